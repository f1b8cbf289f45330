"""Insert tri-state gates at the nonlinearities.

A width gate goes where setting its units to 0 frees something: where, with those channels 0 and
weights generic, every layer that reads them could absorb what they become. If a batch norm stands
between the nonlinearity and its reader the gate goes behind it, since there a 0 would become a
constant that does not fold through a zero-padded border. Of several sites of the same units only
those stay from which a reader is reached first. A linearity gate goes where the layers around the
nonlinearity could be merged into one that costs less.
"""

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from fxprune.channels import Channels, analyse
from fxprune.errors import NothingToDoError, where
from fxprune.gates import UNGATED, DepthSite, Gates, WidthSite, linear_gate, width_gate
from fxprune.observation import Observation, observe
from fxprune.ops.elementwise import NONLINEARITIES, preserves_zero
from fxprune.penalties import paper_penalties
from fxprune.pipeline import Change
from fxprune.program import Program, make_out_of_place
from fxprune.rules import Barrier, Call, Cut, Value, key_of, rule_for
from fxprune.tags import FIXED


@dataclass
class _Candidate:
    """A nonlinearity, and the node whose output its width gate would multiply."""

    name: str
    node: fx.Node
    position: fx.Node


@dataclass
class _Plan:
    channels: Channels
    freed: Tensor
    sites: list[_Candidate]


def insert_gates(
    program: Program,
    *,
    width_init: float = 0.75,
    linear_init: float = 0.25,
    penalties: nn.ModuleDict | None = None,
) -> list[Change]:
    """Put gates into the program, and `gates` and `penalties` beside its modules.

    Raises `NothingToDoError`, with the reasons, if no gate could go anywhere.
    """
    seen = observe(program)
    candidates, refused = _candidates(program, seen)
    plan = _plan(program, candidates, seen)
    depth = _depth_sites(program, candidates)
    width = _width_sites(plan)
    changes = refused + _refusals(plan, candidates)
    if not width and not depth:
        reasons = "; ".join(map(str, changes)) or "it has no nonlinearity with f(0) = 0"
        raise NothingToDoError(f"no gate could be inserted: {reasons}")
    program.module.gates = Gates(
        width, list(depth.values()), width_init=width_init, linear_init=linear_init
    )
    program.module.penalties = paper_penalties() if penalties is None else penalties
    program.module.gates.train(program.module.training)
    _insert(program, plan.sites, depth)
    changes += [Change(s.name, f"width gate over {len(s.units)} channels") for s in width]
    changes += [Change(s.name, "linearity gate") for s in depth.values()]
    return changes


def _candidates(program: Program, seen: Observation) -> tuple[list[_Candidate], list[Change]]:
    """Return the nonlinearities with f(0) = 0, and a reason for each other one."""
    channels = analyse(program, generic=True, observation=seen)
    found: list[_Candidate] = []
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
            found.append(_Candidate(name, node, _behind_affine(node, channels)))
    return found, refused


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


def _plan(program: Program, candidates: Sequence[_Candidate], seen: Observation) -> _Plan:
    """Find which units the gates would free, and drop the sites that free nothing."""
    barriers: dict[fx.Node, str] = {}
    while True:
        plan = _try(program, candidates, barriers, seen)
        needed = [site for site in plan.sites if _reaches_reader(site, plan)]
        fewer = _try(program, needed, barriers, seen)
        if torch.equal(fewer.freed, plan.freed):
            plan = _Plan(plan.channels, plan.freed, fewer.sites)
        refusals = _rehearse(plan)
        if not refusals:
            return plan
        barriers |= refusals


def _try(
    program: Program,
    candidates: Sequence[_Candidate],
    barriers: dict[fx.Node, str],
    seen: Observation,
) -> _Plan:
    positions = {candidate.position for candidate in candidates}
    channels = analyse(program, generic=True, zeroed=positions, barriers=barriers, observation=seen)
    freed = torch.ones(len(channels.classes), dtype=torch.bool)
    freed[[FIXED, *channels.blocked()]] = False
    sites = [c for c in candidates if bool(_freed(c, channels, freed).any())]
    return _Plan(channels, freed, sites)


def _freed(candidate: _Candidate, channels: Channels, freed: Tensor) -> Tensor:
    value = channels.values[candidate.position]
    return freed[channels.classes[value.tags]]


