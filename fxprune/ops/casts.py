"""Casts and copies: the same numbers in another type, place or memory."""

import torch

from fxprune.dataflow.rules import Call, Flow, OpRule, register


def cast_flow(call: Call) -> Flow:
    """Pass channels on; constants become what the new type holds of them."""
    value, dtype = call.value(), call.tensor_spec().dtype
    constants = value.constants
    if dtype != value.dtype and not _holds(dtype, value.dtype):
        cast = constants.nan_to_num().to(dtype).double()
        constants = torch.where(torch.isnan(constants), constants, cast)
    return Flow(call.output(value.tags, constants))


def _holds(wide: torch.dtype, narrow: torch.dtype) -> bool:
    """Tell whether one type holds every number of another."""
    return wide.is_floating_point and torch.promote_types(wide, narrow) == wide


register(
    OpRule("cast", cast_flow),
    *("contiguous", "clone", "detach", "detach_", "requires_grad_", "to", "type", "type_as"),
    *("float", "double", "half", "bfloat16", "bool", "byte", "int", "long", "short", "char"),
    *("cpu", torch.clone, torch.detach),
)
