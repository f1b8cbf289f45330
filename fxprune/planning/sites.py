"""Where width gates would free something, and what.

A gate frees units where setting them to 0 does: where, with those channels 0 and weights generic,
every layer that reads them could absorb what they become. If a batch norm, or a learnt shift,
stands between the nonlinearity and its reader the gate goes behind it, since there a 0 would become
a constant that does not fold through a zero-padded border. Of several sites of the same units only
those stay from which a reader is reached first. Before it is proposed a plan is rehearsed: units go
on paper.
"""

from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxprune.dataflow.channels import Channels, analyse
from fxprune.dataflow.cuts import Cut
from fxprune.dataflow.gradients import reached_by_gradients
from fxprune.dataflow.rules import key_of, rewritten, rule_name
from fxprune.dataflow.tags import FIXED
from fxprune.dataflow.values import Barrier
from fxprune.errors import where
from fxprune.ops.elementwise import NONLINEARITIES, preserves_zero
from fxprune.planning.handwritten import is_handwritten
from fxprune.programs.observation import Observation, TensorSpec, observe
from fxprune.programs.pipeline import Change
from fxprune.programs.program import Program
from fxprune.runtime.kinds import PRODUCTS, SUMS


@dataclass
class Candidate:
    """A nonlinearity, and the node whose output its width gate would multiply."""

    name: str
    node: fx.Node
    position: fx.Node


@dataclass
class Plan:
    """Which classes of channels the gates would free, bool (classes,), and the sites that do it.

    candidates: those that are understood. refused: the others, and why.
    """

    channels: Channels
    freed: Tensor
    sites: list[Candidate]
    candidates: list[Candidate] = field(default_factory=list[Candidate])
    refused: list[Change] = field(default_factory=list[Change])

    def frees(self, candidate: Candidate) -> bool:
        """Tell whether a gate at the candidate would free any of its channels."""
        value = self.channels.values[candidate.position]
        return bool(self.freed[self.channels.classes[value.tags]].any())


def find_candidates(program: Program, seen: Observation) -> tuple[list[Candidate], list[Change]]:
    """Return the nonlinearities a gate may stand at, and a reason for each other one.

    These are those with f(0) = 0, and those written out as products, unless what they give is
    detached, or training does something else there.
    """
    modules: dict[str, nn.Module] = dict(program.module.named_modules())
    found: list[Candidate] = []
    refused: list[Change] = []
    names: dict[str, int] = {}
    gateable: set[fx.Node] = set()
    reached = _reached(program, seen)
    for node in program.graph.nodes:
        module = modules[str(node.target)] if node.op == "call_module" else None
        spec = seen.values[node]
        if is_handwritten(node, modules, seen, gateable):
            found.append(Candidate(_name(node, names), node, _behind(program, node, modules)))
        if key_of(node, module) not in NONLINEARITIES or not isinstance(spec, TensorSpec):
            continue
        name = _name(node, names)
        if preserves_zero(node, module, spec.dtype):
            gateable.add(node)
            found.append(Candidate(name, node, _behind(program, node, modules)))
        else:
            refused.append(Change(name, f"no gate: f(0) is not 0: {where(node)}"))
    for one in [one for one in found if not program.trains(one.node)]:
        found.remove(one)
        refused.append(Change(one.name, f"no gate: not so in training: {where(one.node)}"))
    for one in [one for one in found if one.position not in reached]:
        found.remove(one)
        refused.append(Change(one.name, f"no gate: no gradient reaches it: {where(one.node)}"))
    return found, refused


def _reached(program: Program, seen: Observation) -> set[fx.Node]:
    """Return the nodes that a loss has a gradient by, which is one of training."""
    twin = program.in_training
    if twin is None:
        return reached_by_gradients(program.graph, seen)
    there = reached_by_gradients(twin.program.graph, observe(twin.program))
    return {node for node, others in twin.twins.items() if not there.isdisjoint(others)}


def plan_sites(program: Program, candidates: Sequence[Candidate], seen: Observation) -> Plan:
    """Find which units the gates would free, and drop the sites that free nothing."""
    plan = _try(program, candidates, {}, seen)
    known = plan.channels.barriers
    understood = [_in_front_of(known, one) for one in candidates if one.node not in known]
    refused = [
        Change(one.name, f"no gate: {known[one.node]}: {where(one.node)}")
        for one in candidates
        if one.node in known
    ]
    if understood != list(candidates):
        plan = _try(program, understood, {}, seen)
    barriers: dict[fx.Node, str] = {}
    while True:
        plan = _without_needless(program, plan, barriers, seen)
        refusals = _rehearse(plan)
        if not refusals:
            plan.candidates, plan.refused = understood, refused
            return plan
        barriers |= refusals
        plan = _try(program, understood, barriers, seen)


