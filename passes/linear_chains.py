"""Fold linear layers, or convolutions, with nothing between them into one, where that is cheaper.

    W₂·(W₁·x + b₁) + b₂ = (W₂·W₁)·x + (W₂·b₁ + b₂)

(Srinivas & Babu 2016: a layer with d = 1 is merged with the next), for convolutions where
`folding.linear_layers` finds it exact. With C inputs, M in between and O outputs, 1×1, it saves
parameters iff C·O < M·(C + O): a bottleneck must not be folded. Of all ways to cut a chain into
pieces the cheapest is taken, which never costs more than the chain. Computed in float64.

To fold only the neurons of a layer that are linear would save iff these were more than C·O/(C + O),
half of them at one width; as a site has one gate for all of its neurons, there are none or all.
"""

from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from fxprune.folding.chains import Chain, chains
from fxprune.folding.layer_costs import COSTS, Cost, output_places, unit_of
from fxprune.folding.linear_layers import can_be, compose_all, covers_map, install_, layer_of
from fxprune.folding.plans import Piece, cheapest
from fxprune.programs.observation import Observation, observe
from fxprune.programs.pipeline import Change, keeps_shapes
from fxprune.programs.program import Program
from fxprune.programs.sharing import sole_modules
from fxprune.user_models.modules import device_of


@keeps_shapes
def fold_linear_chains(
    program: Program, *, cost: str = "parameters", pools: bool = False
) -> list[Change]:
    """Merge neighbouring layers where they are exactly one and that costs less.

    cost: "parameters", "macs" or "latency". pools: average pools are layers too. How every chain
    was cut is in `program.plans`.
    """
    changes: list[Change] = []
    while True:
        new = _fold_once(program, COSTS[cost], cost, pools)
        if not new:
            return changes
        changes += new


def _fold_once(program: Program, cost: Cost, unit: str, pools: bool) -> list[Change]:
    sole, seen = sole_modules(program), observe(program)
    left = _left(program)
    changes: list[Change] = []
    grown = False
    for chain in chains(program, sole, seen, pools=pools):
        if len(chain.nodes) < 2:
            continue
        places = [
            output_places(layer, seen.values[node])
            for layer, node in zip(chain.layers, chain.nodes, strict=True)
        ]
        plan = cheapest(chain.layers, places, cost)
        names = tuple(str(node.target) for node in chain.nodes)
        if names not in left:
            program.plans[names] = Change(
                names[0], plan.text(names, unit_of(unit)), plan.data(names, unit)
            )
        for piece in plan.pieces:
            if piece.stop - piece.start < 2 or seen.written(_source(chain, piece)):
                continue
            merge = _Merge(program, chain, piece, sole)
            changes.append(merge.change(unit))
            merge.do(seen, prod(places[piece.stop - 1]))
            grown = grown or merge.adds_node
    if changes:
        seen.drop_dead_code(program.graph)
    if grown:
        program.seen = None  # there is a node no run has shown
    return changes


def _left(program: Program) -> set[tuple[str, ...]]:
    """Return the chains that earlier plans left, of which there is nothing new to say."""
    chosen = [dict(plan.detail)["chosen"] for plan in program.plans.values()]
    return {tuple(piece["layers"][-1] for piece in pieces) for pieces in chosen}


def _source(chain: Chain, piece: Piece) -> fx.Node:
    """Return what the one layer would read."""
    return chain.nodes[piece.start].all_input_nodes[0]


class _Merge:
    """Some layers of a chain, to become one: that of them which is of its kind."""

    def __init__(
        self, program: Program, chain: Chain, piece: Piece, sole: dict[fx.Node, nn.Module]
    ) -> None:
        self.program, self.piece, self.sole = program, piece, sole
        self.source = _source(chain, piece)
        self.nodes = chain.nodes[piece.start : piece.stop]
        self.layers = chain.layers[piece.start : piece.stop]
        kinds = (node for node in reversed(self.nodes) if can_be(sole.get(node), piece.geometry))
        self.kept = next(kinds)
        self.flat = covers_map(self.layers)
        self.adds_node = self.flat or piece.geometry.ones

    def change(self, unit: str) -> Change:
        """Say what is done."""
        piece = self.piece
        names = ", ".join(str(node.target) for node in self.nodes if node is not self.kept)
        return Change(
            names,
            f"folded into {self.kept.target}: {piece.apart} → {piece.cost} {unit_of(unit)}",
            (("before", piece.apart), ("after", piece.cost), ("cost", unit), ("folded", True)),
        )

    def do(self, seen: Observation, places: int) -> None:
        """Let the kept layer compute what all of them do, and what read the last read it."""
        kept, last, geometry = self.kept, self.nodes[-1], self.piece.geometry
        device = device_of(self.program.module)
        pairs = zip(self.nodes, self.layers, strict=True)
        layers = [layer_of(self.sole.get(node), g, device) for node, g in pairs]
        module: Any = self.sole[kept]
        install_(module, compose_all(layers))
        source = self._given()
        kept.replace_input_with(kept.all_input_nodes[0], source)
        if kept is not last:
            last.replace_all_uses_with(kept)
        seen.values[kept] = seen.values[last]
        seen.macs[kept] = geometry.macs(places)

    def _given(self) -> fx.Node:
        """Return what the one layer reads: the source, flattened or with a channel of ones."""
        if self.flat:
            return _insert(self.kept, torch.flatten, (self.source, 1), {})
        if self.piece.geometry.ones:
            amounts = [0] * (2 * len(self.piece.geometry.kernel)) + [0, 1]
            return _insert(self.kept, F.pad, (self.source, amounts), {"value": 1.0})
        return self.source


def _insert(node: fx.Node, function: Any, args: Any, kwargs: Any) -> fx.Node:
    """Put a call in front of a layer."""
    with node.graph.inserting_before(node):
        call = node.graph.call_function(function, args, kwargs)
    call.meta["source"] = node.meta.get("source")
    return call
