"""What chains of layers cost when each is cut the cheapest way, as their gates are.

    best(j) = min over i < j of best(i) + cost(layers i … j as one)

where layers are one only if every linearity gate between them is open. As in `folding.plans` the
parameters decide, then the number of pieces; other costs are of the pieces so chosen. The minimum
is taken for all chains at once, a few kernels a layer of the longest, on the gates' device.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fxprune.gating.latency_tables import LatencyTable, Timing
from fxprune.gating.terms import MACS, PARAMETERS, Row, Term, TermTable
from fxprune.runtime.structure import Structured, Unchanging

PIECES = 1024  # more than any chain has


@dataclass(frozen=True)
class Way(Unchanging):
    """Layers start … stop − 1 of a chain as one layer, if all the linearity gates are open."""

    start: int
    stop: int
    sites: tuple[int, ...]
    parameters: tuple[Term, ...]
    macs: tuple[Term, ...]
    timing: Timing | None = None

    def restricted(self, new: Mapping[Row, Row]) -> "Way":
        """Return the way in rows that are shorter."""
        return replace(
            self,
            parameters=tuple(term.restricted(new) for term in self.parameters),
            macs=tuple(term.restricted(new) for term in self.macs),
            timing=None if self.timing is None else self.timing.restricted(new),
        )


class ChainCosts(Structured):
    """The costs of chains, each of which has a way for every layer alone."""

    _place: Tensor
    _stop: Tensor
    _gates: Tensor
    _site: Tensor
    _chain: Tensor
    _variant: Tensor
    _parameters_way: Tensor
    _macs_way: Tensor
    _latency_way: Tensor

    def __init__(
        self, chains: Sequence[Sequence[Way]], place: Mapping[Row, int], sites: int
    ) -> None:
        """Take the ways of every chain, where each row's count is, and how many gates there are."""
        super().__init__()
        ways = [way for chain in chains for way in chain]
        self._parameter_table = self._table("parameters", [way.parameters for way in ways], place)
        self._mac_table = self._table("macs", [way.macs for way in ways], place)
        self._latency_table: LatencyTable | None = None
        self.longest = max(way.stop for way in ways)
        none, number = len(ways), 0
        places = torch.full((len(chains), self.longest + 1, self.longest), none)
        gates = [list(way.sites) for way in ways]
        found: list[tuple[int, int, int]] = []
        for index, chain in enumerate(chains):
            for way in chain:
                places[index, way.stop, way.start] = number
                number += 1
            own = sorted({site for way in chain for site in way.sites})
            found += [(site, index, variant) for variant, site in enumerate(own)]
        width = max(map(len, gates))
        padded = [[*one, *(sites,) * (width - len(one))] for one in gates]
        self.hold("_place", places)
        self.hold("_stop", torch.tensor([max(way.stop for way in chain) for chain in chains]))
        self.hold("_gates", torch.tensor(padded, dtype=torch.int64).reshape(len(ways), width))
        columns = torch.tensor(found, dtype=torch.int64).reshape(-1, 3).unbind(-1)
        for name, column in zip(("_site", "_chain", "_variant"), columns, strict=True):
            self.hold(name, column)
        self.variants = 1 + max((variant for _, _, variant in found), default=-1)

    def measure_(self, ways: Sequence[Way], place: Mapping[Row, int]) -> None:
        """Measure the latencies of all ways, those of all chains in turn."""
        timed = [(number, way.timing) for number, way in enumerate(ways) if way.timing]
        numbers = torch.tensor([number for number, _ in timed], dtype=torch.int64)
        self.hold("_latency_way", numbers.to(self._stop.device))
        self._latency_table = LatencyTable([timing for _, timing in timed], place)

    def forward(
        self,
        kind: str,
        left: Tensor,
        counts: Callable[[Tensor], Tensor],
        live: Tensor,
        linear: Tensor,
    ) -> Tensor:
        """Return the cost of all chains, a scalar.

        left: what rows have left now. counts: what they have in any units and gates. The gradient
        of a gate is what its other state would cost more, at the state of the others; of a unit,
        what it does as chains are cut now.
        """
        if not self.variants or not (linear.requires_grad and torch.is_grad_enabled()):
            return self._cheapest(kind, left[None], linear[None]).sum()
        now = linear.detach()
        costs = self._cheapest(kind, counts(torch.cat([live, now]))[None], now[None])
        with torch.no_grad():
            others = now.repeat(self.variants, 1)
            others[self._variant, self._site] = 1 - others[self._variant, self._site]
            state = torch.cat([live.expand(self.variants, -1), others], -1)
            changed = self._cheapest(kind, counts(state), others)[self._variant, self._chain]
            rise = (changed - costs[0, self._chain]) * (1 - 2 * now[self._site])
        moved = linear[self._site]
        return costs.sum() + ((moved - moved.detach()) * rise).sum()

    def _cheapest(self, kind: str, left: Tensor, linear: Tensor) -> Tensor:
        """Return what every chain costs, (variants, chains); linear: (variants, sites)."""
        variants, chains = len(linear), len(self._stop)
        spent = self._of_ways(self._parameter_table, self._parameters_way, left)
        asked = spent if kind == PARAMETERS else self._of_ways(*self._asked(kind), left)
        open_gates = torch.cat([linear, linear.new_ones(variants, 1)], -1)
        shut = open_gates[:, self._gates].amin(-1) < 0.5 if self._gates.shape[1] else None
        price = spent[:, :-1].detach() * PIECES + 1
        price = price if shut is None else price.masked_fill(shut, torch.inf)
        price = torch.cat([price, price.new_full((variants, 1), torch.inf)], -1)
        prices, costs = [price.new_zeros(variants, chains)], [spent.new_zeros(variants, chains)]
        for stop in range(1, self.longest + 1):
            ways = self._place[:, stop, :stop]
            least, start = (torch.stack(prices, -1) + price[:, ways]).min(-1, keepdim=True)
            chosen = (torch.stack(costs, -1) + asked[:, ways]).gather(-1, start)
            prices.append(least.squeeze(-1))
            costs.append(chosen.squeeze(-1))
        ends = self._stop.expand(variants, -1).unsqueeze(-1)
        return torch.stack(costs, -1).gather(-1, ends).squeeze(-1)

    def _asked(self, kind: str) -> tuple[TermTable | LatencyTable, Tensor]:
        if kind == MACS:
            return self._mac_table, self._macs_way
        assert self._latency_table is not None
        return self._latency_table, self._latency_way

    def _table(
        self, name: str, terms: Sequence[Sequence[Term]], place: Mapping[Row, int]
    ) -> TermTable:
        number = [way for way, some in enumerate(terms) for _ in some]
        self.hold(f"_{name}_way", torch.tensor(number, dtype=torch.int64))
        return TermTable([term for some in terms for term in some], place)

    def _of_ways(self, table: TermTable | LatencyTable, way: Tensor, counts: Tensor) -> Tensor:
        """Return what every way costs, and 0 for none, (variants, ways + 1)."""
        nothing = counts.new_zeros(len(counts), len(self._gates) + 1)
        return nothing.index_add(-1, way, table(counts))
