"""Operators that put, or add, what they are given at positions an index says.

Where channels lie along the axis an index speaks of, it would say which channel: those stay. Beside
it (nodes of a graph, tokens) each channel is worked on by itself, with an index that may be
computed.
"""

import torch
from torch import Tensor

from fxprune.dataflow.rules import Call, Flow, OpRule, register
from fxprune.dataflow.tags import varying_axes
from fxprune.dataflow.values import Barrier, Value, as_value, unknown


def rows_flow(call: Call) -> Flow:
    """Add, or put, rows that have the same channels at other positions of an axis beside them."""
    value, source = call.value(), call.value(3, "source")
    _require_beside(call, value, source)
    across = {*varying_axes(value.tags)} ^ {*varying_axes(source.tags)}
    if across and value.tags.numel() > 1 < source.tags.numel():
        raise Barrier("its operands have their channels along different axes")
    lead = max(value.tags, source.tags, key=Tensor.numel)
    ties = [(value.tags, lead), (source.tags, lead)]
    flow = Flow(call.output(lead, _zeros(lead, value, source)), ties=ties)
    flow.keeps.append((call.value(2, "index").tags, "it is an index"))
    return flow


def elements_flow(call: Call) -> Flow:
    """Add, or put, elements: an index has a position for each, so that its channels go, too."""
    value, index, source = call.value(), call.value(2, "index"), as_value(call.argument(3, "src"))
    given = [source] if isinstance(source, Value) else []
    operands = [value, index, *given]
    _require_beside(call, *operands)
    lead = max((operand.tags for operand in operands), key=Tensor.numel)
    for operand in operands:
        if varying_axes(operand.tags) != varying_axes(lead):
            raise Barrier("its operands do not have the same channels")
        if any(operand.shape[axis] != value.shape[axis] for axis in varying_axes(lead)):
            raise Barrier("it leaves some of the channels out")
    constants = _zeros(lead, value, *given) if given else unknown(lead)
    return Flow(call.output(lead, constants), ties=[(one.tags, lead) for one in operands])


def _require_beside(call: Call, *operands: Value) -> None:
    """Raise `Barrier` if channels lie along the axis that an index speaks of."""
    axis = int(call.argument(1, "dim")) % max(len(operands[0].shape), 1)
    if any(axis in varying_axes(operand.tags) for operand in operands):
        raise Barrier("it works along the channels")


def _zeros(lead: Tensor, value: Value, source: Value) -> Tensor:
    """Return the constants there are: of zeros, put among zeros, come zeros."""
    zero = (value.constants == 0) & (source.constants == 0)
    return torch.where(zero, 0.0, torch.nan).double().expand(lead.shape)


register(
    OpRule("scattered", rows_flow),
    *(torch.index_add, "index_add", "index_add_", torch.index_copy, "index_copy", "index_copy_"),
    *(torch.index_reduce, "index_reduce", "index_reduce_"),
)
register(
    OpRule("scattered_elements", elements_flow),
    *(torch.scatter, "scatter", "scatter_", torch.scatter_add, "scatter_add", "scatter_add_"),
    *(torch.scatter_reduce, "scatter_reduce", "scatter_reduce_"),
)
