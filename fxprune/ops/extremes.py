"""Maximum and minimum: of two tensors, along one axis, or of all there is.

Along an axis that holds no channels a channel stays what it is, and so does a constant.
"""

from typing import Any

import torch
from torch.utils import _pytree as pytree

from fxprune.observation import TensorSpec
from fxprune.ops.elementwise import elementwise_flow
from fxprune.rules import Call, Flow, OpRule, register
from fxprune.tags import varying_axes
from fxprune.values import Barrier, Value, flatten, unknown


def extreme_flow(call: Call) -> Flow:
    """Compare two tensors, or reduce one along an axis."""
    if len(call.values()) > 1:
        return elementwise_flow(call)
    value = call.value()
    dim: Any = call.argument(1, "dim", call.kwargs.get("axis"))
    axes = set(varying_axes(value.tags))
    if not isinstance(dim, int):
        raise Barrier("it compares channels with each other")
    axis = dim % len(value.shape)
    if axis in axes:
        raise Barrier("it compares channels with each other")
    keep = bool(call.argument(2, "keepdim", call.kwargs.get("keepdims", False)))
    tags, constants = value.tags, value.constants
    if not keep:
        tags, constants = tags.squeeze(axis), constants.squeeze(axis)
    specs = [spec for spec in flatten(call.spec) if isinstance(spec, TensorSpec)]
    known = [constants, *[unknown(tags)] * (len(specs) - 1)]  # the second are positions
    outputs = iter(
        Value(spec.shape, spec.dtype, tags, c) for spec, c in zip(specs, known, strict=True)
    )
    return Flow(pytree.tree_map_only(TensorSpec, lambda _: next(outputs), call.spec))


register(OpRule("extreme", extreme_flow), torch.max, torch.min, "max", "min")
