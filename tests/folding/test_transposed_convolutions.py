"""Transposed convolutions and their neighbours, held against running both."""

from typing import Any

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from torch import nn

from fxprune.folding import linear_layers
from fxprune.folding.convolutions import Geometry, Inexact, geometry_of
from fxprune.folding.linear_layers import compose, composed, layer_of
from fxprune.folding.transposed_convolutions import Transposed, transposed_geometry
from fxprune.testing import error
from tests.conftest import randomise


def geometry(module: nn.Module) -> Geometry:
    found = geometry_of(module) or transposed_geometry(module, 1)
    assert found is not None
    return found


@st.composite
def layers(draw: st.DrawFn) -> nn.Module:
    kernel, stride, dilation = (draw(st.integers(1, high)) for high in (4, 3, 2))
    padding = draw(st.integers(0, 3))
    groups, bias = draw(st.sampled_from([1, 2, 4])), draw(st.booleans())
    torch.manual_seed(draw(st.integers(0, 99)))
    if draw(st.booleans()):
        conv = nn.Conv1d(4, 4, kernel, stride, padding, dilation, groups, bias)
        return randomise(conv).double()
    beyond = draw(st.integers(0, max(stride, dilation) - 1))
    return randomise(
        nn.ConvTranspose1d(4, 4, kernel, stride, padding, beyond, groups, bias, dilation)
    ).double()


def deviation(first: Any, second: Any) -> float:
    merged = compose(*(layer_of(m, geometry(m), torch.device("cpu")) for m in (first, second)))
    kind = nn.ConvTranspose1d if isinstance(merged.geometry, Transposed) else nn.Conv1d
    one = kind(1, 1, 1).double()
    linear_layers.install_(one, merged)
    worst, ran = 0.0, False
    for size in (*range(3, 13), 25, 26):  # what pads 3 off leaves nothing of small ones
        x = torch.randn(2, 4, size, dtype=torch.float64)
        try:
            expected = second(first(x))
        except RuntimeError:
            continue  # smaller than a kernel
        given_ = torch.cat([x, torch.ones_like(x[:, :1])], 1) if merged.geometry.ones else x
        worst, ran = max(worst, error(expected, one(given_))), True
    assert ran
    return worst


@settings(max_examples=300, deadline=None)
@given(first=layers(), second=layers())
@example(
    nn.Conv1d(4, 4, 3, 3, dilation=2, bias=False).double(),
    nn.ConvTranspose1d(4, 4, 4, padding=3, bias=False).double(),
)
def test_what_is_one_is_exact_for_every_size(first: nn.Module, second: nn.Module) -> None:
    kinds = {type(first), type(second)}
    assume(nn.ConvTranspose1d in kinds)
    try:
        composed(geometry(first), geometry(second))
    except Inexact:
        return
    assert deviation(first, second) < 1e-11


T, C = nn.ConvTranspose1d, nn.Conv1d
ONE: dict[str, tuple[nn.Module, nn.Module]] = {
    "1x1 behind": (T(4, 4, 4, 2, 1), C(4, 4, 1)),
    "1x1 before": (C(4, 4, 1, bias=False), T(4, 4, 4, 2, 1, output_padding=1)),
    "convolution behind": (T(4, 4, 4, 2, 1, groups=2), C(4, 4, 3, groups=4)),
    "dilated behind": (T(4, 4, 3, 3), C(4, 4, 2, dilation=2)),
    "border behind": (T(4, 4, 4, 2, bias=False), C(4, 4, 3, padding=1)),
    "both": (T(4, 4, 3, 2, bias=False, output_padding=1), T(4, 4, 2, 2, 1, output_padding=1)),
    "no stride": (T(4, 4, 3, padding=2), C(4, 4, 3, 2)),
    "no stride behind": (C(4, 4, 3, 2, 1), T(4, 4, 3, padding=2)),
}


@pytest.mark.parametrize("name", ONE)
def test_what_is_one_is_found(name: str) -> None:
    first, second = (randomise(module).double() for module in ONE[name])
    assert deviation(first, second) < 1e-11


TWO: dict[str, tuple[nn.Module, nn.Module, str]] = {
    "bias before": (C(4, 4, 1), T(4, 4, 3, 2), "bias"),
    "3x3 before": (C(4, 4, 3, padding=1, bias=False), T(4, 4, 3, 2), "edges"),
    "cut before": (T(4, 4, 3, 2, 1, bias=False), T(4, 4, 3, 2), "cuts"),
    "stride behind": (T(4, 4, 3, 2), C(4, 4, 3, 2), "leaves places out"),
    "border and bias": (T(4, 4, 3, 2), C(4, 4, 3, padding=1), "bias"),
    "border and cut": (T(4, 4, 3, 2, 1, bias=False), C(4, 4, 3, padding=1), "cut"),
    "wide border": (T(4, 4, 3, 2, bias=False), C(4, 4, 3, padding=3), "more zeros"),
    "far": (T(4, 4, 2, 1, bias=False, dilation=3, output_padding=2), C(4, 4, 2), "too far"),
}


@pytest.mark.parametrize("name", TWO)
def test_what_is_not_one_has_a_reason(name: str) -> None:
    first, second, reason = TWO[name]
    with pytest.raises(Inexact, match=reason):
        composed(geometry(first), geometry(second))
