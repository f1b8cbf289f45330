"""Fold sums of linear branches over one input into one layer.

    Σᵢ (conv(Wᵢ, x) + bᵢ) = conv(Σᵢ Wᵢ, x) + Σᵢ bᵢ

exact, borders included, where all have one stride, pad zeros around the same x, and agree on
2pᵢ − dᵢ(kᵢ − 1), so on the sizes of their outputs: with p = max pᵢ, the taps of branch i start at
p − pᵢ and are dᵢ apart. The identity is a tap of 1, a batch norm one of a, with bias t (RepVGG,
Ding et al. 2021). Taken where the one costs no more than the branches do. Computed in float64.
"""

from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from fxprune.folding.affine_maps import ANY_AXIS, affine_map, channel_axis
from fxprune.folding.convolutions import (
    Inexact,
    Layer,
    added,
    geometry_of,
    install_,
    layer_of,
    pointwise,
    summed,
)
from fxprune.folding.layer_costs import COSTS, output_places, unit_of
from fxprune.programs.observation import Observation, observe
from fxprune.programs.pipeline import Change, keeps_shapes
from fxprune.programs.program import Program
from fxprune.programs.sharing import sole_modules
from fxprune.runtime.kinds import SUMS
from fxprune.user_models.modules import device_of


@dataclass(frozen=True)
class _Branch:
    """A term of a sum as a layer over the sum's input; module: the convolution it is, if any."""

    term: fx.Node
    layer: Layer
    module: Any = None


@keeps_shapes
def fold_parallel_branches(program: Program, *, cost: str = "parameters") -> list[Change]:
    """Merge the linear terms of every sum that have one input, where that costs no more.

    cost: "parameters", "macs" or "latency".
    """
    sole = sole_modules(program)
    changes: list[Change] = []
    for sums in _trees(program.graph):
        terms = [term for node in sums for term in _operands(node) if term not in sums]
        for source in dict.fromkeys(_source(term, sole) for term in terms):
            if source is not None:
                changes += _consider(program, sums, terms, source, sole, cost)
    if changes:
        mutated = observe(program).mutated
        program.graph.eliminate_dead_code(lambda node: node in mutated or node.is_impure())
    return changes


def _trees(graph: fx.Graph) -> list[list[fx.Node]]:
    """Return the sums of sums: nodes that add two tensors, each read by the next alone."""
    found: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.nodes:
        if node.target not in SUMS or node.kwargs or len(node.all_input_nodes) != len(node.args):
            continue
        parts = [o for o in _operands(node) if o in found and len(o.users) == 1]
        found[node] = [node, *(n for part in parts for n in found.pop(part))]
    return list(found.values())


def _operands(node: fx.Node) -> list[fx.Node]:
    return [operand for operand in node.args if isinstance(operand, fx.Node)]


def _source(term: fx.Node, sole: dict[fx.Node, nn.Module]) -> fx.Node | None:
    """Return the input of a layer that nobody but the sum reads."""
    if geometry_of(sole.get(term)) is None or len(term.users) != 1:
        return None
    before = term.all_input_nodes[0]
    return before.all_input_nodes[0] if _adds_ones(before) else before


def _adds_ones(node: fx.Node) -> bool:
    """Tell whether a node appends a channel of ones, as merged chains do for their bias."""
    if node.target is not F.pad or node.kwargs != {"value": 1.0} or len(node.args) != 2:
        return False
    amounts: Any = node.args[1]
    return list(amounts[-2:]) == [0, 1] and not any(amounts[:-2])


def _consider(
    program: Program,
    sums: list[fx.Node],
    terms: list[fx.Node],
    source: fx.Node,
    sole: dict[fx.Node, nn.Module],
    cost: str,
) -> list[Change]:
    """Merge the branches over one source; those of another geometry are left."""
    seen = observe(program)
    same = [seen.values[term] == seen.values[node] for node in sums for term in _operands(node)]
    if seen.written(source) or not all(same):
        return []
    reader = next(term for term in terms if _source(term, sole) is source)
    branches = [b for t in terms if (b := _branch(program, t, source, reader, sole, seen))]
    convs = [branch for branch in branches if branch.module is not None]
    kept = max(convs, key=lambda branch: branch.layer.geometry.ones, default=None)
    if kept is None:
        return []
    group = [branch for branch in branches if _fits(branch, kept)]
    count, places = COSTS[cost], output_places(kept.layer.geometry, seen.values[kept.term])
    merged = summed([branch.layer.geometry for branch in group])
    apart = sum(count(b.layer.geometry, places) for b in group if b.module is not None)
    apart += sum(_parameters(sole.get(b.term)) for b in group if cost == "parameters")
    together = count(merged, places)
    if len(group) < 2 or together > apart:
        return []
    install_(kept.module, added([branch.layer for branch in group]))
    for branch in group:
        if branch is not kept:
            _drop(sums, branch.term)
    seen.macs[kept.term] = merged.weights * prod(places)
    names = ", ".join(str(b.term.target) for b in group if b is not kept)
    what = f"folded into {kept.term.target}: {apart} → {together} {unit_of(cost)}"
    detail = (("before", apart), ("after", together), ("cost", cost), ("folded", True))
    return [Change(names, what, detail)]


def _branch(
    program: Program,
    term: fx.Node,
    source: fx.Node,
    reader: fx.Node,
    sole: dict[fx.Node, nn.Module],
    seen: Observation,
) -> _Branch | None:
    """Read a term as a layer over `source`: a layer, an affine map, or the source itself."""
    if _source(term, sole) is source:
        module, geometry = sole[term], geometry_of(sole[term])
        if geometry is not None and term.all_input_nodes[0] is not source:
            geometry = replace(geometry, inputs=geometry.inputs - 1, ones=True)
        return None if geometry is None else _Branch(term, layer_of(module, geometry), module)
    axis = channel_axis(sole[reader], seen.values[source])
    if axis is None:
        return None
    channels, axes = seen.values[source].shape[axis], len(seen.values[source].shape) - 2
    axes = 0 if isinstance(sole[reader], nn.Linear) else axes
    if term is source:
        one = torch.ones(channels, dtype=torch.float64, device=device_of(program.module))
        return _Branch(term, pointwise(one, torch.zeros_like(one), axes))
    found = affine_map(program, term, sole.get(term), seen)
    if found is None or found.source is not source or len(term.users) != 1:
        return None
    if found.axis not in (ANY_AXIS, axis):
        return None
    scale, shift = found.scale.expand(channels), found.shift.expand(channels)
    return _Branch(term, pointwise(scale, shift, axes))


def _fits(branch: _Branch, kept: _Branch) -> bool:
    try:
        summed([kept.layer.geometry, branch.layer.geometry])
    except Inexact:
        return False
    return True


def _parameters(module: nn.Module | None) -> int:
    """Return how many numbers a batch norm has; layers are counted by their geometry."""
    if module is None or geometry_of(module) is not None:
        return 0
    return sum(parameter.numel() for parameter in module.parameters())


def _drop(sums: list[fx.Node], term: fx.Node) -> None:
    """Let a sum be its other operand."""
    parent = next(node for node in sums if term in _operands(node))
    other = next((o for o in _operands(parent) if o is not term), term)
    sums.remove(parent)
    parent.replace_all_uses_with(other)
    parent.graph.erase_node(parent)
