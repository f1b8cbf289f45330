"""Tensors made in the likeness of another: its channels, and the same number in all of them.

Of the other they take size and type, never what is in it. One that is made of sizes has the
channels of the tensor whose size was asked: the state a recurrence begins with is made so.
"""

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from fxprune.dataflow.cuts import Arguments, Cut
from fxprune.dataflow.rules import FILLED, Call, Flow, OpRule, register
from fxprune.dataflow.tags import varying_axes
from fxprune.dataflow.values import ShapeOf, SizeOf, State, Value, as_value, fixed
from fxprune.ops.rewriting import refuse_blocks, with_sizes

# What makes a tensor of sizes.
FILLERS = (
    *(torch.zeros, torch.ones, torch.full, torch.empty),
    *("new_zeros", "new_ones", "new_full", "new_empty"),
)


def like_flow(call: Call) -> Flow:
    """Give the channels of the tensor it is like, filled with what the operator fills them with."""
    value = as_value(call.argument(0, "input"))
    filled: Tensor = call.execute(_small)
    constants = filled.detach().cpu().double().reshape(-1)[0].expand(value.tags.shape)
    return Flow(call.output(value.tags, constants))


def unfilled_flow(call: Call) -> Flow:
    """Give the channels of the tensor it is like, filled with nobody knows what."""
    return Flow(call.output(as_value(call.argument(0, "input")).tags))


def filled_flow(call: Call) -> Flow:
    """Give the channels of the tensor whose size was taken; without one nothing can go."""
    spec = call.tensor_spec()
    sizes = _sizes(call)
    lines = {
        axis: size.value.along(size.axis)
        for axis, size in enumerate(sizes)
        if isinstance(size, SizeOf) and size.axis in varying_axes(size.value.tags)
    }
    if not lines:
        return Flow(fixed(spec))
    chosen = max(lines, key=lambda axis: len(lines[axis].tags))
    line = lines.pop(chosen)
    keeps = [(other.tags, "a tensor of its size is made") for other in lines.values()]
    tags = line.tags.reshape([-1 if axis == chosen else 1 for axis in range(len(spec.shape))])
    constants = torch.full(tags.shape, _filling(call), dtype=torch.float64)
    return Flow(call.output(tags, constants), ties=line.ties, keeps=keeps)


def rewrite_filled(call: Call, cut: Cut) -> Arguments | None:
    """Make it as large as what remains of the tensor whose size was taken."""
    output: Value = filled_flow(call).outputs
    found = cut.indices(output)
    if found is None:
        return None
    if any(isinstance(given, ShapeOf) for given in (*call.args, *call.kwargs.values())):
        return None  # the shape it is given is that of what remains
    refuse_blocks(output, found[0])
    args, kwargs = with_sizes(call, _place(call), output.shape, cut.shape(output))
    return Arguments(tuple(args), kwargs)


def _place(call: Call) -> int:
    return 1 if isinstance(call.node.target, str) else 0


def _sizes(call: Call) -> Sequence[Any]:
    """Return the sizes a tensor is made of."""
    place = _place(call)
    given: Any = call.kwargs.get("size", call.args[place] if len(call.args) > place else ())
    if isinstance(given, ShapeOf):
        return [given.size(axis) for axis in range(len(given))]
    if isinstance(given, (tuple, list)):
        return cast(Sequence[Any], given)
    return call.args[place:]


def _filling(call: Call) -> float:
    """Return the number a tensor is filled with; NaN if it is computed."""
    name = str(getattr(call.node.target, "__name__", call.node.target)).removeprefix("new_")
    if name == "empty":
        return math.nan
    if name != "full":
        return float(name == "ones")
    number = call.argument(_place(call) + 1, "fill_value")
    return float(number) if isinstance(number, (int, float)) else math.nan


def _small(argument: Value | State) -> Tensor:
    value: Value = as_value(argument)
    return torch.zeros((1,) * len(value.shape), dtype=value.dtype)


register(
    OpRule("filled_like", like_flow),
    *(torch.zeros_like, torch.ones_like, torch.full_like),
)
register(
    OpRule("made_like", unfilled_flow),
    torch.empty_like,
)
register(
    OpRule(FILLED, filled_flow, rewrite=rewrite_filled),
    *FILLERS,
)
