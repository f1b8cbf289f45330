"""Attention: softmax(q·kᵀ/√d)·v, head by head (Vaswani et al. 2017).

A head's queries, keys, values and output stand and fall together, and whole, so that √d stays what
it was. With one head only, d may shrink, and its scale becomes a number. A value that is the same
constant for all tokens comes out as it is, since the weights of each query add up to 1.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn

from fxprune.dataflow.cuts import Arguments, Cut
from fxprune.dataflow.rules import Call, Flow, OpRule, register
from fxprune.dataflow.tags import align
from fxprune.dataflow.values import Barrier, State, Value, zeros_of
from fxprune.ops.contraction import contraction_flow
from fxprune.ops.labels import Contraction, Operand, contraction


def attention_flow(call: Call) -> Flow:
    """Follow scaled dot-product attention as one product of queries, keys and values."""
    found = _read(call)
    flow = contraction_flow(call, found)
    output: Value = flow.outputs
    constants = torch.full(output.tags.shape, torch.nan, dtype=torch.float64)
    values = found.operands[2].held
    if isinstance(values, Value) and len(values.shape) == len(output.shape):
        constants = align(values.constants, output.tags).expand(output.tags.shape)
    if not _adds_up(call):
        constants = zeros_of(constants)
    flow.outputs = call.output(output.tags, constants)
    return flow


def rewrite_scale(call: Call, cut: Cut) -> Arguments | None:
    """Give a lone head that shrinks the scale it had."""
    query = call.value(0, "query")
    if call.kwargs.get("scale") is not None or not cut.shrinks(query, -1):
        return None
    scale = query.shape[-1] ** -0.5
    return Arguments(call.node.args, {**call.node.kwargs, "scale": scale})


def refuse_module(call: Call) -> Flow:
    """Keep all channels: what one module calls embedding size is also the size of all heads."""
    raise Barrier(
        "its embedding, heads and output are one size in this module; "
        "an attention written out, or on F.scaled_dot_product_attention, can lose heads"
    )


def _read(call: Call) -> Contraction:
    names = ("query", "key", "value")
    query, key, value = (call.value(place, name) for place, name in enumerate(names))
    if call.kwargs.get("enable_gqa", False):
        key, value = _repeat(key, query), _repeat(value, query)
    rank = len(query.shape)
    operands = [
        Operand(query, (*_leading(rank), "query", "size")),
        Operand(key, (*_leading(len(key.shape)), "key", "size")),
        Operand(value, (*_leading(len(value.shape)), "key", "value")),
    ]
    if any({"query", "key"} & set(one.varying()) for one in operands):
        raise Barrier("its tokens are channels")
    mask = call.argument(3, "attn_mask")
    if isinstance(mask, (Value, State)):
        shape = mask.shape if isinstance(mask, Value) else tuple(mask.tensor.shape)
        labels = (*_leading(len(shape)), "query", "key")
        operands.append(Operand(mask, labels[-len(shape) :]))
    return contraction(operands, (*_leading(rank), "query", "value"))


def _repeat(shared: Value, query: Value) -> Value:
    """Return keys or values as every query of a group sees them."""
    times = query.shape[-3] // shared.shape[-3]
    shape = (*shared.shape[:-3], query.shape[-3], *shared.shape[-2:])
    if shared.tags.shape[-3] == 1:
        return replace(shared, shape=shape)
    tags = shared.tags.repeat_interleave(times, -3)
    return Value(shape, shared.dtype, tags, shared.constants.repeat_interleave(times, -3))


def _leading(rank: int) -> tuple[str, ...]:
    """Name the axes before the last two, which are aligned from the right."""
    return tuple(f"batch{place}" for place in range(rank - 2, 0, -1))


def _adds_up(call: Call) -> bool:
    """Tell whether the weights of each query add up to 1: no dropout, nothing all masked out."""
    return call.argument(4, "dropout_p", 0.0) == 0.0 and call.argument(3, "attn_mask") is None


register(
    OpRule("attention", attention_flow, rewrite=rewrite_scale),
    F.scaled_dot_product_attention,
)
register(
    OpRule("attention module", refuse_module),
    *(nn.MultiheadAttention, F.multi_head_attention_forward),
)
