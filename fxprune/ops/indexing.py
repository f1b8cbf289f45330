"""Operators that pick by position: slices, numbers, lists, and indices.

An index says where channels are. It may be a literal, or a buffer, which then stays as it is since
others may read it; when channels go, whoever picks among them gets positions of its own. Beside the
channels (nodes of a graph, tokens) an index may be computed: then it moves all channels alike.
"""

import operator
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fxprune.dataflow.cuts import Arguments, Cut, Literal
from fxprune.dataflow.rules import Call, Flow, OpRule, register
from fxprune.dataflow.tags import varying_axes
from fxprune.dataflow.values import (
    Barrier,
    Rearranged,
    ShapeOf,
    State,
    Value,
    as_value,
    flatten,
    map_values,
)
from fxprune.ops.execution import checked_arguments, movement_flow
from fxprune.ops.rewriting import (
    follows_as_is,
    frozen_size,
    positions_that_remain,
    refuse_blocks,
    rewrite_nothing,
    shrinks,
    source_of,
)


def getitem_flow(call: Call) -> Flow:
    """Pick from a tuple, from a shape, or from a tensor."""
    order = _arrangement(call)
    if order is not None:
        return Flow(Rearranged(call.args[0], order))
    container = as_value(call.args[0])
    if isinstance(container, Value):
        return _picking_flow(call, 1, call.args[1])
    if isinstance(container, ShapeOf) and isinstance(call.args[1], int):
        return Flow(container.size(call.args[1]))
    flow = Flow(container[call.args[1]])
    if isinstance(container, ShapeOf) and isinstance(call.args[1], slice):
        asked = range(len(container))[call.args[1]]
        if set(asked) & set(varying_axes(container.value.tags)):
            flow.keeps.append((container.value.tags, "its whole shape is used"))
    return flow


def rewrite_getitem(call: Call, cut: Cut) -> Arguments | Literal | None:
    """Let the index name the same channels where they are now; freeze sizes that shrink."""
    if _arrangement(call) is not None:
        return None  # a parameter follows by itself
    container = as_value(call.args[0])
    if isinstance(container, ShapeOf):
        axis = call.args[1]
        return frozen_size(call, cut, container.size(axis)) if isinstance(axis, int) else None
    if not isinstance(container, Value) or not shrinks(call := _with_positions(call, 1, ""), cut):
        return None
    if follows_as_is(call, cut):
        return None
    return _rewrite_index(call, cut, container, call.args[1], call.node.args[1])


def _arrangement(call: Call) -> list[int | None] | None:
    """Return how an index of None, `...` and whole slices (`w[:, None]`) arranges a parameter.

    None for any other index, and for what is no parameter or buffer.
    """
    held, index = call.args[0], call.args[1]
    entries = index if isinstance(index, tuple) else (index,)
    whole = [isinstance(one, slice) and one == slice(None) for one in entries]
    if not isinstance(held, State) or not all(
        one is None or one is ... or is_whole for one, is_whole in zip(entries, whole, strict=True)
    ):
        return None
    axes = list(range(held.tensor.dim()))
    order: list[int | None] = []
    for place, one in enumerate(entries):
        count = len(axes) - sum(whole[place:]) if one is ... else int(whole[place])
        order += [None] if one is None else axes[:count]
        axes = axes[count:]
    return order + axes


def rewrite_select(call: Call, cut: Cut) -> Arguments | None:
    """Pick the same channel where it is now."""
    if not shrinks(call, cut) or follows_as_is(call, cut):
        return None
    value = call.value()
    axis: Any = call.argument(1, "dim")
    index = (*(slice(None),) * (axis % len(value.shape)), call.argument(2, "index"))
    return _rewrite_index(call, cut, value, index, index)


def index_select_flow(call: Call) -> Flow:
    """Pick positions of an axis."""
    axis = int(call.argument(1, "dim")) % len(call.value().shape)
    return _picking_flow(call, 2, (*(slice(None),) * axis, call.argument(2, "index")))


def gather_flow(call: Call) -> Flow:
    """Pick elements by an index that never changes: it tells them apart along every axis."""
    if _is_computed(call.argument(2, "index")):
        raise Barrier("its index is computed")
    return movement_flow(_with_positions(call, 2, "index"))


