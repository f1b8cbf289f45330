"""Operators that mix channels through weights: linear layers and convolutions.

Their outputs are new channels: the tags of the weight's first axis. Output o reads input i where
the weights between them are not all zero. A constant input c_i adds W_oi·c_i (summed over the
kernel) to the bias, exactly, unless zero padding makes the channel something else at the border. A
depthwise convolution does not mix: its outputs are tied to its inputs. Nor does a layer over tokens
mix the channels that lie along another axis.
"""

from typing import Any

import torch
from torch import Tensor, nn

from fxprune.dataflow.cuts import Arguments, Cut
from fxprune.dataflow.rules import Call, Flow, OpRule, Read, register
from fxprune.dataflow.values import Along, Barrier, Value, zeros_of
from fxprune.ops.mixing import (
    CONV_FUNCTIONS,
    GROUPS,
    LINEAR_FUNCTIONS,
    TRANSPOSED_FUNCTIONS,
    Mixing,
    read_call,
)
from fxprune.user_models.modules import count_channels_


def mixing_flow(call: Call) -> Flow:
    """Say which input each output reads and which outputs are constant."""
    mixing = read_call(call)
    if mixing.beside:
        return _beside_flow(call, mixing)
    along = mixing.value.along(mixing.axis)
    inputs, constants = along.tags, along.constants
    if mixing.depthwise:
        return _depthwise_flow(call, mixing, along)
    outputs, ties = _weight_tags(mixing, inputs)
    unknown = torch.isnan(constants) | (constants != 0 if mixing.border else False)
    result = torch.full((len(outputs),), torch.nan, dtype=torch.float64)
    pattern = None
    if not call.generic:
        pattern = _pattern(mixing)
        if pattern is not None or not bool(unknown.all()):
            result = _constant_outputs(mixing, constants, unknown, pattern)
    flow = Flow(_output(call, mixing, outputs, result), ties=[*ties, *along.ties])
    if mixing.bias is not None:
        flow.ties.append((mixing.bias.axis(0), outputs))
    if mixing.kept is not None:
        flow.keeps.append((mixing.kept, "they are tokens"))
    can_absorb = call.module is not None and call.sole_use
    foldable = ~unknown & ((constants == 0) | can_absorb)
    flow.reads.extend(_reads(mixing, outputs, inputs, pattern, foldable))
    return flow


def absorb_constants(call: Call, cut: Cut) -> None:
    """Add what dying constant channels contribute to the bias, and stop reading them."""
    mixing = read_call(call)
    if mixing.depthwise or mixing.beside:
        return
    along = mixing.value.along(mixing.axis)
    dying = ~cut.alive(along.tags) & ~torch.isnan(along.constants)
    if not bool(dying.any()):
        return
    with torch.no_grad():
        amount = torch.where(dying, along.constants, 0.0).to(mixing.weight.tensor.device)
        # Where it may not absorb, what dies is read by outputs that die too.
        if call.module is not None and call.sole_use and bool((amount != 0).any()):
            _shift_bias(call, mixing, amount, cut)
        if bool((dying & cut.keep(along.tags)).any()):
            _stop_reading(mixing, dying)


def rewrite_groups(call: Call, cut: Cut) -> Arguments | None:
    """Give a functional depthwise convolution the number of groups that remain."""
    if call.module is not None or call.node.target in LINEAR_FUNCTIONS:
        return None
    mixing = read_call(call)
    if not mixing.depthwise or mixing.beside:
        return None
    groups = int(cut.keep(mixing.value.along(mixing.axis).tags).sum())
    args = list(call.node.args)
    if len(args) > GROUPS:
        args[GROUPS] = groups
        return Arguments(tuple(args), dict(call.node.kwargs))
    return Arguments(tuple(args), {**call.node.kwargs, "groups": groups})


def resize_module(call: Call) -> None:
    """Update the module's channel counts from the weight it is left with."""
    module: Any = call.module
    if module is None:
        return
    if not isinstance(module, nn.Linear) and 1 < module.groups == module.in_channels:
        each = 1 if module.transposed else module.out_channels // module.groups
        module.groups = len(module.weight) // each
    count_channels_(module)


def _weight_tags(mixing: Mixing, inputs: Tensor) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """Return output tags, and ties: of weights to inputs, and of groups to equal sizes."""
    groups = mixing.groups
    if mixing.out_axis == 0:
        outputs = mixing.weight.axis(0)
        grouped = inputs.reshape(groups, -1)
        ties = [(mixing.weight.axis(1), grouped[0])]
    else:
        outputs = mixing.weight.axis(1).repeat(groups)
        grouped = inputs.reshape(groups, -1)
        ties = [(mixing.weight.axis(0), inputs)]
    if groups > 1:
        ties.append((grouped[:1], grouped[1:]))
        per_group = outputs.reshape(groups, -1)
        ties.append((per_group[:1], per_group[1:]))
    return outputs, ties


def _pattern(mixing: Mixing) -> Tensor | None:
    """Return which weights are nonzero, (groups, O / groups, I / groups), or None if all are."""
    weight = mixing.weight.tensor
    if int(torch.count_nonzero(weight)) == weight.numel():
        return None
    nonzero = mixing.matrix(weight.detach()) != 0
    pattern = (nonzero.squeeze(-1) if nonzero.shape[-1] == 1 else nonzero.any(-1)).cpu()
    return None if bool(pattern.all()) else pattern


