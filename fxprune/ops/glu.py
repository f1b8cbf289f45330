"""Gated linear units: GLU(a, b) = a·σ(b), with a and b the halves of a tensor (Dauphin 2017).

Channel i of either half stands and falls with channel i of the other.
"""

import torch
import torch.nn.functional as F
from torch import nn

from fxprune.dataflow.rules import Call, Flow, OpRule, register
from fxprune.dataflow.tags import varying_axes
from fxprune.dataflow.values import Barrier


def glu_flow(call: Call) -> Flow:
    """Tie the halves; the output carries the channels of the first."""
    value = call.value()
    dim = call.module.dim if isinstance(call.module, nn.GLU) else int(call.argument(1, "dim", -1))
    axis = dim % len(value.shape)
    if varying_axes(value.tags) not in ([], [axis]):
        raise Barrier("it halves another axis than that of the channels")
    along = value.along(axis)
    first, second = along.tags.chunk(2)
    gated, gate = along.constants.chunk(2)
    constants = torch.where(gated == 0, 0.0, gated * torch.sigmoid(gate))
    shape = [1] * len(value.shape)
    shape[axis] = -1
    output = call.output(first.reshape(shape), constants.reshape(shape))
    return Flow(output, ties=[(first, second)])


register(OpRule("glu", glu_flow), nn.GLU, F.glu)
