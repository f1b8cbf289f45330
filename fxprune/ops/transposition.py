"""Axes in another order. A transposed parameter is still that parameter: x @ w.T reads w's rows."""

import torch

from fxprune.dataflow.cuts import Arguments, Cut
from fxprune.dataflow.rules import Call, Flow, OpRule, register
from fxprune.dataflow.values import State, Transposed
from fxprune.ops.execution import movement_flow
from fxprune.ops.rewriting import rewrite_nothing


def transposed_flow(call: Call) -> Flow:
    """Move the tags; of a parameter only say in which order its axes are seen."""
    held = call.argument(0, "input")
    if not isinstance(held, State):
        return movement_flow(call)
    sizes = range(2, held.tensor.dim() + 2)  # each its own, so that the result tells the order
    seen = call.execute(lambda _: torch.empty(*sizes, device="meta")).shape
    return Flow(Transposed(held, [sizes.index(size) for size in seen]))


def rewrite_transposed(call: Call, cut: Cut) -> Arguments | None:
    """Check that a transposed activation follows; a parameter does by itself."""
    return None if isinstance(call.argument(0, "input"), State) else rewrite_nothing(call, cut)


register(
    OpRule("transposition", transposed_flow, rewrite=rewrite_transposed),
    *(torch.t, torch.permute, torch.transpose, torch.swapaxes, torch.swapdims, torch.movedim),
    *(torch.moveaxis, torch.adjoint, "t", "permute", "transpose", "swapaxes", "swapdims"),
    *("movedim", "moveaxis", "adjoint", "t_", "transpose_", "swapaxes_", "swapdims_"),
)
