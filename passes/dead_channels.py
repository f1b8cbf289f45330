"""Remove channels that nothing live reads.

What a dying channel contributes as a constant goes into the biases of its readers (`absorb`); then
every parameter is cut along the axes whose tags die, once, whoever shares it; then the operators'
attributes and literal arguments follow (`resize`, `rewrite`). All rewrites are planned before the
first edit; an operator that cannot follow becomes a barrier and the plan is made anew.
"""

import math
import operator
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate

from fxprune.dataflow.channels import Channels, analyse
from fxprune.dataflow.cuts import Arguments, Cut, Literal, Scaled
from fxprune.dataflow.fixed_sizes import is_fixed
from fxprune.dataflow.foresight import foreseen
from fxprune.dataflow.liveness import settle
from fxprune.dataflow.rules import rewritten, rule_for
from fxprune.dataflow.values import Barrier, State
from fxprune.errors import where
from fxprune.programs.observation import Observation, observe
from fxprune.programs.pipeline import Change, keeps_shapes
from fxprune.programs.program import Program, narrowed
from fxprune.tracing.assumptions import assume_size
from fxprune.tracing.literals import put_literal
from fxprune.tracing.two_modes import in_either_mode
from fxprune.user_models.modules import device_of, free_name, submodule

_Plan = dict[fx.Node, Arguments | Literal]


@keeps_shapes
def eliminate_dead_channels(
    program: Program,
    known: Channels | None = None,
    *,
    in_training: bool = False,
    trained: bool = False,
) -> list[Change]:
    """Cut every unit that is dead: unread, or a constant its readers can absorb.

    known: the analysis of the program as it is, if there is one already. in_training: only what is
    dead whatever the weights become, and a constant only if it is 0, so that a training goes on as
    it would have. trained: a constant only if training mode computes it, too. What was cut stands
    in `program.cuts`.
    """
    channels, cut, plan = _plan(program, known, in_training=in_training, trained=trained)
    seen = observe(program)
    # Which mode's outputs are returned is no operator of the model.
    program.barriers = {
        where(node): reason
        for node, reason in channels.barriers.items()
        if node.target is not in_either_mode
    }
    followers = {
        node: call
        for node, call in channels.calls.items()
        if node not in channels.barriers and node not in cut.gone
    }
    for node, call in followers.items():
        if call.module is not None and not in_training:
            rule_for(node, call.module).absorb(call, cut)
    changes = [
        change
        for state in channels.states.values()
        if (change := _cut_state(program, channels, state, cut)) is not None
    ]
    for node, call in followers.items():
        if call.module is not None:
            rule_for(node, call.module).resize(call)
    for node, answer in plan.items():
        _apply(program, node, _settled(answer, plan), seen)
    changes += _erase(program, cut)
    program.seen = foreseen(program, channels, cut, plan, seen)
    return changes


def _plan(
    program: Program, known: Channels | None, *, in_training: bool, trained: bool
) -> tuple[Channels, Cut, _Plan]:
    """Decide what goes, adding barriers until every operator can follow."""
    seen = observe(program)
    barriers: dict[fx.Node, str] = {}
    while True:
        channels, known = (
            known
            or analyse(
                program,
                generic=in_training,
                absorbing=not in_training,
                trained=trained,
                barriers=barriers,
                observation=seen,
            ),
            None,
        )
        cut = settle(channels)
        plan: _Plan = {}
        refused = False
        for node, call in channels.calls.items():
            if node in channels.barriers or node in cut.gone:
                continue
            try:
                answer = rewritten(call, cut)
            except Barrier as barrier:
                if node in barriers:
                    raise RuntimeError(
                        f"{where(node)} refuses as a barrier: {barrier}"
                    ) from barrier
                barriers[node] = str(barrier)
                refused = True
                continue
            if answer is not None:
                plan[node] = answer
        if not refused:
            return channels, cut, plan


def _erase(program: Program, cut: Cut) -> list[Change]:
    """Erase the nodes of which nothing remains, the last first."""
    found = [node for node in reversed(program.graph.nodes) if node in cut.gone]
    for node in found:
        program.graph.erase_node(node)
    if found:
        program.module.delete_all_unused_submodules()
    return [Change(node.name, "removed: all its channels are dead") for node in reversed(found)]


