"""Gates applied where that is cheapest: conv(x·w) = conv(x) with weights W·w.

A gate in front of layers is left to them, who may multiply their weights instead of the activation
(`gating.gated_reads`): the same values, the same ∂/∂w (also at w' = 0, as the layer then reads
what is behind the gate), no further pass over activations, no x·w saved for the backward. A product
with gates of 0 and 1 also changes places with a pool, behind which there is less to multiply, and
with dropout; of a closed gate before a max pool, ∂w is then that of the largest values, which would
come back.

These functions are what runs of a lowered graph (`planning.lowering`). Traced by torch.fx they
leave the operators they stand for, each gate where it was, so that the model's own graph comes
back.
"""

from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from fxprune.gating.gated_reads import read
from fxprune.gating.gates import width_gate
from fxprune.runtime.kinds import OVERWROTE

_FORWARDS = {nn.Linear.forward, nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward}
_MAX_POOLS = {
    **{nn.MaxPool1d: 1, nn.MaxPool2d: 2, nn.MaxPool3d: 3},
    **{nn.AdaptiveMaxPool1d: 1, nn.AdaptiveMaxPool2d: 2, nn.AdaptiveMaxPool3d: 3},
}
_POOLS: dict[Any, int] = {
    **_MAX_POOLS,
    **{nn.AvgPool1d: 1, nn.AvgPool2d: 2, nn.AvgPool3d: 3},
    **{nn.AdaptiveAvgPool1d: 1, nn.AdaptiveAvgPool2d: 2, nn.AdaptiveAvgPool3d: 3},
    nn.Dropout: 0,  # a pool of single numbers, for our purposes
}


def defer_gate(
    value: Tensor, gate: Tensor, readers_can: bool, pool: nn.Module | None = None
) -> Any:
    """Return an activation and the gate its readers have to apply, None if it is applied already.

    readers_can: whether they can. In exported programs, which take batches of any size, they do
    not. pool: what reads the activation first.
    """
    if isinstance(value, fx.Proxy):
        gated = width_gate(value, gate)
        return gated if pool is None else pool(gated)
    if pool is not None and not swaps_with_gates(pool):  # it is another since the graph was lowered
        return pool(width_gate(value, gate)), None
    if pool is not None:
        value = pool(value)
    if not readers_can or _is_exporting():
        return width_gate(value, gate), None
    return value, gate


def read_gated(layer: Any, gated: Any) -> Any:
    """Call a layer on what `defer_gate` returned, the gate in its weights if it has to apply it."""
    if isinstance(gated, fx.Proxy):
        return layer(gated)
    value, gate = gated
    if gate is None:
        return layer(value)
    if not applies_gates(layer):  # as above
        return layer(width_gate(value, gate))
    return read(layer, value, gate)


def ungated(gated: Any) -> Any:
    """Return the activation for an operator whose result is gated before anybody reads it."""
    return gated if isinstance(gated, fx.Proxy) else gated[0]


def add_to(value: Tensor, other: Tensor) -> Tensor:
    """Add to an activation that nobody else reads, as the model itself does."""
    if isinstance(value, fx.Proxy):
        total: Any = value + other
        total.node.meta[OVERWROTE] = True
        return total
    value += other
    return value


def applies_gates(layer: nn.Module) -> bool:
    """Tell whether a layer does what its weights say, and nobody listens to it.

    Weights that are computed are left alone: spectral norms change whenever they are read.
    """
    computed = parametrize.is_parametrized(layer)  # the others are hooks
    return type(layer).forward in _FORWARDS and _is_untouched(layer) and not computed


def swaps_with_gates(pool: nn.Module) -> bool:
    """Tell whether pool(x·w) = pool(x)·w for gates of 0 and 1, and nobody listens to it.

    A largest value needs a window with one: dilation may take all of it into the border.
    """
    odd = (getattr(pool, "return_indices", False), getattr(pool, "inplace", False))
    plain = getattr(pool, "dilation", 1) == 1 and not any(odd)
    return type(pool) in _POOLS and plain and _is_untouched(pool)


def pooled_axes(pool: nn.Module) -> int:
    """Return how many axes, the last ones, a pool makes smaller."""
    return _POOLS[type(pool)]


def _is_exporting() -> bool:
    """Tell whether a program is being exported; torch 2.11 also says so where it compiles one."""
    flag: bool | None = getattr(torch.compiler, "_is_exporting_flag", None)
    return torch.compiler.is_exporting() if flag is None else flag


def _is_untouched(module: nn.Module) -> bool:
    hooks = (module._forward_pre_hooks, module._forward_hooks)
    backward = (module._backward_pre_hooks, module._backward_hooks)
    return "forward" not in module.__dict__ and not any(hooks) and not any(backward)
