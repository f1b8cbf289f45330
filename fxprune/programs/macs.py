"""Multiply-accumulates, counted while a model runs, where operators mix channels.

The formulas are torch's own but for attention, where those of some versions lack the CPU, or know
of no heads that share keys, and for recurrent layers that run as one operator, of which it has
none. Its `FlopCounterMode` also keeps books by module, which takes as long
again as small models do.
"""

from collections.abc import Iterable
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
