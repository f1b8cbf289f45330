"""What lets einops rearrange values that are being traced, where a model uses it.

einops asks every backend it knows whether a tensor is its own; a traced value is nobody's. What it
then calls are torch's own views and permutations, which a graph has names for.
"""

import sys
from importlib import import_module
from typing import Any

from torch import fx

_NAME = "torch.fx"
# A class knows its subclasses for as long as somebody else holds them.
_held: list[type] = []


def teach_einops() -> None:
    """Give einops, if somebody imported it, a backend for traced values; once."""
    if "einops" not in sys.modules or _held:
        return
    try:
        base: Any = import_module("einops._backends").TorchBackend
    except (ImportError, AttributeError):  # another einops: what uses it is kept whole
        return
    _held.append(_backend(base))


def _backend(base: Any) -> type:
    class TracedBackend(base):
        """Torch's backend, for traced values: einops finds it among the subclasses of its own."""

        framework_name = _NAME

        def is_appropriate_type(self, tensor: Any) -> bool:
            return isinstance(tensor, fx.Proxy)

        def shape(self, x: Any) -> list[Any]:
            # No tuple: einops remembers what it made of those, and traced sizes are of one trace.
            return [x.shape[axis] for axis in range(len(x.shape))]

        def is_float_type(self, x: Any) -> bool:
            return True

    return TracedBackend
