"""Pooling and reductions over the axes along which channels do not vary.

A channel stays what it is. A constant stays constant too, except where zeros are counted in at a
padded border, and except for sums, whose value depends on the size of the input.
"""

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxprune.observation import TensorSpec
from fxprune.rules import Call, Flow, OpRule, register
from fxprune.tags import varying_axes
from fxprune.values import Barrier, Value, flatten, unknown


def pool_flow(call: Call, *, rank: int) -> Flow:
    """Pass channels and constants through a pooling over `rank` axes that no border spoils."""
    return _spatial(call, rank, lambda constants: constants)


def average_flow(call: Call, *, rank: int) -> Flow:
    """Pass constants through an average; only 0 survives a border of counted zeros."""
    padding = getattr(call.module, "padding", None)
    if call.module is None:
        padding = call.argument(3, "padding", 0)
    sizes: Any = padding if isinstance(padding, (tuple, list)) else (padding,)
    if any(size != 0 for size in sizes) or _divides(call):
        return _spatial(call, rank, lambda c: torch.where(c == 0, c, torch.nan))
    return _spatial(call, rank, lambda constants: constants)


def mean_flow(call: Call) -> Flow:
    """Pass channels through a mean, maximum or minimum over axes that hold no channels."""
    return _reduce(call, lambda constants: constants)


def sum_flow(call: Call) -> Flow:
    """Pass channels through a sum over axes that hold no channels; only 0 stays a constant."""
    return _reduce(call, lambda c: torch.where(c == 0, c, torch.nan))


def _divides(call: Call) -> bool:
    """Tell whether the average divides by something else than the number of elements."""
    if call.module is not None:
        return getattr(call.module, "divisor_override", None) is not None
    return call.argument(6, "divisor_override") is not None


def _spatial(call: Call, rank: int, through: Callable[[Tensor], Tensor]) -> Flow:
    value = call.value()
    pooled = range(len(value.shape))[-rank:]
    if any(axis in pooled for axis in varying_axes(value.tags)):
        raise Barrier("it pools over channels")
    specs = [spec for spec in flatten(call.spec) if isinstance(spec, TensorSpec)]
    constants = [through(value.constants), *[unknown(value.tags)] * (len(specs) - 1)]
    outputs = iter(
        Value(spec.shape, spec.dtype, value.tags, known)
        for spec, known in zip(specs, constants, strict=True)
    )
    return Flow(pytree.tree_map_only(TensorSpec, lambda _: next(outputs), call.spec))


def _reduce(call: Call, through: Callable[[Tensor], Tensor]) -> Flow:
    value = call.value()
    axes = _axes(call, value)
    if any(axis in axes for axis in varying_axes(value.tags)):
        raise Barrier("it reduces over channels")
    keep = bool(call.argument(2, "keepdim", call.kwargs.get("keepdims", False)))
    tags, constants = value.tags, through(value.constants)
    for axis in sorted(axes, reverse=True):
        tags = tags if keep else tags.squeeze(axis)
        constants = constants if keep else constants.squeeze(axis)
    return Flow(call.output(tags, constants))


def _axes(call: Call, value: Value) -> set[int]:
    rank = len(value.shape)
    given = call.argument(1, "dim", call.kwargs.get("axis"))  # NumPy's spelling is accepted
    if given is None:
        return set(range(rank))
    dims: Any = given if isinstance(given, (tuple, list)) else (given,)
    if not all(isinstance(dim, int) for dim in dims):
        raise Barrier("the axes it reduces over are computed")
    return {dim % rank for dim in dims}


def _register_pools(rank: int) -> None:
    def named(*names: str) -> list[Any]:
        """Return the modules and functions of these names; some functions live in `torch` too."""
        found = [getattr(nn, f"{name}{rank}d") for name in names]
        for name in names:
            function = re.sub("(?<!^)(?=[A-Z])", "_", name).lower() + f"{rank}d"
            found += [getattr(space, function) for space in (F, torch) if hasattr(space, function)]
        return list(dict.fromkeys(found))

    pool, average = partial(pool_flow, rank=rank), partial(average_flow, rank=rank)
    register(OpRule("pool", pool), *named("MaxPool", "AdaptiveAvgPool", "AdaptiveMaxPool"))
    register(OpRule("average_pool", average), *named("AvgPool"))


for _rank in (1, 2, 3):
    _register_pools(_rank)
register(OpRule("mean", mean_flow), torch.mean, torch.amax, torch.amin, "mean", "amax", "amin")
register(OpRule("sum", sum_flow), torch.sum, "sum")
