"""Padding along axes that hold no channels: a border.

Behind a border of constants a channel is constant only if it has the same value; a border that
repeats what it stands next to changes no constant.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fxprune.rules import Call, Flow, OpRule, register
from fxprune.tags import varying_axes
from fxprune.values import Barrier


def pad_flow(call: Call) -> Flow:
    """Pass channels through a border."""
    value = call.value()
    if any(axis in varying_axes(value.tags) for axis in _axes(call)):
        raise Barrier("it pads along channels")
    mode, fill = _mode(call)
    constants = value.constants
    if mode == "constant":
        constants = torch.where(constants == fill, constants, torch.nan)
    return Flow(call.output(value.tags, constants))


def _axes(call: Call) -> list[int]:
    """Return the axes that are padded: widths come in pairs, the last axis first."""
    widths: Any = call.argument(1, "pad")
    if call.module is not None:
        widths = call.module.padding
    rank = len(call.value().shape)
    if not isinstance(widths, (tuple, list)) or not all(isinstance(w, int) for w in widths):
        raise Barrier("its widths are computed")
    return [rank - 1 - place // 2 for place, width in enumerate(widths) if width != 0]


def _mode(call: Call) -> tuple[str, float]:
    if call.module is None:
        mode = str(call.argument(2, "mode", "constant"))
        return mode, float(call.argument(3, "value") or 0.0)
    if type(call.module) in _REPEATING:
        return "repeating", 0.0
    return "constant", float(getattr(call.module, "value", 0.0))


_REPEATING = (
    *(nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReflectionPad3d),
    *(nn.ReplicationPad1d, nn.ReplicationPad2d, nn.ReplicationPad3d),
    *(nn.CircularPad1d, nn.CircularPad2d, nn.CircularPad3d),
)

register(
    OpRule("padding", pad_flow),
    *(nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d),
    *(nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d),
    *_REPEATING,
    F.pad,
)
