"""Chains of linear layers in a program: each is read by the next alone.

What flattens a map may stand between two layers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from torch import fx, nn

from fxprune.dataflow.flattening import flattens, moves_data, only_reader
from fxprune.folding.average_pools import AXES, pool_at, pool_geometry
from fxprune.folding.convolutions import Geometry, geometry_of
from fxprune.folding.transposed_convolutions import transposed_geometry
from fxprune.folding.whole_maps import behind_flattening
from fxprune.programs.observation import Observation, TensorSpec
from fxprune.programs.program import Program


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