def _without_needless(
    program: Program, plan: Plan, barriers: dict[fx.Node, str], seen: Observation
) -> Plan:
    """Drop the sites that the others do without."""
    needed = _reaching_readers(plan)
    if len(needed) == len(plan.sites):
        return plan
    fewer = _try(program, needed, barriers, seen)
    if not torch.equal(fewer.freed, plan.freed):
        return plan
    return Plan(plan.channels, plan.freed, fewer.sites)


def _name(node: fx.Node, names: dict[str, int]) -> str:
    """Name a site after its module; a module called again gets a number."""
    name = str(node.target) if node.op == "call_module" else node.name
    names[name] = names.get(name, 0) + 1
    return name if names[name] == 1 else f"{name}:{names[name]}"


def _behind(program: Program, node: fx.Node, modules: dict[str, nn.Module]) -> fx.Node:
    """Return where the gate of a nonlinearity goes: behind what is affine, in training as well."""
    last = _behind_affine(node, modules)
    return last if program.trains(last) else node


def _behind_affine(node: fx.Node, modules: dict[str, nn.Module]) -> fx.Node:
    """Follow a nonlinearity's only user while it is a batch norm, or a learnt scale and shift.

    Returns the last that shifts: behind a scale alone 0 is still 0.
    """
    last = node
    while len(node.users) == 1:
        node, before = next(iter(node.users)), node
        module = modules[str(node.target)] if node.op == "call_module" else None
        if rule_name(node, module) == "batch_norm" or _is_affine(node, before, SUMS):
            last = node
        elif not _is_affine(node, before, PRODUCTS):
            break
    return last


def _is_affine(node: fx.Node, operand: fx.Node, kinds: Collection[Hashable]) -> bool:
    """Tell whether a node, of one of the kinds, adds or multiplies a parameter or number."""
    others = [argument for argument in node.args if argument is not operand]
    return (
        node.op != "call_module"
        and node.target in kinds
        and not node.kwargs
        and len(others) == 1
        and (isinstance(others[0], (int, float)) or _is_parameter(others[0]))
    )


def _is_parameter(argument: Any) -> bool:
    return isinstance(argument, fx.Node) and argument.op == "get_attr"


def _in_front_of(barriers: dict[fx.Node, str], site: Candidate) -> Candidate:
    """Put a site at the nonlinearity itself if a batch norm behind it is not understood."""
    return Candidate(site.name, site.node, site.node) if site.position in barriers else site


def _try(
    program: Program,
    candidates: Sequence[Candidate],
    barriers: dict[fx.Node, str],
    seen: Observation,
) -> Plan:
    positions = {candidate.position for candidate in candidates}
    channels = analyse(program, generic=True, zeroed=positions, barriers=barriers, observation=seen)
    freed = torch.ones(len(channels.classes), dtype=torch.bool)
    freed[[FIXED, *channels.blocked()]] = False
    plan = Plan(channels, freed, [])
    plan.sites = [candidate for candidate in candidates if plan.frees(candidate)]
    return plan


def _reaching_readers(plan: Plan) -> list[Candidate]:
    """Return the sites from which a path meets a reader before it meets another site."""
    positions = {site.position for site in plan.sites}
    ends = {node for node, _ in plan.channels.reads} | {n for n, _, _ in plan.channels.keeps}
    ends |= plan.channels.barriers.keys()
    reach: dict[fx.Node, bool] = {}
    for node in reversed(plan.channels.values):
        reach[node] = any(
            user in ends or (user not in positions and reach[user]) for user in node.users
        )
    return [site for site in plan.sites if reach[site.position]]


def _rehearse(plan: Plan) -> dict[fx.Node, str]:
    """Remove half of the freed units on paper; return the operators that could not follow."""
    generator = torch.Generator().manual_seed(0)
    dead = plan.freed & (torch.rand(plan.freed.shape, generator=generator) < 0.5)
    classes = plan.channels.classes
    kept = ~dead
    for value in plan.channels.tensors():
        labels = classes[value.tags.reshape(-1)]
        if len(labels) and not bool(kept[labels].any()):
            kept[labels[0]] = True
    cut = Cut(classes, kept, kept)
    refused: dict[fx.Node, str] = {}
    for node, call in plan.channels.calls.items():
        if node in plan.channels.barriers:
            continue
        try:
            rewritten(call, cut)
        except Barrier as barrier:
            refused[node] = str(barrier)
    return refused
