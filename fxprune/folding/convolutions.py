"""Two linear layers as one: where that is exact, how large it is, its numbers.

    conv(W₂, conv(W₁, x) + b₁) + b₂ = conv(K, x) + (W₂·b₁ + b₂)
    K = conv_transpose(W₂, W₁, stride d₂s₁, dilation d₁)

with stride s₁s₂, padding p₁ + s₁p₂ and groups gcd(g₁, g₂), always exact where p₂ = 0 (ExpandNets,
Guo et al. 2020; DBB, Ding et al. 2021). With p₂ > 0 the second layer pads zeros where the merged
one computes: for every size of x the same iff p₁ ≥ d₁(k₁ − 1), as for 1×1. A bias b₁ is missing in
the padding: a 1×1 takes it along as the weights of one more input channel, which is 1 everywhere.
A linear layer is a convolution without axes. Computed in float64.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import gcd, prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxprune.runtime.kinds import CONVS

Sizes = tuple[int, ...]
_TRANSPOSED = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)


class Inexact(Exception):
    """Raised where two layers are not one; says why."""


@dataclass(frozen=True)
class Geometry:
    """All of a linear layer but its numbers; `ones`: its input has one more channel, of ones.

    size: of the maps it is given, where a flattening further on fixes it.
    """

    inputs: int
    outputs: int
    kernel: Sizes = ()
    stride: Sizes = ()
    padding: Sizes = ()
    dilation: Sizes = ()
    groups: int = 1
    bias: bool = True
    ones: bool = False
    size: Sizes = ()

    @property
    def weights(self) -> int:
        """How many weights it has."""
        return (self.inputs + self.ones) * self.outputs // self.groups * prod(self.kernel)

    @property
    def parameters(self) -> int:
        """How many numbers it has."""
        return self.weights + self.outputs * self.bias

    def macs(self, places: int) -> int:
        """Return the multiply-accumulates at so many places of its output."""
        return self.weights * places

    @property
    def reach(self) -> Sizes:
        """How far its last tap is from its first, along every axis."""
        return tuple((k - 1) * d for k, d in zip(self.kernel, self.dilation, strict=True))

    @property
    def surplus(self) -> Sizes:
        """Return 2p − d(k − 1): two layers of one stride agree on it iff on all output sizes."""
        return tuple(2 * p - r for p, r in zip(self.padding, self.reach, strict=True))


@dataclass(frozen=True)
class Layer:
    """A linear layer: its geometry, its weight (outputs, inputs / groups, kernel…) and bias."""

    geometry: Geometry
    weight: Tensor
    bias: Tensor | None


def geometry_of(module: Any) -> Geometry | None:
    """Read a linear layer or convolution; None for what is neither, or pads no zeros."""
    kind: Any = type(module)
    if kind is nn.Linear:
        return Geometry(module.in_features, module.out_features, bias=module.bias is not None)
    if kind not in CONVS or module.padding_mode != "zeros":
        return None
    padding = module.padding
    if padding == "valid":
        padding = (0,) * len(module.kernel_size)
    if padding == "same":
        reach = [(k - 1) * d for k, d in zip(module.kernel_size, module.dilation, strict=True)]
        if any(steps % 2 for steps in reach):
            return None  # it pads more behind than in front
        padding = tuple(steps // 2 for steps in reach)
    return Geometry(
        *(module.in_channels, module.out_channels, module.kernel_size, module.stride),
        *(padding, module.dilation, module.groups, module.bias is not None),
    )


def layer_of(module: Any, geometry: Geometry) -> Layer:
    """Return a module's numbers in float64."""
    bias = None if module.bias is None else module.bias.detach().double()
    shape = (geometry.outputs, -1, *geometry.kernel)
    return Layer(geometry, module.weight.detach().double().reshape(shape), bias)


