"""What stands in for names of torch's and of the user's modules while a model is traced.

And after: who was called meanwhile may have kept one. So a class that stands for another passes for
it, and is equal to it.
"""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from torch import fx

# torch.fx's own, which has to go first and come back last.
from torch.fx._symbolic_trace import (
    _maybe_revert_all_patches,  # pyright: ignore[reportPrivateUsage]
)
from torch.utils import _pytree as pytree

_NOTHING: Any = object()
# Whose name, which, and what it was before.
_standing: list[tuple[Any, str, Any]] = []


@contextmanager
def standing_in(*names: tuple[Any, str, Any]) -> Generator[None]:
    """Let names of modules and classes be something else; of each whose it is, which, and what."""
    mark = len(_standing)
    try:
        for owner, name, value in names:
            _standing.append((owner, name, vars(owner).get(name, _NOTHING)))
            setattr(owner, name, value)
        yield
    finally:
        # Backwards, as a module may stand under two names.
        for owner, name, before in reversed(_standing[mark:]):
            _set(owner, name, before)
        del _standing[mark:]


@contextmanager
def all_aside() -> Generator[None]:
    """Let all names be what they are while no model is traced, torch.fx's stand-ins included."""
    ours = [(owner, name, vars(owner).get(name, _NOTHING)) for owner, name, _ in _standing]
    with _maybe_revert_all_patches():
        for owner, name, before in reversed(_standing):
            _set(owner, name, before)
        try:
            yield
        finally:
            for owner, name, value in ours:
                _set(owner, name, value)


def _set(owner: Any, name: str, value: Any) -> None:
    if value is not _NOTHING:
        setattr(owner, name, value)
    elif name in vars(owner):  # or a class above has it, or Python itself
        delattr(owner, name)


def is_given_traced(args: Any, kwargs: Any) -> bool:
    """Tell whether a call, of what stands in perhaps, is given traced values."""
    return any(isinstance(leaf, fx.Proxy) for leaf in pytree.tree_leaves((args, kwargs)))


class StandIn(type):
    """A class whose instances are those of `kind`, and which is equal to it."""

    kind: type

    def __instancecheck__(cls, instance: Any) -> bool:
        """Ask for instances of what it stands for."""
        return isinstance(instance, cls.kind)

    def __subclasscheck__(cls, subclass: type) -> bool:
        """Ask for subclasses of what it stands for."""
        return issubclass(subclass, cls.kind)

    def __eq__(cls, other: object) -> bool:
        """Be found where what it stands for is."""
        return other is cls.kind or other is cls

    def __hash__(cls) -> int:
        """Be found where what it stands for is."""
        return hash(cls.kind)
