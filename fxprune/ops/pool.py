"""Pooling over the axes along which channels do not vary, and what undoes it.

A channel stays what it is. A constant stays constant too, except where zeros are counted in at a
padded border, or where it is summed.
"""

import math
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxprune.dataflow.rules import Call, Flow, OpRule, register
from fxprune.dataflow.tags import varying_axes
from fxprune.dataflow.values import Barrier, Value, flatten, unknown, zeros_of
from fxprune.programs.observation import TensorSpec


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
        return _spatial(call, rank, zeros_of)
    return _spatial(call, rank, lambda constants: constants)


def power_flow(call: Call, *, rank: int) -> Flow:
    """Pass channels through the p-norm of every window: of zeros it is 0, where p has a root."""
    module = call.module
    power: Any = call.argument(1, "norm_type") if module is None else module.norm_type
    if not isinstance(power, (int, float)) or not 0 < power < math.inf:
        raise Barrier("its p is not a positive number")
    return _spatial(call, rank, zeros_of)


def unpool_flow(call: Call, *, rank: int) -> Flow:
    """Put the channels of a pooled map where they were; zeros are what is between them."""
    indices = call.value(1, "indices")
    flow = _spatial(call, rank, zeros_of)
    return replace(flow, ties=[(call.value().tags, indices.tags)])


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


def _register_pools(rank: int) -> None:
    def named(*names: str) -> list[Any]:
        """Return the modules and functions of these names; some functions live in `torch` too."""
        found = [getattr(nn, f"{name}{rank}d") for name in names]
        for name in names:
            function = re.sub("(?<=[a-zP])(?=[A-Z])", "_", name).lower() + f"{rank}d"
            for form in (function, function + "_with_indices"):
                found += [getattr(space, form) for space in (F, torch) if hasattr(space, form)]
        return list(dict.fromkeys(found))

    pool, average = partial(pool_flow, rank=rank), partial(average_flow, rank=rank)
    register(OpRule("pool", pool), *named("MaxPool", "AdaptiveAvgPool", "AdaptiveMaxPool"))
    register(OpRule("average_pool", average), *named("AvgPool"))
    register(OpRule("power_pool", partial(power_flow, rank=rank)), *named("LPPool"))
    register(OpRule("unpool", partial(unpool_flow, rank=rank)), *named("MaxUnpool"))


for _rank in (1, 2, 3):
    _register_pools(_rank)
