"""What a model made for the sizes it last met does not bind its trace to these sizes."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxprune
from fxprune.testing import close_half, error
from tests.conftest import randomise

X = torch.randn(2, 3, 12, 12)


class Net(nn.Module):
    """Two convolutions, and something made of the sizes between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 1)
        self.head = nn.Conv2d(6, 2, 1)

    def made(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        return self.head(F.relu(self.second(x * self.made(x)))).mean((2, 3))


def ramp(x: Tensor) -> Tensor:
    height, width = x.shape[-2:]
    return torch.arange(height * width, device=x.device, dtype=x.dtype).view(height, width).sin()


class OfTheShape(Net):
    """As YOLO's heads keep their anchors."""

    shape: Any = None
    ramp = torch.empty(0)

    def made(self, x: Tensor) -> Tensor:
        shape = x.shape
        if self.shape != shape:
            self.ramp, self.shape = ramp(x), shape
        return self.ramp


class OfTheMap(Net):
    """As positions are kept, by the shape of what is kept."""

    def __init__(self) -> None:
        super().__init__()
        self.ramp: Any = None

    def made(self, x: Tensor) -> Tensor:
        if self.ramp is None or self.ramp.shape[-2:] != x.shape[-2:]:
            self.ramp = ramp(x)
        return self.ramp


class ByNumbers(Net):
    """As masks of windows are kept, by height and width."""

    def __init__(self) -> None:
        super().__init__()
        self.height = self.width = 0
        self.ramp: Any = None

    def made(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        if (height, width) != (self.height, self.width):
            self.ramp, self.height, self.width = ramp(x), height, width
        return self.ramp


class OfTheFirst(OfTheMap):
    """Not made again, but cut: what was made first counts."""

    def made(self, x: Tensor) -> Tensor:
        if self.ramp is None or self.ramp.shape[-1] < x.shape[-1]:
            start = 0 if self.ramp is None else float(self.ramp[0, 0]) + 1
            self.ramp = ramp(x) + start
        return self.ramp[: x.shape[-2], : x.shape[-1]]


@pytest.mark.parametrize("kind", [OfTheShape, OfTheMap, ByNumbers])
@pytest.mark.parametrize("training", [False, True])
def test_a_model_that_ran_serves_all_sizes(kind: type[Net], training: bool) -> None:
    model: Any = randomise(kind()).train(training)
    model(X)
    ran = model.ramp
    gated: Any = fxprune.instrument(model, X)
    assert model.ramp is ran and gated.report.assumptions == []
    larger = torch.randn(5, 3, 20, 17)
    assert torch.equal(gated.eval()(larger), model.eval()(larger))
    assert close_half(gated) == 7
    small: Any = fxprune.finalize(gated)
    assert small.report.verification.verdict == "equal" and small.second.in_channels == 4
    assert error(gated(larger), small(larger)) < 1e-5


def test_what_the_first_run_decides_is_no_memo() -> None:
    model: Any = randomise(OfTheFirst()).eval()
    model(X)
    gated: Any = fxprune.instrument(model, X)
    assert len(gated.report.assumptions) == 1
    smaller = torch.randn(5, 3, 9, 8)
    assert torch.equal(gated.eval()(smaller), model(smaller))
    with pytest.raises(AssertionError, match="this model assumes"):
        gated(torch.randn(5, 3, 20, 17))


class KeptWhole(OfTheShape):
    """Not traced into, as it looks at numbers in training."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training and x.sum() > 0:
            x = x * 2
        return super().forward(x)


def test_onnx_files_are_of_all_sizes_whatever_a_part_met_last(tmp_path: Any) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 3, 1), KeptWhole())
    gated: Any = fxprune.instrument(randomise(model), X)
    small: Any = fxprune.finalize(gated)
    small(torch.randn(4, 3, 12, 12))
    check = fxprune.export_onnx(small, tmp_path / "small.onnx", dynamic_size=True)
    assert len(check.errors) > 2 and max(check.errors.values()) < 1e-4
