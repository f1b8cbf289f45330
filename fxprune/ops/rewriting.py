"""How the literal arguments of operators that move data follow when channels go.

Sizes and parts become what remains of them; what merely picks channels becomes the picking of
those that remain. Each answer is checked by execution before it is given; what does not fall in
place is a `Barrier`.
"""

import math
import operator
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate

from fxprune.dataflow.cuts import Arguments, Cut, Literal, Scaled
from fxprune.dataflow.rules import Call, execute
from fxprune.dataflow.values import Barrier, OfSizes, SizeOf, State, Value, flatten
from fxprune.ops.execution import check, checked_arguments, movement_flow, node_values

# By which a map is tried to be longer: of several, as half of the channels may be half of a row's.
_GROWTHS = (1, 2, 4, 6)


def rewrite_nothing(call: Call, cut: Cut) -> Arguments | None:
    """Check that the operator, as it is, moves what remains to where it belongs, or select."""
    if not shrinks(call, cut) or follows_as_is(call, cut):
        return None
    return rewrite_as_selection(call, cut)


def rewrite_sizes(call: Call, cut: Cut) -> Arguments | None:
    """Replace the literal sizes of view, reshape and expand by what remains of the output."""
    if not shrinks(call, cut):
        return None
    output = _single_output(call)
    args, kwargs = with_sizes(call, 1, output.shape, cut.shape(output))
    answer = checked_arguments(call, cut, args, kwargs)
    return replace(answer, binds=bound_axes(call, cut, answer))


def bound_axes(call: Call, cut: Cut, answer: Arguments) -> tuple[int, ...]:
    """Return the axes of a tensor that new sizes are right for as in the example only.

    Of one pixel a channel, `view(-1, 512)` makes a row a sample; of more pixels, rows that end
    amid channels, so that what remains of them is none of its rows. Sizes that the model computes
    from the input's follow it; without a -1 among them no other tensor fits.
    """
    sizes = [one for one in flatten((call.args, call.kwargs)) if isinstance(one, int)]
    computed = [one for one in sizes if isinstance(one, OfSizes) and not one.is_of_channels]
    found = cut.indices(call.value())
    if found is None or -1 not in sizes or any(axis for one in computed for _, axis in one.sizes):
        return ()
    axes = range(1, len(call.value().shape))  # more samples are more rows alike
    return tuple(a for a in axes if a != found[0] and not _follows_growth(call, found, answer, a))


def _follows_growth(call: Call, found: tuple[int, Tensor], answer: Arguments, axis: int) -> bool:
    """Tell whether new sizes leave the right elements where the tensor is longer along an axis."""
    shape = call.value().shape
    for more in _GROWTHS:
        longer = [size + more * (place == axis) for place, size in enumerate(shape)]
        everything = torch.arange(math.prod(longer)).reshape(longer)
        rest = everything.index_select(*found)
        try:
            whole = call.execute(lambda _, given=everything: given)
        except RuntimeError:
            continue  # the model does not take it
        try:
            part = _execute(call, answer, rest)
        except RuntimeError:
            return False
        if not _is_rest(part, whole, torch.isin(whole, rest)):
            return False
    return True


def _execute(call: Call, answer: Arguments, tensor: Tensor) -> Any:
    """Run the rewritten operator on another tensor."""
    known = node_values(call)

    def given(argument: Any) -> Any:
        if isinstance(argument, Scaled):
            return argument.remaining
        found = known[argument] if isinstance(argument, fx.Node) else argument
        return tensor if isinstance(found, (Value, State)) else found

    args: Any = map_aggregate(answer.args, given)
    kwargs: Any = map_aggregate(answer.kwargs, given)
    return execute(call.node, call.module, args, kwargs)


def _is_rest(part: Tensor, whole: Tensor, stays: Tensor) -> bool:
    """Tell whether a tensor is what stays of another along one axis, in its order."""
    if part.dim() != whole.dim():
        return False
    axes = [a for a in range(part.dim()) if part.shape[a] != whole.shape[a]]
    if len(axes) != 1:
        return not axes and torch.equal(part, whole)
    part, whole, stays = (tensor.movedim(axes[0], -1) for tensor in (part, whole, stays))
    if bool((stays.sum(-1) != part.shape[-1]).any()):
        return False
    return torch.equal(whole[stays].reshape(part.shape), part)


