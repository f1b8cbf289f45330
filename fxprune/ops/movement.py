"""Operators that only move data: one rule, run the operator itself on the tags.

So channel shuffles, NHWC flattens and concatenations are right by construction. When channels go,
literal sizes and bounds among the arguments are replaced, and the result is checked the same way:
the rewritten operator, run on the tags that remain, must give the remaining tags of its outputs.
"""

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate, map_arg
from torch.utils import _pytree as pytree

from fxprune.observation import TensorSpec
from fxprune.rules import (
    Arguments,
    Barrier,
    Call,
    Cut,
    Flow,
    Literal,
    OpRule,
    ShapeOf,
    State,
    Value,
    as_value,
    execute,
    flatten,
    register,
)
from fxprune.tags import align, compress, move

Rewriter = Callable[[Call, Cut], Arguments | None]


def movement_flow(call: Call) -> Flow:
    """Run the operator on the tags, and on the constants."""
    values = call.values()
    if not values:
        raise Barrier("it moves no tensor")
    tags = [compress(t).long() for t in _run(call, values, [v.tags for v in values])]
    specs = [spec for spec in flatten(call.spec) if isinstance(spec, TensorSpec)]
    if [len(spec.shape) for spec in specs] != [t.dim() for t in tags]:
        raise Barrier("its outputs are not what the example inputs gave")
    constants = _constants(call, values, tags)
    moved = iter(
        Value(spec.shape, spec.dtype, t, c)
        for spec, t, c in zip(specs, tags, constants, strict=True)
    )
    return Flow(pytree.tree_map_only(TensorSpec, lambda _: next(moved), call.spec))


def like_flow(call: Call) -> Flow:
    """Follow view_as and its like: what gives the shape must keep the channels it is given to."""
    flow = movement_flow(call)
    flow.ties.append((flow.outputs.tags, call.value(1, "other").tags))
    return flow


def shuffle_flow(call: Call) -> Flow:
    """Shuffle channels between groups, which must go on having equally many."""
    flow = movement_flow(call)
    along = call.value().along(1)
    module: Any = call.module
    groups: int = module.groups if module is not None else call.argument(1, "groups")
    grouped = along.tags.reshape(groups, -1)
    flow.ties += [(grouped[:1], grouped[1:]), *along.ties]
    return flow


def getitem_flow(call: Call) -> Flow:
    """Pick from a tuple, or slice a tensor."""
    container = as_value(call.args[0])
    if isinstance(container, Value):
        if any(isinstance(leaf, (Value, State)) for leaf in flatten(call.args[1])):
            raise Barrier("its index is computed")
        return movement_flow(call)
    return Flow(container[call.args[1]])


def rewrite_nothing(call: Call, cut: Cut) -> Arguments | None:
    """Check that the operator, as it is, moves what remains to where it belongs."""
    if _shrinks(call, cut):
        _check(call, cut, call.node.args, call.node.kwargs)
    return None


def rewrite_sizes(call: Call, cut: Cut) -> Arguments | None:
    """Replace the literal sizes of view, reshape and expand by what remains of the output."""
    if not _shrinks(call, cut):
        return None
    output = _single_output(call)
    before, after = output.shape, cut.shape(output)
    args: list[Any] = list(call.node.args)
    kwargs: dict[str, Any] = dict(call.node.kwargs)
    if "shape" in kwargs or "size" in kwargs:
        key = "shape" if "shape" in kwargs else "size"
        kwargs[key] = _new_sizes(call.kwargs[key], kwargs[key], before, after)
    elif isinstance(args[1], (tuple, list)):
        args[1] = _new_sizes(call.args[1], args[1], before, after)
    elif isinstance(args[1], fx.Node) and not isinstance(call.args[1], int):
        raise Barrier("its sizes are another tensor's shape")
    else:
        args[1:] = _new_sizes(call.args[1:], args[1:], before, after)
    return _checked(call, cut, args, kwargs)


def rewrite_chunks(call: Call, cut: Cut) -> Arguments | None:
    """Give split and chunk the sizes that remain of their parts."""
    if not _shrinks(call, cut):
        return None
    parts = [part for part in flatten(_outputs_of(call)) if isinstance(part, Value)]
    dim = int(call.argument(2, "dim", 0))
    sizes = [cut.shape(part)[dim] for part in parts]
    return _checked(call, cut, [call.node.args[0], sizes], {"dim": dim}, torch.split)


def rewrite_getitem(call: Call, cut: Cut) -> Arguments | Literal | None:
    """Move the bounds of contiguous slices by what went before them; freeze sizes that shrink."""
    value = as_value(call.args[0])
    if isinstance(value, ShapeOf):
        axis = call.args[1]
        return Literal(call.spec) if isinstance(axis, int) and value.shrinks(axis, cut) else None
    if not isinstance(value, Value) or not _shrinks(call, cut):
        return None
    found = cut.indices(value)
    if found is None:
        _check(call, cut, call.node.args, call.node.kwargs)
        return None
    index: Any = call.args[1]
    raw: Any = call.node.args[1]
    axis, kept = found
    position = _index_position(index, axis, len(value.shape))
    if position is None:
        return _checked(call, cut, list(call.node.args), dict(call.node.kwargs))
    item: Any = index[position] if isinstance(index, tuple) else index
    if not isinstance(item, slice):
        raise Barrier("it picks a single channel by number")
    chosen = range(value.shape[axis])[item]
    if len(chosen) == 0 or chosen.step != 1:
        raise Barrier("it slices channels with a step")
    start = int((kept < chosen.start).sum())
    stop = int((kept < chosen.stop).sum())
    new = slice(start, stop)
    index = (*raw[:position], new, *raw[position + 1 :]) if isinstance(raw, tuple) else new
    return _checked(call, cut, [call.node.args[0], index], {})


