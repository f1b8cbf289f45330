"""What one run of the program shows: shapes, numbers, aliases and mutations of every node.

Whether an operator writes into its arguments, or returns a view of them, is observed (version
counters, shared storage), not believed from its name.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.immutable_collections import immutable_dict, immutable_list
from torch.utils import _pytree as pytree

from fxprune.errors import ExampleInputError, TraceError, where
from fxprune.programs.macs import MacCounter
from fxprune.programs.program import Program
from fxprune.runtime.kinds import asks_form
from fxprune.runtime.randomness import drawing_alike, generator_state
from fxprune.runtime.storages import storage_of
from fxprune.tracing.two_modes import nodes_of_training, require_mode
from fxprune.user_models.inputs import NESTED
from fxprune.user_models.modules import device_of, evaluating


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of a tensor a node produced."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass
class Observation:
    """What a run showed, by node.

    values: every tensor replaced by its `TensorSpec`, everything else as it was.
    mutated: the nodes whose tensor a node wrote into.
    alias: a representative of the nodes that share memory with a node.
    macs: the multiply-accumulates of a node that has any, for the whole batch, in evaluation.
    draws: the nodes that drew random numbers.
    """

    values: dict[fx.Node, Any]
    mutated: dict[fx.Node, list[fx.Node]]
    alias: dict[fx.Node, fx.Node]
    macs: dict[fx.Node, int]
    draws: set[fx.Node] = field(default_factory=set[fx.Node])

    def add(self, node: fx.Node, value: Any) -> None:
        """Write down what a node computes that shares memory with no other."""
        self.values[node], self.alias[node] = value, node

    def written(self, *nodes: fx.Node) -> bool:
        """Tell whether anybody writes into memory that one of the nodes shares."""
        return any(self.alias[node] in self._written for node in nodes)

    def reads(self, user: fx.Node, member: fx.Node, writer: fx.Node) -> bool:
        """Tell whether a user of what another node wrote into wants its numbers.

        Questions for a form get the answer they got before, unless the writer changes forms too.
        """
        return not asks_form(user) or self.values[writer] != self.values[member]

    def drop_dead_code(self, graph: fx.Graph) -> None:
        """Erase what nobody reads, but for what writes into memory, draws numbers or asserts."""
        for node in reversed(graph.nodes):
            needed = node.users or node.op in ("placeholder", "output")
            if not (needed or node in self.mutated or node in self.draws or node.is_impure()):
                graph.erase_node(node)

    @cached_property
    def _written(self) -> set[fx.Node]:
        return {self.alias[node] for targets in self.mutated.values() for node in targets}

    def restricted(self, graph: fx.Graph) -> "Observation | None":
        """Return what it holds of a graph's nodes; None if there are others than it knows."""
        nodes = dict.fromkeys(graph.nodes)
        if any(node not in self.values for node in nodes):
            return None
        if len(nodes) == len(self.values):
            return self
        return Observation(
            {node: self.values[node] for node in nodes},
            {
                writer: [node for node in written if node in nodes]
                for writer, written in self.mutated.items()
                if writer in nodes
            },
            {node: self.alias[node] for node in nodes},
            {node: count for node, count in self.macs.items() if node in nodes},
            {node for node in self.draws if node in nodes},
        )


def observe(program: Program) -> Observation:
    """Run the program once in evaluation mode, without gradients, and write down what happened.

    What was written down before is returned while no pass has changed a shape since.
    """
    known = program.seen and program.seen.restricted(program.graph)
    if known is None:
        with evaluating(program.module):
            known = _Observer(program).observe()
    program.seen = known
    return known


def require_observable(program: Program) -> None:
    """Raise `TraceError` where a submodule that is kept whole gives what no analysis follows."""
    if any(node.meta.get("leaf_because") for node in program.graph.nodes):
        observe(program)


