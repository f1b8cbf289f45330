"""Padding: a border around what is there, or a crop where a width is negative.

Behind a border of constants a channel is constant only if it has the same value; a border that
repeats what it stands next to changes no constant. Constants put before and after the channels are
channels themselves, new ones: the widths become what remains of them.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxprune.dataflow.cuts import Arguments, Cut
from fxprune.dataflow.rules import Call, Flow, OpRule, register
from fxprune.dataflow.tags import varying_axes
from fxprune.dataflow.values import Barrier, Value
from fxprune.ops.execution import numbers_among
from fxprune.ops.rewriting import source_of


@dataclass(frozen=True)
class Padding:
    """One reading of all forms: (before, after) for each axis that is padded, mode and constant.

    written: the widths as the call has them, in pairs, the last axis first.
    """

    widths: dict[int, tuple[int, int]]
    written: list[Any]
    mode: str
    fill: float

    def borders(self, channels: int | None) -> bool:
        """Tell whether constants are put around a channel, or may be for inputs of other sizes."""
        if any(isinstance(width, fx.Node) for width in self.written):
            return True
        rest = [pair for axis, pair in self.widths.items() if axis != channels]
        return any(width > 0 for pair in rest for width in pair)


def pad_flow(call: Call) -> Flow:
    """Pass channels through a border, and put new ones before and after them."""
    value, padding = call.value(), _read(call)
    tags, constants = value.tags, value.constants
    axis = _channel_axis(value, padding)
    if padding.mode == "constant" and padding.borders(axis):
        constants = torch.where(constants == padding.fill, constants, torch.nan)
    if axis is None:
        return Flow(call.output(tags, constants))
    tags = _join(call, tags, axis, padding)
    fill = torch.full_like(constants, padding.fill)
    before, after = (max(width, 0) for width in padding.widths[axis])
    inner = _crop(constants, axis, padding)
    parts = (_first(fill, axis, before), inner, _first(fill, axis, after))
    return Flow(call.output(tags, torch.cat(parts, axis)))


def rewrite_widths(call: Call, cut: Cut) -> Arguments | None:
    """Pad with as many channels as remain of those it put there, or crop as many as went."""
    value, padding = call.value(), _read(call)
    axis = _channel_axis(value, padding)
    if axis is None:
        return None
    inputs, outputs = cut.keep(value.tags), cut.keep(_join(call, value.tags, axis, padding))
    if bool(inputs.all()) and bool(outputs.all()):
        return None
    before, after = padding.widths[axis]
    size, total = inputs.shape[axis], outputs.shape[axis]
    first = inputs.narrow(axis, 0, -before) if before < 0 else outputs.narrow(axis, 0, before)
    last = (
        inputs.narrow(axis, size + after, -after)
        if after < 0
        else outputs.narrow(axis, total - after, after)
    )
    sign_before, sign_after = (-1 if width < 0 else 1 for width in (before, after))
    place = 2 * (len(value.shape) - 1 - axis)
    widths = [*padding.written]
    widths[place : place + 2] = sign_before * int(first.sum()), sign_after * int(last.sum())
    return Arguments((source_of(call), widths, "constant", padding.fill), {}, F.pad)


def _read(call: Call) -> Padding:
    """Read a module or function call as `Padding`: widths come in pairs, the last axis first."""
    flat: Any = call.argument(1, "pad") if call.module is None else call.module.padding
    if not isinstance(flat, (tuple, list)) or not all(isinstance(width, int) for width in flat):
        raise Barrier("its widths are computed")
    rank = len(call.value().shape)
    written: Any = flat if call.module is not None else _raw_widths(call)
    pairs = zip(flat[::2], flat[1::2], strict=True)
    widths = {rank - 1 - place: pair for place, pair in enumerate(pairs) if pair != (0, 0)}
    if call.module is None:
        mode, fill = call.argument(2, "mode", "constant"), call.argument(3, "value") or 0.0
        if len(numbers_among(call)) > sum(isinstance(width, fx.Node) for width in written):
            raise Barrier("the value it pads with is computed")
        return Padding(widths, list(written), str(mode), float(fill))
    if type(call.module) in _REPEATING:
        return Padding(widths, list(written), "repeating", 0.0)
    return Padding(widths, list(written), "constant", float(getattr(call.module, "value", 0.0)))


def _raw_widths(call: Call) -> Any:
    """Return the widths as the call has them, where some may be computed."""
    return call.node.args[1] if len(call.node.args) > 1 else call.node.kwargs["pad"]


def _channel_axis(value: Value, padding: Padding) -> int | None:
    """Return the axis of the channels if it is padded, None if it is left alone."""
    axes = varying_axes(value.tags)
    if not set(axes) & set(padding.widths):
        return None
    place = 2 * (len(value.shape) - 1 - axes[0])
    if any(isinstance(width, fx.Node) for width in padding.written[place : place + 2]):
        raise Barrier("the number of channels it pads with is computed")
    if len(axes) > 1 or padding.mode != "constant":
        raise Barrier("it repeats channels, or pads along one of several axes of them")
    return axes[0]


def _join(call: Call, tags: Tensor, axis: int, padding: Padding) -> Tensor:
    before, after = (max(width, 0) for width in padding.widths[axis])
    shape = [-1 if a == axis else 1 for a in range(tags.dim())]
    new = call.made_channels(before + after).reshape(shape)
    parts = (new.narrow(axis, 0, before), _crop(tags, axis, padding))
    return torch.cat((*parts, new.narrow(axis, before, after)), axis)


def _crop(tensor: Tensor, axis: int, padding: Padding) -> Tensor:
    before, after = (max(-width, 0) for width in padding.widths[axis])
    return tensor.narrow(axis, before, tensor.shape[axis] - before - after)


def _first(like: Tensor, axis: int, count: int) -> Tensor:
    """Return `count` positions along `axis` of a tensor that is the same all along it."""
    return like.narrow(axis, 0, 1).repeat_interleave(count, axis)


_REPEATING = (
    *(nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReflectionPad3d),
    *(nn.ReplicationPad1d, nn.ReplicationPad2d, nn.ReplicationPad3d),
    *(nn.CircularPad1d, nn.CircularPad2d, nn.CircularPad3d),
)

register(
    OpRule("padding", pad_flow, rewrite=rewrite_widths),
    *(nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d),
    *(nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d),
    *_REPEATING,
    F.pad,
)
