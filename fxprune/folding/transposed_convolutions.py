"""Transposed convolutions and their neighbours as one, where that is exact.

A transposed convolution spreads every input over k places, s apart, and cuts p off each edge:

    y[n·s + j·d − p] += T[j]·x[n]

A convolution behind it with stride 1, padding nothing, is one with it: k grows, and p by what the
other one would have cut off; if that pads, only where p = 0, so that 0 is what it would have read.
One before it must be 1×1 without a bias, or transposed, without a bias, and cut nothing off. With
stride 1 it is itself a convolution, its kernel reversed. `folding.convolutions` merges the kernels.
"""

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from fxprune.folding import convolutions
from fxprune.folding.convolutions import Geometry, Inexact, Layer, Sizes, install_numbers_
from fxprune.runtime.kinds import TRANSPOSED


@dataclass(frozen=True)
class Transposed(Geometry):
    """All of a transposed convolution but its numbers; weights are (outputs, inputs / groups, …).

    beyond: what its outputs have more at their far edge. places: how many its inputs have.
    """

    beyond: Sizes = ()
    places: int = 1

    def macs(self, places: int) -> int:
        """Return its multiply-accumulates: every place of its input meets every weight."""
        return self.weights * self.places


def transposed_geometry(module: Any, places: int) -> Transposed | None:
    """Read a transposed convolution; None for what is none."""
    if type(module) not in TRANSPOSED:
        return None
    return Transposed(
        *(module.in_channels, module.out_channels, module.kernel_size, module.stride),
        *(module.padding, module.dilation, module.groups, module.bias is not None),
        beyond=module.output_padding,
        places=places,
    )


def transposed_layer(module: Any, geometry: Transposed) -> Layer:
    """Return a module's numbers in float64."""
    bias = None if module.bias is None else module.bias.detach().double()
    return Layer(geometry, _swapped(module.weight.detach().double(), geometry.groups), bias)


def install_transposed_(module: Any, layer: Layer) -> None:
    """Let a transposed convolution compute what the layer does."""
    geometry = layer.geometry
    assert isinstance(geometry, Transposed)
    install_numbers_(module, _swapped(layer.weight, geometry.groups), layer.bias)
    module.in_channels, module.out_channels = geometry.inputs, geometry.outputs
    module.kernel_size, module.stride = geometry.kernel, geometry.stride
    module.padding, module.dilation = geometry.padding, geometry.dilation
    module.output_padding, module.groups = geometry.beyond, geometry.groups


def composed_transposed(first: Geometry, second: Geometry) -> Geometry:
    """Return the one layer that two are, of which one at least is transposed."""
    first, second = _plain_geometries(first, second)
    if not isinstance(first, Transposed) and not isinstance(second, Transposed):
        return convolutions.composed(first, second)
    if len(first.kernel) != len(second.kernel):
        raise Inexact("they work along different axes")
    edge = _edge(first, second)
    one, two = _side_by_side(first, second)
    merged = convolutions.composed(one, two)
    beyond, places = _beyond(first, second)
    for more, stride, step in zip(beyond, edge.stride, merged.dilation, strict=True):
        if more and more >= max(stride, step):
            raise Inexact("its outputs would reach too far beyond its inputs")
    return Transposed(
        *(first.inputs, second.outputs, merged.kernel, edge.stride, edge.padding, merged.dilation),
        *(merged.groups, merged.bias),
        beyond=beyond,
        places=places,
    )


def compose_transposed(first: Layer, second: Layer) -> Layer:
    """Return the one layer that two are; `composed_transposed` says whether they are."""
    geometry = composed_transposed(first.geometry, second.geometry)
    plain = _plain_geometries(first.geometry, second.geometry)
    first, second = _as(first, plain[0]), _as(second, plain[1])
    if not isinstance(geometry, Transposed):
        return convolutions.compose(first, second)
    sides = _side_by_side(first.geometry, second.geometry)
    weights = [
        layer.weight if isinstance(layer.geometry, Transposed) else _reversed(layer.weight)
        for layer in (first, second)
    ]
    merged = convolutions.compose(
        Layer(sides[0], weights[0], first.bias), Layer(sides[1], weights[1], second.bias)
    )
    return Layer(geometry, merged.weight, merged.bias)


@dataclass(frozen=True)
class _Edge:
    stride: Sizes
    padding: Sizes


