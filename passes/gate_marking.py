"""Take the width gates out of a model in training, and put back those that remain.

In between they are products with masks, 0 for the units to drop, which the channel analysis sees as
any other; the gates put back count the channels that remain.
"""

from dataclasses import replace

import torch
from torch import Tensor, fx, nn

from fxprune.gating.gates import UNGATED, Gates, WidthSite, width_gate
from fxprune.programs.observation import observe
from fxprune.programs.pipeline import Change
from fxprune.programs.program import Program, narrowed

_MASK = "_fxprune_mask_"


def mark_gates(program: Program, keep: Tensor) -> list[Change]:
    """Replace each width gate by a product with a mask: 0 at the units that go.

    keep: bool (units,).
    """
    gates = _gates(program)
    seen = observe(program)
    kept = torch.cat([keep.cpu(), torch.ones(1, dtype=torch.bool)])  # the last is UNGATED
    changes: list[Change] = []
    for node in program.graph.nodes:
        if node.target is not width_gate:
            continue
        place = _place(node)
        site = gates.width_sites[place]
        mask = kept[torch.tensor(site.units)].view(site.shape)
        name = f"{_MASK}{place}"
        program.module.register_buffer(
            name, mask.to(gates.dead_calls.device, seen.values[node].dtype)
        )
        with program.graph.inserting_before(node):
            node.meta["gate"] = node.args[1]
            node.target, node.args = torch.mul, (node.args[0], program.graph.get_attr(name))
        changes.append(Change(site.name, f"drops {int((~mask).sum())} of {mask.numel()} channels"))
    program.seen = None
    return changes


def restore_gates(program: Program) -> list[Change]:
    """Put gates in the place of the masks, over the units that remain, with the values they had."""
    old = _gates(program)
    sites = list(old.width_sites)
    masks: set[str] = set()
    for node in list(program.graph.nodes):
        if "gate" not in node.meta:
            continue
        vector, mask = node.meta.pop("gate"), node.args[1]
        node.target, node.args = width_gate, (node.args[0], vector)
        program.graph.erase_node(mask)
        place = _place(node)
        sites[place] = _remaining(old.width_sites[place], program.cuts.get(mask.target, []))
        masks.add(mask.target)
    for name in masks:  # evaluation and training may each have a gate of one site
        delattr(program.module, name)
    units = sorted({u for site in sites for u in site.units if u != UNGATED})
    number = {unit: index for index, unit in enumerate(units)}
    renumbered = [replace(s, units=tuple(number.get(u, UNGATED) for u in s.units)) for s in sites]
    program.module.gates = _rebuilt(old, renumbered, units)
    program.cuts["gates.width"] = [(0, torch.tensor(units, dtype=torch.long))]
    program.seen = None
    return [Change("gates", f"{len(units)} of {len(old.dead_calls)} units remain")]


def _remaining(site: WidthSite, cuts: list[tuple[int, Tensor]]) -> WidthSite:
    units = narrowed(torch.tensor(site.units).view(site.shape), cuts)
    return WidthSite(site.name, tuple(units.reshape(-1).tolist()), tuple(units.shape))


def _rebuilt(old: Gates, sites: list[WidthSite], units: list[int]) -> Gates:
    assert old.width is not None
    new = Gates(
        sites,
        old.depth_sites,
        width_init=1.0,
        linear_init=0.0,
        costs=None if old.costs is None else old.costs.restricted(units),
    ).to(old.width.device)
    positions = torch.tensor(units, dtype=torch.long, device=old.width.device)
    new.width = nn.Parameter(old.width.detach()[positions], requires_grad=old.width.requires_grad)
    new.linear = old.linear
    new.dead_calls = old.dead_calls[positions]
    new.importance = old.importance[positions]
    return new.train(old.training)


def _gates(program: Program) -> Gates:
    gates = program.module.gates
    assert isinstance(gates, Gates)
    return gates


def _place(node: fx.Node) -> int:
    vector = node.args[1]
    assert isinstance(vector, fx.Node)
    place = vector.args[1]
    assert isinstance(place, int)
    return place
