"""Terms of a cost: what costs in proportion to products of counts.

    full · Π_k count_k / size_k

A row is a count: the channels along an axis that always stay, and so many for every unit that
lives. Many terms are evaluated at once, as a product over columns of a table.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fxprune.runtime.structure import Structured, Unchanging

NEURONS, PARAMETERS, MACS, LATENCY = "neurons", "parameters", "macs", "latency"


@dataclass(frozen=True, eq=False)
class Row(Unchanging):
    """An axis: how many of its channels always stay, and how many each unit stands for.

    Rows are told apart by identity: who makes them makes equal ones once.
    """

    base: int
    units: tuple[int, ...] = ()
    times: tuple[int, ...] = ()

    @property
    def size(self) -> int:
        """How long the axis is while every unit lives."""
        return self.base + sum(self.times)

    def restricted(self, place: Mapping[int, int]) -> "Row":
        """Return the row in the units that have a place; the others died."""
        pairs = [(place[u], m) for u, m in zip(self.units, self.times, strict=True) if u in place]
        return Row(self.base, tuple(u for u, _ in pairs), tuple(m for _, m in pairs))


@dataclass(frozen=True)
class Term(Unchanging):
    """What costs `full` while every unit lives, in proportion to each of its rows."""

    full: int
    rows: tuple[Row, ...]

    def restricted(self, new: Mapping[Row, Row]) -> "Term":
        """Return the term in rows that are shorter."""
        rows = tuple(new[row] for row in self.rows)
        after = self.full * math.prod(row.size for row in rows)
        return Term(after // math.prod(row.size for row in self.rows), rows)


class TermTable(Structured):
    """Terms side by side: from the counts of rows, what each costs."""

    _rows: Tensor
    _full: Tensor
    _size: Tensor

    def __init__(self, terms: Sequence[Term], place: Mapping[Row, int]) -> None:
        """Take the terms and where each row's count is; the first row's is 1."""
        super().__init__()
        width = max((len(term.rows) for term in terms), default=0)
        rows = [[*map(place.__getitem__, t.rows), *(0,) * (width - len(t.rows))] for t in terms]
        sizes = [math.prod(row.size for row in term.rows) or 1 for term in terms]
        self.hold("_rows", torch.tensor(rows, dtype=torch.int64).reshape(len(terms), width))
        self.hold("_full", torch.tensor([term.full for term in terms], dtype=torch.int64))
        self.hold("_size", torch.tensor(sizes, dtype=torch.int64))

    def forward(self, counts: Tensor) -> Tensor:
        """Return what the terms cost, (…, terms); counts: (…, rows)."""
        total = self._full.to(counts.dtype).expand(*counts.shape[:-1], -1)
        for rows in self._rows.unbind(-1):
            total = total * counts[..., rows]
        return total / self._size.to(counts.dtype)


def merged(terms: Sequence[Term]) -> tuple[Term, ...]:
    """Add up the terms that shrink alike."""
    full: dict[tuple[Row, ...], int] = {}
    order: dict[Row, int] = {}
    for term in terms:
        rows = [row for row in term.rows if row.units]
        rows = tuple(sorted(rows, key=lambda row: order.setdefault(row, len(order))))
        full[rows] = full.get(rows, 0) + term.full
    return tuple(Term(amount, rows) for rows, amount in full.items() if amount)