def with_sizes(
    call: Call, place: int, before: Sequence[int], after: Sequence[int]
) -> tuple[list[Any], dict[str, Any]]:
    """Return a node's arguments with the sizes that begin at `place` replaced where they differ."""
    args: list[Any] = list(call.node.args)
    kwargs: dict[str, Any] = dict(call.node.kwargs)
    if "shape" in kwargs or "size" in kwargs:
        key = "shape" if "shape" in kwargs else "size"
        kwargs[key] = _new_sizes(call.kwargs[key], kwargs[key], before, after)
    elif isinstance(args[place], (tuple, list)):
        args[place] = _new_sizes(call.args[place], args[place], before, after)
    elif isinstance(args[place], fx.Node) and not isinstance(call.args[place], int):
        raise Barrier("its sizes are another tensor's shape")
    else:
        args[place:] = _new_sizes(call.args[place:], args[place:], before, after)
    return args, kwargs


def frozen_size(call: Call, cut: Cut, size: SizeOf) -> Literal | None:
    """Freeze the size of an axis that shrinks at what it was; no samples may be counted in it."""
    held, axis = size.held, size.axis
    value = held.outline(axis) if isinstance(held, State) else held
    if not cut.shrinks(value, axis):
        return None
    if axis == 0 and not size.is_of_channels:
        raise Barrier("it asks how many samples, and channels, an axis holds")
    return Literal(call.spec)


def rewrite_chunks(call: Call, cut: Cut) -> Arguments | None:
    """Give split and chunk the sizes that remain of their parts; beside the channels they stay."""
    if not shrinks(call, cut) or follows_as_is(call, cut):
        return None
    parts = [part for part in flatten(_outputs_of(call)) if isinstance(part, Value)]
    dim = int(call.argument(2, "dim", 0))
    refuse_blocks(call.value(), dim)
    sizes = [cut.shape(part)[dim] for part in parts]
    return checked_arguments(call, cut, [source_of(call), sizes], {"dim": dim}, torch.split)


def rewrite_placed(call: Call, cut: Cut) -> Arguments | None:
    """Put a part where it belongs among the channels that remain."""
    if not shrinks(call, cut) or follows_as_is(call, cut):
        return None
    value, axis = call.value(), int(call.argument(2, "dim", 0))
    found = cut.indices(value)
    if found is None or found[0] != axis % len(value.shape) or "src" in call.kwargs:
        raise Barrier("it cannot follow the removal of channels")
    refuse_blocks(value, found[0])
    bounds: Any = (call.argument(place, "", None) for place in (3, 4, 5))
    size = value.shape[axis]
    chosen = torch.arange(size)[slice(*bounds)]
    new = positions_that_remain(chosen, found[1], size)
    if not isinstance(new, slice):
        raise Barrier("what it puts there is no longer one slice")
    step = 1 if new.step is None else new.step
    args = [*call.node.args[:2], axis, new.start, new.stop, step]
    return checked_arguments(call, cut, args, {}, torch.slice_scatter)


def rewrite_unflatten(call: Call, cut: Cut) -> Arguments | None:
    """Replace the literal sizes an axis is split into by what remains of them."""
    if not shrinks(call, cut):
        return None
    module: Any = call.module
    dim: Any = module.dim if isinstance(module, nn.Unflatten) else call.argument(1, "dim")
    args, kwargs = call.node.args, call.node.kwargs
    sizes: Any = call.argument(2, "sizes")
    raw: Any = args[2] if len(args) > 2 else kwargs.get("sizes")
    if isinstance(module, nn.Unflatten):
        sizes = raw = module.unflattened_size
    if not isinstance(raw, (tuple, list)):
        raise Barrier("its sizes are another tensor's shape")
    output = _single_output(call)
    start = int(dim) % len(call.value().shape)
    span = slice(start, start + len(sizes))
    new = _new_sizes(sizes, raw, output.shape[span], cut.shape(output)[span])
    return checked_arguments(call, cut, [source_of(call), dim, new], {}, torch.unflatten)