def _edge(first: Geometry, second: Geometry) -> _Edge:
    """Return the stride of the one layer and what it cuts off; `Inexact` if that is not all."""
    if not isinstance(second, Transposed):
        return _edge_before_convolution(first, second)
    if first.bias or first.ones:
        raise Inexact("a bias of the first is not everywhere where the second spreads it")
    strides = list(zip(first.stride, second.stride, strict=True))
    if isinstance(first, Transposed):
        if any(first.padding):
            raise Inexact("the first cuts its edges off")
        return _Edge(tuple(a * b for a, b in strides), second.padding)
    if max(first.kernel) > 1 or max(first.stride) > 1 or any(first.padding):
        raise Inexact("the first leaves the edges out, or adds to them")
    return _Edge(second.stride, second.padding)


def _edge_before_convolution(first: Geometry, second: Geometry) -> _Edge:
    if any(stride > 1 for stride in second.stride):
        raise Inexact("the second leaves places out")
    if any(second.padding) and first.bias:
        raise Inexact("zeros are padded where the first one has a bias")
    if any(p and border for p, border in zip(first.padding, second.padding, strict=True)):
        raise Inexact("zeros are padded where the first cut its edges off")
    padding = [
        p + reach - border
        for p, reach, border in zip(first.padding, second.reach, second.padding, strict=True)
    ]
    if min(padding) < 0:
        raise Inexact("more zeros are padded than the second reads")
    return _Edge(first.stride, tuple(padding))


def _beyond(first: Geometry, second: Geometry) -> tuple[Sizes, int]:
    """Return what the one layer's outputs have more, and the places of its inputs."""
    if not isinstance(first, Transposed):
        assert isinstance(second, Transposed)
        return second.beyond, second.places  # a 1×1 has as many
    if not isinstance(second, Transposed):
        return first.beyond, first.places
    pairs = zip(first.beyond, second.stride, second.beyond, strict=True)
    return tuple(a * stride + b for a, stride, b in pairs), first.places


def _side_by_side(first: Geometry, second: Geometry) -> tuple[Geometry, Geometry]:
    """Return convolutions whose one kernel is the two layers', both spreading what they read."""
    zeros, ones = (0,) * len(first.kernel), (1,) * len(first.kernel)
    steps = second.stride if isinstance(second, Transposed) else ones
    dilation = tuple(d * step for d, step in zip(first.dilation, steps, strict=True))
    return (
        _convolution(first, stride=ones, padding=zeros, dilation=dilation),
        _convolution(second, stride=ones, padding=zeros, dilation=second.dilation),
    )


def _plain_geometries(first: Geometry, second: Geometry) -> tuple[Geometry, Geometry]:
    """Return transposed ones of stride 1 as convolutions, where the other one is not that too."""
    if isinstance(second, Transposed) and _is_convolution(second):
        return first, _as_convolution(second)
    if isinstance(first, Transposed) and _is_convolution(first) and max(second.stride) > 1:
        return _as_convolution(first), second
    return first, second


def _is_convolution(layer: Transposed) -> bool:
    inside = all(p <= reach for p, reach in zip(layer.padding, layer.reach, strict=True))
    return inside and max(layer.stride) == 1 and not any(layer.beyond)


def _as_convolution(layer: Geometry) -> Geometry:
    padding = tuple(reach - p for p, reach in zip(layer.padding, layer.reach, strict=True))
    return _convolution(layer, stride=layer.stride, padding=padding, dilation=layer.dilation)


def _as(layer: Layer, geometry: Geometry) -> Layer:
    """Return a layer of the geometry that it has, or has as a convolution."""
    if layer.geometry is geometry:
        return layer
    return Layer(geometry, _reversed(layer.weight), layer.bias)


def _convolution(layer: Geometry, *, stride: Sizes, padding: Sizes, dilation: Sizes) -> Geometry:
    return replace(
        Geometry(layer.inputs, layer.outputs, layer.kernel, groups=layer.groups, bias=layer.bias),
        stride=stride,
        padding=padding,
        dilation=dilation,
        ones=layer.ones,
    )


def _reversed(weight: Tensor) -> Tensor:
    return weight.flip(*range(2, weight.dim()))


def _swapped(weight: Tensor, groups: int) -> Tensor:
    """Exchange inputs and outputs of every group's weights."""
    return weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)
