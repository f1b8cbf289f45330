"""Assignments to parts of a traced tensor, as operators that make a new one.

    y[:, 6:, 0] = x    →    y = slice_scatter(y, select_scatter(y[:, 6:], x, 2, 0), 1, 6)

A graph has no assignments. What had the name of the old tensor gets that of the new, so that what
is computed is the same wherever no other name that shares its memory is read later, which
`stale_names` sees to.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

_DOTS = type(Ellipsis)
_KINDS = "it assigns at places of several kinds"


class CannotAssign(TypeError):
    """Raised for an assignment that no operator stands for; says why."""


def assigned(tensor: Any, example: Tensor, index: Any, value: Any, examples: Any) -> Any:
    """Return a traced tensor with `value` at `index`.

    example: what the tensor is on the example inputs; examples: tells it of other traced values.
    """
    if tensor.node.op == "get_attr":
        raise CannotAssign("it assigns to a part of what has another name (a view, a buffer)")
    if example.is_complex():
        raise CannotAssign("it assigns to a part of complex numbers")  # no gradients go that way
    entries = list(index) if isinstance(index, tuple) else [index]
    if any(isinstance(entry, (Tensor, fx.Proxy)) for entry in entries):
        while entries and (entries[-1] is Ellipsis or _is_whole(entries[-1])):
            entries.pop()  # positions say nothing of the axes behind theirs
    shown = [examples(entry) if isinstance(entry, fx.Proxy) else entry for entry in entries]
    if any(isinstance(entry, Tensor) for entry in shown):
        return _at_positions(tensor, example, entries, shown, value, examples)
    if any(isinstance(e, bool) or not isinstance(e, (int, slice, _DOTS)) for e in shown):
        raise CannotAssign(_KINDS)
    return _at_places(tensor, example, _axes(entries, example.dim()), value, examples)


def _axes(entries: list[Any], rank: int) -> list[tuple[int, Any]]:
    """Return which axes an index speaks of, with what it says; those taken whole are left out."""
    place = next((place for place, entry in enumerate(entries) if entry is Ellipsis), None)
    if place is not None:
        whole = [slice(None)] * (rank - len(entries) + 1)
        entries = [*entries[:place], *whole, *entries[place + 1 :]]
    return [(axis, entry) for axis, entry in enumerate(entries) if not _is_whole(entry)]


def _is_whole(entry: Any) -> bool:
    return isinstance(entry, slice) and all(
        part is None for part in (entry.start, entry.stop, entry.step)
    )


def _at_places(
    tensor: Any, example: Tensor, axes: Sequence[tuple[int, Any]], value: Any, examples: Any
) -> Any:
    if not axes:
        return _filling(tensor, example, value, examples)
    (axis, entry), *others = axes
    part = tensor[(*[slice(None)] * axis, entry)]
    shown = examples(part)
    if isinstance(entry, slice):
        inner = _at_places(part, shown, others, value, examples)
        step = 1 if entry.step is None else entry.step
        return torch.slice_scatter(tensor, inner, axis, entry.start, entry.stop, step)
    beyond = [(other - 1, e) for other, e in others]  # the axis is gone in what is picked
    inner = _at_places(part, shown, beyond, value, examples)
    return torch.select_scatter(tensor, inner, axis, entry)


def _filling(part: Any, example: Tensor, value: Any, examples: Any) -> Any:
    """Return what fills a part whole: a number, or a tensor that is broadcast to it."""
    given = examples(value) if isinstance(value, fx.Proxy) else value
    if not isinstance(given, Tensor):
        return _full(part, value)
    if given.dtype != example.dtype:
        value = value.type_as(part)
    # A size that depends on data is no number, and compares to none.
    sizes = [*given.shape, *example.shape]
    same = all(type(size) is int for size in sizes) and given.shape == example.shape
    return value if same else value.expand_as(part)


def _at_positions(
    tensor: Any,
    example: Tensor,
    entries: Sequence[Any],
    shown: Sequence[Any],
    value: Any,
    examples: Any,
) -> Any:
    """Assign where a mask is true, or at positions that are tensors."""
    if not all(isinstance(entry, Tensor) for entry in shown):
        raise CannotAssign(_KINDS)
    given = examples(value) if isinstance(value, fx.Proxy) else value
    if isinstance(given, Tensor):
        value = value if given.dtype == example.dtype else value.type_as(tensor)
        return torch.index_put(tensor, tuple(entries), value)
    (first, *others), rank = shown, example.dim()
    if not others and first.dtype == torch.bool and first.dim() == rank:
        return tensor.masked_fill(entries[0], value)
    return torch.index_put(tensor, tuple(entries), _full(tensor[tuple(entries)], value))


def _full(part: Any, number: Any) -> Any:
    """Return a tensor like a part, full of a number, which may be traced."""
    return torch.full_like(part, number)
