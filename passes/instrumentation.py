"""Insert tri-state gates at the nonlinearities.

A width gate goes where setting its units to 0 frees something; which sites these are is the
question of `planning.sites`. A linearity gate goes where the layers around the nonlinearity could
be merged into one that costs less, the question of `planning.depth_sites`. What gets no gate is
reported, with the reason.
"""

import operator
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor, fx, nn

from fxprune.dataflow.tags import FIXED, compress
from fxprune.dataflow.values import Value
from fxprune.errors import NothingToDoError, where
from fxprune.gating.gates import UNGATED, DepthSite, Gates, WidthSite, linear_gate, width_gate
from fxprune.gating.penalties import paper_penalties
from fxprune.planning.accounts import account
from fxprune.planning.depth_sites import find_depth_sites
from fxprune.planning.sites import Candidate, Plan, find_candidates, plan_sites
from fxprune.programs.observation import Observation, TensorSpec, observe
from fxprune.programs.out_of_place import give_own_module, make_out_of_place, overwrites
from fxprune.programs.pipeline import Change, keeps_shapes
from fxprune.programs.program import Program
from fxprune.user_models.modules import device_of


@keeps_shapes
def insert_gates(
    program: Program,
    *,
    width_init: float = 0.75,
    linear_init: float = 0.25,
    penalties: nn.ModuleDict | None = None,
    ends: float = 1.0,
) -> list[Change]:
    """Put gates into the program, and `gates` and `penalties` beside its modules.

    ends: as in `find_depth_sites`.
    Raises `NothingToDoError`, with the reasons, if no gate could go anywhere.
    """
    seen = observe(program)
    candidates, refused = find_candidates(program, seen)
    plan = plan_sites(program, candidates, seen)
    mergeable, undecided = find_depth_sites(program, plan.candidates, seen, ends=ends)
    depth = {c.node: DepthSite(c.name, index) for index, c in enumerate(mergeable)}
    width, units = _width_sites(plan)
    sites = {node: site.index for node, site in depth.items()}
    changes = refused + plan.refused + _refusals(plan) + undecided
    if not width and not depth:
        found = changes or _untraced(program.graph)
        reasons = "; ".join(map(str, found)) or "it has no nonlinearity with f(0) = 0"
        raise NothingToDoError(f"no gate could be inserted: {reasons}")
    program.module.gates = Gates(
        width,
        list(depth.values()),
        width_init=width_init,
        linear_init=linear_init,
        costs=account(program, plan, seen, units, sites),
    ).to(device_of(program.module))
    program.module.penalties = paper_penalties() if penalties is None else penalties
    program.module.gates.train(program.module.training)
    _insert(program, plan.sites, depth, seen)
    changes += [Change(s.name, f"width gate over {len(s.units)} channels") for s in width]
    changes += [Change(s.name, "linearity gate") for s in depth.values()]
    return changes


def _untraced(graph: fx.Graph) -> list[Change]:
    """Return the submodules that are kept whole, whose nonlinearities nobody sees, and why."""
    calls = graph.find_nodes(op="call_module")
    reasons = {str(call.target): call.meta.get("leaf_because") for call in calls}
    return [
        Change(path, f"it could not be traced into: {because}")
        for path, because in reasons.items()
        if because
    ]


def _width_sites(plan: Plan) -> tuple[list[WidthSite], dict[int, int]]:
    """Return the sites, and the number of every freed class, in the order they meet them."""
    indices: dict[int, int] = {}
    sites: list[WidthSite] = []
    free = plan.freed.tolist()
    for site in plan.sites:
        value: Value = plan.channels.values[site.position]
        classes = compress(plan.channels.classes[value.tags])  # sub-pixels of a channel are one
        units = tuple(
            indices.setdefault(label, len(indices)) if free[label] else UNGATED
            for label in classes.reshape(-1).tolist()
        )
        sites.append(WidthSite(site.name, units, tuple(classes.shape)))
    return sites, indices


def _refusals(plan: Plan) -> list[Change]:
    """Say why a nonlinearity got no width gate."""
    gated = {site.node for site in plan.sites}
    reasons = plan.channels.blocked()
    changes: list[Change] = []
    for candidate in plan.candidates:
        if candidate.node in gated:
            continue
        if plan.frees(candidate):
            changes.append(Change(candidate.name, "no gate: one further on has the same units"))
            continue
        value: Value = plan.channels.values[candidate.position]
        labels = plan.channels.classes[value.tags.reshape(-1)].unique().tolist()
        found = (
            _made_by(plan, candidate) or _nearest(plan, candidate)
            if label == FIXED
            else reasons.get(label)
            for label in labels
        )
        reason = next(
            (text for text in found if text), f"its channels stay: {where(candidate.node)}"
        )
        changes.append(Change(candidate.name, f"no width gate: {reason}"))
    return changes


