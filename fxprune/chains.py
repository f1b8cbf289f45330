"""Chains of linear layers with nothing between them, and the cheapest way to cut them in pieces.

    best(j) = min over i < j of best(i) + cost(layers i … j as one)

where the layers are exactly one (`fxprune.linear_layers`); a layer alone is always a piece, so that
no plan costs more than the chain as it is. Of plans that cost the same, that which merges fewer
average pools, then that of fewer layers. What flattens a map may stand between two layers.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from torch import fx, nn

from fxprune.average_pools import AXES, Pool, pool_at, pool_geometry
from fxprune.convolutions import Geometry, Inexact, geometry_of
from fxprune.flattening import flattens, moves_data, only_reader
from fxprune.linear_layers import all_composed, composed, covers_map
from fxprune.observation import Observation, TensorSpec
from fxprune.program import Program
from fxprune.transposed_convolutions import transposed_geometry
from fxprune.whole_maps import behind_flattening

LONGEST = 32  # of a piece; what is merged is considered again

Cost = Callable[[Geometry, int], int]
"""What a layer costs at so many places of its output."""


def parameters(geometry: Geometry, places: int) -> int:
    """Return how many numbers a layer has."""
    return geometry.parameters


def macs(geometry: Geometry, places: int) -> int:
    """Return how many multiply-accumulates a layer takes."""
    return geometry.macs(places)


def output_places(geometry: Geometry, spec: Any) -> int:
    """Return at how many places, of the whole batch, a layer's outputs are computed."""
    return prod(spec.shape) // geometry.outputs if isinstance(spec, TensorSpec) else 1


COSTS: dict[str, Cost] = {"parameters": parameters, "macs": macs}


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
class Chain:
    """Layers of which each is read by the next alone, and the geometry of each."""

    nodes: list[fx.Node]
    layers: list[Geometry]


def chains(
    program: Program, sole: dict[fx.Node, nn.Module], seen: Observation, *, pools: bool = False
) -> list[Chain]:
    """Return the longest runs of layers of which each is read by the next alone.

    pools: average pools are layers too.
    """
    found: dict[fx.Node, list[fx.Node]] = {}
    layers: dict[fx.Node, Geometry] = {}
    for node in program.graph.nodes:
        layer = _layer(program, node, sole.get(node), seen, pools=pools)
        if layer is None or len(node.all_input_nodes) != 1:
            continue
        layers[node] = layer
        before = _layer_before(program, node, found, layers, seen)
        chain = [] if before is None else found.pop(before)
        found[node] = [*chain, node]
    return [Chain(nodes, in_order(nodes, layers, seen)) for nodes in found.values()]


def in_order(
    nodes: Sequence[fx.Node], layers: dict[fx.Node, Geometry], seen: Observation
) -> list[Geometry]:
    """Return the layers of a chain, those from a flattening on as convolutions of whole maps."""
    chain = [layers[node] for node in nodes]
    linear = (i for i in range(1, len(chain)) if chain[i - 1].kernel and not chain[i].kernel)
    place = next(linear, None)
    if place is None:
        return chain
    before = [seen.values[node.all_input_nodes[0]].shape[2:] for node in nodes[:place]]
    return behind_flattening(chain, place, [*before, seen.values[nodes[place - 1]].shape[2:]])


def _layer(
    program: Program,
    node: fx.Node,
    module: nn.Module | None,
    seen: Observation,
    *,
    pools: bool,
) -> Geometry | None:
    """Read a node as a layer of its own."""
    layer = geometry_of(module)
    if layer is not None or not isinstance(spec := seen.values[node], TensorSpec):
        return layer
    if (pool := pool_at(program, node)) is not None:
        unbatched = len(spec.shape) == 1 + AXES[type(pool)]
        return None if unbatched or not pools else pool_geometry(pool, spec.shape[1])
    given = seen.values[node.all_input_nodes[0]] if node.all_input_nodes else None
    if module is None or not isinstance(given, TensorSpec):
        return None
    inputs: Any = getattr(module, "in_channels", 1)
    return transposed_geometry(module, prod(given.shape) // inputs)


def _layer_before(
    program: Program,
    node: fx.Node,
    found: dict[fx.Node, list[fx.Node]],
    layers: dict[fx.Node, Geometry],
    seen: Observation,
) -> fx.Node | None:
    """Return the layer that a layer alone reads, as it is or flattened."""
    before, reader = node.all_input_nodes[0], node
    if before in found:
        alike = len(layers[before].kernel) == len(layers[node].kernel)
        return before if alike and len(before.users) == 1 else None
    path: list[fx.Node] = []
    while before not in found:
        if not moves_data(program, before, seen) or only_reader(before, seen) is not reader:
            return None
        path.insert(0, before)
        reader, before = before, path[0].args[0]
        assert isinstance(before, fx.Node)
    axes = len(layers[before].kernel)
    if layers[node].kernel or not axes or only_reader(before, seen) is not reader:
        return None
    batched = len(seen.values[before].shape) == axes + 2
    return before if batched and flattens(program, path, seen) else None


def cheapest(layers: Sequence[Geometry], places: Sequence[int], cost: Cost) -> list[Piece]:
    """Cut a chain into the pieces that cost least; places: of the outputs of every layer."""
    best: list[tuple[int, int, int, Piece | None]] = [(0, 0, 0, None)]
    options = pieces(layers, places, cost)
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
    plan: list[Piece] = []
    stop = len(layers)
    while stop:
        piece = best[stop][3]
        assert piece is not None
        plan.append(piece)
        stop = piece.start
    return plan[::-1]


def pieces(layers: Sequence[Geometry], places: Sequence[int], cost: Cost) -> list[list[Piece]]:
    """Return everything that is one layer, by where it stops."""
    found: list[list[Piece]] = [[] for _ in range(len(layers) + 1)]
    alone = [cost(layer, count) for layer, count in zip(layers, places, strict=True)]
    for start in range(len(layers)):
        for stop, merged in _growing(layers, start):
            whole = cost(merged, places[stop - 1])
            pools = sum(isinstance(layer, Pool) for layer in layers[start:stop])
            pools = pools if stop > start + 1 else 0
            found[stop].append(Piece(start, stop, merged, whole, sum(alone[start:stop]), pools))
    return found


def _growing(layers: Sequence[Geometry], start: int) -> Iterator[tuple[int, Geometry]]:
    """Yield where the pieces that start at a layer stop, and the one layer that each is."""
    merged: Geometry | None = layers[start]
    yield start + 1, layers[start]
    for stop in range(start + 2, min(len(layers), start + LONGEST) + 1):
        whole = covers_map(layers[start:stop])  # what comes before may be one with it only
        try:
            if whole:
                merged = all_composed(layers[start:stop])
            elif merged is not None:
                merged = composed(merged, layers[stop - 1])
        except Inexact:
            merged = None
        if merged is not None:
            yield stop, merged
