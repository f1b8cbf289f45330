"""Fold linear layers, or convolutions, with nothing between them into one, where that is cheaper.

    W₂·(W₁·x + b₁) + b₂ = (W₂·W₁)·x + (W₂·b₁ + b₂)

(Srinivas & Babu 2016: a layer with d = 1 is merged with the next), for convolutions where
`fxprune.convolutions` finds it exact. With C inputs, M in between and O outputs, 1×1, it saves
parameters iff C·O < M·(C + O): a bottleneck must not be folded. Of all ways to cut a chain into
pieces the cheapest is taken, which never costs more than the chain. Computed in float64.
"""

from collections.abc import Sequence
from functools import reduce
from math import prod

import torch.nn.functional as F
from torch import fx, nn

from fxprune.chains import COSTS, Cost, Piece, chains, cheapest, output_places, unit_of
from fxprune.convolutions import Geometry, compose, geometry_of, install_, layer_of
from fxprune.observation import observe
from fxprune.pipeline import Change, keeps_shapes
from fxprune.program import Program
from fxprune.sharing import sole_modules


@keeps_shapes
def fold_linear_chains(program: Program, *, cost: str = "parameters") -> list[Change]:
    """Merge neighbouring layers where they are exactly one and that costs less.

    cost: "parameters", "macs" or "latency". How every chain was cut is in `program.plans`.
    """
    changes: list[Change] = []
    while True:
        new = _fold_once(program, COSTS[cost], cost)
        if not new:
            return changes
        changes += new


def _fold_once(program: Program, cost: Cost, unit: str) -> list[Change]:
    sole = sole_modules(program)
    found = [chain for chain in chains(program.graph, sole) if len(chain) > 1]
    if not found:
        return []
    seen = observe(program)
    left = _left(program)
    changes: list[Change] = []
    widened = False
    for chain in found:
        layers = [geometry for node in chain if (geometry := geometry_of(sole[node]))]
        places = [
            output_places(layer, seen.values[node])
            for layer, node in zip(layers, chain, strict=True)
        ]
        plan = cheapest(layers, places, cost)
        names = tuple(str(node.target) for node in chain)
        if names not in left:
            program.plans[names] = Change(
                names[0], plan.text(names, unit_of(unit)), plan.data(names, unit)
            )
        for piece in plan.pieces:
            nodes = chain[piece.start : piece.stop]
            if len(nodes) < 2 or seen.written(nodes[0].all_input_nodes[0]):
                continue
            changes.append(_merge(nodes, layers, piece, sole, unit))
            seen.macs[nodes[-1]] = piece.geometry.weights * prod(places[piece.stop - 1])
            widened = widened or piece.geometry.ones
    if widened:
        program.seen = None  # there is a node no run has shown
    return changes


def _left(program: Program) -> set[tuple[str, ...]]:
    """Return the chains that earlier plans left, of which there is nothing new to say."""
    chosen = [dict(plan.detail)["chosen"] for plan in program.plans.values()]
    return {tuple(piece["layers"][-1] for piece in pieces) for pieces in chosen}


def _merge(
    nodes: Sequence[fx.Node],
    chain: Sequence[Geometry],
    piece: Piece,
    sole: dict[fx.Node, nn.Module],
    unit: str,
) -> Change:
    """Let the last of the layers compute what all of them do, and drop the others."""
    first, last = nodes[0], nodes[-1]
    geometries = chain[piece.start : piece.stop]
    layers = [layer_of(sole[node], g) for node, g in zip(nodes, geometries, strict=True)]
    install_(sole[last], reduce(compose, layers))
    last.replace_input_with(nodes[-2], first.all_input_nodes[0])
    for node in reversed(nodes[:-1]):
        node.graph.erase_node(node)
    if piece.geometry.ones:
        _add_ones(last, len(piece.geometry.kernel))
    names = ", ".join(str(node.target) for node in nodes[:-1])
    return Change(
        names,
        f"folded into {last.target}: {piece.apart} → {piece.cost} {unit_of(unit)}",
        (("before", piece.apart), ("after", piece.cost), ("cost", unit), ("folded", True)),
    )


def _add_ones(node: fx.Node, axes: int) -> None:
    """Let a layer read one more channel, of ones: what stands for a bias before its border."""
    source = node.all_input_nodes[0]
    with node.graph.inserting_before(node):
        widened = node.graph.call_function(
            F.pad, (source, [0] * (2 * axes) + [0, 1]), {"value": 1.0}
        )
    widened.meta["source"] = node.meta.get("source")
    node.replace_input_with(source, widened)
