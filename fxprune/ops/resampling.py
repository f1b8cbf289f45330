"""Resampling of maps: every output is a weighted mean of inputs of its own channel.

The weights sum to 1, so a constant stays what it is; nearest neighbours only move data.
"""

import torch.nn.functional as F
from torch import nn

from fxprune.dataflow.rules import Call, Flow, OpRule, register
from fxprune.dataflow.tags import varying_axes
from fxprune.dataflow.values import Barrier


def resample_flow(call: Call) -> Flow:
    """Pass channels and constants through; maps are (N, C, …)."""
    value = call.value()
    if any(axis > 1 for axis in varying_axes(value.tags)):
        raise Barrier("it resamples along channels")
    return Flow(call.output(value.tags, value.constants))


register(
    OpRule("resampling", resample_flow),
    *(nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d),
    F.interpolate,
)