def _cut_state(program: Program, channels: Channels, state: State, cut: Cut) -> Change | None:
    tensor, before = state.tensor.detach(), tuple(state.tensor.shape)
    if not tensor.numel():
        return None
    kept: list[tuple[int, Tensor]] = []
    for axis, keep in _keeps(state, cut):
        if not bool(keep.any()):
            return None  # it goes with the nodes that use it
        if not bool(keep.all()):
            kept.append((axis, keep.nonzero().reshape(-1)))
    if not kept:
        return None
    names = channels.names.get(state.name, [state.name])
    tensor = narrowed(tensor, kept)
    _replace(program.module, names, state.tensor, tensor)
    program.cuts |= dict.fromkeys(names, kept)
    after = tuple(tensor.shape)
    what = f"{'×'.join(map(str, before))} → {'×'.join(map(str, after))}"
    return Change(state.name, what, (("before", before), ("after", after)))


def _keeps(state: State, cut: Cut) -> list[tuple[int, Tensor]]:
    """Return the mask of each axis of a parameter that its users know of."""
    if state.whole is not None:
        keep = cut.keep(state.whole)
        return [(a, _over_the_rest(keep, a)) for a in range(keep.dim())]
    return [(axis, cut.keep(tags)) for axis, tags in state.axes.items()]


def _over_the_rest(keep: Tensor, axis: int) -> Tensor:
    return keep.movedim(axis, 0).reshape(keep.shape[axis], -1).any(1)


def _replace(module: nn.Module, names: list[str], old: Tensor, new: Tensor) -> None:
    """Put `new` in the place of `old` under all its names, so that what was tied stays tied."""
    if isinstance(old, nn.Parameter):
        new = nn.Parameter(new, requires_grad=old.requires_grad)
    for name in names:
        owner, _, attribute = name.rpartition(".")
        setattr(submodule(module, owner), attribute, new)


def _settled(answer: Arguments | Literal, plan: _Plan) -> Arguments | Literal:
    """Take the part of a number that is frozen itself for a number."""
    if isinstance(answer, Literal):
        return answer

    def settled(argument: Any) -> Any:
        is_frozen = isinstance(argument, Scaled) and isinstance(plan.get(argument.number), Literal)
        return argument.remaining if is_frozen else argument

    args: Any = map_aggregate(answer.args, settled)
    kwargs: Any = map_aggregate(answer.kwargs, settled)
    return replace(answer, args=args, kwargs=kwargs)


def _apply(program: Program, node: fx.Node, answer: Arguments | Literal, seen: Observation) -> None:
    if isinstance(answer, Literal):
        put_literal(node, answer.value)
        return
    tensor = node.args[0] if answer.binds else None
    for axis in answer.binds:
        if isinstance(tensor, fx.Node) and not is_fixed(program.module, tensor, axis, seen):
            assume_size(node, tensor, axis, seen.values[tensor].shape[axis])
    if answer.function is not None:
        node.op, node.target = "call_function", answer.function

    def settle_argument(argument: Any) -> Any:
        if isinstance(argument, Scaled):
            return _scaled(node, argument)
        return _buffer(program, node, argument) if isinstance(argument, Tensor) else argument

    node.args = map_aggregate(answer.args, settle_argument)
    node.kwargs = map_aggregate(answer.kwargs, settle_argument)
    if answer.then is not None:
        _append(node, *answer.then)


def _buffer(program: Program, node: fx.Node, tensor: Tensor) -> fx.Node:
    """Register a constant the program computes with from now on; return the node that reads it."""
    name = free_name(program.module, f"{node.name}_index")
    program.module.register_buffer(name, tensor.to(device_of(program.module)))
    with program.graph.inserting_before(node):
        return program.graph.get_attr(name)


def _scaled(node: fx.Node, part: Scaled) -> fx.Node:
    """Compute what remains of a number of sizes, in front of the node that takes it."""
    divisor = math.gcd(part.remaining, part.whole)
    with node.graph.inserting_before(node):
        number = part.number
        if part.remaining > divisor:
            number = node.graph.call_function(operator.mul, (number, part.remaining // divisor))
        return node.graph.call_function(operator.floordiv, (number, part.whole // divisor))


def _append(node: fx.Node, function: Callable[..., Any], number: float) -> None:
    """Apply a function of a tensor and a number to what a node returns."""
    with node.graph.inserting_after(node):
        call = node.graph.call_function(function, (node, number))
    call.meta["source"] = node.meta.get("source")
    node.replace_all_uses_with(call, delete_user_cb=lambda user: user is not call)
