"""Operators that only move data, asked by execution: run the operator itself on the tags.

So channel shuffles, NHWC flattens and concatenations are right by construction, and so is what
becomes of them: the rewritten operator, run on the tags that remain, must give the remaining tags
of its outputs.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_aggregate, map_arg
from torch.utils import _pytree as pytree

from fxprune.dataflow.cuts import Arguments, Cut, Scaled
from fxprune.dataflow.rules import Call, Flow, execute
from fxprune.dataflow.tags import align, compress, move, varying_axes
from fxprune.dataflow.values import Barrier, OfSizes, State, Value, as_value, flatten
from fxprune.programs.observation import TensorSpec


def movement_flow(call: Call) -> Flow:
    """Run the operator on the tags, and on the constants."""
    values = call.values()
    if not values:
        raise Barrier("it moves no tensor")
    if not all(map(is_settled, numbers_among(call))):
        raise Barrier("a number it takes is computed from data")
    ties: list[tuple[Tensor, Tensor]] = []
    if any(varying_axes(value.tags) for value in values) and _is_loose(call):
        values, ties = _taken_as_one(call, values)
    tags = [compress(t).long() for t in _run(call, values, [v.tags for v in values])]
    specs = [spec for spec in flatten(call.spec) if isinstance(spec, TensorSpec)]
    if len(specs) != len(tags) or not all(map(_fits, specs, tags)):
        raise Barrier("its outputs are not what the example inputs gave")
    constants = _constants(call, values, tags)
    moved = iter(
        Value(spec.shape, spec.dtype, t, c)
        for spec, t, c in zip(specs, tags, constants, strict=True)
    )
    return Flow(pytree.tree_map_only(TensorSpec, lambda _: next(moved), call.spec), ties=ties)


def _is_loose(call: Call) -> bool:
    """Tell whether inputs of another size may move other channels: a table cut to their length."""
    known = node_values(call)
    numbers = [known[node] for node in numbers_among(call)]
    return not all(isinstance(one, OfSizes) and one.is_of_channels for one in numbers)


def _taken_as_one(
    call: Call, values: list[Value]
) -> tuple[list[Value], list[tuple[Tensor, Tensor]]]:
    """Make channels one along every axis of which an operator takes a part, and say what to tie.

    Which part it is depends on the inputs, so that none may go, and no constant counts that the
    others do not share.
    """
    rolled = call.node.target in (torch.roll, "roll")
    start = 0
    marks: list[Tensor] = []
    for value in values:
        stop = start + value.tags.numel()
        marks.append(torch.arange(start, stop).view_as(value.tags))
        start = stop
    outputs = [t.long().unique() for t in _run(call, values, marks)]
    whole: list[Value] = []
    ties: list[tuple[Tensor, Tensor]] = []
    for value, mark in zip(values, marks, strict=True):
        constants = value.constants
        for taken in outputs:
            present = torch.isin(mark, taken)
            for axis in varying_axes(value.tags):
                first = present.narrow(axis, 0, 1)
                if rolled or not torch.equal(present, first.expand_as(present)):
                    lead = value.tags.narrow(axis, 0, 1)
                    ties.append((lead, value.tags))
                    size = [-1] * lead.dim()
                    size[axis] = value.tags.shape[axis]
                    constants = align(constants, lead).expand(size)
        whole.append(replace(value, constants=constants))
    return whole, ties


def checked_arguments(
    call: Call,
    cut: Cut,
    args: list[Any],
    kwargs: dict[str, Any],
    function: Callable[..., Any] | None = None,
) -> Arguments:
    """Return the arguments of the rewritten operator, once `check` has passed them."""
    check(call, cut, args, kwargs, function)
    return Arguments(tuple(args), kwargs, function)


def check(
    call: Call, cut: Cut, args: Any, kwargs: Any, function: Callable[..., Any] | None = None
) -> None:
    """Run the rewritten operator on the channels that remain; `Barrier` unless they fall in place.

    What falls in place must be what the operator, as it was, would have put there.
    """
    known = node_values(call)

    def remaining(argument: Any) -> Any:
        if isinstance(argument, Scaled):
            return argument.remaining
        found = as_value(known[argument]) if isinstance(argument, fx.Node) else argument
        return _remaining(_numbers(found), found, cut) if isinstance(found, Value) else found

    actual_args: Any = map_aggregate(tuple(args), remaining)
    actual_kwargs: Any = map_aggregate(dict(kwargs), remaining)
    try:
        if function is None:
            result = execute(call.node, call.module, actual_args, actual_kwargs)
        else:
            result = function(*actual_args, **actual_kwargs)
    except Exception as error:
        raise Barrier(f"it cannot follow the removal of channels: {error}") from error
    outputs = [v for v in flatten(movement_flow(call).outputs) if isinstance(v, Value)]
    whole = [t for t in flatten(call.execute(_numbers)) if isinstance(t, Tensor)]
    expected = [_remaining(t, v, cut) for t, v in zip(whole, outputs, strict=True)]
    actual = [t for t in flatten(result) if isinstance(t, Tensor)]
    if len(actual) != len(expected) or not all(map(torch.equal, actual, expected)):
        raise Barrier("it cannot follow the removal of channels")


def _run(call: Call, values: list[Value], tensors: list[Tensor]) -> list[Tensor]:
    def operate(full: list[Tensor]) -> Any:
        stream = iter(full)
        return flatten(call.execute(lambda _: next(stream)))

    try:
        return move(operate, tensors, [v.shape for v in values])
    except (RuntimeError, IndexError, TypeError) as error:  # a size may be a tensor of one number
        raise Barrier(f"it does not run on channel tags: {error}") from error


def _constants(call: Call, values: list[Value], tags: list[Tensor]) -> list[Tensor]:
    if all(bool(torch.isnan(v.constants).all()) for v in values):
        return [torch.full(t.shape, torch.nan, dtype=torch.float64) for t in tags]
    moved = _run(call, values, [v.constants for v in values])
    return [align(c, t) for c, t in zip(moved, tags, strict=True)]


def node_values(call: Call) -> dict[fx.Node, Any]:
    """Return what each node among the arguments stands for: a `Value`, a `State` or a number."""
    known = dict(zip(_nodes(call.node.args), _leaves(call.args, call.node.args), strict=True))
    return known | dict(
        zip(_nodes(call.node.kwargs), _leaves(call.kwargs, call.node.kwargs), strict=True)
    )


def numbers_among(call: Call) -> list[fx.Node]:
    """Return the nodes among the arguments that stand for plain numbers."""
    return [node for node, found in node_values(call).items() if isinstance(found, (int, float))]


def _nodes(structure: Any) -> list[fx.Node]:
    found: list[fx.Node] = []
    map_arg(structure, lambda node: found.append(node))
    return found


def _leaves(values: Any, raw: Any) -> list[Any]:
    """Return what stands in `values` where `raw` has a node."""
    if isinstance(raw, fx.Node):
        return [values]
    if isinstance(raw, slice):
        pairs = ((getattr(values, k), getattr(raw, k)) for k in ("start", "stop", "step"))
        return [leaf for v, r in pairs for leaf in _leaves(v, r)]
    if isinstance(raw, dict):
        return [leaf for key, r in raw.items() for leaf in _leaves(values[key], r)]
    if isinstance(raw, (tuple, list)):
        return [leaf for v, r in zip(values, raw, strict=True) for leaf in _leaves(v, r)]
    return []


def _numbers(argument: Value | State) -> Tensor:
    """Return numbers that tell channels apart: their tags, if no two share one, else one each."""
    value: Value = as_value(argument)
    tags = value.tags
    if len(tags.unique()) < tags.numel():
        tags = torch.arange(math.prod(value.shape)).reshape(value.shape)
    return tags.double().expand(value.shape).contiguous()


def _remaining(full: Tensor, value: Value, cut: Cut) -> Tensor:
    found = cut.indices(value)
    return full if found is None else full.index_select(found[0], found[1])


def _fits(spec: TensorSpec, tags: Tensor) -> bool:
    pairs = zip(tags.shape, spec.shape, strict=False)
    return tags.dim() == len(spec.shape) and all(have in (1, size) for have, size in pairs)


def is_settled(node: fx.Node) -> bool:
    """Tell whether a number is computed from sizes alone, whatever is in the input."""
    pending = [node]
    while pending:
        node = pending.pop()
        if node.op == "get_attr" or (node.op != "placeholder" and node.target in _SIZES):
            continue
        if getattr(node.target, "__module__", "") not in ("_operator", "math", "builtins"):
            return False
        pending.extend(node.all_input_nodes)
    return True


def ranks_asked(number: fx.Node) -> list[fx.Node] | None:
    """Return the tensors from whose ranks a number is computed; None if from other things, too."""
    pending, found = [number], list[fx.Node]()
    while pending:
        node = pending.pop()
        by_method = node.op == "call_method" and node.target in _RANKS
        if by_method or (node.target is getattr and node.args[1] == "ndim"):
            found += node.all_input_nodes
        elif getattr(node.target, "__module__", "") == "_operator":
            pending += node.all_input_nodes
        else:
            return None
    return found


_RANKS = frozenset({"dim", "ndimension"})
_SIZES = frozenset(
    {getattr, len, torch.numel, "size", "dim", "ndimension", "numel", "nelement", "stride"}
)
