"""Chains of linear layers with nothing between them, and the cheapest way to cut them in pieces.

    best(j) = min over i < j of best(i) + cost(layers i … j as one)

where the layers are exactly one (`fxprune.convolutions`); a layer alone is always a piece, so that
no plan costs more than the chain as it is. Of plans that cost the same, that of fewer layers.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from torch import fx, nn

from fxprune.convolutions import Geometry, Inexact, Sizes, composed, geometry_of
from fxprune.latency import LATENCY, Latencies
from fxprune.observation import TensorSpec

LONGEST = 32  # of a piece; what is merged is considered again

MOST = 50  # of the pieces a plan tells it did not choose

Cost = Callable[[Geometry, Sizes], int]
"""What a layer costs at the places of its output: the batch, and the sizes of its axes."""


def parameters(geometry: Geometry, places: Sizes) -> int:
    """Return how many numbers a layer has."""
    return geometry.parameters


def macs(geometry: Geometry, places: Sizes) -> int:
    """Return how many multiply-accumulates a layer takes."""
    return geometry.weights * prod(places)


def output_places(geometry: Geometry, spec: Any) -> Sizes:
    """Return at which places a layer's outputs are computed: the batch, and the sizes of axes."""
    if not isinstance(spec, TensorSpec):
        return (1,) * (1 + len(geometry.kernel))
    axes = len(geometry.kernel)
    batch = prod(spec.shape) // geometry.outputs // prod(spec.shape[len(spec.shape) - axes :])
    return (batch, *spec.shape[len(spec.shape) - axes :])


def unit_of(cost: str) -> str:
    """Return what a cost is counted in."""
    return "ns" if cost == LATENCY else cost


COSTS: dict[str, Cost] = {"parameters": parameters, "macs": macs, LATENCY: Latencies()}


@dataclass(frozen=True)
class Piece:
    """Layers start … stop − 1 of a chain, as one layer, and what they cost as one and apart."""

    start: int
    stop: int
    geometry: Geometry
    cost: int
    apart: int


def chains(graph: fx.Graph, sole: dict[fx.Node, nn.Module]) -> list[list[fx.Node]]:
    """Return the longest runs of layers of which each is read by the next alone."""
    found: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.nodes:
        if geometry_of(sole.get(node)) is None or len(node.all_input_nodes) != 1:
            continue
        before = node.all_input_nodes[0]
        chain = found.pop(before) if before in found and len(before.users) == 1 else []
        found[node] = [*chain, node]
    return list(found.values())


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
    best: list[tuple[int, int, Piece | None]] = [(0, 0, None)]
    options, refused = _pieces(layers, places, cost)
    for stop in range(1, len(layers) + 1):
        best.append(
            min(
                (
                    (best[piece.start][0] + piece.cost, best[piece.start][1] + 1, piece)
                    for piece in options[stop]
                ),
                key=lambda plan: plan[:2],
            )
        )
    chosen: list[Piece] = []
    stop = len(layers)
    while stop:
        piece = best[stop][2]
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
    for start, geometry in enumerate(layers):
        apart = cost(geometry, places[start])
        merged, stop = geometry, start + 1
        found[stop].append(Piece(start, stop, merged, apart, apart))
        while stop < min(len(layers), start + LONGEST):
            try:
                merged = composed(merged, layers[stop])
            except Inexact as reason:
                refused[stop + 1] = (start, str(reason))
                break
            apart += cost(layers[stop], places[stop])
            stop += 1
            found[stop].append(Piece(start, stop, merged, cost(merged, places[stop - 1]), apart))
    return found, refused
