"""Two convolutions as one: exactly where they are, held against running both."""

from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fxprune.folding import convolutions
from fxprune.folding.convolutions import Inexact, compose, composed, geometry_of, install_, layer_of
from fxprune.testing import error
from tests.conftest import randomise

SIZES = range(5, 16)


@st.composite
def convs(draw: st.DrawFn, axes: int = 1) -> nn.Module:
    def sizes(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(low, high)) for _ in range(axes))

    cls: Any = convolutions.CONVS[axes - 1]
    kernel, stride, padding, dilation = sizes(1, 5), sizes(1, 3), sizes(0, 4), sizes(1, 2)
    groups, bias = draw(st.sampled_from([1, 2, 4])), draw(st.booleans())
    torch.manual_seed(draw(st.integers(0, 99)))
    conv = cls(4, 4, kernel, stride, padding, dilation, groups, bias)
    return randomise(conv).double()


def merged(first: nn.Module, second: Any) -> tuple[nn.Module, bool]:
    layer = compose(*(layer_of(m, g) for m in (first, second) if (g := geometry_of(m))))
    result: Any = type(second)(1, 1, 1).double()
    install_(result, layer)
    assert layer.weight.numel() == layer.geometry.weights
    return result, layer.geometry.ones


def deviation(first: nn.Module, second: nn.Module, axes: int = 1) -> float:
    """Return the largest relative error over maps of many sizes."""
    one, ones = merged(first, second)
    worst, ran = 0.0, False
    for size in SIZES:
        x = torch.randn(2, 4, *(size + axis for axis in range(axes)), dtype=torch.float64)
        try:
            with torch.no_grad():
                expected = second(first(x))
        except RuntimeError:
            continue  # smaller than a kernel
        given_: Tensor = torch.cat([x, torch.ones_like(x[:, :1])], 1) if ones else x
        with torch.no_grad():
            worst, ran = max(worst, error(expected, one(given_))), True
    assume(ran)
    return worst


@settings(max_examples=150, deadline=None)
@given(first=convs(), second=convs())
def test_two_convolutions_are_one_exactly_where_the_algebra_says(first: Any, second: Any) -> None:
    try:
        composed(*(g for m in (first, second) if (g := geometry_of(m))))
    except Inexact as reason:
        if "bias" in str(reason):
            return
        # The rule is sharp wherever the outermost zero is read for some size.
        assume(second.dilation == (1,) and second.stride == (1,))
        with patch.object(convolutions, "_carried", lambda first, second: first):
            assert deviation(first, second) > 1e-6
        return
    assert deviation(first, second) < 1e-11


@settings(max_examples=25, deadline=None)
@given(first=convs(2), second=convs(2))
def test_along_two_axes_each_has_its_own_geometry(first: Any, second: Any) -> None:
    second.padding = (0, second.padding[1])
    second.bias = None
    try:
        composed(*(g for m in (first, second) if (g := geometry_of(m))))
    except Inexact:
        second.padding = (0, 0)
    assert deviation(first, second, 2) < 1e-11


@settings(max_examples=40, deadline=None)
@given(second=convs(), stride=st.integers(1, 3))
def test_a_bias_passes_a_border_as_a_channel_of_ones(second: Any, stride: int) -> None:
    second.groups, second.weight = 1, nn.Parameter(torch.randn(4, 4, *second.kernel_size).double())
    first = randomise(nn.Conv1d(4, 4, 1, stride)).double()
    layers = [g for m in (first, second) if (g := geometry_of(m))]
    assert composed(*layers).ones == (second.padding != (0,))
    assert deviation(first, second) < 1e-11


def test_a_bias_before_a_border_is_refused_with_its_reason() -> None:
    layers = [geometry_of(nn.Conv2d(4, 4, 1, groups=2)) for _ in range(2)]
    second = geometry_of(nn.Conv2d(4, 4, 3, padding=1, groups=2))
    assert layers[0] is not None and second is not None
    with pytest.raises(Inexact, match="bias"):
        composed(layers[0], second)


def test_what_pads_no_zeros_is_not_read() -> None:
    assert geometry_of(nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular")) is None
    assert geometry_of(nn.Conv2d(4, 4, 4, padding="same")) is None
    same = geometry_of(nn.Conv2d(4, 4, 3, padding="same"))
    assert same is not None and same.padding == (1, 1)
