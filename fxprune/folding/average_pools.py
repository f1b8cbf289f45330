"""Average pools, as depthwise convolutions of 1/k² that cost no numbers.

That is what a pool is where it pads nothing or counts the zeros it pads, and where no window hangs
over the edge (`ceil_mode`). By itself it stays a pool: it is read as a layer for what it may become
together with its neighbours.
"""

from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from fxprune.folding.convolutions import Geometry, Layer
from fxprune.programs.program import Program
from fxprune.user_models.modules import is_hooked, submodule

AXES: dict[type[nn.Module], int] = {nn.AvgPool1d: 1, nn.AvgPool2d: 2, nn.AvgPool3d: 3}
_FUNCTIONS: dict[Any, Any] = {
    F.avg_pool1d: nn.AvgPool1d,
    F.avg_pool2d: nn.AvgPool2d,
    F.avg_pool3d: nn.AvgPool3d,
}
_ADAPTIVE: dict[Any, int] = {
    **{nn.AdaptiveAvgPool1d: 1, nn.AdaptiveAvgPool2d: 2, nn.AdaptiveAvgPool3d: 3},
    **{F.adaptive_avg_pool1d: 1, F.adaptive_avg_pool2d: 2, F.adaptive_avg_pool3d: 3},
}


@dataclass(frozen=True)
class Pool(Geometry):
    """An average over windows, of which each sum is divided by `divisor`."""

    divisor: int = 1

    @property
    def weights(self) -> int:
        """Return 0: it multiplies with nothing it stores."""
        return 0


@dataclass(frozen=True)
class Average:
    """An average over the places of every channel, along so many axes.

    keeps_constants: its weights sum to 1 everywhere.
    """

    axes: int
    keeps_constants: bool


def average_at(program: Program, node: fx.Node) -> Average | None:
    """Return the average over windows that a node is, of whatever sizes; None if it is none."""
    pool = pool_at(program, node)
    if pool is not None:
        return Average(AXES[type(pool)], averages(pool))
    target: Any = node.target
    if node.op == "call_module":
        target = type(submodule(program.module, str(node.target)))
    axes = _ADAPTIVE.get(target) if node.op.startswith("call_") else None
    return None if axes is None or len(node.all_input_nodes) != 1 else Average(axes, True)


def pool_at(program: Program, node: fx.Node) -> Any:
    """Return the average pool that a node is, as a module; None if it is none."""
    if node.op == "call_module":
        module = submodule(program.module, str(node.target))
        return module if type(module) in AXES and not is_hooked(module) else None
    kind = _FUNCTIONS.get(node.target) if node.op == "call_function" else None
    if kind is None or len(node.all_input_nodes) != 1 or node.args[:1] != (*node.all_input_nodes,):
        return None
    return kind(*node.args[1:], **node.kwargs)


def averages(pool: Any) -> bool:
    """Tell whether a pool's weights sum to 1 at the border too."""
    if getattr(pool, "divisor_override", None) is not None or pool.ceil_mode:
        return False
    return not any(_sizes(pool.padding, 1)) or not pool.count_include_pad


def pool_geometry(pool: Any, channels: int) -> Pool | None:
    """Return a pool as a convolution; None where it is none."""
    axes = AXES[type(pool)]
    kernel, padding = _sizes(pool.kernel_size, axes), _sizes(pool.padding, axes)
    divisor = getattr(pool, "divisor_override", None)
    uncounted = any(padding) and not pool.count_include_pad and divisor is None
    if pool.ceil_mode or uncounted:
        return None
    return Pool(
        *(channels, channels, kernel, _sizes(pool.stride, axes), padding, (1,) * axes),
        groups=channels,
        bias=False,
        divisor=divisor or prod(kernel),
    )


def pool_layer(geometry: Pool, device: torch.device) -> Layer:
    """Return the convolution's numbers."""
    shape, value = (geometry.outputs, 1, *geometry.kernel), 1 / geometry.divisor
    return Layer(geometry, torch.full(shape, value, dtype=torch.float64, device=device), None)


def _sizes(given: Any, axes: int) -> tuple[int, ...]:
    return tuple(given) if isinstance(given, (tuple, list)) else (given,) * axes
