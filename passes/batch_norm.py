"""Fold a batch norm, or a constant per channel, into the layer before it.

    a·(W·x + b) + t = (a·W)·x + (a·b + t)

with a = γ/√(σ² + ε), t = β − a·μ for a batch norm with stored statistics (Jacob et al. 2018,
section 3.2), a buffer or number for a sum or product, as removed branches leave them. Exact for
linear layers, convolutions and transposed convolutions of any geometry, since a scales output
channels only. Computed in float64.
"""

from typing import Any

from torch import fx

from fxprune.folding.affine_maps import AffineMap, affine_map, scale_outputs_
from fxprune.folding.affine_neighbours import layer_before
from fxprune.programs.observation import observe
from fxprune.programs.pipeline import Change, keeps_shapes
from fxprune.programs.program import Program
from fxprune.programs.sharing import sole_modules


@keeps_shapes
def fold_batch_norm(program: Program) -> list[Change]:
    """Fold every affine map of channels whose input is a layer nobody else reads or shares."""
    sole = sole_modules(program)
    seen = observe(program)
    changes: list[Change] = []
    for node in list(program.graph.nodes):
        found = affine_map(program, node, sole.get(node), seen)
        layer = None if found is None else layer_before(found.source, found.axis, sole, seen)
        if found is not None and layer is not None:
            changes.append(_fold(node, found, layer))
    if changes:
        seen.drop_dead_code(program.graph)
    return changes


def _fold(node: fx.Node, found: AffineMap, layer: Any) -> Change:
    channels = getattr(layer, "out_channels", None) or layer.out_features
    scale_outputs_(layer, found.scale.expand(channels), found.shift.expand(channels))
    node.replace_all_uses_with(found.source)
    node.graph.erase_node(node)
    name = str(node.target) if node.op == "call_module" else node.name
    return Change(name, f"folded into {found.source.target}")
