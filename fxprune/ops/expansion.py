"""Operators that repeat a tensor until it is as large as another, or as its sizes say.

    index.view(-1, 1).expand_as(messages)        weight.expand(-1, x.shape[1])

Along an axis where it has one entry it gets the channels of what it is as large as, equal in all of
them, and has fewer when those have. Elsewhere it is moved as it is.
"""

from collections.abc import Mapping
from typing import Any

import torch

from fxprune.dataflow.cuts import Arguments, Cut
from fxprune.dataflow.rules import Call, Flow, OpRule, register
from fxprune.dataflow.tags import varying_axes
from fxprune.dataflow.values import Along, ShapeOf, SizeOf, Value
from fxprune.ops.execution import movement_flow
from fxprune.ops.movement import like_flow
from fxprune.ops.rewriting import refuse_blocks, rewrite_nothing, rewrite_sizes, with_sizes


def expanded_flow(call: Call) -> Flow:
    """Give an axis of one entry the channels whose size is asked for; move all else."""
    lines = _lines_of_sizes(call)
    if not lines:
        return movement_flow(call)
    if _takes_channels(call, lines):
        return _flow_along(call, lines)
    keeps = [(line.tags, "a tensor is expanded to its size") for line in lines.values()]
    flow = movement_flow(call)
    flow.keeps += keeps
    return flow


def rewrite_expanded(call: Call, cut: Cut) -> Arguments | None:
    """Expand to as many channels as remain."""
    if not _takes_channels(call, _lines_of_sizes(call)):
        return rewrite_sizes(call, cut)
    output: Value = expanded_flow(call).outputs
    found = cut.indices(output)
    if found is None:
        return None
    refuse_blocks(output, found[0])
    args, kwargs = with_sizes(call, 1, output.shape, cut.shape(output))
    return Arguments(tuple(args), kwargs)


def expanded_as_flow(call: Call) -> Flow:
    """Give an axis of one entry the channels of the other tensor; of others' it keeps all."""
    lines = _lines_of_other(call)
    return _flow_along(call, lines) if _takes_channels(call, lines) else like_flow(call)


def rewrite_expanded_as(call: Call, cut: Cut) -> Arguments | None:
    """Let it follow the other tensor."""
    return None if _takes_channels(call, _lines_of_other(call)) else rewrite_nothing(call, cut)


def _takes_channels(call: Call, lines: Mapping[int, Along]) -> bool:
    """Tell whether channels of one axis are taken, by a tensor that has none of its own."""
    return len(lines) == 1 and not varying_axes(call.value().tags)


def _flow_along(call: Call, lines: Mapping[int, Along]) -> Flow:
    value = call.value()
    ((axis, line),) = lines.items()
    shape = [1] * len(call.tensor_spec().shape)
    shape[axis] = -1
    tags = line.tags.reshape(shape)
    constants = value.constants.reshape(-1)[0].expand(tags.shape)
    kept = [(value.tags, "it is expanded")]  # the one entry there is
    return Flow(call.output(tags, constants), ties=line.ties, keeps=kept)


def _lines_of_sizes(call: Call) -> dict[int, Along]:
    """Return, by axis of the output, the channels as many of which are asked for."""
    given: Any = call.args[1:] or tuple(call.kwargs.values())
    sizes: Any = given[0] if len(given) == 1 and isinstance(given[0], (tuple, list)) else given
    if isinstance(sizes, ShapeOf):
        sizes = [sizes.size(axis) for axis in range(len(sizes))]
    asked = {axis: size for axis, size in enumerate(sizes) if isinstance(size, SizeOf)}
    return _lines(call, {axis: (size.value, size.axis) for axis, size in asked.items()})


def _lines_of_other(call: Call) -> dict[int, Along]:
    other = call.value(1, "other")
    return _lines(call, {axis: (other, axis) for axis in range(len(other.shape))})


def _lines(call: Call, sources: Mapping[int, tuple[Value, int]]) -> dict[int, Along]:
    """Return the channels of tensors along an axis where this one has one entry, by that axis."""
    value = call.value()
    new = len(call.tensor_spec().shape) - len(value.shape)
    return {
        axis: other.along(place)
        for axis, (other, place) in sources.items()
        if (axis < new or value.shape[axis - new] == 1) and place in varying_axes(other.tags)
    }


register(
    OpRule("expanded", expanded_flow, rewrite=rewrite_expanded),
    *(torch.broadcast_to, "expand", "broadcast_to"),
)
register(OpRule("expanded_as", expanded_as_flow, rewrite=rewrite_expanded_as), "expand_as")