def _picking_flow(call: Call, place: int, index: Any) -> Flow:
    """Move what an index picks; where it is computed it must leave the channels beside alone."""
    value = call.value()
    entries = index if isinstance(index, tuple) else (index,)
    computed = [leaf for leaf in flatten(index) if _is_computed(leaf)]
    if computed and any(isinstance(e, State) and e.tensor.dtype == torch.bool for e in entries):
        raise Barrier("its index is computed")  # a mask may speak of several axes
    for axis in varying_axes(value.tags) if computed else ():
        entry = _entry_of(entries, axis, len(value.shape))
        if entry is not None and not isinstance(entries[entry], slice):
            raise Barrier("its index is computed")
    flow = movement_flow(_with_positions(call, place, "index"))
    flow.keeps += [(as_value(entry).tags, "it is an index") for entry in computed]
    return flow


def _is_computed(entry: Any) -> bool:
    """Tell whether an index is known when the model runs only."""
    never_changes = isinstance(entry, State) and not entry.learns
    return isinstance(entry, (Value, State)) and not never_changes


def rewrite_index_select(call: Call, cut: Cut) -> Arguments | None:
    """Pick the same channels where they are now."""
    return rewrite_nothing(_with_positions(call, 2, "index"), cut)


def _with_positions(call: Call, place: int, name: str) -> Call:
    """Put the numbers of a constant index in the place of the buffer that holds them."""
    args = [map_values(_positions, arg) if at == place else arg for at, arg in enumerate(call.args)]
    kwargs = {
        key: map_values(_positions, arg) if key == name else arg for key, arg in call.kwargs.items()
    }
    return replace(call, args=tuple(args), kwargs=kwargs)


def _positions(argument: Value | State) -> Tensor:
    """Return an index in numbers: any, where it picks among what is no channel."""
    if _is_computed(argument):
        value: Value = as_value(argument)
        if value.dtype == torch.bool:
            raise Barrier("how much it picks depends on the input")
        return torch.zeros(value.shape, dtype=torch.int64)
    assert isinstance(argument, State)
    argument.freeze()  # an index is read whole
    return argument.tensor.detach().cpu()


def _rewrite_index(call: Call, cut: Cut, value: Value, index: Any, raw: Any) -> Arguments:
    """Replace the entry of an index that speaks of the axis along which channels went."""
    found = cut.indices(value)
    if found is None:
        raise Barrier("it cannot follow the removal of channels")
    axis, kept = found
    refuse_blocks(value, axis)
    entries: Sequence[Any] = index if isinstance(index, tuple) else (index,)
    written: Any = raw if isinstance(raw, tuple) else (raw,)
    place = _entry_of(entries, axis, len(value.shape))
    if place is None:
        raise Barrier("it cannot follow the removal of channels")
    new = _entry_that_remains(entries[place], kept, value.shape[axis])
    picked = (*written[:place], new, *written[place + 1 :])
    return checked_arguments(
        call, cut, [source_of(call), picked if len(picked) > 1 else new], {}, operator.getitem
    )


def _entry_that_remains(entry: Any, kept: Tensor, size: int) -> Any:
    if isinstance(entry, int):
        return int((kept < entry % size).sum())
    if isinstance(entry, slice):
        entry = list(range(size)[entry])
        return positions_that_remain(torch.tensor(entry, dtype=torch.int64), kept, size)
    chosen = torch.as_tensor(entry)
    if chosen.dim() != 1:
        raise Barrier("its index has several axes")
    if chosen.dtype == torch.bool:
        chosen = chosen.nonzero().reshape(-1)
    new = positions_that_remain(chosen % size, kept, size)
    return new.tolist() if isinstance(entry, list) and isinstance(new, Tensor) else new


def _entry_of(entries: Sequence[Any], axis: int, rank: int) -> int | None:
    """Return which entry of an index speaks of `axis`, None if it takes the axis whole."""
    takes = [_axes_taken(entry) for entry in entries]
    position = 0
    for place, entry in enumerate(entries):
        if entry is Ellipsis:
            position = rank - sum(takes[place + 1 :])
            continue
        if takes[place] and position <= axis < position + takes[place]:
            return place
        position += takes[place]
    return None


def _axes_taken(entry: Any) -> int:
    """Return how many axes of the tensor an entry of an index speaks of."""
    if entry is None or entry is Ellipsis or isinstance(entry, bool):
        return 0
    masks = isinstance(entry, Tensor) and entry.dtype == torch.bool
    return entry.dim() if masks else 1


register(OpRule("getitem", getitem_flow, rewrite=rewrite_getitem), operator.getitem)
register(OpRule("select", movement_flow, rewrite=rewrite_select), torch.select, "select")
register(
    OpRule("index_select", index_select_flow, rewrite=rewrite_index_select),
    *(torch.index_select, "index_select"),
)
register(OpRule("gather", gather_flow, rewrite=rewrite_index_select), torch.gather, "gather")
