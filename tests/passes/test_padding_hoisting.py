"""Padding moved to the first of some convolutions: the sizes, the inside, and that they merge."""

from typing import Any, cast

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

import fxprune
from fxprune.compiler import GatedModel
from fxprune.passes.padding_hoisting import hoist_padding
from fxprune.programs.program import Program, capture
from fxprune.testing import error
from tests.conftest import randomise


def program(model: nn.Module, *shape: int) -> Program:
    model = randomise(model).double().eval()
    inputs = ((torch.randn(shape, dtype=torch.float64),), {})
    return capture(model, inputs)


def instrumented(model: nn.Module, x: Tensor, **options: Any) -> GatedModel:
    return fxprune.instrument(randomise(model).eval(), x, hoist_padding=True, **options)


def linearise(gated: GatedModel) -> None:
    assert gated.gates.linear is not None
    with torch.no_grad():
        gated.gates.linear.fill_(1)


def folded(gated: GatedModel) -> list[nn.Conv2d]:
    """Finalise a model; return the convolutions that are left."""
    small = fxprune.finalize(gated)
    assert small.report.verification is not None
    assert small.report.verification.verdict == "equal"  # to 1e-9 in float64
    return [part for part in small.modules() if isinstance(part, nn.Conv2d)]


SIZES = st.tuples(*(st.integers(1, n) for n in (4, 2, 2)), st.integers(0, 2))


@settings(max_examples=25, deadline=None)
@given(geometry=st.lists(SIZES, min_size=2, max_size=3))
def test_sizes_stay_and_the_inside_too(geometry: list[tuple[int, int, int, int]]) -> None:
    widths = [2, *(40,) * (len(geometry) - 1), 2]
    pairs = zip(widths, widths[1:], geometry, strict=False)
    layers = [nn.Conv1d(i, o, k, s, p, d) for i, o, (k, s, d, p) in pairs]
    before = program(nn.Sequential(*layers), 2, 2, 64)
    after = before.clone()
    changes = hoist_padding(after)
    assume(changes)
    (border,) = dict(changes[-1].detail)["border"]
    for size in range(54, 66):
        x = torch.randn(2, 2, size, dtype=torch.float64)
        expected, actual = before.module(x), after.module(x)
        assert expected.shape == actual.shape
        inside = slice(border, expected.shape[-1] - border)
        assert error(expected[..., inside], actual[..., inside]) < 1e-12
    assert not hoist_padding(after)


def stack() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(3, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.Conv2d(32, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        nn.Linear(4, 3),
    )


def test_padded_convolutions_become_one() -> None:
    x = torch.randn(4, 3, 9, 9)
    gated = instrumented(stack(), x)
    changes = [str(change) for change in gated.report.passes["hoist_padding"]]
    assert changes == [
        "3: the padding of 3 moved to 0: outputs within 1 of the border change",
    ]
    assert [site.name for site in gated.gates.depth_sites] == ["2"]
    assert {row.layer: row.border for row in fxprune.inspect(gated).rows}["3"] == 1
    assert "border" in str(fxprune.inspect(gated))
    linearise(gated)
    (left,) = folded(gated)
    assert left.kernel_size == (5, 5) and left.padding == (2, 2)


class Written(nn.Conv2d):
    """A convolution of somebody's own, which is traced into."""

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self.weight, self.bias)


def test_convolutions_written_as_functions_become_one_too() -> None:
    convs = Written(4, 12, 3, padding=1), Written(12, 4, 3, padding=1)
    gated = instrumented(nn.Sequential(convs[0], nn.ReLU(), convs[1]), torch.randn(2, 4, 12, 12))
    linearise(gated)
    (conv,) = folded(gated)
    assert conv.kernel_size == (5, 5) and conv.padding == (2, 2)


def test_without_the_option_nothing_moves_and_the_reason_is_given() -> None:
    x = torch.randn(4, 3, 9, 9)
    model = randomise(stack()).eval()
    gated = fxprune.instrument(model, x)
    assert torch.equal(gated.eval()(x), model(x)) and gated.gates.linear is None
    assert "border" not in str(fxprune.inspect(gated))
    assert "not one: zeros are padded between them" in str(gated.report)