def _index_position(index: Any, axis: int, rank: int) -> int | None:
    """Return which entry of an index speaks of `axis`, None if it takes the axis whole."""
    entries: tuple[Any, ...] = index if isinstance(index, tuple) else (index,)
    if any(entry is None or isinstance(entry, (list, Tensor, bool)) for entry in entries):
        raise Barrier("it slices with a list or a new axis")
    position, remaining = 0, len(entries)
    for place, entry in enumerate(entries):
        remaining -= 1
        if entry is Ellipsis:
            position = rank - remaining
            continue
        if position == axis:
            whole = entry == slice(None)
            return None if whole else place
        position += 1
    return None


def _new_sizes(
    numbers: Sequence[Any], raw: Sequence[Any], before: Sequence[int], after: Sequence[int]
) -> Any:
    """Replace sizes of axes that shrink; -1 and the others stay as they are."""
    new = [
        node if number == -1 or old == size else size
        for number, node, old, size in zip(numbers, raw, before, after, strict=True)
    ]
    return tuple(new)


def _run(call: Call, values: list[Value], tensors: list[Tensor]) -> list[Tensor]:
    def operate(full: list[Tensor]) -> Any:
        stream = iter(full)
        return flatten(call.execute(lambda _: next(stream)))

    try:
        return move(operate, tensors, [v.shape for v in values])
    except RuntimeError as error:
        raise Barrier(f"it does not run on channel tags: {error}") from error


def _constants(call: Call, values: list[Value], tags: list[Tensor]) -> list[Tensor]:
    if all(bool(torch.isnan(v.constants).all()) for v in values):
        return [torch.full(t.shape, torch.nan, dtype=torch.float64) for t in tags]
    moved = _run(call, values, [v.constants for v in values])
    return [align(c, t) for c, t in zip(moved, tags, strict=True)]


def _outputs_of(call: Call) -> Any:
    return movement_flow(call).outputs


def _single_output(call: Call) -> Value:
    output = _outputs_of(call)
    if not isinstance(output, Value):
        raise Barrier("it does not return one tensor")
    return output


def _shrinks(call: Call, cut: Cut) -> bool:
    return any(cut.indices(value) is not None for value in call.values())


def _checked(
    call: Call,
    cut: Cut,
    args: list[Any],
    kwargs: dict[str, Any],
    function: Callable[..., Any] | None = None,
) -> Arguments:
    _check(call, cut, args, kwargs, function)
    return Arguments(tuple(args), kwargs, function)


def _check(
    call: Call, cut: Cut, args: Any, kwargs: Any, function: Callable[..., Any] | None = None
) -> None:
    """Run the rewritten operator on the tags that remain; `Barrier` unless they fall in place."""
    known = _node_values(call)

    def remaining(argument: Any) -> Any:
        found = as_value(known[argument]) if isinstance(argument, fx.Node) else argument
        return _remaining(found, cut) if isinstance(found, Value) else found

    actual_args: Any = map_aggregate(tuple(args), remaining)
    actual_kwargs: Any = map_aggregate(dict(kwargs), remaining)
    try:
        if function is None:
            result = execute(call.node, call.module, actual_args, actual_kwargs)
        else:
            result = function(*actual_args, **actual_kwargs)
    except Exception as error:
        raise Barrier(f"it cannot follow the removal of channels: {error}") from error
    outputs = [v for v in flatten(_outputs_of(call)) if isinstance(v, Value)]
    expected = [_remaining(v, cut) for v in outputs]
    actual = [t for t in flatten(result) if isinstance(t, Tensor)]
    if len(actual) != len(expected) or not all(map(torch.equal, actual, expected)):
        raise Barrier("it cannot follow the removal of channels")


def _node_values(call: Call) -> dict[fx.Node, Any]:
    """Return what each node among the arguments stands for: a `Value`, a `State` or a number."""
    known = dict(zip(_nodes(call.node.args), _leaves(call.args, call.node.args), strict=True))
    return known | dict(
        zip(_nodes(call.node.kwargs), _leaves(call.kwargs, call.node.kwargs), strict=True)
    )


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


def _remaining(value: Value, cut: Cut) -> Tensor:
    full = value.tags.double().expand(value.shape)
    found = cut.indices(value)
    return full if found is None else full.index_select(found[0], found[1])


_SAME = OpRule("movement", movement_flow, rewrite=rewrite_nothing)
register(
    _SAME,
    *(nn.Flatten, nn.PixelShuffle, nn.PixelUnshuffle),
    *(torch.flatten, torch.permute, torch.transpose, torch.swapaxes, torch.movedim, torch.t),
    *(torch.squeeze, torch.unsqueeze, torch.flip, torch.roll, torch.concat),
    *(torch.cat, torch.stack, torch.unbind),
    *(F.pixel_shuffle, F.pixel_unshuffle),
    *("flatten", "permute", "transpose", "swapaxes", "movedim", "t", "squeeze", "unsqueeze"),
    *("flip", "roll", "unbind"),
)
register(OpRule("like", like_flow, rewrite=rewrite_nothing), "expand_as", "view_as", "reshape_as")
register(
    OpRule("shuffle", shuffle_flow, rewrite=rewrite_nothing),
    *dict.fromkeys((nn.ChannelShuffle, F.channel_shuffle, torch.channel_shuffle)),
)
register(
    OpRule("sizes", movement_flow, rewrite=rewrite_sizes),
    *(torch.reshape, "view", "reshape", "expand"),
)
register(
    OpRule("parts", movement_flow, rewrite=rewrite_chunks),
    *(torch.chunk, torch.split, "chunk", "split"),
)
register(OpRule("getitem", getitem_flow, rewrite=rewrite_getitem), operator.getitem)
