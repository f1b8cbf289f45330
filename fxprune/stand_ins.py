"""Classes that pass for another while a model is traced.

And after: who was imported meanwhile may have kept one.
"""

from typing import Any


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