def test_in_a_model_of_regions_nothing_moves() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = stack()

        def forward(self, x: Tensor) -> Tensor:
            y = self.body(x)
            return y + 1 if y.sum().item() > 1e9 else y

    gated = instrumented(Outer(), torch.randn(4, 3, 9, 9))
    assert "hoist_padding" not in gated.report.passes
    assert "not moved: that is for models traced whole" in str(gated.report)


KEPT = {
    "exact as it is": [nn.Conv2d(3, 64, 1), nn.ReLU(), nn.Conv2d(64, 4, 3, padding=1)],
    "never cheaper": [
        *(nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.ReLU()),
        nn.Conv2d(8, 8, 3, padding=1, groups=8),
    ],
    "bottleneck": [nn.Conv2d(16, 2, 3, padding=1), nn.ReLU(), nn.Conv2d(2, 16, 3, padding=1)],
    "softplus": [nn.Conv2d(3, 64, 3), nn.Softplus(), nn.Conv2d(64, 4, 3, padding=1)],
    "a pool": [
        *(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.MaxPool2d(2)),
        nn.Conv2d(64, 4, 3, padding=1),
    ],
}


@pytest.mark.parametrize("name", KEPT)
def test_padding_stays_where_moving_it_is_of_no_use(name: str) -> None:
    layers = KEPT[name]
    first = cast(nn.Conv2d, layers[0])
    assert hoist_padding(program(nn.Sequential(*layers), 2, first.in_channels, 9, 9)) == []


def test_only_what_a_shared_layer_needs_stays() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(4, 64, 3, padding=1), nn.Conv2d(64, 4, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(self.b(self.a(x).relu())).relu())

    assert hoist_padding(program(Twice(), 2, 4, 9, 9)) == []


class Net(nn.Module):
    """A stem, blocks of ResNet-18, and a head."""

    def __init__(self, *blocks: nn.Module, width: int = 8) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.blocks, self.head = nn.Sequential(*blocks), nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.norm(self.stem(x)).relu())
        return self.head(x.mean((2, 3)))


def shortcut(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, 2, bias=False), nn.BatchNorm2d(outputs))


@pytest.mark.parametrize("strided", [False, True])
def test_blocks_with_linear_interiors_become_convolutions(strided: bool) -> None:
    second = BasicBlock(8, 16, 2, shortcut(8, 16)) if strided else BasicBlock(8, 8)
    model = Net(BasicBlock(8, 8), second, width=16 if strided else 8)
    gated = instrumented(model, torch.randn(4, 3, 12, 12))
    moved = [change.where for change in gated.report.passes["hoist_padding"]]
    assert moved == ["blocks.0.conv2", "blocks.1.conv2"]
    linearise(gated)
    close(gated, "relu", "blocks.0.relu:2", "blocks.1.relu:2", step=2)
    _, *blocks = folded(gated)
    kernel = 7 if strided else 5
    assert [conv.kernel_size for conv in blocks] == [(5, 5), (kernel, kernel)]
    assert "add" not in fxprune.finalize(gated).code


def test_blocks_of_equal_width_stay_as_they_are_cheaper() -> None:
    gated = instrumented(Net(BasicBlock(8, 8)), torch.randn(4, 3, 12, 12))
    linearise(gated)
    assert len(folded(gated)) == 3


def test_a_block_without_width_is_its_shortcut() -> None:
    model = Net(BasicBlock(8, 8), BasicBlock(8, 16, 2, shortcut(8, 16)), width=16)
    gated = instrumented(model, torch.randn(4, 3, 12, 12))
    close(gated, "blocks.0.relu", "blocks.1.relu")
    _, left = folded(gated)
    assert left.kernel_size == (1, 1) and left.stride == (2, 2)


def close(gated: GatedModel, *sites: str, step: int = 1) -> None:
    """Close the units of some sites, all or one in so many."""
    assert gated.gates.width is not None
    with torch.no_grad():
        for site in gated.gates.width_sites:
            if site.name in sites:
                gated.gates.width[list(site.units[::step])] = 0
