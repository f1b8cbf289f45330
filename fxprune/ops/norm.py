"""Normalisation of each channel: with stored statistics an affine map.

It is a·x + t with a = γ/√(σ² + ε) and t = β − a·μ (Ioffe & Szegedy 2015).

A constant channel c becomes the constant a·c + t; with γ = 0 any channel becomes the constant β.
With the statistics of the batch, or as in instance norm of each map by itself, c becomes β. Where
a model is to be trained on, a constant is one in both modes, or none: a·c + t has to be β.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxprune.dataflow.cuts import Arguments, Cut
from fxprune.dataflow.rules import Call, Flow, OpRule, register
from fxprune.dataflow.values import Barrier, State

_NAMES = ("running_mean", "running_var", "weight", "bias")
# How far apart, relatively, a constant of evaluation and one of training may be.
_SAME = 1e-9


def batch_norm_flow(call: Call) -> Flow:
    """Tie the statistics and affine parameters to the channels; map the constants."""
    value = call.value()
    along = value.along(1)
    states = _states(call)
    ties = [(state.axis(0), along.tags) for state in states.values() if state is not None]
    if not ties and call.module is not None:
        raise Barrier("it has no tensor that would say how many channels remain")
    if _of_batch(call, states):
        constants = _centred(states, along.constants)
    else:
        constants = _constants(call, states, along.constants)
        if call.trained:
            constants = _in_both_modes(constants, _centred(states, along.constants))
    shape = [1, -1, *(1,) * (len(value.shape) - 2)]
    ties += along.ties
    return Flow(call.output(along.tags.reshape(shape), constants.reshape(shape)), ties=ties)


def resize_batch_norm(call: Call) -> None:
    """Tell the module how many channels it has left."""
    module: Any = call.module
    if module is None:
        return
    for held in (module.running_mean, module.weight, module.bias):
        if held is not None:
            module.num_features = held.numel()


def _of_batch(call: Call, states: dict[str, State | None]) -> bool:
    """Tell whether it takes its statistics from the batch, in evaluation too."""
    if states["running_mean"] is None or states["running_var"] is None:
        return True
    return call.module is None and call.argument(5, "training", False) is True


def _centred(states: dict[str, State | None], inputs: Tensor) -> Tensor:
    """Return what constants become whose mean is taken off: β, as does all that γ = 0 silences."""
    weight, bias = states["weight"], states["bias"]
    result = inputs * 0.0
    if weight is not None:
        result = torch.where(weight.known() == 0, 0.0, result)
    return result if bias is None else result + bias.known()


def _in_both_modes(stored: Tensor, centred: Tensor) -> Tensor:
    """Return what channels are whether stored statistics are taken or those of the batch."""
    same = torch.isclose(stored, centred, rtol=_SAME, atol=_SAME)
    return torch.where(same, stored, torch.nan)


def _states(call: Call) -> dict[str, State | None]:
    if call.module is not None:
        return {name: call.state(name) for name in _NAMES}
    found = {name: call.argument(place + 1, name) for place, name in enumerate(_NAMES)}
    if any(not (state is None or isinstance(state, State)) for state in found.values()):
        raise Barrier("its statistics or parameters are computed")
    return found


def _constants(call: Call, states: dict[str, State | None], inputs: Tensor) -> Tensor:
    if bool(torch.isnan(inputs).all()) and (call.generic or not _silences(states["weight"])):
        return inputs
    mean, variance = states["running_mean"], states["running_var"]
    assert mean is not None and variance is not None
    scale = torch.rsqrt(variance.known() + _epsilon(call))
    if states["weight"] is not None:
        scale = scale * states["weight"].known()
    shift = -mean.known() * scale
    if states["bias"] is not None:
        shift = shift + states["bias"].known()
    inputs = torch.where((scale == 0) & torch.isnan(inputs), 0.0, inputs)
    return inputs * scale + shift


def _silences(weight: State | None) -> bool:
    """Tell whether any channel is multiplied by 0."""
    return weight is not None and not bool(weight.tensor.all())


def _epsilon(call: Call) -> float:
    if isinstance(call.module, nn.modules.batchnorm._NormBase):
        return call.module.eps
    return float(call.argument(7, "eps", 1e-5))


def instance_norm_flow(call: Call) -> Flow:
    """Follow γ·(x − mean)/√(var + ε) + β with a map's own statistics: a constant becomes β."""
    if isinstance(call.module, nn.modules.instancenorm._InstanceNorm):
        if len(call.value().shape) == call.module._get_no_batch_dim():
            raise Barrier("it takes its input for one sample, without a batch")
        if call.module.track_running_stats:
            return batch_norm_flow(call)  # stored statistics: in evaluation the same affine map
    states = _states(call)
    if call.module is None and any(state is not None for state in states.values()):
        raise Barrier("its statistics or parameters are given to a function")
    value = call.value()
    along = value.along(1)
    ties = [*along.ties]
    result = along.constants * 0.0
    for name in ("weight", "bias"):
        state = states[name]
        if state is not None:
            ties.append((state.axis(0), along.tags))
            result = result + state.known() if name == "bias" else result
    shape = [1, -1, *(1,) * (len(value.shape) - 2)]
    return Flow(call.output(along.tags.reshape(shape), result.reshape(shape)), ties=ties)


def rewrite_instance_norm(call: Call, cut: Cut) -> Arguments | None:
    """Call the function where a module has no parameters to tell it how many channels remain."""
    module: Any = call.module
    if module is None or module.weight is not None or module.track_running_stats:
        return None
    if cut.indices(call.value()) is None:
        return None
    return Arguments(call.node.args[:1], {"eps": module.eps}, F.instance_norm)


def resize_instance_norm(call: Call) -> None:
    """Tell the module how many channels it has left."""
    module: Any = call.module
    if module is None:
        return
    for held in (module.weight, module.running_mean):
        if held is not None:
            module.num_features = held.numel()


register(
    OpRule(
        "instance_norm",
        instance_norm_flow,
        rewrite=rewrite_instance_norm,
        resize=resize_instance_norm,
    ),
    *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d, F.instance_norm),
)
register(
    OpRule("batch_norm", batch_norm_flow, resize=resize_batch_norm),
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm),
    F.batch_norm,
)
