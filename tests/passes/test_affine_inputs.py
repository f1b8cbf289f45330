"""Folding batch norms and constants per channel into the layers after them."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.passes.affine_inputs import fold_affine_inputs
from fxprune.passes.batch_norm import fold_batch_norm
from fxprune.programs.program import Program, capture
from fxprune.testing import check_rewrite, spread
from tests.conftest import randomise

IMAGE, LINE = (3, 4, 6, 6), (3, 4, 9)
Case = tuple[Callable[[], nn.Module], tuple[int, ...]]


def program(model: nn.Module, shape: tuple[int, ...]) -> Program:
    model = randomise(model).double().eval()
    return capture(model, ((torch.randn(shape).double(),), {}))


class Still(nn.Module):
    """A norm without a shift before a layer with a border of zeros."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.norm, self.layer = nn.BatchNorm2d(4), layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.norm(x))


class Constants(nn.Module):
    """What a collapsed branch leaves: sums, differences, products with buffers and numbers."""

    shift: Tensor
    scale: Tensor

    def __init__(self, layer: nn.Module, *shape: int) -> None:
        super().__init__()
        self.layer = layer
        self.register_buffer("shift", torch.randn(shape))
        self.register_buffer("scale", torch.rand(shape) + 0.5)
        self.before = False

    def forward(self, x: Tensor) -> Tensor:
        y = x if self.before else self.layer(x)
        y = 0.5 - (self.shift - y * self.scale) / 3.0
        y = torch.mul(self.scale, y + self.shift) / self.scale
        return self.layer(y) if self.before else y


FOLDED: dict[str, Case] = {
    "linear": (lambda: nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 5, bias=False)), (3, 4)),
    "1x1": (lambda: nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 5, 1)), IMAGE),
    "no border, groups": (
        lambda: nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, 2, groups=2, bias=False)),
        IMAGE,
    ),
    "line": (lambda: nn.Sequential(nn.BatchNorm1d(4), nn.Conv1d(4, 6, 3)), LINE),
    "reflected border": (
        lambda: nn.Sequential(
            nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect")
        ),
        IMAGE,
    ),
    "flattened": (
        lambda: nn.Sequential(nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 5)),
        IMAGE,
    ),
    "pooled, flattened": (
        lambda: nn.Sequential(
            nn.BatchNorm2d(4), nn.AvgPool2d(2), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
            nn.Linear(16, 5),
        ),
        IMAGE,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FOLDED)
def test_a_batch_norm_before_a_layer_goes(name: str) -> None:
    build, shape = FOLDED[name]
    after = check_rewrite(fold_affine_inputs, program(build(), shape))
    assert "BatchNorm" not in "".join(_called(after))
    assert spread(after.run()) > 1e-2


STILL: dict[str, Callable[[], nn.Module]] = {
    "conv": lambda: nn.Conv2d(4, 6, 3, padding=1, groups=2),
    "transposed": lambda: nn.ConvTranspose2d(4, 6, 3, 2, groups=2),
}


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("name", STILL)
def test_only_a_scale_passes_a_border_of_zeros(name: str, shifted: bool) -> None:
    one = program(Still(STILL[name]()), IMAGE)
    norm = one.module.get_submodule("norm")
    assert isinstance(norm, nn.BatchNorm2d) and norm.running_mean is not None
    if not shifted:
        norm.running_mean.zero_()
        norm.bias.data.zero_()
    if shifted:
        assert fold_affine_inputs(one) == []
    else:
        assert "BatchNorm2d" not in _called(check_rewrite(fold_affine_inputs, one))


STAYS: dict[str, Case] = {
    "padded pool": (
        lambda: nn.Sequential(
            nn.BatchNorm2d(4), nn.AvgPool2d(2, padding=1), nn.Flatten(), nn.Linear(64, 5)
        ),
        IMAGE,
    ),
    "pooled, not flattened": (
        lambda: nn.Sequential(nn.BatchNorm2d(4), nn.AvgPool2d(3, 1), nn.Linear(4, 5)),
        IMAGE,
    ),
    "nonlinear": (
        lambda: nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 1)),
        IMAGE,
    ),
    "other axis": (lambda: nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 5)), (3, 4, 4)),
    "batch statistics": (
        lambda: nn.Sequential(
            nn.BatchNorm2d(4, track_running_stats=False), nn.Conv2d(4, 5, 1)
        ),
        IMAGE,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", STAYS)
def test_what_is_not_the_same_stays(name: str) -> None:
    build, shape = STAYS[name]
    assert fold_affine_inputs(program(build(), shape)) == []


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("kind", ["conv", "linear", "tokens", "transposed"])
def test_constants_of_a_channel_vanish_in_a_layer(kind: str, before: bool) -> None:
    layer, per_channel, shape = {
        "conv": (nn.Conv2d(4, 4, 3, padding=0 if before else 1, bias=False), (1, 4, 1, 1), IMAGE),
        "linear": (nn.Linear(4, 4), (4,), (3, 4)),
        "tokens": (nn.Linear(4, 4), (1, 1, 4), (3, 5, 4)),
        "transposed": (nn.ConvTranspose2d(4, 4, 3), (4, 1, 1), IMAGE),
    }[kind]
    model = Constants(layer, *per_channel)
    model.before = before
    one = program(model, shape)
    if before and kind == "transposed":
        after = check_rewrite(fold_affine_inputs, one)
        assert "add" in after.text()  # its shifts have to stay
        return
    after = check_rewrite(fold_affine_inputs if before else fold_batch_norm, one)
    assert [node.op for node in after.graph.nodes] == ["placeholder", "call_module", "output"]


def test_a_constant_along_another_axis_stays() -> None:
    model = Constants(nn.Conv2d(4, 4, 1), 6)  # along the width
    one = program(model, IMAGE)
    before = one.text()
    changes = fold_batch_norm(one)
    assert "scale" in one.text() and len(changes) == 0, (before, changes)


def _called(one: Program) -> list[str]:
    return [
        type(one.module.get_submodule(str(node.target))).__name__
        for node in one.graph.nodes
        if node.op == "call_module"
    ]


def test_a_folded_parameter_leaves_the_model() -> None:
    class LayerScale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.gamma = nn.Linear(4, 4), nn.Parameter(torch.rand(4) + 0.5)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.gamma * self.layer(x)

    model = randomise(nn.Sequential(LayerScale(), nn.ReLU(), nn.Linear(4, 3)))
    small = fxprune.finalize(model, torch.randn(3, 4))
    assert sorted(name for name, _ in small.named_parameters()) == [
        *("0.layer.bias", "0.layer.weight", "2.bias", "2.weight"),
    ]


def test_a_quotient_by_zero_stays() -> None:
    class Infinite(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) / 0.0

    assert fold_batch_norm(program(Infinite(), (3, 4))) == []
