"""Bilinear layers: y_o = Σ_ij W_oij·a_i·b_j + bias_o.

Output o reads a_i where some W_oi· is not 0, and b_j likewise. A channel that is 0 adds nothing and
may go; any other constant would have to change the weights of the other input, and stays.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxprune.dataflow.rules import Call, Flow, OpRule, Read, register
from fxprune.ops.mixing import weight_and_bias


def bilinear_flow(call: Call) -> Flow:
    """Give out new channels that read both inputs."""
    first, second = call.value(0, "input1"), call.value(1, "input2")
    weight, bias = weight_and_bias(call, 2)
    left, right = first.along(-1), second.along(-1)
    outputs = weight.axis(0)
    reason = "it multiplies it with another input"
    pattern = None if call.generic else weight.tensor.detach().cpu() != 0
    ties = [(weight.axis(1), left.tags), (weight.axis(2), right.tags), *left.ties, *right.ties]
    if bias is not None:
        ties.append((bias.axis(0), outputs))
    reads = [
        Read(outputs, inputs.tags, _over(pattern, axis), inputs.constants == 0, reason)
        for inputs, axis in ((left, 2), (right, 1))
    ]
    constants = torch.full((len(outputs),), torch.nan, dtype=torch.float64)
    if pattern is not None:
        products = (left.constants != 0).unsqueeze(1) & (right.constants != 0)
        shift = torch.zeros(len(outputs)) if bias is None else bias.known()
        constants = torch.where((pattern & products).any(2).any(1), torch.nan, shift.double())
    shape = [1] * (len(call.tensor_spec().shape) - 1) + [-1]
    output = call.output(outputs.reshape(shape), constants.reshape(shape))
    return Flow(output, ties=ties, reads=reads)


def resize_bilinear(call: Call) -> None:
    """Tell the module how many channels it has left on all sides."""
    module: Any = call.module
    if module is not None:
        module.out_features, module.in1_features, module.in2_features = module.weight.shape


def _over(pattern: Tensor | None, axis: int) -> Tensor | None:
    return None if pattern is None else pattern.any(axis)


register(OpRule("bilinear", bilinear_flow, resize=resize_bilinear), nn.Bilinear, F.bilinear)
