"""Replace branches that compute constants by the constants.

    x + f(…) = x + c,   x · f(…) = x · c,   c of size 1 along every axis on which it does not vary

A branch is constant where its gates or weights left nothing alive in it (Srinivas & Babu 2016: a
residual block whose layers have no neurons is its shortcut). What meets the constant broadcasts it,
so that no size of a map is frozen; a sum with 0 or a product with 1 is what it is combined with.
"""

import operator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg

from fxprune.dataflow.channels import Channels, analyse
from fxprune.dataflow.fixed_sizes import is_fixed
from fxprune.dataflow.rules import Call, rule_for
from fxprune.dataflow.tags import compress, varying_axes
from fxprune.dataflow.values import State, Value
from fxprune.programs.observation import Observation, TensorSpec, observe
from fxprune.programs.pipeline import Change
from fxprune.programs.program import Program
from fxprune.runtime.kinds import CALLS, PRODUCTS, SUMS
from fxprune.tracing.asked_tracer import PLAIN
from fxprune.tracing.two_modes import has_both_modes
from fxprune.user_models.modules import device_of

_DIFFERENCES = (operator.sub, torch.sub, "sub")
_QUOTIENTS = (operator.truediv, torch.div, "div")
# What makes tensors of other tensors' sizes and dtypes, and what gives a tensor those of another.
_MAKING = frozenset(
    name for what in ("zeros", "ones", "full", "empty") for name in (f"{what}_like", f"new_{what}")
)
_BECOMING = frozenset({"to", "type_as", "expand_as", "view_as", "reshape_as"})


def remove_constant_branches(
    program: Program, known: Channels | None = None, *, trained: bool = False
) -> list[Change]:
    """Let elementwise operators meet a constant operand as a buffer, and drop what computed it.

    known: the analysis of the program as it is, if there is one already. trained: the result is
    trained on, so that what is computed from parameters alone is constant until the next step only,
    and what a branch has learnt (a bias behind what is dead) is a parameter instead of a buffer.
    """
    seen = observe(program)
    learnt = _computed_from_parameters(program, seen) if trained else set[fx.Node]()
    channels = known or analyse(program, observation=seen)
    moved = _computed_from_inputs(program)
    changes: list[Change] = []
    for node, call in channels.calls.items():
        if (
            node in channels.barriers
            or node in seen.mutated
            or _constant(channels, node) is not None
        ):
            continue
        if rule_for(node, call.module).name not in ("elementwise", "product"):
            continue
        for operand in dict.fromkeys(node.all_input_nodes):
            constant = None if operand in learnt else _constant(channels, operand)
            if constant is None or not _broadcasts(call, seen, operand, constant):
                continue
            learning = trained and _has_learnt(program, operand)
            if learning and has_both_modes(program.graph):
                continue  # either mode would have a parameter of its own, and one is not trained
            if not _grows_alone(program, call, seen, operand, moved):
                changes.append(_replace(program, seen, node, operand, constant, learning=learning))
    if changes:
        seen.drop_dead_code(program.graph)
        program.module.delete_all_unused_submodules()
    return changes


def _computed_from_parameters(program: Program, seen: Observation) -> set[fx.Node]:
    """Return the nodes whose numbers are computed from state alone, some of which is learnt.

    Of what an input is read for its size, device or dtype only, they may read more.
    """
    moved: dict[fx.Node, bool] = {}
    parameters = dict(program.module.named_parameters(remove_duplicate=False))
    for node in program.graph.nodes:
        if node.op == "get_attr":
            parameter = parameters.get(str(node.target))
            moved[node] = parameter is not None and parameter.requires_grad
        elif node.op in CALLS and isinstance(seen.values.get(node), TensorSpec):
            sources = _numbers_read(node, seen)
            if all(source in moved for source in sources):
                moved[node] = any(moved[source] for source in sources) or _learns(program, node)
    return {node for node, is_moved in moved.items() if is_moved}


def _computed_from_inputs(program: Program) -> set[fx.Node]:
    """Return the nodes whose sizes an input may change."""
    moved: set[fx.Node] = set()
    for node in program.graph.nodes:
        if node.op == "placeholder" or not moved.isdisjoint(node.all_input_nodes):
            moved.add(node)
    return moved


def _numbers_read(node: fx.Node, seen: Observation) -> list[fx.Node]:
    """Return the tensors whose numbers an operator may read."""
    name = getattr(node.target, "__name__", node.target)
    if name in _MAKING:
        return []
    sources = [one for one in node.all_input_nodes if _has_numbers(seen.values.get(one))]
    return sources[:1] if name in _BECOMING else sources


def _has_numbers(value: Any) -> bool:
    return not isinstance(value, PLAIN)


