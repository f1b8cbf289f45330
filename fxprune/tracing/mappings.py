"""Dicts of classes of their own (OrderedDict, a ModelOutput): a graph makes them by their class."""

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from torch.fx.immutable_collections import immutable_dict

from fxprune.errors import TraceError

# What a user reads no other way than a dict.
_PLAIN = (dict, immutable_dict, defaultdict, Counter)


def arguments_of(mapping: dict[Any, Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Return what its class makes a mapping of; None for what a dict may stand for.

    Raises `TraceError` for what the entries alone do not make.
    """
    kind = type(mapping)
    if is_dataclass(mapping):
        entries = {field.name: getattr(mapping, field.name) for field in fields(mapping)}
        if not entries.keys() >= mapping.keys():
            raise TraceError(f"a {kind.__name__} has entries besides its fields")
        return (), entries
    if kind in _PLAIN:
        return None
    try:
        again: Any = kind(dict(mapping))
    except Exception as error:
        raise TraceError(_remedy(kind)) from error
    if not _alike(mapping, again):
        raise TraceError(_remedy(kind))
    return (dict(mapping),), {}


def _alike(one: Any, other: Any) -> bool:
    """Tell whether two values are one, or containers of the same."""
    if type(one) is not type(other):
        return False
    if isinstance(one, Mapping):
        return (
            list(one) == list(other)
            and all(_alike(one[key], other[key]) for key in one)
            and _alike(getattr(one, "__dict__", None), getattr(other, "__dict__", None))
        )
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(_alike, one, other))
    return one is other


def _remedy(kind: type) -> str:
    return f"a {kind.__name__} is not made of its entries alone, as a dict is; return a dict"
