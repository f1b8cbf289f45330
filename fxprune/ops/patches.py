"""Maps cut into patches, and put together again (im2col and col2im).

Channel c of a map (N, C, …) becomes the k² rows of a column that begin at c·k², and back. A border
of zeros is counted in, and patches that overlap are added up: only 0 stays a constant then.
"""

import torch
import torch.nn.functional as F
from torch import nn

from fxprune.dataflow.rules import Call, Flow, OpRule, register
from fxprune.dataflow.tags import varying_axes
from fxprune.dataflow.values import Along, Barrier, Value, zeros_of


def unfold_flow(call: Call) -> Flow:
    """Repeat every channel for each place of a patch."""
    value = call.value()
    axis = len(value.shape) - 3
    along = _channels(value, axis)
    repeats = call.tensor_spec().shape[-2] // value.shape[axis]
    shape = [1] * axis + [-1, 1]
    zeros = zeros_of(along.constants).repeat_interleave(repeats)
    tags = along.tags.repeat_interleave(repeats)
    return Flow(call.output(tags.reshape(shape), zeros.reshape(shape)), ties=along.ties)


def fold_flow(call: Call) -> Flow:
    """Make one channel of the rows of a patch, which stand and fall together."""
    value = call.value()
    axis = len(value.shape) - 2
    along = _channels(value, axis)
    grouped = along.tags.reshape(call.tensor_spec().shape[-3], -1)
    silent = (along.constants.reshape(grouped.shape) == 0).all(1)
    shape = [1] * axis + [-1, 1, 1]
    constants = torch.where(silent, 0.0, torch.nan).double()
    output = call.output(grouped[:, 0].reshape(shape), constants.reshape(shape))
    return Flow(output, ties=[(grouped[:, :1], grouped[:, 1:]), *along.ties])


def _channels(value: Value, axis: int) -> Along:
    if any(a != axis for a in varying_axes(value.tags)):
        raise Barrier("its channels lie along another axis")
    return value.along(axis)


register(OpRule("unfold", unfold_flow), nn.Unfold, F.unfold)
register(OpRule("fold", fold_flow), nn.Fold, F.fold)
