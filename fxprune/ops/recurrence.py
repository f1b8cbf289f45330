"""Recurrent networks: what comes in may go, the hidden state stays.

Input channels are mixed by W_ih, so one that is 0, or whose weights are, goes with its column. The
hidden state is one size in the whole module, and read by itself a step later: it keeps all units.
"""

from collections.abc import Iterator
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxprune.dataflow.rules import Call, Flow, OpRule, Read, register
from fxprune.dataflow.tags import FIXED
from fxprune.dataflow.values import Barrier, State, Value, fixed
from fxprune.programs.observation import TensorSpec

_FIRST = ("weight_ih", "weight_ih_l0", "weight_ih_l0_reverse")


def recurrence_flow(call: Call) -> Flow:
    """Let the inputs go that are 0 or have no weights; keep what else there is."""
    if not isinstance(call.argument(0, "input"), Value):
        raise Barrier("its input is no tensor")
    if not any(name in _FIRST for name, _ in _parameters(call)):
        raise Barrier("its weights are computed")
    value, *states = call.values()
    along = value.along(-1)
    flow = Flow(pytree.tree_map_only(TensorSpec, fixed, call.spec), ties=[*along.ties])
    flow.keeps += [(state.tags, "a recurrent network begins with it") for state in states]
    read = torch.zeros(len(along.tags), dtype=torch.bool)
    for name, state in _parameters(call):
        if name not in _FIRST:
            state.freeze()
            continue
        rows = state.axis(0)
        flow.ties += [(rows, torch.zeros_like(rows)), (state.axis(1), along.tags)]
        read |= (state.tensor.detach() != 0).any(0).cpu()
    reason = "a recurrent network reads it where it is not 0"
    pattern = None if call.generic else read.reshape(1, -1)
    outputs = torch.full((1,), FIXED)
    flow.reads.append(Read(outputs, along.tags, pattern, along.constants == 0, reason))
    return flow


def resize_recurrence(call: Call) -> None:
    """Tell the module how many inputs it has left."""
    module: Any = call.module
    first = module.weight_ih if isinstance(module, nn.RNNCellBase) else module.weight_ih_l0
    module.input_size = first.shape[1]


def input_products(call: Call) -> tuple[Tensor, int]:
    """Return the tags of what comes in, and how many products it is in, for the whole batch.

    The other products of a recurrent network are with its hidden state, which stays.
    """
    value = call.value()
    weights = [state for name, state in _parameters(call) if name in _FIRST]
    steps = prod(value.shape[:-1])
    return weights[0].axis(1), steps * sum(state.tensor.numel() for state in weights)


def _parameters(call: Call) -> Iterator[tuple[str, State]]:
    assert call.module is not None
    for name, _ in call.module.named_parameters():
        state = call.state(name)
        if state is not None:
            yield name, state


register(
    OpRule("recurrence", recurrence_flow, resize=resize_recurrence),
    *(nn.RNN, nn.LSTM, nn.GRU, nn.RNNCell, nn.LSTMCell, nn.GRUCell),
)
