"""Reductions: sums, means, extremes, norms and variances over some axes.

Beside the axes of the channels a channel stays what it is. Over channels, one that is always 0 adds
nothing to a sum or a norm; a mean of fewer channels is off by the ratio of their numbers, a maximum
by the 0 that is missing: what is done to the result mends that. Other reductions keep all channels.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

from fxprune.dataflow.cuts import Arguments, Cut
from fxprune.dataflow.rules import Call, Flow, OpRule, Read, register
from fxprune.dataflow.tags import FIXED, varying_axes
from fxprune.dataflow.values import Barrier, Value, axes_of, flatten, unknown, zeros_of
from fxprune.ops.elementwise import elementwise_flow
from fxprune.programs.observation import TensorSpec

_OVER = "it reduces over channels, where a removed one would still count"
_READ = "it adds up channels that are not 0"


def _same(constants: Tensor) -> Tensor:
    return constants


@dataclass(frozen=True)
class Reduction:
    """What a reduction does to a constant; whether channels that are 0 may be missing from it.

    place: the position of `dim`. mend: a function and number that mend the result where channels,
    a tensor's share of which is given, remain.
    """

    through: Callable[[Tensor], Tensor]
    place: int = 1
    sparse: bool = False
    mend: Callable[[float], tuple[Callable[..., Any], float]] | None = None


def reduce_flow(call: Call, *, reduction: Reduction) -> Flow:
    """Pass on channels beside the axes reduced over; read those along them."""
    value = call.value()
    axes = _axes(call, value, reduction.place)
    if _is_over(value, axes) and reduction.sparse and _ignores_zeros(call):
        inputs, constants = value.tags.reshape(-1), value.constants.reshape(-1)
        one = torch.full((1,) * len(call.tensor_spec().shape), FIXED)
        read = Read(one.reshape(-1), inputs, None, constants == 0, _READ)
        # Gates may close one by one: in general a sum is not 0 for one of its channels being so.
        silent = not call.generic and bool((constants == 0).all())
        result = torch.zeros(one.shape, dtype=torch.float64) if silent else unknown(one)
        return Flow(call.output(one, result), reads=[read])
    beside = value.beside(axes, _OVER)
    specs = [spec for spec in flatten(call.spec) if isinstance(spec, TensorSpec)]
    tags, constants = beside.tags, reduction.through(beside.constants)
    if axes and len(specs[0].shape) < len(value.shape):
        for axis in sorted(axes, reverse=True):
            tags, constants = tags.squeeze(axis), constants.squeeze(axis)
    if any(len(spec.shape) != tags.dim() for spec in specs):
        raise Barrier("its output is not of the shape its arguments say")
    moved = iter(  # what else there is, positions or variances, is unknown
        Value(spec.shape, spec.dtype, tags, unknown(tags) if place else constants)
        for place, spec in enumerate(specs)
    )
    outputs = pytree.tree_map_only(TensorSpec, lambda _: next(moved), call.spec)
    return Flow(outputs, ties=beside.ties)


def variance_flow(call: Call) -> Flow:
    """Follow variances: that of zeros is 0, unless there are too few of them to tell."""
    value = call.value()
    count = math.prod(value.shape[axis] for axis in _axes(call, value, 1))
    return reduce_flow(
        call, reduction=Reduction(zeros_of if count > _correction(call) else unknown)
    )


def _correction(call: Call) -> float:
    """Return what is taken from the number of entries; infinite if it is computed."""
    flags = [argument for argument in call.args[1:3] if isinstance(argument, bool)]
    unbiased = call.kwargs.get("unbiased", flags[0] if flags else True)
    found = call.kwargs.get("correction", 1 if unbiased is not False else 0)
    return found if isinstance(found, (int, float)) else math.inf


def extreme_flow(call: Call) -> Flow:
    """Follow the extreme of a tensor, or of two tensors, element by element."""
    if len(call.values()) > 1:
        return elementwise_flow(call)
    return reduce_flow(call, reduction=Reduction(_same))


def rewrite_reduction(call: Call, cut: Cut, *, reduction: Reduction) -> Arguments | None:
    """Mend the result where channels are missing that were 0."""
    value = call.value()
    found = cut.indices(value)
    axes = _axes(call, value, reduction.place)
    if found is None or reduction.mend is None or found[0] not in axes:
        return None
    share = len(found[1]) / value.shape[found[0]]
    return Arguments(call.node.args, dict(call.node.kwargs), then=reduction.mend(share))


def normalize_flow(call: Call) -> Flow:
    """Follow x / max(‖x‖, ε): a channel that is 0 adds nothing to the norm, and stays 0."""
    value = call.value()
    dim = call.argument(2, "dim", 1)
    if not isinstance(dim, int):
        raise Barrier("it normalises over several axes")
    axes = axes_of((dim,), len(value.shape))
    output = call.output(value.tags, zeros_of(value.constants))
    if not _is_over(value, axes):
        return Flow(output, ties=value.beside(axes, _OVER).ties)
    if not _ignores_zeros(call):
        raise Barrier(_OVER)
    tags = value.tags.reshape(-1)
    return Flow(output, reads=[Read(tags, tags, None, value.constants.reshape(-1) == 0, _READ)])


def similarity_flow(call: Call) -> Flow:
    """Follow a·b / (‖a‖·‖b‖): a channel may be missing where it is 0 on both sides."""
    first, second = call.value(0, "x1"), call.value(1, "x2")
    axis = call.argument(2, "dim", 1) % len(first.shape)
    if first.shape != second.shape:
        raise Barrier("it broadcasts its operands")
    if not (_is_over(first, {axis}) and _is_over(second, {axis})):
        left, right = first.beside({axis}, _OVER), second.beside({axis}, _OVER)
        if left.tags.shape != right.tags.shape:
            raise Barrier("its operands have their channels along different axes")
        output = call.output(left.tags.squeeze(axis))
        return Flow(output, ties=[*left.ties, *right.ties, (left.tags, right.tags)])
    one = torch.full((1,) * len(call.tensor_spec().shape), FIXED)
    zero = ((first.constants == 0) & (second.constants == 0)).reshape(-1)
    read = Read(one.reshape(-1), first.tags.reshape(-1), None, zero, _READ)
    return Flow(call.output(one), ties=[(first.tags, second.tags)], reads=[read])


def _is_over(value: Value, axes: set[int]) -> bool:
    """Tell whether channels lie along axes reduced over, and along no others."""
    varying = set(varying_axes(value.tags))
    return bool(varying) and varying <= axes


def _ignores_zeros(call: Call) -> bool:
    """Tell whether a norm, if it is one, is of an order to which zeros add nothing."""
    if "norm" not in str(getattr(call.node.target, "__name__", call.node.target)):
        return True
    order = call.argument(1, "p", call.kwargs.get("ord", 2))
    return order in (None, "fro") or (isinstance(order, (int, float)) and order > 0)


def _axes(call: Call, value: Value, place: int) -> set[int]:
    rank = len(value.shape)
    given = call.argument(place, "dim", call.kwargs.get("axis"))  # NumPy's spelling is accepted
    if given is None or isinstance(given, bool):  # `var(x, True)` speaks of its divisor
        return set(range(rank))
    dims: Any = given if isinstance(given, (tuple, list)) else (given,)
    if not all(isinstance(dim, int) for dim in dims):
        raise Barrier("the axes it reduces over are computed")
    return axes_of(dims, rank) or set(range(rank))


def _register(name: str, reduction: Reduction, *targets: Any) -> None:
    flow = partial(reduce_flow, reduction=reduction)
    rewrite = partial(rewrite_reduction, reduction=reduction)
    register(OpRule(name, flow, rewrite=rewrite), *targets)


def _forms(*names: str) -> list[Any]:
    functions = [getattr(torch, name) for name in names]
    return [*functions, *(name for name in names if hasattr(Tensor, name))]


_MEAN = Reduction(_same, sparse=True, mend=lambda share: (torch.mul, share))
_MAXIMUM = Reduction(_same, sparse=True, mend=lambda _: (torch.clamp_min, 0))
_MINIMUM = Reduction(_same, sparse=True, mend=lambda _: (torch.clamp_max, 0))
_register("mean", _MEAN, *_forms("mean"))
_register("sum", Reduction(zeros_of, sparse=True), *_forms("sum"))
_register("maximum", _MAXIMUM, *_forms("amax"))
_register("minimum", _MINIMUM, *_forms("amin"))
register(OpRule("extremes", extreme_flow), *_forms("max", "min", "median"))
register(OpRule("statistics", variance_flow), *_forms("var", "std", "var_mean", "std_mean"))
_register("product of all", Reduction(zeros_of), *_forms("prod", "all", "any"))
_register("logsumexp", Reduction(unknown), *_forms("logsumexp", "argmax", "argmin"))
_register(
    "norm",
    Reduction(zeros_of, 2, sparse=True),
    *(*_forms("norm"), torch.linalg.norm, torch.linalg.vector_norm),
)
register(OpRule("normalize", normalize_flow), F.normalize)
register(OpRule("similarity", similarity_flow), F.cosine_similarity)
