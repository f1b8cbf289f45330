"""Picking channels out of a stream for one of its readers, as a pass proposes it.

What is picked are channels of their own: one that this reader does not need may go here, while the
stream keeps it for others. Once it is settled which do, the operator becomes a slice or an
`index_select`.
"""

import operator
from typing import Any

import torch
from torch import Tensor

from fxprune.dataflow.cuts import Arguments, Cut
from fxprune.dataflow.rules import Call, Flow, OpRule, Read, register
from fxprune.ops.rewriting import positions_that_remain


def pick_channels(x: Tensor, axis: int) -> Tensor:
    """Return `x`: that it needs all its channels is what the analysis is to find out."""
    return x


def pick_flow(call: Call) -> Flow:
    """Give out channels of their own, each of which reads the one it is."""
    value, axis = call.value(0, "x"), int(call.args[1])
    along = value.along(axis)
    picked = call.made_channels(len(along.tags))
    shape = [-1 if place == axis else 1 for place in range(len(value.shape))]
    output = call.output(picked.reshape(shape), along.constants.reshape(shape))
    foldable = torch.zeros(len(picked), dtype=torch.bool)
    read = Read(picked, along.tags, None, foldable, "it is picked", pairwise=True)
    return Flow(output, reads=[read], ties=along.ties)


def rewrite_pick(call: Call, cut: Cut) -> Arguments:
    """Pick what stays here from what stays in the stream."""
    axis = int(call.args[1])
    stream, picked = call.value(0, "x").along(axis).tags, call.made_channels(0)
    here, there = cut.keep(picked), cut.keep(stream)
    chosen = here.nonzero().reshape(-1)
    new = positions_that_remain(chosen, there.nonzero().reshape(-1), len(stream))
    source: Any = call.node.args[0]
    if isinstance(new, slice):
        return Arguments((source, (*(slice(None),) * axis, new)), {}, operator.getitem)
    return Arguments((source, axis, new), {}, torch.index_select)


register(OpRule("pick", pick_flow, rewrite=rewrite_pick), pick_channels)
