"""The channel dataflow: which channels are tied, constant, live. It asks and never edits.

Forward, every node's rule gives its outputs tags and constants, and reports ties and reads
(`analyse`). Then ties are closed, so that what remains of every tensor will be a box. Backward, a
class of tags is live if something live reads it where it is not a foldable constant (`settle`):
optimistic, all dead but what must stay, grown until nothing changes, as in aggressive dead-code
elimination. Linear in nodes and channels; no recursion.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from fxprune import ops as ops
from fxprune.errors import where
from fxprune.observation import Observation, TensorSpec, observe
from fxprune.pipeline import Change
from fxprune.program import Program
from fxprune.rules import (
    Barrier,
    Call,
    Cut,
    Flow,
    Read,
    ShapeOf,
    State,
    Value,
    as_value,
    barrier_flow,
    fixed,
    flatten,
    rule_for,
)
from fxprune.tags import FIXED, TagTable, varying_axes


@dataclass
class Channels:
    """What the forward analysis found.

    values: what each node stands for (`Value`, `State`, plain Python, nested).
    classes: the class of every tag, int64 (tags,). barriers: why a node's channels must stay.
    """

    values: dict[fx.Node, Any]
    calls: dict[fx.Node, Call]
    states: dict[str, State]
    names: dict[str, list[str]]
    classes: Tensor
    reads: list[tuple[fx.Node, Read]]
    keeps: list[tuple[fx.Node, Tensor, str]]
    barriers: dict[fx.Node, str]

    def tensors(self) -> list[Value]:
        """Return every tensor value of the program, parameters used as operands among them."""
        return [leaf for leaf in flatten(list(self.values.values())) if isinstance(leaf, Value)]

    def blocked(self) -> dict[int, str]:
        """Return, for every class no gate could free, the first reason found."""
        found: dict[int, str] = {}
        for node, tags, reason in self.keeps:
            self._note(found, tags, f"{reason}: {where(node)}")
        for node, read in self.reads:
            self._note(found, read.inputs[~read.foldable], f"{read.reason}: {where(node)}")
        return found

    def _note(self, found: dict[int, str], tags: Tensor, reason: str) -> None:
        for label in self.classes[tags.reshape(-1)].unique().tolist():
            found.setdefault(label, reason)


def analyse(
    program: Program,
    *,
    generic: bool = False,
    zeroed: Collection[fx.Node] = (),
    barriers: Mapping[fx.Node, str] | None = None,
    observation: Observation | None = None,
) -> Channels:
    """Run the forward analysis.

    generic: only what holds for whatever weights training may find. zeroed: nodes whose output is
    taken to be 0 in every channel. barriers: nodes to treat as unknown operators, and why.
    """
    return _Forward(program, generic, zeroed, barriers or {}, observation).run()


def settle(channels: Channels) -> Cut:
    """Find the classes that are live, and what stays beside them so that no tensor is emptied."""
    classes = channels.classes
    live = torch.zeros(len(classes), dtype=torch.bool)
    live[FIXED] = True
    for _, tags, _ in channels.keeps:
        live[classes[tags.reshape(-1)]] = True
    _grow(channels, live)
    kept = live.clone()
    for tags in _axes(channels):
        if not bool(kept[classes[tags]].any()):
            kept[classes[tags[0]]] = True
    return Cut(classes, live, kept)


def refusals(program: Program) -> list[Change]:
    """Return the operators of a program around which every channel stays, and why."""
    channels = analyse(program)
    return [
        Change(where(node), f"all channels around it stay: {reason}")
        for node, reason in channels.barriers.items()
    ]


def _grow(channels: Channels, live: Tensor) -> None:
    classes = channels.classes
    reads = [
        (classes[read.outputs], classes[read.inputs], read.pattern, ~read.foldable)
        for _, read in reversed(channels.reads)
    ]
    seen = [-1] * len(reads)
    changed = True
    while changed:
        changed = False
        for place, (outputs, inputs, pattern, solid) in enumerate(reads):
            alive = live[outputs]
            count = int(alive.sum())
            if count == seen[place]:
                continue
            seen[place] = count
            if count == 0:
                continue
            needed = solid if pattern is None else solid & pattern[alive].any(0)
            new = inputs[needed]
            if not bool(live[new].all()):
                live[new] = True
                changed = True


def _axes(channels: Channels) -> list[Tensor]:
    """Return the tags of every tensor and every cut axis of a parameter: none may be emptied."""
    found = [value.tags.reshape(-1) for value in channels.tensors()]
    for state in channels.states.values():
        found.extend(state.axes.values())
        if state.whole is not None:
            found.append(state.whole.reshape(-1))
    return [tags for tags in found if len(tags)]


class _Forward:
    def __init__(
        self,
        program: Program,
        generic: bool,
        zeroed: Collection[fx.Node],
        barriers: Mapping[fx.Node, str],
        observation: Observation | None,
    ) -> None:
        self.program = program
        self.generic = generic
        self.zeroed = zeroed
        self.forced = barriers
        self.seen = observation or observe(program)
        self.table = TagTable()
        self.found = Channels({}, {}, {}, {}, torch.empty(0), [], [], {})
        self.tensors: dict[int, str] = {}
        self.users: dict[str, int] = {}
        self.modules = dict(program.module.named_modules())
        self._name_tensors()
        self.overwritten = self._overwritten()

    def run(self) -> Channels:
        for node in self.program.graph.nodes:
            value = self._visit(node)
            if node in self.zeroed:
                value = pytree.tree_map_only(Value, _zero, value)
            if self.seen.alias[node] in self.overwritten:
                value = pytree.tree_map_only((Value, State), self._fix, value)
            self.found.values[node] = value
        self._close_boxes()
        return self.found

    def _visit(self, node: fx.Node) -> Any:
        spec = self.seen.values[node]
        if node.op == "placeholder":
            return pytree.tree_map_only(TensorSpec, fixed, spec)
        if node.op == "get_attr":
            return self._state(str(node.target)) or spec
        if node.op == "output":
            return self._output(node)
        return self._call(node, spec)

    def _output(self, node: fx.Node) -> Any:
        result = self._arguments(node.args)[0]
        for leaf in flatten(result):
            value = as_value(leaf)
            if isinstance(value, Value):
                self.found.keeps.append((node, value.tags, "it reaches an output"))
        return None

    def _call(self, node: fx.Node, spec: Any) -> Any:
        module = self.modules[str(node.target)] if node.op == "call_module" else None
        args, kwargs = self._arguments(node.args), self._arguments(node.kwargs)
        call = Call(
            node, module, args, kwargs, spec, self._state, self.generic, self._sole_use(node)
        )
        leaves = flatten((args, kwargs))
        if not any(isinstance(leaf, (Value, State, ShapeOf)) for leaf in leaves):
            return pytree.tree_map_only(TensorSpec, fixed, spec)
        self.found.calls[node] = call
        flow = self._flow(node, call)
        for left, right in flow.ties:
            self.table.tie(left, right)
        self.found.reads.extend((node, read) for read in flow.reads)
        self.found.keeps.extend((node, tags, reason) for tags, reason in flow.keeps)
        return flow.outputs

    def _flow(self, node: fx.Node, call: Call) -> Flow:
        try:
            if node in self.forced:
                raise Barrier(self.forced[node])
            return rule_for(node, call.module).flow(call)
        except Barrier as barrier:
            self.found.barriers[node] = str(barrier)
            self._keep_parameters(node)
            return barrier_flow(call, str(barrier))

    def _keep_parameters(self, node: fx.Node) -> None:
        """Keep whole what a barrier holds: another user may share it."""
        if node.op != "call_module":
            return
        for name, _ in (
            *self.modules[str(node.target)].named_parameters(),
            *self.modules[str(node.target)].named_buffers(),
        ):
            state = self._state(f"{node.target}.{name}")
            if state is not None:
                self._fix(state)

    def _fix(self, value: Value | State) -> Value:
        value = value.value() if isinstance(value, State) else value
        self.table.tie(value.tags, torch.zeros_like(value.tags))
        return Value(
            value.shape, value.dtype, value.tags, torch.full_like(value.constants, torch.nan)
        )

    def _arguments(self, raw: Any) -> Any:
        return map_arg(raw, lambda node: self.found.values[node])

    def _state(self, name: str) -> State | None:
        owner, _, attribute = name.rpartition(".")
        tensor = getattr(self.modules.get(owner), attribute, None)
        if not isinstance(tensor, Tensor):
            return None
        key = self.tensors.setdefault(id(tensor), name)
        if key not in self.found.states:
            self.found.states[key] = State(key, tensor, self.table, self.generic)
        return self.found.states[key]

    def _name_tensors(self) -> None:
        for prefix, module in self.program.module.named_modules(remove_duplicate=False):
            for name, tensor in (*module._parameters.items(), *module._buffers.items()):
                if tensor is not None:
                    full = f"{prefix}.{name}" if prefix else name
                    first = self.tensors.setdefault(id(tensor), full)
                    self.found.names.setdefault(first, []).append(full)
        for node in self.program.graph.nodes:
            if node.op == "call_module":
                module = self.modules[node.target]
                used = [self.tensors[id(t)] for t in (*module.parameters(), *module.buffers())]
            elif node.op == "get_attr" and (state := self._state(str(node.target))):
                used = [state.name]
            else:
                continue
            for name in used:
                self.users[name] = self.users.get(name, 0) + 1

    def _sole_use(self, node: fx.Node) -> bool:
        if node.op != "call_module":
            return False
        module = self.modules[str(node.target)]
        return all(self.users[self.tensors[id(t)]] == 1 for t in module.parameters())

    def _overwritten(self) -> set[fx.Node]:
        """Return the alias groups of which a member is read after another was written to."""
        order = {node: place for place, node in enumerate(self.program.graph.nodes)}
        groups: dict[fx.Node, list[fx.Node]] = {}
        for node, group in self.seen.alias.items():
            groups.setdefault(group, []).append(node)
        unsafe: set[fx.Node] = set()
        for writer, written in self.seen.mutated.items():
            for node in written:
                group = self.seen.alias[node]
                for member in groups[group]:
                    if order[member] < order[writer] and any(
                        order[user] > order[writer] for user in member.users
                    ):
                        unsafe.add(group)
        return unsafe

    def _close_boxes(self) -> None:
        """Tie channels until every tensor's vary along one axis: what remains will be a box."""
        self.found.classes = self.table.classes()
        wide = [value.tags for value in self.found.tensors() if len(varying_axes(value.tags)) > 1]
        wide += [
            state.whole
            for state in self.found.states.values()
            if state.whole is not None and len(varying_axes(state.whole)) > 1
        ]
        while wide:
            rest: list[Tensor] = []
            for tags in wide:
                axis = _free_axis(self.found.classes[tags])
                if axis is None:
                    continue
                front = tags.movedim(axis, 0).reshape(tags.shape[axis], -1)
                self.table.tie(front[:, :1], front[:, 1:])
                rest.append(tags)
            if not rest:
                return
            wide = rest
            self.found.classes = self.table.classes()


def _free_axis(classes: Tensor) -> int | None:
    """Return the axis to keep apart, the one of most classes; None if classes vary along one."""
    axes = [
        axis
        for axis in varying_axes(classes)
        if not torch.equal(classes, classes.narrow(axis, 0, 1).expand(classes.shape))
    ]
    if len(axes) < 2:
        return None
    return max(axes, key=lambda axis: classes.shape[axis])


def _zero(value: Value) -> Value:
    return Value(value.shape, value.dtype, value.tags, torch.zeros_like(value.constants))