def _reaches_reader(site: _Candidate, plan: _Plan) -> bool:
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


def _rehearse(plan: _Plan) -> dict[fx.Node, str]:
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


def _width_sites(plan: _Plan) -> list[WidthSite]:
    """Give every freed class a number, in the order in which the sites meet them."""
    indices: dict[int, int] = {}
    sites: list[WidthSite] = []
    for site in plan.sites:
        value: Value = plan.channels.values[site.position]
        units: list[int] = []
        for label in plan.channels.classes[value.tags.reshape(-1)].tolist():
            free = bool(plan.freed[label])
            units.append(indices.setdefault(label, len(indices)) if free else UNGATED)
        sites.append(WidthSite(site.name, tuple(units), tuple(value.tags.shape)))
    return sites


def _refusals(plan: _Plan, candidates: Sequence[_Candidate]) -> list[Change]:
    """Say why a nonlinearity got no width gate."""
    gated = {site.node for site in plan.sites}
    reasons = plan.channels.blocked()
    changes: list[Change] = []
    for candidate in candidates:
        if candidate.node in gated:
            continue
        if bool(_freed(candidate, plan.channels, plan.freed).any()):
            changes.append(Change(candidate.name, "no gate: one further on has the same units"))
            continue
        value: Value = plan.channels.values[candidate.position]
        labels = plan.channels.classes[value.tags.reshape(-1)].unique().tolist()
        found = (reasons.get(label) for label in labels)
        reason = next(
            (text for text in found if text), f"its channels stay: {where(candidate.node)}"
        )
        changes.append(Change(candidate.name, f"no width gate: {reason}"))
    return changes


def _depth_sites(program: Program, candidates: Sequence[_Candidate]) -> dict[fx.Node, DepthSite]:
    """Return the nonlinearities between two linear layers that would be cheaper merged."""
    modules = dict(program.module.named_modules())
    found: dict[fx.Node, DepthSite] = {}
    for candidate in candidates:
        before = _neighbour(candidate.node, modules, forward=False)
        after = _neighbour(candidate.node, modules, forward=True)
        if before is None or after is None:
            continue
        merged = before.in_features * after.out_features
        apart = before.out_features * (before.in_features + after.out_features)
        if merged < apart:
            found[candidate.node] = DepthSite(candidate.name, len(found))
    return found


def _neighbour(node: fx.Node, modules: dict[str, nn.Module], *, forward: bool) -> nn.Linear | None:
    """Return the linear layer next to a node, if nothing but dropout stands between."""
    while True:
        if forward:
            if len(node.users) != 1:
                return None
            node = next(iter(node.users))
        else:
            if len(node.all_input_nodes) != 1 or len(node.all_input_nodes[0].users) != 1:
                return None
            node = node.all_input_nodes[0]
        if node.op != "call_module":
            return None
        module = modules[str(node.target)]
        if type(module) is nn.Linear:
            return module
        if not isinstance(module, (nn.Dropout, nn.Identity)):
            return None


def _insert(program: Program, sites: Sequence[_Candidate], depth: dict[fx.Node, DepthSite]) -> None:
    """Rewrite the graph: one call of the gates, then a gate function at every site."""
    graph = program.graph
    with graph.inserting_before(next(n for n in graph.nodes if n.op != "placeholder")):
        gates = graph.call_module("gates")
        places = range(len(sites) + len(depth))
        vectors = [graph.call_function(operator.getitem, (gates, place)) for place in places]
    gated: dict[fx.Node, fx.Node] = {}
    for (node, _), vector in zip(depth.items(), vectors[len(sites) :], strict=True):
        make_out_of_place(node, program.module)
        gated[node] = _insert_after(node, linear_gate, (node.all_input_nodes[0], node, vector))
    for site, vector in zip(sites, vectors, strict=False):
        position = gated.get(site.position, site.position)
        _insert_after(position, width_gate, (position, vector))


def _insert_after(
    node: fx.Node, function: Callable[..., Tensor], args: tuple[fx.Node, ...]
) -> fx.Node:
    """Put a call behind `node` and let everybody else who used `node` use the call."""
    with node.graph.inserting_after(node):
        call = node.graph.call_function(function, args)
    call.meta["source"] = node.meta.get("source")
    node.replace_all_uses_with(call, delete_user_cb=lambda user: user is not call)
    return call
