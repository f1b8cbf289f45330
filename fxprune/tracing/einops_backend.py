"""What lets einops rearrange values that are being traced, where a model uses it.

einops asks the backends it has loaded, one by one, whether a tensor is theirs; torch's would take a
traced value for a tensor. What ours calls are torch's own views and permutations, which a graph has
names for.
"""

import sys
from importlib import import_module
from typing import Any

from torch import fx

_NAME = "torch.fx"


def teach_einops() -> None:
    """Give einops, if somebody imported it, a backend for traced values; once."""
    if "einops" not in sys.modules:
        return
    try:
        backends: Any = import_module("einops._backends")
        loaded: dict[str, Any] = backends._loaded_backends
        if _NAME in loaded:
            return
        first = {_NAME: _backend(backends.TorchBackend)(), **loaded}
    except (ImportError, AttributeError):  # another einops: what uses it is kept whole
        return
    loaded.clear()
    loaded.update(first)


def _backend(base: Any) -> type:
    class TracedBackend(base):
        """Torch's backend, for traced values."""

        framework_name = _NAME

        def is_appropriate_type(self, tensor: Any) -> bool:
            return issubclass(type(tensor), fx.Proxy)

        def shape(self, x: Any) -> list[Any]:
            # No tuple: einops remembers what it made of those, and traced sizes are of one trace.
            return [x.shape[axis] for axis in range(len(x.shape))]

        def is_float_type(self, x: Any) -> bool:
            return True

    return TracedBackend
