"""Layers that read through gates: y = L(x·w; W) = L(x; W·w), whichever product is less work.

A large product is made again for the backward. Autograd would keep it until then, beside x and W;
of one that is small, or much smaller than x, that costs less than the calls to make it.

    of x·w:  ∂x = Lᵀ(∂y; W)·w     ∂W = ∂L(∂y; x·w)      ∂w = Σ Lᵀ(∂y; W)·x
    of W·w:  ∂x = Lᵀ(∂y; W·w)     ∂W = ∂L(∂y; x)·w      ∂w = Σ ∂L(∂y; x)·W

∂w is a sum over all that a channel's gate multiplies.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fxprune.gating.gates import width_gate
from fxprune.runtime.eager import is_eager

LARGE = 2**19  # bytes of a product
MUCH_SMALLER = 4  # times smaller than the value, which is kept in any case
_CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d)


def read(layer: Any, value: Tensor, gate: Tensor) -> Tensor:
    """Call a linear layer or convolution on a value whose channels a gate multiplies.

    gate: a number a channel, in a shape that broadcasts to the value's.
    """
    weights, groups = layer.weight, getattr(layer, "groups", 1)
    in_value = scales_value(layer, value)
    if not _keeps_product(layer, value):
        value, weights = _operands((value, weights, gate), groups, in_value)
        if isinstance(layer, nn.Linear):
            return F.linear(value, weights, layer.bias)
        return layer._conv_forward(value, weights, layer.bias)
    result: Any
    if isinstance(layer, nn.Linear):
        result = _Linear.apply(value, weights, gate, layer.bias, in_value)
    else:
        where = (list(layer.stride), list(layer.padding), list(layer.dilation), groups)
        result = _Convolution.apply(value, weights, gate, layer.bias, in_value, *where)
    return result


def scales_value(layer: Any, value: Tensor) -> bool:
    """Tell whether a layer is given fewer numbers than it has weights."""
    return value.numel() <= layer.weight.numel()


def scaled_weights(weights: Tensor, gate: Tensor, groups: int = 1) -> Tensor:
    """Multiply each weight of a layer by the gate of the channel it is for."""
    return weights * _factors(weights, gate, groups)


def _operands(saved: Sequence[Tensor], groups: int, in_value: bool) -> tuple[Tensor, Tensor]:
    """Return what a layer is called on, and with which weights; saved: value, weights and gate."""
    value, weights, gate = saved
    if in_value:
        return width_gate(value, gate), weights
    return value, scaled_weights(weights, gate, groups)


def _keeps_product(layer: Any, value: Tensor) -> bool:
    """Tell whether autograd would keep a large product, of a layer whose backward is written here.

    A compiler makes products again by itself.
    """
    if not torch.is_grad_enabled() or not is_eager():
        return False
    product = value if scales_value(layer, value) else layer.weight
    size = product.numel()
    if size * product.element_size() < LARGE or size * MUCH_SMALLER < value.numel():
        return False
    if isinstance(layer, nn.Linear):
        return value.dim() > 1
    plain = layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    return plain and value.dim() == layer.weight.dim()


class _Read(torch.autograd.Function):
    """What both kinds of layers have in common.

    Their forward takes a context: what torch does for those without takes as long as the gates.
    """

    @staticmethod
    def keep(ctx: Any, saved: Sequence[Tensor], in_value: bool, where: Sequence[Any]) -> None:
        """Note what the backward needs."""
        ctx.save_for_backward(*saved)
        ctx.in_value, ctx.where = in_value, where

    @staticmethod
    def needed(ctx: Any) -> list[bool]:
        """Tell whether ∂ of the value, the weights and the bias that the layer sees are needed."""
        value, weights, gate, bias, *_ = ctx.needs_input_grad
        return [value or (gate and ctx.in_value), weights or (gate and not ctx.in_value), bias]

    @staticmethod
    def shared(
        ctx: Any, saved: Sequence[Tensor], groups: int, seen: Sequence[Tensor | None]
    ) -> tuple[Tensor | None, ...]:
        """Return ∂x, ∂W, ∂w and ∂b from ∂ of what the layer saw: its value, its weights, its bias.

        saved: asked for once, as checkpointed activations are there but once.
        """
        value, weights, gate = saved
        to_value, to_weights, to_bias = seen
        to_gate, wanted = None, ctx.needs_input_grad[2]
        if to_value is not None:
            to_value = to_value.to(value.dtype)
        if to_weights is not None:
            to_weights = to_weights.to(weights.dtype)
        if ctx.in_value and to_value is not None:
            to_gate = (to_value * value).sum_to_size(gate.shape) if wanted else None
            to_value = _times_(to_value, gate.to(value.dtype))
        elif not ctx.in_value and to_weights is not None:
            to_gate = _summed(to_weights * weights, gate, groups) if wanted else None
            to_weights = _times_(to_weights, _factors(weights, gate, groups))
        to_gate = None if to_gate is None else to_gate.to(gate.dtype)
        return to_value, to_weights, to_gate, to_bias


def _factors(weights: Tensor, gate: Tensor, groups: int) -> Tensor:
    """Return what each weight is multiplied by, in a shape that broadcasts to the weights'."""
    factors = gate.to(weights.dtype).reshape(groups, 1, -1)
    if groups > 1:
        factors = factors.expand(-1, weights.shape[0] // groups, -1)
    return factors.reshape(-1, weights.shape[1], *(1,) * (weights.dim() - 2))


def _times_(gradient: Tensor, factors: Tensor) -> Tensor:
    """Multiply a gradient that was just made; a second backward needs it as it was."""
    return gradient * factors if torch.is_grad_enabled() else gradient.mul_(factors)


def _summed(weights: Tensor, gate: Tensor, groups: int) -> Tensor:
    """Sum numbers of the shape of weights over all that read a channel."""
    parts = weights.unflatten(0, (groups, -1))
    others = [axis for axis in range(parts.dim()) if axis not in (0, 2)]
    return parts.sum(others).reshape(gate.shape)


class _Linear(_Read):
    @staticmethod
    def forward(
        ctx: Any, value: Tensor, weights: Tensor, gate: Tensor, bias: Tensor | None, in_value: bool
    ) -> Tensor:
        _Read.keep(ctx, (value, weights, gate), in_value, ())
        return F.linear(*_operands((value, weights, gate), 1, in_value), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        needed = _Read.needed(ctx)
        saved = ctx.saved_tensors
        value, weights = _operands(saved, 1, ctx.in_value)
        value, weights = value.to(grad.dtype), weights.to(grad.dtype)
        rows = grad.flatten(0, -2)
        seen = (
            grad @ weights if needed[0] else None,
            rows.t() @ value.flatten(0, -2) if needed[1] else None,
            rows.sum(0) if needed[2] else None,
        )
        return *_Read.shared(ctx, saved, 1, seen), None


class _Convolution(_Read):
    @staticmethod
    def forward(
        ctx: Any,
        value: Tensor,
        weights: Tensor,
        gate: Tensor,
        bias: Tensor | None,
        in_value: bool,
        *where: Any,
    ) -> Tensor:
        _Read.keep(ctx, (value, weights, gate), in_value, where)
        convolution = _CONVOLUTIONS[weights.dim() - 3]
        return convolution(*_operands((value, weights, gate), where[-1], in_value), bias, *where)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        stride, padding, dilation, groups = ctx.where
        saved = ctx.saved_tensors
        value, weights = _operands(saved, groups, ctx.in_value)
        value, weights = value.to(grad.dtype), weights.to(grad.dtype)
        seen = torch.ops.aten.convolution_backward(
            *(grad, value, weights, [len(weights)], stride, padding, dilation),
            *(False, [0] * len(stride), groups, _Read.needed(ctx)),
        )
        return *_Read.shared(ctx, saved, groups, seen), None, None, None, None, None
