"""Operators that only move data: views, permutations, concatenations, slices.

All have one flow, the operator itself run on the tags (`execution`), and differ in how their
arguments follow (`rewriting`). Here is what some ask for besides: shapes given by another tensor,
groups to shuffle, and picking, from a tuple as often as from a tensor.
"""

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fxprune.ops.execution import movement_flow
from fxprune.ops.rewriting import (
    rewrite_chunks,
    rewrite_concatenation,
    rewrite_getitem,
    rewrite_nothing,
    rewrite_sizes,
)
from fxprune.rules import Call, Flow, OpRule, register
from fxprune.values import Barrier, State, Value, as_value, flatten


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


def getitem_flow(call: Call) -> Flow:
    """Pick from a tuple, or slice a tensor."""
    container = as_value(call.args[0])
    if isinstance(container, Value):
        if any(isinstance(leaf, (Value, State)) for leaf in flatten(call.args[1])):
            raise Barrier("its index is computed")
        return movement_flow(call)
    return Flow(container[call.args[1]])


_SAME = OpRule("movement", movement_flow, rewrite=rewrite_nothing)
register(
    _SAME,
    *(nn.Flatten, nn.PixelShuffle, nn.PixelUnshuffle),
    *(torch.flatten, torch.permute, torch.transpose, torch.swapaxes, torch.movedim, torch.t),
    *(torch.squeeze, torch.unsqueeze, torch.flip, torch.roll),
    *(torch.stack, torch.unbind),
    *(F.pixel_shuffle, F.pixel_unshuffle),
    *("flatten", "permute", "transpose", "swapaxes", "movedim", "t", "squeeze", "unsqueeze"),
    *("flip", "roll", "unbind"),
)
register(
    OpRule("concatenation", movement_flow, rewrite=rewrite_concatenation),
    *dict.fromkeys((torch.cat, torch.concat, torch.concatenate)),
)
register(OpRule("like", like_flow, rewrite=rewrite_nothing), "expand_as", "view_as", "reshape_as")
register(
    OpRule("shuffle", shuffle_flow, rewrite=rewrite_nothing),
    *dict.fromkeys((nn.ChannelShuffle, F.channel_shuffle, torch.channel_shuffle)),
)
register(
    OpRule("sizes", movement_flow, rewrite=rewrite_sizes),
    *(torch.reshape, "view", "reshape", "expand"),
)
register(
    OpRule("parts", movement_flow, rewrite=rewrite_chunks),
    *(torch.chunk, torch.split, "chunk", "split"),
)
register(OpRule("getitem", getitem_flow, rewrite=rewrite_getitem), operator.getitem)