class _Observer(fx.Interpreter):
    def __init__(self, program: Program) -> None:
        super().__init__(program.module)
        self.extra_traceback = False  # the error raised here says where
        self.program = program
        self.device = device_of(program.module)
        self.seen = Observation({}, {}, {}, {})
        self.counter = MacCounter()
        self.attributes: dict[int, fx.Node] = {}

    def observe(self) -> Observation:
        args, kwargs = self.program.inputs()
        kept = [(one, one._version, one.clone()) for one in self.program.module.buffers()]
        with torch.no_grad(), drawing_alike(self.device), self.counter:
            self.run(*_positional(self.program.graph, args, kwargs))
            for buffer, version, numbers in kept:  # what a forward counts, it counts no further
                if buffer._version != version:
                    buffer.copy_(numbers)
        for node in nodes_of_training(self.program.graph):
            self.seen.macs.pop(node, None)
        return self.seen

    def fetch_args_kwargs_from_env(self, n: fx.Node) -> tuple[Any, Any]:
        """Return arguments whose lists are ordinary ones, as in the generated code."""
        return _ordinary(super().fetch_args_kwargs_from_env(n))

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Call a function; both modes are looked at in evaluation."""
        return None if target is require_mode else super().call_function(target, args, kwargs)

    def run_node(self, n: fx.Node) -> Any:
        inputs = {node: self.env[node] for node in n.all_input_nodes}
        before = {node: [t._version for t in _tensors(value)] for node, value in inputs.items()}
        counted = self.counter.macs
        state = generator_state(self.device)
        try:
            result = super().run_node(n)
        except Exception as error:
            raise ExampleInputError(
                f"{where(n)} fails on the example inputs: {type(error).__name__}: {error}"
            ) from error
        if any(tensor.is_nested for tensor in _tensors(result)):
            raise TraceError(f"{where(n)} gives a nested tensor, {NESTED}")
        written = [
            node
            for node, value in inputs.items()
            if before[node] != [t._version for t in _tensors(value)]
        ]
        if written:
            self.seen.mutated[n] = written
        if not torch.equal(state, generator_state(self.device)):
            self.seen.draws.add(n)
        if self.counter.macs > counted:
            self.seen.macs[n] = self.counter.macs - counted
        self.seen.values[n] = _described(result)
        self.seen.alias[n] = self._representative(n, inputs, result)
        return result

    def _representative(self, n: fx.Node, inputs: dict[fx.Node, Any], result: Any) -> fx.Node:
        """Return who stands for the memory of a result; groups it joins become one."""
        if n.op == "output":
            return n
        mine = {storage_of(tensor) for tensor in _tensors(result)}
        if n.op == "get_attr":  # every read of a buffer is a node of its own
            readers = [self.attributes.setdefault(memory, n) for memory in mine]
            return next((self.seen.alias.get(reader, n) for reader in readers), n)
        groups = [
            self.seen.alias[node]
            for node, value in inputs.items()
            if any(storage_of(tensor) in mine for tensor in _tensors(value))
        ]
        if not groups:
            return n
        if len(set(groups)) > 1:
            for node, group in self.seen.alias.items():
                self.seen.alias[node] = groups[0] if group in groups else group
        return groups[0]


def _positional(graph: fx.Graph, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Any]:
    """Yield one value per placeholder: positional arguments first, then keywords by name."""
    for index, node in enumerate(n for n in graph.nodes if n.op == "placeholder"):
        if index < len(args):
            yield args[index]
        else:
            yield kwargs[node.target] if node.target in kwargs else node.args[0]


def _ordinary(structure: Any) -> Any:
    """Return nested arguments with lists and dicts that may be written to."""
    if isinstance(structure, (immutable_list, immutable_dict)):
        structure = dict(structure) if isinstance(structure, dict) else list(structure)
    if type(structure) is list:
        return [_ordinary(part) for part in structure]
    if type(structure) is tuple:
        return tuple(_ordinary(part) for part in structure)
    if type(structure) is dict:
        return {key: _ordinary(part) for key, part in structure.items()}
    return structure


def _described(value: Any) -> Any:
    """Return what is known of a value; where tensors are in a class of its own, as a tuple."""
    if isinstance(value, Tensor):
        return TensorSpec(tuple(value.shape), value.dtype)
    try:
        return pytree.tree_map_only(Tensor, _described, value)
    except Exception:  # a packed sequence looks at what it is made of
        return tuple(map(_described, pytree.tree_leaves(value)))


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]
