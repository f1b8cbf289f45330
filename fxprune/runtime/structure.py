"""What a module is, apart from the state it is in.

Tensors of that kind, as indices, follow the module from device to device but are no buffers:
averaging models would blend them, loading a state would ask for them, and data parallelism would
send them round in every step. Values of that kind never change, so that copies share them.
"""

from collections.abc import Callable
from typing import Any, Self

from torch import Tensor, nn


class Unchanging:
    """A value that a deep copy of what holds it shares: there may be thousands in a model."""

    def __deepcopy__(self, memo: Any) -> Self:
        """Return itself: nobody writes to it."""
        return self


class Structured(nn.Module):
    """A module that holds such tensors: `hold` one and it is an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self._held: set[str] = set()

    def hold(self, name: str, tensor: Tensor) -> None:
        """Make a tensor an attribute of this name."""
        self._held.add(name)
        setattr(self, name, tensor)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        for name in self._held:
            setattr(self, name, fn(getattr(self, name)))
        return self
