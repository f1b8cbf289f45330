"""Axes in another order, and axes of size 1 put in or left out.

A parameter seen so is still that parameter: `x @ w.T` reads w's rows, and a depthwise convolution
by `w.unsqueeze(1)` scales channels by w's rows.
"""

from collections.abc import Callable, Sequence

import torch

from fxprune.dataflow.cuts import Arguments, Cut
from fxprune.dataflow.rules import Call, Flow, OpRule, register
from fxprune.dataflow.values import Rearranged, State
from fxprune.ops.execution import movement_flow
from fxprune.ops.rewriting import rewrite_nothing

# For every axis of the result which one of a parameter it is, None for a new one.
Order = Sequence[int | None]


def arrangement(name: str, order_of: Callable[[Call, State], Order | None]) -> OpRule:
    """Return the rule of operators that arrange axes; of a parameter it says in which order."""

    def order(call: Call) -> Order | None:
        held = call.argument(0, "input")
        return order_of(call, held) if isinstance(held, State) else None

    def flow(call: Call) -> Flow:
        found = order(call)
        if found is None:
            return movement_flow(call)
        return Flow(Rearranged(call.argument(0, "input"), found))

    def rewrite(call: Call, cut: Cut) -> Arguments | None:
        """Check that an activation follows; a parameter does by itself."""
        return rewrite_nothing(call, cut) if order(call) is None else None

    return OpRule(name, flow, rewrite=rewrite)


def _transposed(call: Call, held: State) -> Order:
    sizes = range(2, held.tensor.dim() + 2)  # each its own, so that the result tells the order
    seen = call.execute(lambda _: torch.empty(*sizes, device="meta")).shape
    return [sizes.index(size) for size in seen]


def _unsqueezed(call: Call, held: State) -> Order | None:
    dim = call.argument(1, "dim")
    if not isinstance(dim, int):
        return None
    order: list[int | None] = list(range(held.tensor.dim()))
    order.insert(dim % (len(order) + 1), None)
    return order


def _squeezed(call: Call, held: State) -> Order | None:
    """Return which axes stay; an axis of another size does, unless it shrinks to 1."""
    dim, shape = call.argument(1, "dim"), held.tensor.shape
    if not isinstance(dim, int) or not shape or shape[dim] != 1:
        return None
    return [axis for axis in range(len(shape)) if axis != dim % len(shape)]


TRANSPOSITION = arrangement("transposition", _transposed)
register(
    TRANSPOSITION,
    *(torch.t, torch.permute, torch.transpose, torch.swapaxes, torch.swapdims, torch.movedim),
    *(torch.moveaxis, torch.adjoint, "t", "permute", "transpose", "swapaxes", "swapdims"),
    *("movedim", "moveaxis", "adjoint", "t_", "transpose_", "swapaxes_", "swapdims_"),
)
UNSQUEEZE, SQUEEZE = arrangement("unsqueeze", _unsqueezed), arrangement("squeeze", _squeezed)
register(UNSQUEEZE, torch.unsqueeze, "unsqueeze", "unsqueeze_")
register(SQUEEZE, torch.squeeze, "squeeze", "squeeze_")
