"""Names of a tensor that are read after the forward wrote into it by another of them.

    part = y[:, :2]        y[y > 50] = 0        return head(y) + other(part)

A trace writes out of place, and only the name that was written by goes on with what is new. All
others would read what was there before, which no example tells where a mask is never true on it.
So they are looked for, by the memory that names share on the example inputs.
"""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, fx

from fxprune.runtime.kinds import asks_form
from fxprune.runtime.storages import share_memory, storage_of


@dataclass(frozen=True)
class Write:
    """A write that was traced out of place.

    old, new: what the name stood for before and after. last: the last node there was then. index:
    where it wrote, None for everywhere or who knows.
    """

    old: fx.Node
    new: fx.Node
    last: fx.Node
    index: Any = None


def plain_index(index: Any) -> Any:
    """Return an index if it is made of numbers and slices alone, else None."""
    entries = index if isinstance(index, tuple) else (index,)
    return index if all(_is_plain(entry) for entry in entries) else None


def stale_read(
    graph: fx.Graph, writes: Sequence[Write], tensor_of: Callable[[fx.Node], Tensor | None]
) -> fx.Node | None:
    """Return a node that reads by another name what was written into before it; None if none does.

    tensor_of: what a node is on the example inputs, if that is known, and a tensor.
    """
    there = [one for one in writes if not any(n._erased for n in (one.old, one.new, one.last))]
    late = _read_after(graph, there)
    if not late:  # what is overwritten is as a rule not read again; values take long to get
        return None
    before: dict[int, list[Tensor]] = {}  # by memory, the tensors that a name stood for so far
    for place, write in enumerate(there):
        old, new = tensor_of(write.old), tensor_of(write.new)
        if old is None or new is None:
            continue
        names = [*before.get(storage_of(old), []), old]
        before[storage_of(new)] = names
        for node, reader in late.get(place, {}).items():
            tensor = tensor_of(node)
            if tensor is not None and any(_shows(tensor, name, write.index) for name in names):
                return reader
    return None


def _read_after(graph: fx.Graph, writes: Sequence[Write]) -> dict[int, dict[fx.Node, fx.Node]]:
    """Return, by the place of a write, the nodes of before it that are read after it, and by whom.

    Whom of them is first. Only nodes behind the first write are gone through.
    """
    if not writes:
        return {}
    behind = [*takewhile(lambda node: node is not writes[0].last, reversed(graph.nodes))][::-1]
    order = {node: place for place, node in enumerate(behind)}
    places = [order.get(write.last, -1) for write in writes]
    late: dict[int, dict[fx.Node, fx.Node]] = {}
    for reader in behind:
        if asks_form(reader):
            continue
        for node in reader.all_input_nodes:
            first = bisect_left(places, order.get(node, -1))
            for place in range(first, bisect_left(places, order[reader])):
                if node is not writes[place].new:
                    late.setdefault(place, {}).setdefault(node, reader)
    return late


def _shows(tensor: Tensor, name: Tensor, index: Any) -> bool:
    """Tell whether a tensor has any of what is written at an index of another."""
    if not share_memory(tensor, name):
        return False
    if index is None:
        return True
    try:
        size = 1 + max(map(_end, (tensor, name)))
        written = torch.zeros(size, dtype=torch.bool, device="cpu")
        _laid_out(written, name)[index] = True
        return bool(_laid_out(written, tensor).any())
    except (RuntimeError, TypeError):  # sizes that depend on data, elements that lie on others
        return True


def _laid_out(memory: Tensor, tensor: Tensor) -> Tensor:
    return memory.as_strided(tensor.size(), tensor.stride(), tensor.storage_offset())


def _end(tensor: Tensor) -> int:
    steps = ((size - 1) * step for size, step in zip(tensor.size(), tensor.stride(), strict=True))
    return int(tensor.storage_offset()) + sum(steps)


def _is_plain(entry: Any) -> bool:
    if isinstance(entry, slice):
        return all(
            type(part) in (int, type(None)) for part in (entry.start, entry.stop, entry.step)
        )
    return type(entry) is int or entry is Ellipsis
