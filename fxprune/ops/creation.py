"""Tensors made in the likeness of another: its channels, and the same number in all of them.

Of the other they take size and type, never what is in it.
"""

import torch
from torch import Tensor

from fxprune.rules import Call, Flow, OpRule, register
from fxprune.tags import FIXED
from fxprune.values import State, Value, as_value


def like_flow(call: Call) -> Flow:
    """Give the channels of the tensor it is like, filled with what the operator fills them with."""
    value = as_value(call.argument(0, "input"))
    filled: Tensor = call.execute(_small)
    constants = filled.detach().cpu().double().reshape(-1)[:1].expand(value.tags.shape)
    return Flow(call.output(value.tags, constants))


def random_flow(call: Call) -> Flow:
    """Give the channels of the tensor it is like, filled with nobody knows what."""
    return Flow(call.output(as_value(call.argument(0, "input")).tags))


def new_flow(call: Call) -> Flow:
    """Make a tensor of a size of its own: nothing in it can go."""
    return Flow(call.output(torch.full((1,) * len(call.tensor_spec().shape), FIXED)))


def _small(argument: Value | State) -> Tensor:
    value: Value = as_value(argument)
    return torch.zeros((1,) * len(value.shape), dtype=value.dtype)


register(
    OpRule("filled_like", like_flow),
    *(torch.zeros_like, torch.ones_like, torch.full_like),
)
register(
    OpRule("made_like", random_flow),
    *(torch.rand_like, torch.randn_like),
)
register(OpRule("new", new_flow), "new_zeros", "new_ones", "new_full")
