"""Where width gates would free something, and what.

A gate frees units where setting them to 0 does: where, with those channels 0 and weights generic,
every layer that reads them could absorb what they become. If a batch norm stands between the
nonlinearity and its reader the gate goes behind it, since there a 0 would become a constant that
does not fold through a zero-padded border. Of several sites of the same units only those stay from
which a reader is reached first. Before it is proposed a plan is rehearsed: units go on paper.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from fxprune.channels import Channels, analyse
from fxprune.cuts import Cut
from fxprune.errors import where
from fxprune.observation import Observation
from fxprune.ops.elementwise import NONLINEARITIES, preserves_zero
from fxprune.pipeline import Change
from fxprune.program import Program
from fxprune.rules import Call, key_of, rule_for
from fxprune.tags import FIXED
from fxprune.values import Barrier


@dataclass
class Candidate:
    """A nonlinearity, and the node whose output its width gate would multiply."""

    name: str
    node: fx.Node
    position: fx.Node


@dataclass
class Plan:
    """Which classes of channels the gates would free, bool (classes,), and the sites that do it."""

    channels: Channels
    freed: Tensor
    sites: list[Candidate]

    def frees(self, candidate: Candidate) -> bool:
        """Tell whether a gate at the candidate would free any of its channels."""
        value = self.channels.values[candidate.position]
        return bool(self.freed[self.channels.classes[value.tags]].any())


def find_candidates(program: Program, seen: Observation) -> tuple[list[Candidate], list[Change]]:
    """Return the nonlinearities with f(0) = 0, and a reason for each other one."""
    channels = analyse(program, generic=True, observation=seen)
    found: list[Candidate] = []
    refused: list[Change] = []
    names: dict[str, int] = {}
    for node, call in channels.calls.items():
        if key_of(node, call.module) not in NONLINEARITIES:
            continue
        name = _name(node, names)
        if node in channels.barriers:
            refused.append(Change(name, f"no gate: {channels.barriers[node]}: {where(node)}"))
        elif not preserves_zero(call):
            refused.append(Change(name, f"no gate: f(0) is not 0: {where(node)}"))
        else:
            found.append(Candidate(name, node, _behind_affine(node, channels)))
    return found, refused


def plan_sites(program: Program, candidates: Sequence[Candidate], seen: Observation) -> Plan:
    """Find which units the gates would free, and drop the sites that free nothing."""
    barriers: dict[fx.Node, str] = {}
    while True:
        plan = _try(program, candidates, barriers, seen)
        needed = [site for site in plan.sites if _reaches_reader(site, plan)]
        if len(needed) < len(plan.sites):
            fewer = _try(program, needed, barriers, seen)
            if torch.equal(fewer.freed, plan.freed):
                plan = Plan(plan.channels, plan.freed, fewer.sites)
        refusals = _rehearse(plan)
        if not refusals:
            return plan
        barriers |= refusals


def _name(node: fx.Node, names: dict[str, int]) -> str:
    """Name a site after its module; a module called again gets a number."""
    name = str(node.target) if node.op == "call_module" else node.name
    names[name] = names.get(name, 0) + 1
    return name if names[name] == 1 else f"{name}:{names[name]}"


def _behind_affine(node: fx.Node, channels: Channels) -> fx.Node:
    """Follow a nonlinearity's only user while it is a batch norm."""
    while len(node.users) == 1:
        user = next(iter(node.users))
        call = channels.calls.get(user)
        if call is None or user in channels.barriers or not _is_batch_norm(call):
            return node
        node = user
    return node


def _is_batch_norm(call: Call) -> bool:
    return rule_for(call.node, call.module).name == "batch_norm"


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


def _reaches_reader(site: Candidate, plan: Plan) -> bool:
    """Tell whether a path from the site meets a reader before it meets another site."""
    others = {other.position for other in plan.sites}
    readers = {node for node, _ in plan.channels.reads} | {n for n, _, _ in plan.channels.keeps}
    pending, visited = list(site.position.users), set[fx.Node]()
    while pending:
        node = pending.pop()
        if node in readers or node in plan.channels.barriers:
            return True
        if node in visited or node in others:
            continue
        visited.add(node)
        pending.extend(node.users)
    return False


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
            rule_for(node, call.module).rewrite(call, cut)
        except Barrier as barrier:
            refused[node] = str(barrier)
    return refused
