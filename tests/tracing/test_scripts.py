"""Scripted functions are traced as the Python they were compiled from."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.testing import close_half, error
from tests.conftest import randomise

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:FutureWarning")


def gated_unit(left: Tensor, right: Tensor, size: int) -> Tensor:
    """The gated unit of WaveGlow, fused there."""
    total = left + right
    return torch.tanh(total[:, :size]) * torch.sigmoid(total[:, size:])


def swish(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


class Scripted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv1d(3, 16, 3, padding=1), nn.Conv1d(2, 16, 1)
        self.third, self.fourth = nn.Conv1d(8, 6, 1), nn.Conv1d(6, 2, 1)
        self.unit: Any = torch.jit.script(gated_unit)
        self.swish: Any = torch.jit.script(swish)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x = self.unit(self.first(x), self.second(y), size=8)
        return self.fourth(self.swish(self.third(x)))


def test_scripted_functions_are_seen_through() -> None:
    model = randomise(Scripted()).double()
    x, y = (torch.randn(2, n, 10, dtype=torch.float64) for n in (3, 2))
    call = torch.jit.ScriptFunction.__call__
    gated: Any = fxprune.instrument(model, (x, y))
    assert torch.jit.ScriptFunction.__call__ is call
    assert torch.equal(gated(x, y), model(x, y))
    assert close_half(gated) == 7
    small: Any = fxprune.finalize(gated)
    assert small.report.verification.verdict == "equal"
    assert (small.third.in_channels, small.fourth.in_channels) == (4, 3)
    assert error(gated(x, y), small(x, y)) < 1e-12
