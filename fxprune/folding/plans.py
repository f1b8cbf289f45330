"""The cheapest way to cut a chain of linear layers in pieces.

    best(j) = min over i < j of best(i) + cost(layers i … j as one)

where the layers are exactly one (`folding.linear_layers`); a layer alone is always a piece, so that
no plan costs more than the chain as it is. Of plans that cost the same, that which merges fewer
average pools, then that of fewer layers.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from fxprune.folding.average_pools import Pool
from fxprune.folding.convolutions import Geometry, Inexact, Sizes
from fxprune.folding.layer_costs import Cost
from fxprune.folding.linear_layers import all_composed, composed, covers_map

LONGEST = 32  # of a piece; what is merged is considered again

MOST = 50  # of the pieces a plan tells it did not choose


@dataclass(frozen=True)
class Piece:
    """Layers start … stop − 1 of a chain, as one layer, and what they cost as one and apart.

    pools: how many average pools it merges with others.
    """

    start: int
    stop: int
    geometry: Geometry
    cost: int
    apart: int
    pools: int = 0


@dataclass(frozen=True)
class Plan:
    """How to cut a chain: the pieces, all that could have been, and what is not one layer.

    refused: by stop, the start of the shortest run that is not one layer, and why.
    """

    pieces: list[Piece]
    options: list[Piece]
    refused: dict[int, tuple[int, str]]

    @property
    def cost(self) -> int:
        """What the chain costs, so cut."""
        return sum(piece.cost for piece in self.pieces)

    @property
    def apart(self) -> int:
        """What its layers cost as they are."""
        return sum(piece.apart for piece in self.pieces)

    def text(self, names: Sequence[str], unit: str) -> str:
        """Say in a line what was chosen, and what could not be."""
        merged = [_named(names, piece.start, piece.stop) for piece in self.pieces]
        line = f"{' | '.join(merged)}: {self.apart} → {self.cost} {unit}"
        near = min(self._others(), key=lambda piece: piece.cost - piece.apart, default=None)
        if near is not None and near.cost > near.apart:
            which = _named(names, near.start, near.stop)
            line += f"; {which} would be {near.cost}, apart {near.apart}"
        reasons: dict[str, list[str]] = {}
        for stop, (start, reason) in self.refused.items():
            reasons.setdefault(reason, []).append(_named(names, start, stop))
        for reason, runs in reasons.items():
            line += f"; not one: {', '.join(runs[:3])}{' …' * (len(runs) > 3)} ({reason})"
        return line

    def data(self, names: Sequence[str], cost: str) -> tuple[tuple[str, Any], ...]:
        """Return it all as data: the alternatives that are nearest to pay, if there are many."""
        others = sorted(self._others(), key=lambda piece: piece.cost - piece.apart)[:MOST]
        return (
            ("cost", cost),
            ("apart", self.apart),
            ("chosen", [_entry(names, piece) for piece in self.pieces]),
            ("alternatives", [_entry(names, piece) for piece in others]),
            (
                "refused",
                [
                    {"layers": list(names[start:stop]), "reason": reason}
                    for stop, (start, reason) in list(self.refused.items())[:MOST]
                ],
            ),
        )

    def _others(self) -> list[Piece]:
        return [p for p in self.options if p.stop - p.start > 1 and p not in self.pieces]


def _named(names: Sequence[str], start: int, stop: int) -> str:
    return "·".join(names[start:stop]) if stop - start <= 4 else f"{names[start]}…{names[stop - 1]}"


def _entry(names: Sequence[str], piece: Piece) -> dict[str, Any]:
    layers = list(names[piece.start : piece.stop])
    return {"layers": layers, "as one": piece.cost, "apart": piece.apart}


def cheapest(layers: Sequence[Geometry], places: Sequence[Sizes], cost: Cost) -> Plan:
    """Cut a chain into the pieces that cost least; places: of the outputs of every layer."""
    best: list[tuple[int, int, int, Piece | None]] = [(0, 0, 0, None)]
    options, refused = _pieces(layers, places, cost)
    for stop in range(1, len(layers) + 1):
        plans = [(best[piece.start], piece) for piece in options[stop]]
        best.append(
            min(
                (
                    (spent + piece.cost, pools + piece.pools, count + 1, piece)
                    for (spent, pools, count, _), piece in plans
                ),
                key=lambda plan: plan[:3],
            )
        )
    chosen: list[Piece] = []
    stop = len(layers)
    while stop:
        piece = best[stop][3]
        assert piece is not None
        chosen.append(piece)
        stop = piece.start
    return Plan(chosen[::-1], [piece for ending in options for piece in ending], refused)


def _pieces(
    layers: Sequence[Geometry], places: Sequence[Sizes], cost: Cost
) -> tuple[list[list[Piece]], dict[int, tuple[int, str]]]:
    """Return everything that is one layer, by where it stops, and why the rest is not."""
    refused: dict[int, tuple[int, str]] = {}
    found: list[list[Piece]] = [[] for _ in range(len(layers) + 1)]
    alone = [cost(layer, where) for layer, where in zip(layers, places, strict=True)]
    for start in range(len(layers)):
        for stop, merged in _growing(layers, start):
            if isinstance(merged, str):
                refused[stop] = (start, merged)
                continue
            whole = cost(merged, places[stop - 1])
            pools = sum(isinstance(layer, Pool) for layer in layers[start:stop])
            pools = pools if stop > start + 1 else 0
            found[stop].append(Piece(start, stop, merged, whole, sum(alone[start:stop]), pools))
    return found, refused


def _growing(layers: Sequence[Geometry], start: int) -> Iterator[tuple[int, Geometry | str]]:
    """Yield where runs that start at a layer stop, and the one layer each is; a reason at a loss.

    A run that is none goes on only where a flattened map is still to come: of that it is.
    """
    merged: Geometry | None = layers[start]
    yield start + 1, layers[start]
    for stop in range(start + 2, min(len(layers), start + LONGEST) + 1):
        whole = covers_map(layers[start:stop])
        try:
            if whole:
                merged = all_composed(layers[start:stop])
            elif merged is not None:
                merged = composed(merged, layers[stop - 1])
        except Inexact as reason:
            merged = None
            yield stop, str(reason)
        if merged is not None:
            yield stop, merged
