"""Operators that take an axis together, so that one that is 0 still counts: softmax, sorting.

Channels beside that axis pass; parameters along it stay as they are. Along it, a removed channel
would change a mean, a variance or a softmax's sum: they keep their channels, and say so.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxprune.dataflow.rules import Call, Flow, OpRule, register
from fxprune.dataflow.tags import varying_axes
from fxprune.dataflow.values import Barrier, State, Value, axes_of, flatten, unknown, zeros_of
from fxprune.programs.observation import TensorSpec

_NORMALISES = "it normalises over channels, where a removed one would still count"
_ALONG = "it lies along the axis that is normalised"
_COMPARES = "it compares or adds up channels, where a removed one would still count"


def softmax_flow(call: Call) -> Flow:
    """Pass channels beside the axis whose numbers add up to 1."""
    dim: Any = call.module.dim if call.module is not None else call.argument(1, "dim")
    return _beside(call, (dim,), _NORMALISES)


def softmax2d_flow(call: Call) -> Flow:
    """Follow a softmax over the channels of maps."""
    return _beside(call, (-3,), _NORMALISES)


def layer_norm_flow(call: Call) -> Flow:
    """Pass channels beside the last axes, which are normalised.

    Learnt tokens (queries, latents) are rows (T, C), of which none may go; that of heads, (T, H, C)
    and more, may.
    """
    shape: Any = call.argument(1, "normalized_shape")
    if call.module is not None:
        shape = call.module.normalized_shape
    rank = len(shape) if isinstance(shape, (tuple, list)) else 1
    varying = varying_axes(call.value().tags)
    first = len(call.value().shape) - rank
    if first <= 2 and min(varying, default=first) < first <= max(varying, default=0):
        raise Barrier(_NORMALISES)
    return _beside(call, range(-rank, 0), _NORMALISES)


def response_norm_flow(call: Call) -> Flow:
    """Follow a normalisation over neighbouring channels."""
    return _beside(call, (1,), _NORMALISES)


def order_flow(
    call: Call, *, place: int, through: Callable[[Tensor], Tensor], default: int | None = -1
) -> Flow:
    """Pass channels beside the axis that is sorted or added up, and constants `through` it."""
    return _beside(call, (call.argument(place, "dim", default),), _COMPARES, through)


def difference_flow(call: Call) -> Flow:
    """Pass channels beside the axis along which neighbours are subtracted."""
    if len(call.values()) > 1:
        raise Barrier("it puts another tensor in front or behind")
    return order_flow(call, place=2, through=zeros_of)


def _same(constants: Tensor) -> Tensor:
    return constants


def _beside(
    call: Call, dims: Any, reason: str, through: Callable[[Tensor], Tensor] = unknown
) -> Flow:
    value = call.value()
    if not all(isinstance(dim, int) for dim in dims):
        raise Barrier("it does not say along which axis it works")
    beside = value.beside(axes_of(dims, len(value.shape)), reason)
    for state in _states(call):
        state.freeze()
    others = [v for v in flatten((call.args, call.kwargs)) if isinstance(v, Value)]
    keeps = [(other.tags, _ALONG) for other in others if other is not value]
    tags = beside.tags
    known = iter([through(beside.constants)])  # of the first output; the others are positions
    outputs = pytree.tree_map_only(
        TensorSpec,
        lambda spec: Value(spec.shape, spec.dtype, tags, next(known, unknown(tags))),
        call.spec,
    )
    return Flow(outputs, ties=beside.ties, keeps=keeps)


def _states(call: Call) -> list[State]:
    names = [] if call.module is None else ["weight", "bias"]
    held = [call.state(name) for name in names]
    given = [leaf for leaf in flatten((call.args, call.kwargs)) if isinstance(leaf, State)]
    return [*given, *(state for state in held if state is not None)]


register(
    OpRule("softmax", softmax_flow),
    *(nn.Softmax, nn.LogSoftmax, nn.Softmin, F.softmax, F.log_softmax, F.softmin),
    *(torch.softmax, torch.log_softmax, "softmax", "log_softmax"),
)
register(OpRule("softmax of maps", softmax2d_flow), nn.Softmax2d)
register(
    OpRule("layer_norm", layer_norm_flow),
    *(nn.LayerNorm, F.layer_norm, torch.layer_norm),
)
register(OpRule("response_norm", response_norm_flow), nn.LocalResponseNorm, F.local_response_norm)
register(OpRule("difference", difference_flow), torch.diff, "diff")
for _names, _place, _default, _through in (
    (("cumsum", "cumprod"), 1, None, zeros_of),
    (("cummax", "cummin"), 1, None, _same),
    (("sort",), 1, -1, _same),
    (("argsort",), 1, -1, unknown),
    (("topk",), 2, -1, _same),
):
    register(
        OpRule("order", partial(order_flow, place=_place, default=_default, through=_through)),
        *(form for name in _names for form in (getattr(torch, name), name)),
    )
