"""Operators that only move data: views, permutations, concatenations, slices.

All have one flow, the operator itself run on the tags (`execution`), and differ in how their
arguments follow (`rewriting`). Here is what some ask for besides: shapes given by another tensor,
and groups to shuffle.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fxprune.dataflow.rules import Call, Flow, OpRule, register
from fxprune.ops.execution import movement_flow
from fxprune.ops.rewriting import (
    rewrite_chunks,
    rewrite_nothing,
    rewrite_placed,
    rewrite_sizes,
    rewrite_unflatten,
)


def like_flow(call: Call) -> Flow:
    """Follow view_as and its like: what gives the shape must keep the channels it is given to."""
    flow = movement_flow(call)
    flow.ties.append((flow.outputs.tags, call.value(1, "other").tags))
    return flow


def shuffle_flow(call: Call) -> Flow:
    """Shuffle channels between groups, which must go on having equally many."""
    flow = movement_flow(call)
    along = call.value().along(1)
    module: Any = call.module
    groups: int = module.groups if module is not None else call.argument(1, "groups")
    grouped = along.tags.reshape(groups, -1)
    flow.ties += [(grouped[:1], grouped[1:]), *along.ties]
    return flow


register(
    OpRule("movement", movement_flow, rewrite=rewrite_nothing),
    *(nn.Flatten, nn.PixelShuffle, nn.PixelUnshuffle),
    *(F.pixel_shuffle, F.pixel_unshuffle),
    *(torch.stack, torch.hstack, torch.vstack),
    *(torch.dstack, torch.column_stack, torch.row_stack, torch.flatten, torch.ravel),
    *(torch.flip, torch.fliplr, torch.flipud, torch.roll, torch.rot90),
    *(torch.unbind, torch.narrow, torch.diagonal),
    *(torch.tile, torch.repeat_interleave, torch.atleast_1d, torch.atleast_2d, torch.atleast_3d),
    *("flatten", "ravel", "flip", "fliplr", "flipud", "roll", "rot90"),
    *("unbind", "narrow", "diagonal", "tile", "repeat", "repeat_interleave", "unfold"),
)
register(OpRule("like", like_flow, rewrite=rewrite_nothing), "view_as", "reshape_as")
register(
    OpRule("shuffle", shuffle_flow, rewrite=rewrite_nothing),
    *dict.fromkeys((nn.ChannelShuffle, F.channel_shuffle, torch.channel_shuffle)),
)
register(
    OpRule("sizes", movement_flow, rewrite=rewrite_sizes),
    *(torch.reshape, "view", "reshape"),
)
register(
    OpRule("unflatten", movement_flow, rewrite=rewrite_unflatten),
    *(nn.Unflatten, torch.unflatten, "unflatten"),
)
register(
    OpRule("parts", movement_flow, rewrite=rewrite_chunks),
    *(torch.chunk, torch.split, torch.tensor_split, torch.split_with_sizes),
    *(torch.unsafe_chunk, torch.unsafe_split),
    *("chunk", "split", "tensor_split", "split_with_sizes", "unsafe_chunk", "unsafe_split"),
)
register(
    OpRule("placed", movement_flow, rewrite=rewrite_placed), torch.slice_scatter, "slice_scatter"
)
register(
    OpRule("selected", movement_flow, rewrite=rewrite_nothing),
    *(torch.select_scatter, "select_scatter"),
)
