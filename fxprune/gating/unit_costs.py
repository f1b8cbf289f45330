"""What a gated model would cost if it were finalised now, as a function of its gates.

    cost = Σ_t full_t · Π_k count_tk / size_tk,   count_r = base_r + Σ_u m_ru · w_u

A term is a parameter, or an operator that multiplies; its sizes that can shrink are rows. A row
counts the channels along one axis: those that always stay, and m_ru for every unit u that lives. A
linearity gate is a unit too, in a row of its own, so that a term can count where it is open. Where
layers may become one, a chain of them costs what the cheapest way to cut it does
(`gating.chain_costs`). What is left to do in training is a handful of kernels, whatever the depth.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain

import torch
from torch import Tensor

from fxprune.errors import GateError
from fxprune.gating.chain_costs import ChainCosts, Way
from fxprune.gating.latency_tables import LatencyTable, Timing
from fxprune.gating.terms import LATENCY, MACS, NEURONS, PARAMETERS, Row, Term, TermTable, merged
from fxprune.runtime.structure import Structured

KINDS = (NEURONS, PARAMETERS, MACS)


class UnitCosts(Structured):
    """The costs of a model in its units and linearity gates.

    units, sites: how many there are; gate i is unit `units + i` in rows. parameters, macs: the
    terms of each kind of cost. samples: the batch size the MACs were counted at; costs are those of
    one sample. chains: the ways to cut each chain of layers. timings: of the other layers; they are
    measured when latency is first asked for. What it holds is int64, so that no
    change of the model's dtype rounds it.
    """

    _base: Tensor
    _row: Tensor
    _unit: Tensor
    _times: Tensor

    def __init__(
        self,
        units: int,
        parameters: Sequence[Term],
        macs: Sequence[Term],
        samples: int = 1,
        *,
        sites: int = 0,
        chains: Sequence[Sequence[Way]] = (),
        timings: Sequence[Timing] = (),
    ) -> None:
        """Take the terms of each kind of cost, and of what chains may become."""
        super().__init__()
        self.units, self.sites, self.samples = units, sites, samples
        self.terms: Mapping[str, tuple[Term, ...]] = {
            PARAMETERS: merged(parameters),
            MACS: merged(macs),
        }
        self.chains = tuple(tuple(ways) for ways in chains)
        self.timings = tuple(timings)
        one = Row(1)  # stands for the rows a term has fewer than others
        rows = list(dict.fromkeys([one, *self._all()]))
        self.rows = tuple(rows)
        self._place = place = {row: index for index, row in enumerate(rows)}
        self._hold("_base", [row.base for row in rows])
        self._hold("_row", [place[row] for row in rows for _ in row.units])
        self._hold("_unit", [unit for row in rows for unit in row.units])
        self._hold("_times", [times for row in rows for times in row.times])
        self._parameter_table = TermTable(self.terms[PARAMETERS], place)
        self._mac_table = TermTable(self.terms[MACS], place)
        self._chains = ChainCosts(self.chains, place, sites) if self.chains else None
        self._latency_table: LatencyTable | None = None

    def forward(self, kind: str, live: Tensor, linear: Tensor | None = None) -> Tensor:
        """Return the cost, a scalar, differentiable in `live` and `linear`.

        kind: "neurons", "parameters", "macs" or "latency" (nanoseconds), these of a sample. live:
        (units,), 1 for a unit that lives and 0 for one that does not; what lies between is
        interpolated. linear: (sites,), 1 where a nonlinearity is linear; none is if not given. Its
        gradient is what the cost rises by where that one changes. Numbers are exact in float64, of
        latency at the widths that were measured. Raises `GateError` for another kind.
        """
        require_kind(kind)
        if kind == NEURONS:
            return live.sum()
        linear = live.new_zeros(self.sites) if linear is None else linear.to(live)
        table = self._table(kind)
        counts = self._counts(torch.cat([live, linear]))
        total = table(counts).sum()
        if self._chains is not None:
            total = total + self._chains(kind, counts, self._counts, live, linear)
        return total / self.samples if kind == MACS else total

    def full(self, kind: str) -> float:
        """Return the cost while every unit lives, and no nonlinearity is linear."""
        ones = torch.ones(self.units, dtype=torch.float64, device=self._base.device)
        return float(self(kind, ones))

    def groups(self) -> list[tuple[int, ...]]:
        """Return sets of units of which one has to live, lest a tensor be left without channels."""
        found = {row.units for row in self.rows if not row.base and row.units}
        return sorted(units for units in found if max(units) < self.units)

    def restricted(self, kept: Sequence[int]) -> "UnitCosts":
        """Return the costs in some of the units, renumbered in the order given; the rest died."""
        place = {unit: index for index, unit in enumerate(kept)}
        place |= {self.units + site: len(kept) + site for site in range(self.sites)}
        new = {row: row.restricted(place) for row in self.rows}

        parameters, macs = (
            [term.restricted(new) for term in self.terms[kind]] for kind in (PARAMETERS, MACS)
        )
        return UnitCosts(
            *(len(kept), parameters, macs, self.samples),
            sites=self.sites,
            chains=[[way.restricted(new) for way in ways] for ways in self.chains],
            timings=[timing.restricted(new) for timing in self.timings],
        ).to(self._base.device)

    def without(self, parts: Mapping["UnitCosts", int]) -> "UnitCosts":
        """Return the costs less those of parts that are counted by themselves.

        parts: the costs of each, and how many parameters it has, unfolded, in the whole. From here
        on they are of as many samples as the whole's.
        """
        parameters, macs = [*self.terms[PARAMETERS]], [*self.terms[MACS]]
        for part, numbers in parts.items():
            parameters.append(Term(-numbers, ()))
            macs.append(Term(-round(part.full(MACS) * part.samples), ()))
            part.samples = self.samples
        return UnitCosts(
            *(self.units, parameters, macs, self.samples),
            sites=self.sites,
            chains=self.chains,
            timings=self.timings,
        ).to(self._base.device)

    def _table(self, kind: str) -> TermTable | LatencyTable:
        if kind != LATENCY:
            return self._parameter_table if kind == PARAMETERS else self._mac_table
        if self._latency_table is None:
            table = LatencyTable(self.timings, self._place)
            if self._chains is not None:
                self._chains.measure_([way for ways in self.chains for way in ways], self._place)
            self._latency_table = table
            self.to(self._base.device)
        return self._latency_table

    def _counts(self, state: Tensor) -> Tensor:
        """Return how many channels every row has left; state: (…, units and sites)."""
        amount = state[..., self._unit] * self._times.to(state.dtype)
        base = self._base.to(state.dtype).expand(*state.shape[:-1], -1)
        return base.index_add(-1, self._row, amount)

    def _all(self) -> Iterator[Row]:
        """Yield the rows of everything."""
        ways = [way for ways in self.chains for way in ways]
        in_chains = (term for way in ways for term in (*way.parameters, *way.macs))
        for term in chain(*self.terms.values(), in_chains):
            yield from term.rows
        for timing in (*self.timings, *(way.timing for way in ways)):
            yield from () if timing is None else (timing.made.row, timing.read.row)

    def _hold(self, name: str, numbers: Sequence[object]) -> None:
        self.hold(name, torch.tensor(numbers, dtype=torch.int64))


def require_kind(kind: str) -> None:
    """Raise `GateError` for a kind of cost there is not."""
    if kind not in (*KINDS, LATENCY):
        raise GateError(f"there is no cost {kind!r}; take one of {', '.join(KINDS)}, {LATENCY}")