def composed(first: Geometry, second: Geometry) -> Geometry:
    """Return the one layer that two are; raise `Inexact` with the reason if they are not one."""
    if len(first.kernel) != len(second.kernel):
        raise Inexact("they work along different axes")
    first = _carried(first, second)
    axes = range(len(first.kernel))
    stride = [a * b for a, b in zip(first.stride, second.stride, strict=True)]
    padding = [first.padding[i] + first.stride[i] * second.padding[i] for i in axes]
    dilation = [_spacing(first, second, i) for i in axes]
    reach = [first.reach[i] + first.stride[i] * second.reach[i] for i in axes]
    return Geometry(
        *(first.inputs, second.outputs),
        kernel=tuple(r // d + 1 for r, d in zip(reach, dilation, strict=True)),
        stride=tuple(stride),
        padding=tuple(padding),
        dilation=tuple(dilation),
        groups=gcd(first.groups, second.groups),
        bias=first.bias or second.bias,
        ones=first.ones,
    )


def compose(first: Layer, second: Layer) -> Layer:
    """Return the one layer that two are; `composed` says whether they are."""
    geometry = composed(first.geometry, second.geometry)
    if geometry.ones and not first.geometry.ones:
        first = _with_ones(first)
    groups = geometry.groups
    inner = dense(first, groups)
    outer = dense(second, groups)
    weight = torch.cat([_kernel(first, second, i, o) for i, o in zip(inner, outer, strict=True)])
    bias = moved_bias(first.bias, second.bias, outer)
    step = tuple(slice(None, None, d) for d in geometry.dilation)
    return Layer(geometry, weight[(slice(None), slice(None), *step)], bias)


def moved_bias(first: Tensor | None, second: Tensor | None, outer: list[Tensor]) -> Tensor | None:
    """Return what the bias of two layers is, of which the second has the weights `outer`."""
    if first is None:
        return second
    given = first.unflatten(0, (len(outer), -1))
    moved = torch.cat(
        [
            o.flatten(2).sum(-1) @ b if o.dim() > 2 else o @ b
            for o, b in zip(outer, given, strict=True)
        ]
    )
    return moved if second is None else second + moved


def pointwise(scale: Tensor, shift: Tensor, axes: int) -> Layer:
    """Return the layer that computes a·x + t for every channel: the identity, a batch norm."""
    channels, ones = len(scale), (1,) * axes
    bias = shift if bool((shift != 0).any()) else None
    geometry = Geometry(
        *(channels, channels, ones, ones, (0,) * axes, ones),
        *(channels if axes else 1, bias is not None),
    )
    weight = scale.reshape(-1, 1, *ones) if axes else torch.diag(scale)
    return Layer(geometry, weight, bias)


def summed(layers: Sequence[Geometry]) -> Geometry:
    """Return the one layer that a sum of layers over one input is; raise `Inexact` if it is none.

    Taps are as far apart as all allow.
    """
    first = layers[0]
    if len({(g.inputs, g.outputs, g.stride, g.surplus) for g in layers}) > 1:
        raise Inexact("their sizes or strides differ")
    axes = range(len(first.kernel))
    padding = [max(g.padding[i] for g in layers) for i in axes]
    reach = [max(g.reach[i] for g in layers) for i in axes]
    spacing = [
        gcd(
            *(g.dilation[i] if g.kernel[i] > 1 else 0 for g in layers),
            *(padding[i] - g.padding[i] for g in layers),
        )
        or 1
        for i in axes
    ]
    return replace(
        first,
        kernel=tuple(r // d + 1 for r, d in zip(reach, spacing, strict=True)),
        padding=tuple(padding),
        dilation=tuple(spacing),
        groups=gcd(*(g.groups for g in layers)),
        bias=any(g.bias for g in layers),
        ones=any(g.ones for g in layers),
    )


def added(layers: Sequence[Layer]) -> Layer:
    """Return the one layer that a sum of layers is; `summed` says whether it is one."""
    geometry = summed([layer.geometry for layer in layers])
    inputs = (geometry.inputs + geometry.ones) // geometry.groups
    weight = layers[0].weight.new_zeros(geometry.outputs, inputs, *geometry.kernel)
    for layer in layers:
        part = torch.cat(dense(layer, geometry.groups))
        columns = slice(0, part.shape[1])  # it may not read the channel of ones
        weight[:, columns][_taps(layer.geometry, geometry)] += part
    biases = [layer.bias for layer in layers if layer.bias is not None]
    return Layer(geometry, weight, sum(biases[1:], biases[0]) if biases else None)


def install_(module: Any, layer: Layer) -> None:
    """Let a module of the same kind compute what the layer does, in the module's dtype."""
    geometry = layer.geometry
    if isinstance(module, nn.Linear):
        weight = layer.weight.flatten(1)
        install_numbers_(module, weight, layer.bias)
        module.out_features, module.in_features = weight.shape
        return
    install_numbers_(module, layer.weight, layer.bias)
    inputs = geometry.inputs + geometry.ones
    module.in_channels, module.out_channels = inputs, geometry.outputs
    module.kernel_size, module.stride = geometry.kernel, geometry.stride
    module.padding, module.dilation = geometry.padding, geometry.dilation
    module.groups = geometry.groups
    module._reversed_padding_repeated_twice = [
        amount for amount in reversed(geometry.padding) for _ in range(2)
    ]


def install_numbers_(module: Any, weight: Tensor, bias: Tensor | None) -> None:
    """Give a module numbers, in the dtype it has."""
    dtype, trained = module.weight.dtype, module.weight.requires_grad
    module.weight = nn.Parameter(weight.to(dtype).contiguous(), requires_grad=trained)
    module.bias = None
    if bias is not None:
        module.bias = nn.Parameter(bias.to(dtype), requires_grad=trained)


def dense(layer: Layer, groups: int) -> list[Tensor]:
    """Return the weights of a layer as that of fewer groups, each dense: zeros where none were."""
    weight, finer = layer.weight, layer.geometry.groups // groups
    outputs, inputs = weight.shape[0] // (groups * finer), weight.shape[1]
    found = weight.new_zeros(groups, finer, outputs, finer, inputs, *weight.shape[2:])
    parts = weight.unflatten(0, (groups, finer, outputs))
    for place in range(finer):
        found[:, place, :, place] = parts[:, place]
    return list(found.flatten(3, 4).flatten(1, 2))


def _carried(first: Geometry, second: Geometry) -> Geometry:
    """Return the first layer as it passes the second one's border, its bias perhaps an input."""
    if not any(second.padding):
        return first
    for padding, reach, border in zip(first.padding, first.reach, second.padding, strict=True):
        if border and padding < reach:
            raise Inexact("zeros are padded between them")
    if not first.bias:
        return first
    pointwise = all(k == 1 for k in first.kernel) and not any(first.padding)
    if first.ones or not pointwise or gcd(first.groups, second.groups) > 1:
        raise Inexact("zeros are padded where the first one has a bias")
    return replace(first, bias=False, ones=True, groups=1)


def _taps(part: Geometry, whole: Geometry) -> tuple[slice, ...]:
    """Return where in the kernel of a sum the taps of one of its parts lie."""
    places = [slice(None), slice(None)]
    for axis, spacing in enumerate(whole.dilation):
        start = (whole.padding[axis] - part.padding[axis]) // spacing
        step = part.dilation[axis] // spacing if part.kernel[axis] > 1 else 1
        places.append(slice(start, start + step * (part.kernel[axis] - 1) + 1, step))
    return tuple(places)


def _spacing(first: Geometry, second: Geometry, axis: int) -> int:
    """Return how far the taps are apart that can be anything but 0."""
    one = first.dilation[axis] if first.kernel[axis] > 1 else 0
    two = first.stride[axis] * second.dilation[axis] if second.kernel[axis] > 1 else 0
    return gcd(one, two) or 1


def _with_ones(layer: Layer) -> Layer:
    """Let a 1×1 read its bias as the weights of a channel of ones."""
    assert layer.bias is not None
    weight = dense(layer, 1)[0]
    bias = layer.bias.reshape(-1, 1, *(1,) * (weight.dim() - 2))
    geometry = replace(layer.geometry, bias=False, ones=True, groups=1)
    return Layer(geometry, torch.cat([weight, bias], 1), None)


def _kernel(first: Layer, second: Layer, inner: Tensor, outer: Tensor) -> Tensor:
    """Return the kernel of a group, with a tap at every place it reaches.

    Where one of the layers has a single tap it is a product of matrices, which takes less time.
    """
    one, two = first.geometry, second.geometry
    axes = len(one.kernel)
    steps = [d * s for d, s in zip(two.dilation, one.stride, strict=True)]
    if prod(two.kernel) == 1 and _is_dense(one.kernel, one.dilation):
        return torch.tensordot(outer.flatten(1), inner, 1)
    if prod(one.kernel) == 1 and _is_dense(two.kernel, steps):
        return torch.einsum("om...,mc->oc...", outer, inner.flatten(1))
    return _TRANSPOSED[axes - 1](outer, inner, stride=steps, dilation=one.dilation)


def _is_dense(kernel: Sizes, steps: Sequence[int]) -> bool:
    """Tell whether a kernel's taps, so many places apart, leave no place out."""
    return all(k == 1 or step == 1 for k, step in zip(kernel, steps, strict=True))