def _constant_outputs(
    mixing: Mixing, constants: Tensor, unknown: Tensor, pattern: Tensor | None
) -> Tensor:
    missing = unknown.reshape(mixing.groups, 1, -1)
    read = missing if pattern is None else pattern & missing
    outputs = mixing.matrix(mixing.weight.tensor).shape[1]
    varies = read.any(-1).expand(mixing.groups, outputs).reshape(-1)
    if bool(varies.all()):
        return torch.full(varies.shape, torch.nan, dtype=torch.float64)
    result = _mixed(mixing, torch.where(unknown, 0.0, constants)).cpu()
    if mixing.bias is not None:
        result = result + mixing.bias.known()
    return torch.where(varies, torch.nan, result)


def _mixed(mixing: Mixing, amounts: Tensor) -> Tensor:
    """Return W·amounts in float64; most are 0, and large weights are not read for those."""
    grouped = amounts.to(mixing.weight.tensor.device).reshape(mixing.groups, -1)
    places = grouped.any(0).nonzero().reshape(-1)
    matrix = mixing.matrix(mixing.weight.tensor.detach()).index_select(2, places)
    weights = matrix.sum(-1, dtype=torch.float64)
    return torch.einsum("goi,gi->go", weights, grouped[:, places]).reshape(-1)


def _reads(
    mixing: Mixing, outputs: Tensor, inputs: Tensor, pattern: Tensor | None, foldable: Tensor
) -> list[Read]:
    reason = "a layer reads it where it is not a constant that can be folded"
    if pattern is None:
        return [Read(outputs, inputs, None, foldable, reason)]
    parts = zip(
        outputs.reshape(mixing.groups, -1),
        inputs.reshape(mixing.groups, -1),
        pattern,
        foldable.reshape(mixing.groups, -1),
        strict=True,
    )
    return [Read(o, i, p, f, reason) for o, i, p, f in parts]


def _shift_bias(call: Call, mixing: Mixing, amount: Tensor, cut: Cut) -> None:
    """Add W·amount to the bias; a bias made for it is cut here, as the analysis never saw it."""
    shift = _mixed(mixing, amount)
    if mixing.bias is not None:
        bias = mixing.bias.tensor
        bias.data = (bias.double() + shift).to(bias.dtype)  # its memory may be the user's
        return
    module: Any = call.module
    keep = cut.keep(_weight_tags(mixing, mixing.value.along(mixing.axis).tags)[0])
    module.bias = nn.Parameter(shift[keep.to(shift.device)].to(mixing.weight.tensor.dtype))


def _stop_reading(mixing: Mixing, dying: Tensor) -> None:
    """Zero the weights of absorbed inputs that stay for want of any other channel."""
    weight = mixing.weight.tensor
    stay = (~dying).to(weight.device).reshape(mixing.groups, 1, -1, 1)
    masked = mixing.matrix(weight) * stay
    masked = masked if mixing.out_axis == 0 else masked.transpose(1, 2)
    weight.data = masked.reshape(weight.shape)


def _depthwise_flow(call: Call, mixing: Mixing, along: Along) -> Flow:
    """Follow a convolution that keeps channels apart: m outputs an input, tied to it."""
    weight, channels = mixing.weight, mixing.value.shape[mixing.axis]
    outs = call.tensor_spec().shape[mixing.axis]
    tags = along.tags.repeat_interleave(outs // channels)
    constants = along.constants.repeat_interleave(outs // channels)
    unknown = torch.isnan(constants) | (constants != 0 if mixing.border else False)
    if call.generic:
        scale = torch.ones(outs, dtype=torch.float64)
    else:
        scale = mixing.matrix(weight.tensor.detach().cpu().double()).sum(-1).reshape(-1)
        nonzero = (mixing.matrix(weight.tensor.detach()) != 0).any(-1).reshape(-1).cpu()
        unknown = unknown & nonzero
    result = torch.where(unknown, 0.0, torch.nan_to_num(constants)) * scale
    if mixing.bias is not None:
        result = result + mixing.bias.known()
    result = torch.where(unknown, torch.nan, result)
    ties = [(weight.axis(0), along.tags if mixing.out_axis else tags), *along.ties]
    if mixing.bias is not None:
        ties.append((mixing.bias.axis(0), tags))
    return Flow(_output(call, mixing, tags, result), ties=ties)


def _beside_flow(call: Call, mixing: Mixing) -> Flow:
    """Follow a layer that mixes tokens, not channels: each channel goes through it alone."""
    stride: Any = getattr(call.module, "stride", call.argument(3, "stride", 1))
    if any(step != 1 for step in (stride if isinstance(stride, (tuple, list)) else (stride,))):
        raise Barrier("it strides over channels")
    for state in (mixing.weight, mixing.bias):
        if state is not None:
            state.freeze()
    value = mixing.value
    constants = torch.full(value.tags.shape, torch.nan, dtype=torch.float64)
    if mixing.bias is None:
        constants = zeros_of(value.constants)
    return Flow(call.output(value.tags, constants))


def _output(call: Call, mixing: Mixing, tags: Tensor, constants: Tensor) -> Value:
    shape = [1] * len(call.tensor_spec().shape)
    shape[mixing.axis] = len(tags)
    return call.output(tags.reshape(shape), constants.reshape(shape))


register(
    OpRule("mixing", mixing_flow, absorb_constants, rewrite_groups, resize_module),
    *(nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    *LINEAR_FUNCTIONS,
    *CONV_FUNCTIONS,
    *TRANSPOSED_FUNCTIONS,
)
