"""Multiply-accumulates, counted while a model runs, where operators mix channels.

The formulas are torch's own but for attention, where those of some versions lack the CPU, or know
of no heads that share keys, and for operators of which it has none: layers that run as one
(recurrent ones, and torch's transformers in evaluation), products with a vector, bilinear ones. Its
`FlopCounterMode` also keeps books by module, which takes as long again as small models do.
"""

from collections.abc import Iterable
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

from fxprune.runtime.dispatch import DispatchMode


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    """Return what attention takes: (batch, heads, positions, features), heads may share keys."""
    return 2 * query[..., 0].numel() * key.shape[-2] * (query.shape[-1] + value.shape[-1])


def _recurrent(input: Tensor, weights: Iterable[Tensor]) -> int:
    """Return what recurrent layers take: every step multiplies by every matrix; biases are none."""
    return 2 * input[..., 0].numel() * sum(one.numel() for one in weights if one.ndim == 2)


def _one_layer(input: Tensor, into: Tensor, on: Tensor, *_: Any, **__: Any) -> int:
    """Return what a layer takes, in one direction."""
    return _recurrent(input, (into, on))


def _all_layers(input: Tensor, weights: Iterable[Tensor], *_: Any, **__: Any) -> int:
    """Return what the layers take, in both directions if there are two."""
    return _recurrent(input, weights)


def _attention_module(*args: Any, **_: Any) -> int:
    """Return what torch's attention module takes; it runs as one operator on itself only."""
    return _fused(args[0], args[3], args[5:9])


def _encoder_layer(*args: Any, **_: Any) -> int:
    """Return what a layer of torch's transformer encoder takes."""
    return _fused(args[0], args[1], args[3:18])


def _fused(sequences: Tensor, width: int, numbers: Iterable[Any]) -> int:
    """Return what linear layers and attention take, of sequences that may be nested."""
    matrices = sum(one.numel() for one in numbers if isinstance(one, Tensor) and one.ndim == 2)
    pairs = sum(len(sequence) ** 2 for sequence in sequences.unbind())
    return 2 * (sequences.numel() // width * matrices + 2 * pairs * width)


def _vector(matrix: Tensor, *_: Any, **__: Any) -> int:
    """Return what a matrix, or a vector, takes that is multiplied by a vector."""
    return 2 * matrix.numel()


def _added_vector(_: Tensor, matrix: Tensor, *__: Any, **___: Any) -> int:
    """Return the same where something is added."""
    return _vector(matrix)


def _summed_products(_: Tensor, left: Tensor, right: Tensor, *__: Any, **___: Any) -> int:
    """Return what products of matrices take that are summed up."""
    return 2 * left.numel() * right.shape[-1]


def _bilinear(*args: Any, **_: Any) -> int:
    """Return what bilinear layers take: the numbers of three tensors, with new axes, multiplied."""
    shapes: list[list[int]] = []
    for tensor, new in zip(args[:3], args[3:6], strict=True):
        shape = list(tensor.shape)
        for axis in new:
            shape.insert(axis, 1)
        shapes.append(shape)
    return 2 * prod(torch.broadcast_shapes(*shapes))


_ATTENTIONS: tuple[Any, ...] = (
    torch.ops.aten._scaled_dot_product_flash_attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu,
    torch.ops.aten._scaled_dot_product_efficient_attention,
    torch.ops.aten._scaled_dot_product_cudnn_attention,
)
_FORMULAS = {
    **flop_registry,
    **dict.fromkeys(_ATTENTIONS, _attention),
    torch.ops.aten.mkldnn_rnn_layer: _one_layer,
    torch.ops.aten._cudnn_rnn: _all_layers,
    torch.ops.aten.miopen_rnn: _all_layers,
    torch.ops.aten._native_multi_head_attention: _attention_module,
    torch.ops.aten._transformer_encoder_layer_fwd: _encoder_layer,
    torch.ops.aten.mv: _vector,
    torch.ops.aten.dot: _vector,
    torch.ops.aten.addmv: _added_vector,
    torch.ops.aten.addbmm: _summed_products,
    torch.ops.aten._trilinear: _bilinear,
}


class MacCounter(DispatchMode):
    """Count what runs while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    @property
    def macs(self) -> int:
        """The multiply-accumulates so far; each is two floating-point operations."""
        return self.flops // 2

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **kwargs or {})
        formula = _FORMULAS.get(getattr(func, "_overloadpacket", func))
        if formula is not None:
            self.flops += formula(*args, **kwargs or {}, out_val=result)
        return result
