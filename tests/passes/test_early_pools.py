"""Averages before 1×1 convolutions."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxprune
from fxprune.passes.early_pools import advance_pools
from fxprune.programs.program import Program, capture
from fxprune.testing import check_rewrite
from tests.conftest import randomise


def program(*layers: nn.Module, size: int = 8) -> Program:
    model = randomise(nn.Sequential(*layers)).double().eval()
    x = torch.randn(2, 3, size, size, dtype=torch.float64)
    return capture(model, ((x,), {}))


class Functional(nn.Module):
    def __init__(self, function: Callable[..., Tensor], *args: object) -> None:
        super().__init__()
        self.function, self.args = function, args

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, *self.args)


def point(bias: bool = True) -> nn.Module:
    return nn.Conv2d(3, 6, 1, bias=bias)


EARLY: dict[str, nn.Module] = {
    "halved": nn.AvgPool2d(2),
    "overlapping": nn.AvgPool2d(3, 2, 1, count_include_pad=False),
    "global": nn.AdaptiveAvgPool2d(1),
    "adaptive": nn.AdaptiveAvgPool2d((3, 5)),
    "function": Functional(F.avg_pool2d, 2),
    "adaptive function": Functional(F.adaptive_avg_pool2d, 2),
}


@pytest.mark.parametrize("name", EARLY)
def test_an_average_goes_before_a_1x1(name: str) -> None:
    before = program(nn.Sigmoid(), point(), nn.Conv2d(6, 4, 1, groups=2), EARLY[name], nn.Tanh())
    after = check_rewrite(advance_pools, before)
    calls = [str(node.target) for node in after.graph.nodes if node.op != "placeholder"]
    assert calls.index("1") > calls.index("0") + 1 and calls.index("2") == calls.index("1") + 1


LATE: dict[str, tuple[nn.Module, ...]] = {
    "counted zeros": (point(), nn.AvgPool2d(3, 2, 1)),
    "another divisor": (point(), nn.AvgPool2d(2, divisor_override=3)),
    "as many places": (point(), nn.AvgPool2d(3, 1, 1, count_include_pad=False)),
    "3x3": (nn.Conv2d(3, 6, 3, padding=1), nn.AvgPool2d(2)),
    "strided": (nn.Conv2d(3, 6, 1, 2), nn.AvgPool2d(2)),
    "maximum": (point(), nn.MaxPool2d(2)),
}


@pytest.mark.parametrize("name", LATE)
def test_other_pools_and_layers_stay(name: str) -> None:
    assert advance_pools(program(*LATE[name])) == []


@pytest.mark.parametrize("name", ["counted zeros", "another divisor"])
def test_without_a_bias_any_average_goes(name: str) -> None:
    check = program(point(bias=False), LATE[name][1])
    assert check_rewrite(advance_pools, check).text() != check.text()


def test_a_layer_read_twice_stays() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.pool = point(), nn.AvgPool2d(8)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return y - self.pool(y)

    assert advance_pools(program(Twice())) == []


def test_a_transition_of_a_densenet_costs_a_quarter() -> None:
    norm = [nn.BatchNorm2d(3), nn.ReLU()]
    model = randomise(nn.Sequential(*norm, point(bias=False), nn.AvgPool2d(2), nn.Sigmoid()))
    small = fxprune.finalize(model.eval(), torch.randn(2, 3, 8, 8))
    report = small.report
    assert report.before and report.after and report.verification
    assert report.after.macs * 4 == report.before.macs
    assert report.verification.verdict == "equal"
