"""Triangles of matrices: zeros on one side of the diagonal of the last two axes.

What is 0 depends on where an element stands, so channels along these axes stay.
"""

import torch

from fxprune.dataflow.rules import Call, Flow, OpRule, register
from fxprune.dataflow.tags import varying_axes
from fxprune.dataflow.values import Barrier


def triangle_flow(call: Call) -> Flow:
    """Pass channels along other axes on; only 0 is the same on both sides of the diagonal."""
    value = call.value()
    if any(axis >= len(value.shape) - 2 for axis in varying_axes(value.tags)):
        raise Barrier("it keeps a triangle of its channels, by where they stand")
    constants = torch.where(value.constants == 0, value.constants, torch.nan)
    return Flow(call.output(value.tags, constants))


register(
    OpRule("triangle", triangle_flow), torch.tril, torch.triu, "tril", "triu", "tril_", "triu_"
)
