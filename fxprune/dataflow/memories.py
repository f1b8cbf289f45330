"""What a run showed, left in a model for the next verb: by the names of nodes.

It is believed only while graph, modules and inputs are what they were, to the strides, and only
where no number can have decided a shape: then numbers may be trained, and shapes stay.
"""

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fxprune.dataflow.rules import rule_name
from fxprune.dataflow.values import flatten
from fxprune.gating.gates import Gates, linear_gate, width_gate
from fxprune.programs.observation import Observation, TensorSpec
from fxprune.programs.program import Program
from fxprune.runtime.structure import Unchanging
from fxprune.user_models.modules import submodule

_PLAIN = (bool, int, float, str, tuple, list, type(None))
_TOLD = (TensorSpec, bool, int, float, str, type(None), torch.dtype, torch.device)
_GATES = (width_gate, linear_gate)


@dataclass(frozen=True)
class Memory(Unchanging):
    """An observation by the names of nodes, and the digest of the program it is of."""

    digest: str
    values: dict[str, Any]
    mutated: dict[str, list[str]]
    alias: dict[str, str]
    macs: dict[str, int]


def memory_of_run(program: Program) -> Memory | None:
    """Return what is known of a program's last run, None if numbers might change it."""
    seen = program.seen and program.seen.restricted(program.graph)
    if (
        not seen
        or seen.draws
        or not all(_is_of_sizes(program, node, seen) for node in program.graph.nodes)
    ):
        return None
    firsts: dict[fx.Node, str] = {}
    for node, group in seen.alias.items():
        firsts.setdefault(group, node.name)
    return Memory(
        _digest(program),
        {node.name: value for node, value in seen.values.items()},
        {node.name: [one.name for one in written] for node, written in seen.mutated.items()},
        {node.name: firsts[group] for node, group in seen.alias.items()},
        {node.name: count for node, count in seen.macs.items()},
    )


def recalled(program: Program, memory: Memory | None) -> Observation | None:
    """Return what was left of a run, None if the program is another by now."""
    if memory is None or memory.digest != _digest(program):
        return None
    nodes = {node.name: node for node in program.graph.nodes}
    return Observation(
        {nodes[name]: value for name, value in memory.values.items()},
        {nodes[n]: [nodes[one] for one in written] for n, written in memory.mutated.items()},
        {nodes[name]: nodes[group] for name, group in memory.alias.items()},
        {nodes[name]: count for name, count in memory.macs.items()},
    )


def _is_of_sizes(program: Program, node: fx.Node, seen: Observation) -> bool:
    """Tell whether all a node gives follows from sizes: no tensor of it could index or count."""
    for leaf in flatten(seen.values[node]):
        if not isinstance(leaf, _TOLD):
            return False
        if isinstance(leaf, TensorSpec) and not leaf.dtype.is_floating_point:
            return False
    if node.op in ("placeholder", "get_attr", "output") or node.target in _GATES:
        return True
    module = submodule(program.module, str(node.target)) if node.op == "call_module" else None
    return isinstance(module, Gates) or rule_name(node, module) != ""


def _digest(program: Program) -> str:
    """Return what stands for all that a run in evaluation mode depends on, numbers apart."""
    nodes = [
        (node.name, node.op, str(node.target), str(node.args), str(node.kwargs))
        for node in program.graph.nodes
    ]
    held = [_held(program.module, node) for node in program.graph.nodes]
    inputs = pytree.tree_map_only(Tensor, _layout, (program.args, program.kwargs))
    autocast = [torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda")]
    return hashlib.sha256(repr((nodes, held, inputs, autocast)).encode()).hexdigest()


def _held(root: nn.Module, node: fx.Node) -> Any:
    """Return what a node takes from the module: a tensor's layout, a module and those in it."""
    if node.op == "call_module":
        module = submodule(root, str(node.target))
        run = [module] if isinstance(module, Gates) else module.modules()  # costs are not run
        return [_described(part) for part in run]
    if node.op != "get_attr":
        return None
    owner, _, name = str(node.target).rpartition(".")
    found = getattr(submodule(root, owner), name, None)
    if isinstance(found, Tensor):
        return _layout(found)
    return None if name == "training" else found


def _described(module: nn.Module) -> tuple[Any, ...]:
    if isinstance(module, Gates):
        return ([site.shape for site in module.width_sites], len(module.depth_sites))
    tensors = {**module._parameters, **module._buffers}
    layouts = [(name, None if t is None else _layout(t)) for name, t in tensors.items()]
    plain = [(k, v) for k, v in vars(module).items() if type(v) in _PLAIN and k != "training"]
    hooks = (len(module._forward_hooks), len(module._forward_pre_hooks))
    return type(module), layouts, plain, hooks


def _layout(tensor: Tensor) -> tuple[Any, ...]:
    return tuple(tensor.shape), tensor.dtype, str(tensor.device), tensor.stride()
