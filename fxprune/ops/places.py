"""Maps read at places that are given or computed: every channel is read at the same ones.

What lies outside a map is counted as 0, so that only 0 stays a constant.
"""

from typing import Any

import torch
import torch.nn.functional as F

from fxprune.dataflow.rules import Call, Flow, OpRule, register
from fxprune.dataflow.tags import varying_axes
from fxprune.dataflow.values import Barrier, State, Value, as_value, flatten, zeros_of

_PLACES = "it says where maps are read"


def sample_flow(call: Call) -> Flow:
    """Pass the channels of maps (N, C, …); all that says where to read them stays."""
    value = call.value()
    if any(axis != 1 for axis in varying_axes(value.tags)):
        raise Barrier("its input's channels lie along another axis than the second")
    places = flatten((call.args[1:], call.kwargs))
    for state in places:
        if isinstance(state, State):
            state.freeze()
    keeps = [
        (place.tags, _PLACES)
        for place in map(as_value, places)
        if isinstance(place, Value) and place is not value
    ]
    return Flow(call.output(value.tags, zeros_of(value.constants)), keeps=keeps)


_KEYS: tuple[Any, ...] = (F.grid_sample, torch.grid_sampler)
register(OpRule("grid_sample", sample_flow), *_KEYS)
