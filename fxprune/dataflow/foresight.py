"""What a run of a program would show once its channels are cut, known from the cut: no run needed.

A tensor has the shape that remains of it; a layer multiplies in proportion to its weights and to
the places they are applied at. Where anything else would change, nothing is foretold.
"""

from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fxprune.dataflow.channels import Channels
from fxprune.dataflow.cuts import Arguments, Cut, Literal
from fxprune.dataflow.rules import Call
from fxprune.dataflow.values import ShapeOf, State, Value, flatten
from fxprune.programs.observation import Observation, TensorSpec
from fxprune.programs.program import Program
from fxprune.runtime.kinds import LAYERS
from fxprune.user_models.modules import submodule

Plan = dict[fx.Node, Arguments | Literal]


def foreseen(
    program: Program, channels: Channels, cut: Cut, plan: Plan, seen: Observation
) -> Observation | None:
    """Return what a run of a program would show that was cut just now, None if that is not sure.

    channels, seen: what was known of it before. plan: what became of its nodes' arguments.
    """
    if (
        seen.mutated
        or seen.draws
        or any(isinstance(a, Arguments) and a.then for a in plan.values())
    ):
        return None  # other operators could share other memory, or draw other numbers
    after = Observation({}, {}, {}, {})
    for node in program.graph.nodes:
        known = _value(program, node, channels, cut, seen)
        if known is None:
            return None
        count = _count(program, node, channels, known.spec, cut, seen.macs.get(node, 0))
        if count is None:
            return None
        after.add(node, known.spec)
        if count:
            after.macs[node] = count
    return after


class _Known:
    """What is known of a node: its value as an observation holds it, which may be None."""

    def __init__(self, spec: Any) -> None:
        self.spec = spec


def _value(
    program: Program, node: fx.Node, channels: Channels, cut: Cut, seen: Observation
) -> _Known | None:
    if node.op == "get_attr":  # cut already, or put there by the cut
        owner, _, name = str(node.target).rpartition(".")
        held = getattr(submodule(program.module, owner), name)
        shown = isinstance(held, Tensor)
        return _Known(TensorSpec(tuple(held.shape), held.dtype) if shown else held)
    if node not in channels.values:
        return None
    if node.op == "output" or node not in channels.calls:
        return _Known(seen.values[node])
    value = channels.values[node]
    if any(isinstance(leaf, (State, ShapeOf)) for leaf in flatten(value)):
        return None
    remaining = pytree.tree_map_only(Value, lambda v: TensorSpec(cut.shape(v), v.dtype), value)
    return _Known(remaining)


def _count(
    program: Program, node: fx.Node, channels: Channels, spec: Any, cut: Cut, before: int
) -> int | None:
    """Return the multiply-accumulates of a node, None if they cannot be told."""
    call = channels.calls.get(node)
    if call is None or not before:
        return before
    if type(call.module) in LAYERS:
        return _of_layer(call, spec, before)
    taken = (leaf for leaf in flatten((call.args, call.kwargs)) if isinstance(leaf, Value))
    used = [*channels.uses.get(node, ()), *_parameters(call)]
    is_whole = spec == call.spec and all(cut.indices(value) is None for value in taken)
    return before if is_whole and program.cuts.keys().isdisjoint(used) else None


def _parameters(call: Call) -> list[str]:
    leaves = flatten((call.args, call.kwargs))
    return [leaf.name for leaf in leaves if isinstance(leaf, State)]


def _of_layer(call: Call, spec: TensorSpec, before: int) -> int | None:
    """Return Σ over places of a layer's weights, if that is what was counted before the cut."""
    module: Any = call.module
    weight = call.state("weight")
    assert weight is not None
    if getattr(module, "transposed", False):
        return before if spec == call.spec and module.weight.shape == weight.tensor.shape else None
    axis = -1 if isinstance(module, nn.Linear) else 1 - module.weight.dim()
    old = call.tensor_spec().shape
    was = weight.tensor.numel() * torch.Size(old).numel() // old[axis]
    now = module.weight.numel() * torch.Size(spec.shape).numel() // spec.shape[axis]
    return now if was == before else None