def follows_as_is(call: Call, cut: Cut) -> bool:
    """Tell whether the operator, with the arguments it has, moves what remains where it belongs."""
    try:
        check(call, cut, call.node.args, call.node.kwargs)
    except Barrier:
        return False
    return True


def rewrite_as_selection(call: Call, cut: Cut) -> Arguments:
    """Let an operator that picks channels along one axis pick those that remain."""
    values, output = call.values(), _single_output(call)
    found = cut.indices(values[0])
    if len(values) != 1 or found is None:
        raise Barrier("it cannot follow the removal of channels")
    axis, kept = found
    refuse_blocks(values[0], axis)
    chosen = _selection(call, values[0], output, axis)
    new = positions_that_remain(chosen, kept, values[0].shape[axis])
    if isinstance(new, slice):
        index = (*(slice(None),) * axis, new)
        return checked_arguments(call, cut, [source_of(call), index], {}, operator.getitem)
    return checked_arguments(call, cut, [source_of(call), axis, new], {}, torch.index_select)


def refuse_blocks(value: Value, axis: int) -> None:
    """Refuse to count along an axis where channels are blocks, as in a flattened map.

    Another map has longer blocks: positions would be right for the example's size only.
    """
    along = value.along(axis).tags
    if len(along.unique()) < len(along):
        raise Barrier("it counts positions along an axis that holds both channels and space")


def _selection(call: Call, value: Value, output: Value, axis: int) -> Tensor:
    """Return the positions an operator picks along `axis`; `Barrier` if it does anything else."""
    rest = [size for place, size in enumerate(value.shape) if place != axis]
    if rest != [size for place, size in enumerate(output.shape) if place != axis]:
        raise Barrier("it cannot follow the removal of channels")
    size = value.shape[axis]
    line = torch.arange(size, dtype=torch.float64).reshape(-1, *(1,) * (len(rest) - axis))
    everything = torch.arange(math.prod(value.shape), dtype=torch.float64).reshape(value.shape)
    marks: Tensor = call.execute(lambda _: line.expand(value.shape))
    chosen = marks.movedim(axis, 0).reshape(output.shape[axis], -1)[:, 0].long()
    if not torch.equal(call.execute(lambda _: everything), everything.index_select(axis, chosen)):
        raise Barrier("it cannot follow the removal of channels")
    return chosen


def positions_that_remain(chosen: Tensor, kept: Tensor, size: int) -> slice | Tensor:
    """Return where the chosen of `size` positions are once only `kept` are left; a slice if one."""
    place = torch.full((size,), -1)
    place[kept] = torch.arange(len(kept))
    new = place[chosen]
    new = new[new >= 0]
    if len(new) == 0:
        raise Barrier("nothing would remain of what it picks")
    first, last = int(new[0]), int(new[-1])
    step = int(new[1]) - first if len(new) > 1 else 1
    if step > 0 and first <= last and torch.equal(new, torch.arange(first, last + 1, step)):
        return slice(first, last + 1, None if step == 1 else step)
    return new


def source_of(call: Call) -> fx.Node:
    """Return the node of the one tensor an operator takes."""
    known = node_values(call)
    return next(node for node, found in known.items() if isinstance(found, (Value, State)))


def _new_sizes(
    numbers: Sequence[Any], raw: Sequence[Any], before: Sequence[int], after: Sequence[int]
) -> Any:
    """Replace sizes of axes that shrink; -1 and the others stay as they are."""
    new: list[Any] = []
    for number, node, old, size in zip(numbers, raw, before, after, strict=True):
        computed = isinstance(number, OfSizes) and not number.is_of_channels
        if number == -1 or old == size:
            new.append(node)
        else:
            new.append(Scaled(node, size, old) if computed else size)
    return tuple(new)


def _outputs_of(call: Call) -> Any:
    return movement_flow(call).outputs


def _single_output(call: Call) -> Value:
    output = _outputs_of(call)
    if not isinstance(output, Value):
        raise Barrier("it does not return one tensor")
    return output


def shrinks(call: Call, cut: Cut) -> bool:
    """Tell whether any tensor the operator takes shrinks."""
    return any(cut.indices(value) is not None for value in call.values())
