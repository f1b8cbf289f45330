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

from fxprune.convolutions import Geometry, Inexact, composed, geometry_of
from fxprune.observation import TensorSpec

LONGEST = 32  # of a piece; what is merged is considered again

Cost = Callable[[Geometry, int], int]
"""What a layer costs at so many places of its output."""


def parameters(geometry: Geometry, places: int) -> int:
    """Return how many numbers a layer has."""
    return geometry.parameters


def macs(geometry: Geometry, places: int) -> int:
    """Return how many multiply-accumulates a layer takes."""
    return geometry.weights * places


def output_places(geometry: Geometry, spec: Any) -> int:
    """Return at how many places, of the whole batch, a layer's outputs are computed."""
    return prod(spec.shape) // geometry.outputs if isinstance(spec, TensorSpec) else 1


COSTS: dict[str, Cost] = {"parameters": parameters, "macs": macs}


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


def cheapest(layers: Sequence[Geometry], places: Sequence[int], cost: Cost) -> list[Piece]:
    """Cut a chain into the pieces that cost least; places: of the outputs of every layer."""
    best: list[tuple[int, int, Piece | None]] = [(0, 0, None)]
    options = pieces(layers, places, cost)
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
    plan: list[Piece] = []
    stop = len(layers)
    while stop:
        piece = best[stop][2]
        assert piece is not None
        plan.append(piece)
        stop = piece.start
    return plan[::-1]


def pieces(layers: Sequence[Geometry], places: Sequence[int], cost: Cost) -> list[list[Piece]]:
    """Return everything that is one layer, by where it stops."""
    found: list[list[Piece]] = [[] for _ in range(len(layers) + 1)]
    for start, geometry in enumerate(layers):
        apart = cost(geometry, places[start])
        merged, stop = geometry, start + 1
        found[stop].append(Piece(start, stop, merged, apart, apart))
        while stop < min(len(layers), start + LONGEST):
            try:
                merged = composed(merged, layers[stop])
            except Inexact:
                break
            apart += cost(layers[stop], places[stop])
            stop += 1
            found[stop].append(Piece(start, stop, merged, cost(merged, places[stop - 1]), apart))
    return found