def _made_by(plan: Plan, candidate: Candidate) -> str:
    """Return which operator gives channels that all stay, and why, if one does."""

    def sources(node: fx.Node) -> Iterable[fx.Node]:
        value = plan.channels.values.get(node)
        stays = isinstance(value, Value) and bool((value.tags == FIXED).all())
        return node.all_input_nodes if stays else ()

    barriers = plan.channels.barriers
    found = (node for node in _outwards(candidate.position, sources) if node in barriers)
    return next((f"{barriers[node]}: {where(node)}" for node in found), "")


def _nearest(plan: Plan, candidate: Candidate) -> str:
    """Return why channels stay that have become one with all that stay: who says so first."""
    keeps: dict[fx.Node, list[tuple[Tensor, str]]] = {}
    for node, tags, reason in plan.channels.keeps:
        keeps.setdefault(node, []).append((tags, reason))
    for node in _outwards(candidate.position, lambda node: node.users):
        value = plan.channels.values[node]
        for user in node.users if isinstance(value, Value) else ():
            for tags, reason in keeps.get(user, ()):
                if bool(torch.isin(value.tags, tags).any()):
                    return f"{reason}: {where(user)}"
    return ""


def _outwards(
    start: fx.Node, neighbours: Callable[[fx.Node], Iterable[fx.Node]]
) -> Iterator[fx.Node]:
    """Yield a node and what is reached from it, the nearest first, each once."""
    waiting, met = deque([start]), {start}
    while waiting:
        node = waiting.popleft()
        yield node
        new = [other for other in neighbours(node) if other not in met]
        waiting += new
        met |= set(new)


def _insert(
    program: Program,
    sites: Sequence[Candidate],
    depth: dict[fx.Node, DepthSite],
    seen: Observation,
) -> None:
    """Rewrite the graph: one call of the gates, then a gate function at every site."""
    graph, twin = program.graph, program.in_training
    gates, vectors = _call_gates(graph, len(sites) + len(depth))
    _note_gates(program, gates, vectors, seen)
    there: list[fx.Node] = []
    if twin is not None:
        twin.program.module.gates = program.module.gates
        _, there = _call_gates(twin.program.graph, len(vectors))
    gated: dict[fx.Node, fx.Node] = {}
    calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
    for place, node in enumerate(depth, len(sites)):
        twins = [] if twin is None else twin.twins[node]
        if calls[node.target] > 1 and overwrites(node, program.module):
            calls[node.target] -= 1
            give_own_module(node, program.module)  # the other calls may have to overwrite
            for other in twins:
                other.target = node.target
        if make_out_of_place(node, program.module):
            seen.mutated.pop(node, None)
        gated[node] = _gate_linearity(node, vectors[place])
        seen.add(gated[node], seen.values[node])
        for other in twins:
            make_out_of_place(other, program.module)
            gated[other] = _gate_linearity(other, there[place])
    for place, site in enumerate(sites):
        position = gated.get(site.position, site.position)
        gate = _insert_after(position, width_gate, (position, vectors[place]))
        seen.add(gate, seen.values[position])
        for other in [] if twin is None else twin.twins[site.position]:
            position = gated.get(other, other)
            _insert_after(position, width_gate, (position, there[place]))


def _call_gates(graph: fx.Graph, count: int) -> tuple[fx.Node, list[fx.Node]]:
    """Let a graph call the gates first of all, and return that call and the vectors it gives."""
    with graph.inserting_before(next(n for n in graph.nodes if n.op != "placeholder")):
        gates = graph.call_module("gates")
        vectors = (graph.call_function(operator.getitem, (gates, place)) for place in range(count))
        return gates, list(vectors)


def _gate_linearity(node: fx.Node, vector: fx.Node) -> fx.Node:
    return _insert_after(node, linear_gate, (node.all_input_nodes[0], node, vector))


def _note_gates(
    program: Program, gates: fx.Node, vectors: Sequence[fx.Node], seen: Observation
) -> None:
    """Write down what the gates will return: parts of one tensor."""
    module = program.module.gates
    assert isinstance(module, Gates)
    with torch.no_grad():
        parts = tuple(TensorSpec(tuple(part.shape), part.dtype) for part in module())
    seen.add(gates, parts)
    for vector, part in zip(vectors, parts, strict=True):
        seen.values[vector], seen.alias[vector] = part, gates


def _insert_after(
    node: fx.Node, function: Callable[..., Tensor], args: tuple[fx.Node, ...]
) -> fx.Node:
    """Put a call behind `node` and let everybody else who used `node` use the call."""
    with node.graph.inserting_after(node):
        call = node.graph.call_function(function, args)
    call.meta["source"] = node.meta.get("source")
    node.replace_all_uses_with(call, delete_user_cb=lambda user: user is not call)
    return call
