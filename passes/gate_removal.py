"""Take the gates out of a trained model: what they decided becomes ordinary operators.

A width gate with all units kept is dropped; one with some removed becomes a multiplication by a
buffer of zeros and ones, which the channel analysis sees as any other. A linearity gate becomes one
of its two branches. After this pass a gated model is a plain model with exact zeros in it.
"""

import torch
from torch import fx, nn

from fxprune.gating.gates import UNGATED, Gates, linear_gate, width_gate
from fxprune.planning.lowering import raise_
from fxprune.programs.observation import Observation, TensorSpec
from fxprune.programs.pipeline import Change, keeps_shapes
from fxprune.programs.program import Program


@keeps_shapes
def remove_gates(program: Program) -> list[Change]:
    """Replace every gate by its verdict, and drop the gates and penalties."""
    module = program.module
    gates = getattr(module, "gates", None)
    if not isinstance(gates, Gates):
        return []
    _forget_written_gates(program)
    changes: list[Change] = []
    for node in list(program.graph.nodes):
        if node.target is width_gate:
            changes += _resolve_width(program, gates, node)
        elif node.target is linear_gate:
            changes += _resolve_depth(gates, node)
    for node in reversed(list(program.graph.nodes)):
        if (node.op == "call_module" and node.target == "gates") or _picks_gate(node):
            program.graph.erase_node(node)
    raise_(module)
    del module.gates
    if isinstance(getattr(module, "penalties", None), nn.Module):
        del module.penalties
    return changes


def _forget_written_gates(program: Program) -> None:
    """Forget a run that overwrote what a gate returned: it would be the gate's input now."""
    seen: Observation | None = program.seen
    written = () if seen is None else (node for nodes in seen.mutated.values() for node in nodes)
    if any(node.target in (width_gate, linear_gate) for node in written):
        program.seen = None


def _picks_gate(node: fx.Node) -> bool:
    source = node.args[0] if node.args else None
    return isinstance(source, fx.Node) and source.op == "call_module" and source.target == "gates"


def _place(node: fx.Node) -> int:
    """Return the place of the vector a gate takes, its last argument, in what the gates return."""
    picked = node.args[-1]
    assert isinstance(picked, fx.Node)
    place = picked.args[1]
    assert isinstance(place, int)
    return place


def _resolve_width(program: Program, gates: Gates, node: fx.Node) -> list[Change]:
    module: fx.GraphModule = program.module
    seen: Observation | None = program.seen
    site = gates.width_sites[_place(node)]
    kept = gates.kept(site)
    value = node.args[0]
    assert isinstance(value, fx.Node)
    if bool(kept.all()):
        node.replace_all_uses_with(value)
        node.graph.erase_node(node)
    else:
        name = f"{node.name}_mask"
        # Of type bool, so that the product has the type of the activation, whatever that is.
        mask = kept.to(next(gates.parameters()).device).view(site.shape)
        module.register_buffer(name, mask)
        with node.graph.inserting_before(node):
            buffer = node.graph.get_attr(name)
            product = node.graph.call_function(torch.mul, (value, buffer))
        product.meta["source"] = node.meta.get("source")
        if seen is not None:
            seen.add(buffer, TensorSpec(tuple(mask.shape), mask.dtype))
            seen.add(product, seen.values[value])
        node.replace_all_uses_with(product)
        node.graph.erase_node(node)
    gated = sum(unit != UNGATED for unit in site.units)
    live = int(kept.sum())
    return [
        Change(
            site.name,
            f"keeps {live} of {len(kept)} channels",
            (("live", live), ("total", len(kept)), ("gated", gated)),
        )
    ]


def _resolve_depth(gates: Gates, node: fx.Node) -> list[Change]:
    site = gates.depth_sites[_place(node) - len(gates.width_sites)]
    linear = bool(gates.linearised()[site.index])
    branch = node.args[0 if linear else 1]
    assert isinstance(branch, fx.Node)
    other = node.args[1 if linear else 0]
    assert isinstance(other, fx.Node)
    node.replace_all_uses_with(branch)
    node.graph.erase_node(node)
    if not other.users:
        other.graph.erase_node(other)
    return [Change(site.name, "is linear" if linear else "stays nonlinear", (("linear", linear),))]