def _learns(program: Program, node: fx.Node) -> bool:
    if node.op != "call_module":
        return False
    module = program.module.get_submodule(str(node.target))
    return any(parameter.requires_grad for parameter in module.parameters())


def _has_learnt(program: Program, operand: fx.Node) -> bool:
    """Tell whether what computes a constant has parameters that are trained."""
    parameters = dict(program.module.named_parameters(remove_duplicate=False))
    waiting, met = [operand], {operand}
    while waiting:
        node = waiting.pop()
        own = parameters.get(str(node.target)) if node.op == "get_attr" else None
        if _learns(program, node) or (own is not None and own.requires_grad):
            return True
        new = set(node.all_input_nodes) - met
        met |= new
        waiting += new
    return False


def _constant(channels: Channels, node: fx.Node) -> Tensor | None:
    """Return what a computed tensor always is, float64; None if not known for maps of any size."""
    value = channels.values.get(node)
    value = value.operand if isinstance(value, State) else value
    if node not in channels.calls or not isinstance(value, Value):
        return None
    if not value.dtype.is_floating_point or not bool(torch.isfinite(value.constants).all()):
        return None
    constant = compress(value.constants)
    axes = varying_axes(constant)
    if len(axes) > 1:
        return None
    # Where a channel is met several times along an axis, as in a flattened map, space is in there.
    labels = value.along(axes[0]).tags if axes else torch.empty(0)
    return constant if len(labels.unique()) == len(labels) else None


def _broadcasts(call: Call, seen: Observation, operand: fx.Node, constant: Tensor) -> bool:
    """Tell whether the result has the same shape if the operand is as small as its constant."""
    others = [node for node in call.node.all_input_nodes if node is not operand]
    specs = [seen.values.get(node) for node in others]  # but constants put here before: small too
    shapes = [spec.shape for spec in specs if isinstance(spec, TensorSpec)]
    return torch.broadcast_shapes(constant.shape, *shapes) == call.tensor_spec().shape


def _grows_alone(
    program: Program, call: Call, seen: Observation, operand: fx.Node, moved: set[fx.Node]
) -> bool:
    """Tell whether other inputs may make an operand longer than all that it meets.

    Of one sample, a learnt position is as large as what is added to it; of two it is not.
    """
    shape = call.tensor_spec().shape
    others = [node for node in call.node.all_input_nodes if node is not operand]

    def may_grow(node: fx.Node, axis: int) -> bool:
        spec = seen.values.get(node)
        own = axis - len(shape) + len(spec.shape) if isinstance(spec, TensorSpec) else -1
        return own >= 0 and node in moved and not is_fixed(program.module, node, own, seen)

    single = [axis for axis, size in enumerate(shape) if size == 1]
    return any(
        may_grow(operand, axis) and not any(may_grow(other, axis) for other in others)
        for axis in single
    )


def _replace(
    program: Program,
    seen: Observation,
    node: fx.Node,
    operand: fx.Node,
    constant: Tensor,
    *,
    learning: bool,
) -> Change:
    other = _what_it_leaves(node, operand, constant)
    if other is not None and _may_stand_for(other, node, seen):
        node.replace_all_uses_with(other)
        return Change(node.name, f"{operand.name} is constant: {other.name} remains")
    spec: TensorSpec = seen.values[operand]
    name = f"{operand.name}_constant"
    if not hasattr(program.module, name):
        constant = constant.to(device_of(program.module), spec.dtype)
        if learning:
            program.module.register_parameter(name, nn.Parameter(constant))
        else:
            program.module.register_buffer(name, constant)
    with node.graph.inserting_before(node):
        buffer = node.graph.get_attr(name)

    def put(argument: fx.Node) -> fx.Node:
        return buffer if argument is operand else argument

    node.args, node.kwargs = map_arg(node.args, put), map_arg(node.kwargs, put)
    kind = "parameter" if learning else "buffer"
    return Change(node.name, f"{operand.name} is constant: a {kind} stands for it")


def _may_stand_for(other: fx.Node, node: fx.Node, seen: Observation) -> bool:
    same = other in seen.values and seen.values[other] == seen.values[node]
    return same and not seen.written(other, node)


def _what_it_leaves(node: fx.Node, operand: fx.Node, constant: Tensor) -> fx.Node | None:
    """Return the operand that a sum with 0, or a product with 1, is."""
    if len(node.args) != 2 or node.kwargs:
        return None
    first, second = node.args
    target: Any = node.target
    neutral = 0.0 if target in (*SUMS, *_DIFFERENCES) else 1.0
    if not bool((constant == neutral).all()):
        return None
    if second is operand and target in (*SUMS, *_DIFFERENCES, *PRODUCTS, *_QUOTIENTS):
        return first if isinstance(first, fx.Node) else None
    if first is operand and target in (*SUMS, *PRODUCTS):
        return second if isinstance(second, fx.Node) else None
    return None
