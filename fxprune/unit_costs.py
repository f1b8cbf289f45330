"""What a gated model would cost if it were finalised now, as a function of its gates.

    cost = Σ_t full_t · Π_k count_tk / size_tk,   count_r = base_r + Σ_u m_ru · w_u

A term is a parameter, or an operator that multiplies; its sizes that can shrink are rows. A row
counts the channels along one axis: those that always stay, and m_ru for every unit u that lives.
Rows and terms were found once, by the channel analysis; what is left to do in training is a handful
of kernels, whatever the depth.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fxprune.errors import GateError
from fxprune.structure import Structured

NEURONS, PARAMETERS, MACS = "neurons", "parameters", "macs"
KINDS = (NEURONS, PARAMETERS, MACS)


@dataclass(frozen=True, eq=False)
class Row:
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

    def __deepcopy__(self, memo: Any) -> "Row":
        """Return itself: it never changes."""
        return self


@dataclass(frozen=True)
class Term:
    """What costs `full` while every unit lives, in proportion to each of its rows."""

    full: int
    rows: tuple[Row, ...]

    def __deepcopy__(self, memo: Any) -> "Term":
        """Return itself: it never changes."""
        return self


class UnitCosts(Structured):
    """The costs of a model in its units.

    units: how many there are. samples: the batch size the MACs were counted at; costs are those of
    one sample. What it holds is int64, so that no change of the model's dtype rounds it.
    """

    _base: Tensor
    _row: Tensor
    _unit: Tensor
    _times: Tensor

    def __init__(
        self, units: int, parameters: Sequence[Term], macs: Sequence[Term], samples: int = 1
    ) -> None:
        """Take the terms of each kind of cost."""
        super().__init__()
        self.units, self.samples = units, samples
        self.terms: Mapping[str, tuple[Term, ...]] = {
            PARAMETERS: _merged(parameters),
            MACS: _merged(macs),
        }
        one = Row(1)  # stands for the rows a term has fewer than others
        rows = list(dict.fromkeys([one, *(row for t in self._all() for row in t.rows)]))
        self.rows = tuple(rows)
        place = {row: index for index, row in enumerate(rows)}
        self._hold("_base", [row.base for row in rows])
        self._hold("_row", [place[row] for row in rows for _ in row.units])
        self._hold("_unit", [unit for row in rows for unit in row.units])
        self._hold("_times", [times for row in rows for times in row.times])
        for kind, terms in self.terms.items():
            width = max((len(term.rows) for term in terms), default=0)
            padded = [(*t.rows, *(one,) * (width - len(t.rows))) for t in terms]
            self._hold(f"_{kind}_rows", [[place[row] for row in term] for term in padded])
            self._hold(f"_{kind}_full", [term.full for term in terms])
            self._hold(f"_{kind}_size", [math.prod(r.size for r in t.rows) or 1 for t in terms])

    def forward(self, kind: str, live: Tensor) -> Tensor:
        """Return the cost, a scalar, differentiable in `live`.

        kind: "neurons", "parameters" or "macs" (a sample's). live: (units,), 1 for a unit that
        lives and 0 for one that does not; what lies between is interpolated. Numbers are exact in
        float64. Raises `GateError` for another kind.
        """
        require_kind(kind)
        if kind == NEURONS:
            return live.sum()
        amount = live[self._unit] * self._times.to(live.dtype)
        counts = self._base.to(live.dtype).index_add(0, self._row, amount)
        total: Tensor = getattr(self, f"_{kind}_full").to(live.dtype)
        for rows in getattr(self, f"_{kind}_rows").unbind(-1) if len(total) else ():
            total = total * counts[rows]
        total = (total / getattr(self, f"_{kind}_size").to(live.dtype)).sum()
        return total / self.samples if kind == MACS else total

    def full(self, kind: str) -> float:
        """Return the cost while every unit lives."""
        require_kind(kind)
        if kind == NEURONS:
            return self.units
        return sum(term.full for term in self.terms[kind]) / (self.samples if kind == MACS else 1)

    def groups(self) -> list[tuple[int, ...]]:
        """Return sets of units of which one has to live, lest a tensor be left without channels."""
        found = {row.units for row in self.rows if not row.base and row.units}
        return sorted(found)

    def restricted(self, kept: Sequence[int]) -> "UnitCosts":
        """Return the costs in some of the units, renumbered in the order given; the rest died."""
        place = {unit: index for index, unit in enumerate(kept)}

        def restrict(old: Row) -> Row:
            pairs = [(place[u], m) for u, m in zip(old.units, old.times, strict=True) if u in place]
            return Row(old.base, tuple(u for u, _ in pairs), tuple(m for _, m in pairs))

        new = {row: restrict(row) for row in self.rows}

        def term(old: Term) -> Term:
            rows = [new[one] for one in old.rows]
            after = old.full * math.prod(one.size for one in rows)
            return Term(after // math.prod(one.size for one in old.rows), tuple(rows))

        parameters, macs = ([term(one) for one in self.terms[kind]] for kind in (PARAMETERS, MACS))
        return UnitCosts(len(kept), parameters, macs, self.samples).to(self._base.device)

    def _all(self) -> list[Term]:
        return [term for terms in self.terms.values() for term in terms]

    def _hold(self, name: str, numbers: Sequence[object]) -> None:
        self.hold(name, torch.tensor(numbers, dtype=torch.int64))


def require_kind(kind: str) -> None:
    """Raise `GateError` for a kind of cost there is not."""
    if kind not in KINDS:
        raise GateError(f"there is no cost {kind!r}; take one of {', '.join(KINDS)}")


def _merged(terms: Sequence[Term]) -> tuple[Term, ...]:
    """Add up the terms that shrink alike."""
    full: dict[tuple[Row, ...], int] = {}
    order: dict[Row, int] = {}
    for term in terms:
        rows = [row for row in term.rows if row.units]
        rows = tuple(sorted(rows, key=lambda row: order.setdefault(row, len(order))))
        full[rows] = full.get(rows, 0) + term.full
    return tuple(Term(amount, rows) for rows, amount in full.items() if amount)
