"""How the literal arguments of operators that move data follow when channels go.

Sizes, parts and the bounds of slices become what remains of them. Each answer is checked by
execution before it is given; what does not fall in place is a `Barrier`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from fxprune.cuts import Arguments, Cut, Literal
from fxprune.ops.execution import check, checked_arguments, movement_flow
from fxprune.rules import Call
from fxprune.values import Barrier, ShapeOf, Value, as_value, flatten


def rewrite_nothing(call: Call, cut: Cut) -> Arguments | None:
    """Check that the operator, as it is, moves what remains to where it belongs."""
    if _shrinks(call, cut):
        check(call, cut, call.node.args, call.node.kwargs)
    return None


def rewrite_concatenation(call: Call, cut: Cut) -> Arguments | None:
    """Leave out the parts of which nothing remains."""
    if not _shrinks(call, cut):
        return None
    args, kwargs = list(call.node.args), dict(call.node.kwargs)
    parts: Any = args[0] if args else kwargs["tensors"]
    stay = [part for part in parts if part not in cut.gone]
    if args:
        args[0] = stay
    else:
        kwargs["tensors"] = stay
    return checked_arguments(call, cut, args, kwargs)


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
    return checked_arguments(call, cut, args, kwargs)


def rewrite_chunks(call: Call, cut: Cut) -> Arguments | None:
    """Give split and chunk the sizes that remain of their parts."""
    if not _shrinks(call, cut):
        return None
    parts = [part for part in flatten(_outputs_of(call)) if isinstance(part, Value)]
    dim = int(call.argument(2, "dim", 0))
    sizes = [cut.shape(part)[dim] for part in parts]
    return checked_arguments(call, cut, [call.node.args[0], sizes], {"dim": dim}, torch.split)


def rewrite_getitem(call: Call, cut: Cut) -> Arguments | Literal | None:
    """Move the bounds of contiguous slices by what went before them; freeze sizes that shrink."""
    value = as_value(call.args[0])
    if isinstance(value, ShapeOf):
        picked: Any = range(len(value))[call.args[1]]
        axes: Sequence[int] = [picked] if isinstance(picked, int) else picked
        frozen = any(cut.shrinks(value.value, axis) for axis in axes)
        return Literal(value[call.args[1]]) if frozen else None
    if not isinstance(value, Value) or not _shrinks(call, cut):
        return None
    found = cut.indices(value)
    if found is None:
        check(call, cut, call.node.args, call.node.kwargs)
        return None
    index: Any = call.args[1]
    raw: Any = call.node.args[1]
    axis, kept = found
    position = _index_position(index, axis, len(value.shape))
    if position is None:
        return checked_arguments(call, cut, list(call.node.args), dict(call.node.kwargs))
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
    return checked_arguments(call, cut, [call.node.args[0], index], {})


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


def _outputs_of(call: Call) -> Any:
    return movement_flow(call).outputs


def _single_output(call: Call) -> Value:
    output = _outputs_of(call)
    if not isinstance(output, Value):
        raise Barrier("it does not return one tensor")
    return output


def _shrinks(call: Call, cut: Cut) -> bool:
    return any(cut.indices(value) is not None for value in call.values())
