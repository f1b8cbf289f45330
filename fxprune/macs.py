"""Multiply-accumulates, counted while a model runs, where operators mix channels.

The formulas are torch's own, of which some versions lack that of attention on a CPU. Its
`FlopCounterMode` also keeps books by module, which takes as long again as small models do.
"""

from typing import Any

import torch
from torch.utils.flop_counter import flop_registry

from fxprune.dispatch import DispatchMode

_SDPA: Any = torch.ops.aten._scaled_dot_product_flash_attention
_SDPA_ON_CPU: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_FORMULAS = {_SDPA_ON_CPU: flop_registry[_SDPA], **flop_registry}


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
