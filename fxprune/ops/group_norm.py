"""Normalisation with statistics of its own input that can lose channels exactly.

Group norm: a group goes whole, or not at all, so the statistics of the others stay. A group that is
the same constant all over becomes β.

Root mean square norm: x·γ / √(Σx²/C + ε). Channels that are always 0 add nothing to the sum; with
C' of them left, Σx²/C + ε = (Σx²/C' + ε·C/C')·C'/C, so ε' = ε·C/C' and γ' = γ·√(C/C').
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fxprune.dataflow.cuts import Arguments, Cut
from fxprune.dataflow.rules import Call, Flow, OpRule, Read, register
from fxprune.dataflow.tags import varying_axes
from fxprune.dataflow.values import Barrier, State, zeros_of
from fxprune.ops.statistics import layer_norm_flow


def group_norm_flow(call: Call) -> Flow:
    """Tie the channels of each group, and the parameters to the channels."""
    value = call.value()
    along = value.along(1)
    weight, bias = _parameters(call)
    if call.module is not None and weight is None:
        raise Barrier("it has no parameters to tell it how many channels remain")
    groups = along.tags.reshape(_groups(call), -1)
    ties = [*along.ties, (groups[:, :1], groups[:, 1:])]
    ties += [(state.axis(0), along.tags) for state in (weight, bias) if state is not None]
    inputs = along.constants.reshape(len(groups), -1)
    result = torch.where((inputs == inputs[:, :1]).all(1, keepdim=True), 0.0, torch.nan)
    result = result.expand(inputs.shape).reshape(-1).double()
    if bias is not None:
        result = result + bias.known()
    shape = [1, -1, *(1,) * (len(value.shape) - 2)]
    return Flow(call.output(along.tags.reshape(shape), result.reshape(shape)), ties=ties)


def rewrite_groups(call: Call, cut: Cut) -> Arguments | None:
    """Give the function the number of groups that remain."""
    along = call.value().along(1)
    keep = cut.keep(along.tags)
    if call.module is not None or bool(keep.all()):
        return None
    groups = int(keep.reshape(_groups(call), -1)[:, 0].sum())
    args: list[Any] = list(call.node.args)
    if len(args) > 1:
        args[1] = groups
        return Arguments(tuple(args), dict(call.node.kwargs))
    return Arguments(tuple(args), {**call.node.kwargs, "num_groups": groups})


def resize_groups(call: Call) -> None:
    """Tell the module how many channels and groups it has left."""
    if isinstance(call.module, nn.GroupNorm):
        size = call.module.num_channels // call.module.num_groups
        call.module.num_channels = call.module.weight.numel()
        call.module.num_groups = call.module.num_channels // size


def rms_norm_flow(call: Call) -> Flow:
    """Tie what goes in to what comes out; every output reads every input that is not 0."""
    value = call.value()
    last = len(value.shape) - 1
    if varying_axes(value.tags) != [last]:
        return layer_norm_flow(call)
    weight = call.state("weight") if isinstance(call.module, nn.RMSNorm) else None
    if weight is None or weight.tensor.dim() > 1 or not _has_epsilon(call):
        raise Barrier("it normalises over channels, with no weight or ε that could make up for one")
    along = value.along(last)
    zero = (along.constants == 0) & call.sole_use
    reason = "it adds up the squares of channels that are not 0"
    constants = zeros_of(value.constants)
    return Flow(
        call.output(value.tags, constants),
        ties=[(weight.axis(0), along.tags)],
        reads=[Read(along.tags, along.tags, None, zero, reason)],
    )


def resize_rms_norm(call: Call) -> None:
    """Let ε and the weight make up for the channels that went."""
    module: Any = call.module
    if module is None or module.weight is None:
        return
    before, after = module.normalized_shape[-1], module.weight.shape[-1]
    if before == after:
        return
    module.normalized_shape = (after,)
    module.eps = module.eps * before / after
    with torch.no_grad():
        module.weight.mul_((before / after) ** 0.5)


def _has_epsilon(call: Call) -> bool:
    """Tell whether ε is a number; without one it is that of the type computed in."""
    return isinstance(call.module, nn.RMSNorm) and call.module.eps is not None


def _groups(call: Call) -> int:
    if isinstance(call.module, nn.GroupNorm):
        return call.module.num_groups
    groups = call.argument(1, "num_groups")
    if not isinstance(groups, int):
        raise Barrier("its number of groups is computed")
    return groups


def _parameters(call: Call) -> tuple[State | None, State | None]:
    if call.module is not None:
        return call.state("weight"), call.state("bias")
    found = call.argument(2, "weight"), call.argument(3, "bias")
    if any(not (one is None or isinstance(one, State)) for one in found):
        raise Barrier("its parameters are computed")
    return found


register(
    OpRule("group_norm", group_norm_flow, rewrite=rewrite_groups, resize=resize_groups),
    *(nn.GroupNorm, F.group_norm, torch.group_norm),
)
register(
    OpRule("rms_norm", rms_norm_flow, resize=resize_rms_norm),
    *(nn.RMSNorm, F.rms_norm, torch.rms_norm),
)
