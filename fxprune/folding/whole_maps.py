"""A linear layer of a flattened map, as a convolution whose kernel covers the map.

    linear(W, flatten(conv(x))) = linear(W', flatten(x)),   W' = conv_transpose(W as (O, C, H, W))

It pads nothing, so that every layer before it is one with it (`folding.convolutions`), borders and
biases included: taps that meet padding fall away. A linear layer behind it is one of size 1.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod

from fxprune.folding.convolutions import Geometry, Layer, Sizes, compose, composed, dense


@dataclass(frozen=True)
class WholeMap(Geometry):
    """A linear layer of a flattened map of `size`, which its kernel covers."""


def behind_flattening(
    layers: Sequence[Geometry], place: int, sizes: Sequence[Sizes]
) -> list[Geometry]:
    """Return a run of layers as convolutions, the `place`-th of which is given a flattened map.

    sizes: of the maps that the layers up to that one are given, flattened or not.
    """
    axes, size = len(sizes[place]), sizes[place]
    linear = [_of_size_one(layer, axes) for layer in layers[place:]]
    linear[0] = _whole(linear[0], layers[place].inputs // prod(size), size)
    before = zip(layers[:place], sizes, strict=False)
    return [*(replace(layer, size=given) for layer, given in before), *linear]


def composed_whole(first: Geometry, second: Geometry) -> Geometry:
    """Return the one layer that two are, of which one covers its map."""
    merged = composed(first, second)
    return _whole(merged, merged.inputs, first.size)


def compose_whole(first: Layer, second: Layer) -> Layer:
    """Return the one layer that two are; taps that meet nothing but padding fall away."""
    geometry = composed_whole(first.geometry, second.geometry)
    merged = compose(first, second)
    weight = dense(merged, 1)[0]
    whole = weight.new_zeros(*weight.shape[:2], *geometry.size)
    taken, put = [slice(None)] * 2, [slice(None)] * 2
    for axis, size in enumerate(geometry.size):
        step, padding = merged.geometry.dilation[axis], merged.geometry.padding[axis]
        places = range(-padding, -padding + step * merged.geometry.kernel[axis], step)
        inside = [tap for tap, at in enumerate(places) if 0 <= at < size]
        taken.append(slice(inside[0], inside[-1] + 1) if inside else slice(0, 0))
        put.append(slice(places[inside[0]], places[inside[-1]] + 1, step) if inside else slice(0))
    whole[tuple(put)] = weight[tuple(taken)]
    return Layer(geometry, whole, merged.bias)


def _of_size_one(layer: Geometry, axes: int) -> Geometry:
    ones = (1,) * axes
    zeros = (0,) * axes
    return replace(layer, kernel=ones, stride=ones, padding=zeros, dilation=ones, size=ones)


def _whole(layer: Geometry, inputs: int, size: Sizes) -> WholeMap:
    ones, zeros = (1,) * len(size), (0,) * len(size)
    return WholeMap(
        *(inputs, layer.outputs, size, ones, zeros, ones),
        bias=layer.bias,
        size=size,
    )
