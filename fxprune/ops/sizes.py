"""Questions about a tensor's size, rank, type and place.

A size asked of an axis that shrinks stays the number it was (it may scale an attention, or build a
constant); where it named the size of a view, `rewriting` has already put the new size there.
"""

import operator
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import fx

from fxprune.dataflow.cuts import Arguments, Cut, Literal
from fxprune.dataflow.rules import Call, Flow, OpRule, register
from fxprune.dataflow.values import (
    Barrier,
    ShapeOf,
    SizeOf,
    State,
    Value,
    as_value,
    fixed,
    zeros_of,
)
from fxprune.ops.creation import FILLERS
from fxprune.ops.execution import movement_flow
from fxprune.ops.rewriting import frozen_size, rewrite_nothing
from fxprune.ops.transposition import TRANSPOSITION
from fxprune.runtime.kinds import FORMS

# What makes the places that maps are read at.
GRIDS = (F.affine_grid, torch.affine_grid_generator)
_HARMLESS = FORMS - {"shape"}
_PARTS = {"real", "imag"}
_TRANSPOSED = {"T", "mT", "H", "mH"}


def getattr_flow(call: Call) -> Flow:
    """Answer an attribute of a tensor."""
    container, name = call.args[0], call.args[1]
    if isinstance(container, tuple) and not isinstance(container, ShapeOf):
        if not hasattr(cast(Any, container), name):
            raise Barrier(f"the attribute {name!r} is read")
        # What `max`, `sort` or `topk` return has names.
        return Flow(getattr(cast(Any, container), name))
    if name == "shape":
        return size_flow(call)
    if name in _HARMLESS:
        return Flow(call.spec)
    if name in _TRANSPOSED:
        return TRANSPOSITION.flow(call)
    if name == "data":
        return movement_flow(call)
    if name in _PARTS:
        value = call.value()
        return Flow(call.output(value.tags, zeros_of(value.constants)))
    raise Barrier(f"the attribute {name!r} is read")


def rewrite_getattr(call: Call, cut: Cut) -> Arguments | Literal | None:
    """Check that a transposed tensor follows."""
    if call.args[1] in _TRANSPOSED:
        return TRANSPOSITION.rewrite(call, cut)
    return rewrite_nothing(call, cut) if call.args[1] == "data" else None


def size_flow(call: Call) -> Flow:
    """Answer the size of an axis, or of all: then only picking from it is understood."""
    held = _held(call)
    if isinstance(call.spec, int):
        return Flow(SizeOf(held, call.argument(1, "dim")))
    if all(_picks(user) for user in call.node.users):
        return Flow(ShapeOf(held))
    return Flow(call.spec, keeps=[(call.value().tags, "its whole shape is used")])


def _held(call: Call) -> Value | State:
    """Return whose size is asked for; of a parameter it says nothing of the other axes."""
    held = call.argument(0, "input")
    return held if isinstance(held, State) else call.value()


def count_flow(call: Call) -> Flow:
    """Answer the number of elements: nothing it is computed from may shrink."""
    return Flow(call.spec, keeps=[(call.value().tags, "its number of elements is used")])


def rank_flow(call: Call) -> Flow:
    """Answer what no removal changes."""
    return Flow(call.spec)


def grid_flow(call: Call) -> Flow:
    """Make places of a transform, which stays, and of the shape of maps of any channels."""
    tensors = call.values()
    return Flow(
        fixed(call.tensor_spec()), keeps=[(one.tags, "it is a transform") for one in tensors]
    )


def rewrite_size(call: Call, cut: Cut) -> Literal | None:
    """Freeze the size of an axis that shrinks."""
    if not isinstance(call.spec, int):
        return None
    return frozen_size(call, cut, SizeOf(_held(call), call.argument(1, "dim")))


def structure_flow(call: Call) -> Flow:
    """Answer how many entries a tuple or dict has, or which: its tensors may have any size."""
    if isinstance(as_value(call.args[0]), Value):
        raise Barrier("it asks a tensor for its first size")
    return Flow(call.execute(lambda entry: entry))


def _picks(user: fx.Node) -> bool:
    """Tell whether a shape is asked for its length, for sizes at places known, or for a grid."""
    if user.target in GRIDS:
        return True  # of as many places as the maps have; how many channels they have is no matter
    if user.target in FILLERS:
        return True  # what is made has the channels of what the shape is of
    index: Any = user.args[1] if len(user.args) > 1 else None
    if isinstance(index, slice):
        places = (index.start, index.stop, index.step)
        known = all(place is None or isinstance(place, int) for place in places)
    else:
        known = isinstance(index, int)
    return user.target is len or (user.target is operator.getitem and known)


register(OpRule("attribute", getattr_flow, rewrite=rewrite_getattr), getattr)
register(OpRule("size", size_flow, rewrite=rewrite_size), "size")
register(OpRule("count", count_flow), "numel", "nelement", torch.numel)
register(OpRule("structure", structure_flow), len, list)
register(OpRule("grid", grid_flow), *GRIDS)
register(OpRule("rank", rank_flow), hasattr, "dim", "ndimension", "is_floating_point")
