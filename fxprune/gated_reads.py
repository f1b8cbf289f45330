"""Layers that read through gates: y = L(x; W·w) + b, with W·w made again for the backward.

Autograd would keep W·w of every such layer until then, which is as much as the weights themselves.

    ∂x = Lᵀ(∂y; W·w)    ∂W = ∂(W·w)·w    ∂w = Σ ∂(W·w)·W over all that reads a channel
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.nn import functional as F

_CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d)


def read(layer: Any, value: Tensor, gate: Tensor) -> Tensor:
    """Call a linear layer or convolution on a value whose channels a gate multiplies.

    gate: a number a channel of the value, in any shape.
    """
    weights, groups = layer.weight, getattr(layer, "groups", 1)
    if not _keeps_weights(layer, value):
        scaled = scaled_weights(weights, gate, groups)
        if isinstance(layer, nn.Linear):
            return F.linear(value, scaled, layer.bias)
        return layer._conv_forward(value, scaled, layer.bias)
    result: Any
    if isinstance(layer, nn.Linear):
        result = _Linear.apply(value, weights, gate, layer.bias)
    else:
        where = (list(layer.stride), list(layer.padding), list(layer.dilation), groups)
        result = _Convolution.apply(value, weights, gate, layer.bias, *where)
    return result


def scaled_weights(weights: Tensor, gate: Tensor, groups: int = 1) -> Tensor:
    """Multiply each weight of a layer by the gate of the channel it is for."""
    channels = gate.to(weights.dtype).reshape(groups, 1, -1, *(1,) * (weights.dim() - 2))
    if groups == 1:
        return weights * channels[0]
    return (weights.unflatten(0, (groups, -1)) * channels).flatten(0, 1)


def _keeps_weights(layer: Any, value: Tensor) -> bool:
    """Tell whether autograd would keep the product, of a layer whose backward is written here.

    A compiler makes products again by itself, and what traces should see plain operators.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    if torch.jit.is_tracing():  # pyright: ignore[reportPrivateImportUsage]
        return False
    if isinstance(layer, nn.Linear):
        return value.dim() > 1
    plain = layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    return plain and value.dim() == layer.weight.dim()


def _weight_gradients(
    ctx: Any, scaled: Tensor | None, groups: int
) -> tuple[Tensor | None, Tensor | None]:
    """Return ∂W and ∂w from ∂(W·w), as far as anybody needs them."""
    if scaled is None:
        return None, None
    _, weights, gate = ctx.saved_tensors
    scaled = scaled.to(weights.dtype)
    to_weights = scaled_weights(scaled, gate, groups) if ctx.needs_input_grad[1] else None
    if not ctx.needs_input_grad[2]:
        return to_weights, None
    parts = (scaled * weights).unflatten(0, (groups, -1))
    others = [axis for axis in range(parts.dim()) if axis not in (0, 2)]
    return to_weights, parts.sum(others).reshape(gate.shape).to(gate)


class _Linear(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(value: Tensor, weights: Tensor, gate: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(value, scaled_weights(weights, gate), bias)

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:3])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        value, weights, gate = ctx.saved_tensors
        rows, to_value, to_scaled = grad.flatten(0, -2), None, None
        if ctx.needs_input_grad[0]:
            to_value = (grad @ scaled_weights(weights, gate).to(grad.dtype)).to(value.dtype)
        if any(ctx.needs_input_grad[1:3]):
            to_scaled = rows.t() @ value.flatten(0, -2).to(grad.dtype)
        to_bias = rows.sum(0) if ctx.needs_input_grad[3] else None
        return to_value, *_weight_gradients(ctx, to_scaled, 1), to_bias


class _Convolution(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        value: Tensor, weights: Tensor, gate: Tensor, bias: Tensor | None, *where: Any
    ) -> Tensor:
        convolution = _CONVOLUTIONS[weights.dim() - 3]
        return convolution(value, scaled_weights(weights, gate, where[-1]), bias, *where)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:3])
        ctx.where = inputs[4:]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        value, weights, gate = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.where
        scaled = scaled_weights(weights, gate, groups).to(grad.dtype)
        to_value, to_scaled, to_bias = torch.ops.aten.convolution_backward(
            *(grad, value.to(grad.dtype), scaled, [len(weights)], stride, padding, dilation),
            *(False, [0] * len(stride), groups),
            [ctx.needs_input_grad[0], any(ctx.needs_input_grad[1:3]), ctx.needs_input_grad[3]],
        )
        to_value = None if to_value is None else to_value.to(value.dtype)
        found = (to_value, *_weight_gradients(ctx, to_scaled, groups), to_bias)
        return *found, *(None for _ in ctx.where)
