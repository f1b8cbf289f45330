"""Which channels are tied and which constant: the forward half of the analysis. It never edits.

Every node's rule gives its outputs tags and constants, and reports ties and reads (`analyse`).
Then ties are closed, so that what remains of every tensor will be a box; which classes of tags are
live is the question of `liveness`. Linear in nodes and channels; no recursion.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from fxprune import ops as ops
from fxprune.dataflow.boxes import close_boxes
from fxprune.dataflow.cuts import Cut
from fxprune.dataflow.rules import CPU, FILLED, Call, Flow, Read, barrier_flow, flow_of, rule_name
from fxprune.dataflow.tags import TagTable
from fxprune.dataflow.values import (
    Barrier,
    OfSizes,
    ShapeOf,
    SizeOf,
    State,
    Value,
    as_value,
    fixed,
    flatten,
)
from fxprune.errors import where
from fxprune.ops.settled import require_settled
from fxprune.programs.observation import Observation, TensorSpec, observe
from fxprune.programs.overwrites import Overwrites
from fxprune.programs.program import Program
from fxprune.user_models.modules import device_of, tensors_in


@dataclass
class Channels:
    """What the forward analysis found.

    values: what each node stands for (`Value`, `State`, plain Python, nested). uses: the names of
    the parameters and buffers a node uses.
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
    uses: dict[fx.Node, list[str]]
    settled: Cut | None = None  # what `liveness.settle` found: it asks once

    def tensors(self, without: Collection[fx.Node] = ()) -> list[Value]:
        """Return every tensor value of the program but those of some nodes."""
        found = [value for node, value in self.values.items() if node not in without]
        return [leaf for leaf in flatten(found) if isinstance(leaf, Value)]

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
    absorbing: bool = True,
    trained: bool = False,
) -> Channels:
    """Run the forward analysis.

    generic: only what holds for whatever weights training may find. zeroed: nodes whose output is
    taken to be 0 in every channel. barriers: nodes to treat as unknown operators, and why.
    absorbing: layers may take constants into their biases; else only zeros need not be read.
    trained: constant is only what training mode computes, too, where batch norms and dropout do
    something else.
    """
    return _Forward(program, generic, zeroed, barriers or {}, observation, absorbing, trained).run()


class _Forward:
    def __init__(
        self,
        program: Program,
        generic: bool,
        zeroed: Collection[fx.Node],
        barriers: Mapping[fx.Node, str],
        observation: Observation | None,
        absorbing: bool,
        trained: bool,
    ) -> None:
        self.program = program
        self.generic = generic
        self.zeroed = zeroed
        self.forced = barriers
        self.absorbing = absorbing
        self.trained = trained
        self.seen = observation or observe(program)
        self.table = TagTable()
        self.found = Channels({}, {}, {}, {}, torch.empty(0), [], [], {}, {})
        self.tensors: dict[int, str] = {}
        self.users: dict[str, int] = {}
        self.modules = dict(program.module.named_modules())
        device = device_of(program.module)
        self.device = device if device.type == "cuda" else CPU  # others may have no float64
        self._name_tensors()
        overwrites = Overwrites(program.graph, self.seen)
        read_again = (overwrites.read_again(writer) for writer in self.seen.mutated)
        self.overwritten = set[fx.Node]().union(*read_again)

    def run(self) -> Channels:
        for node in self.program.graph.nodes:
            value = self._visit(node)
            if node in self.zeroed:
                value = pytree.tree_map_only(Value, _zero, value)
            if self.seen.alias[node] in self.overwritten:
                value = pytree.tree_map_only((Value, State), self._fix, value)
            self.found.values[node] = value
        wide = [value.tags for value in self.found.tensors()]
        wide += [s.whole for s in self.found.states.values() if s.whole is not None]
        self.found.classes = close_boxes(self.table, wide)
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
            node,
            module,
            args,
            kwargs,
            spec,
            self._state,
            self.table.fresh,
            self.generic,
            self.absorbing and self._sole_use(node),
            self.device,
            self.trained,
        )
        leaves = flatten((args, kwargs))
        if not any(isinstance(leaf, (Value, State, ShapeOf)) for leaf in leaves) and not (
            any(isinstance(leaf, SizeOf) for leaf in leaves) and rule_name(node, module) == FILLED
        ):
            if type(spec) is int:
                return OfSizes.computed(spec, (self.found.values[n] for n in node.all_input_nodes))
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
            if node in self.seen.draws:
                raise Barrier("it draws random numbers, others where there are fewer channels")
            if any(isinstance(one, TensorSpec) and 0 in one.shape for one in flatten(call.spec)):
                raise Barrier("it gives nothing on the example inputs, which tells nothing of it")
            require_settled(call)
            return flow_of(call)
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
                state.freeze()

    def _fix(self, value: Value | State) -> Value:
        if isinstance(value, State):
            value.freeze()
            value = value.value()
        self.table.tie(value.tags, torch.zeros_like(value.tags))
        return Value(
            value.shape, value.dtype, value.tags, torch.full_like(value.constants, torch.nan)
        )

    def _arguments(self, raw: Any) -> Any:
        return map_arg(raw, lambda node: self.found.values[node])

    def _state(self, name: str) -> State | None:
        owner, _, attribute = name.rpartition(".")
        tensor = getattr(self.modules.get(owner), attribute, None)
        if not isinstance(tensor, Tensor) or tensor.is_complex():
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
                used = [self.tensors[id(tensor)] for tensor in tensors_in(module)]
            elif node.op == "get_attr" and (state := self._state(str(node.target))):
                used = [state.name]
            else:
                continue
            self.found.uses[node] = used
            for name in used:
                self.users[name] = self.users.get(name, 0) + 1

    def _sole_use(self, node: fx.Node) -> bool:
        if node.op != "call_module":
            return False
        module = self.modules[str(node.target)]
        held = (t for t in tensors_in(module) if isinstance(t, nn.Parameter))
        return all(self.users[self.tensors[id(t)]] == 1 for t in held)


def _zero(value: Value) -> Value:
    return Value(value.shape, value.dtype, value.tags, torch.zeros_like(value.constants))
