"""Concatenation: the parts' channels, one after the other. A part of which nothing remains goes.

It moves data like any other movement, but over maps that need not be blown up to be moved. What is
put in a row beside the channels (a class token in front of others) has the same channels.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fxprune.dataflow.cuts import Arguments, Cut
from fxprune.dataflow.rules import Call, Flow, OpRule, register
from fxprune.dataflow.tags import align, compress
from fxprune.dataflow.values import Barrier, Value, as_value


def concatenation_flow(call: Call) -> Flow:
    """Put tags and constants of the parts one after the other."""
    parts, rank = _parts(call), len(call.tensor_spec().shape)
    if any(len(part.shape) != rank for part in parts):
        raise Barrier("its parts have different numbers of axes")
    dim: Any = call.argument(1, "dim", call.kwargs.get("axis", 0))
    if not isinstance(dim, int):
        raise Barrier("the axis it works on is computed")
    axis = dim % rank
    first, *others = parts
    if _lie_beside(parts, axis):
        joined = _joined(parts, [part.constants for part in parts], axis)
        ties = [(first.tags, other.tags) for other in others]
        return Flow(call.output(first.tags, align(joined, first.tags)), ties=ties)
    tags = compress(_joined(parts, [part.tags for part in parts], axis))
    constants = align(_joined(parts, [part.constants for part in parts], axis), tags)
    return Flow(call.output(tags, constants))


def rewrite_concatenation(call: Call, cut: Cut) -> Arguments | None:
    """Leave out the parts of which nothing remains; the others, being boxes, still fit."""
    args, kwargs = list(call.node.args), dict(call.node.kwargs)
    nodes: Any = args[0] if args else kwargs["tensors"]
    if not isinstance(nodes, (list, tuple)):  # what one operator returned, all of which stays
        for part in _parts(call):
            cut.indices(part)
        return None
    stay = [node for node in nodes if node not in cut.gone]
    for part, node in zip(_parts(call), nodes, strict=True):
        if node not in cut.gone:
            cut.indices(part)
    if len(stay) == len(nodes):
        return None
    if args:
        args[0] = stay
    else:
        kwargs["tensors"] = stay
    return Arguments(tuple(args), kwargs)


def _lie_beside(parts: Sequence[Value], axis: int) -> bool:
    """Tell whether parts have the same channels beside an axis: tokens, or images, in a row."""
    shapes = {part.tags.shape for part in parts}
    return len(shapes) == 1 and parts[0].tags.shape[axis] == 1 and parts[0].tags.numel() > 1


def _parts(call: Call) -> list[Value]:
    given: Any = call.argument(0, "tensors")
    parts = [as_value(part) for part in given] if isinstance(given, (list, tuple)) else []
    if not parts or not all(isinstance(part, Value) for part in parts):
        raise Barrier("its parts are not a list of tensors")
    return parts


def _joined(parts: Sequence[Value], tensors: Sequence[Tensor], axis: int) -> Tensor:
    """Concatenate, blown up only along axes on which any of them varies."""
    sizes = [max(tensor.shape[a] for tensor in tensors) for a in range(tensors[0].dim())]
    return torch.cat(
        [
            tensor.expand(*sizes[:axis], part.shape[axis], *sizes[axis + 1 :])
            for part, tensor in zip(parts, tensors, strict=True)
        ],
        axis,
    )


register(
    OpRule("concatenation", concatenation_flow, rewrite=rewrite_concatenation),
    *dict.fromkeys((torch.cat, torch.concat, torch.concatenate)),
)
