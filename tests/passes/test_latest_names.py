"""Readers of an older name of what was overwritten read the newest."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxprune
from fxprune.passes.in_place import make_functional
from fxprune.passes.latest_names import read_latest_names
from fxprune.programs.program import capture
from fxprune.testing import close_half, error
from fxprune.user_models.inputs import model_inputs
from tests.conftest import randomise


class Statements(nn.Module):
    """Overwrites in statements, and reads what it called things before."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        F.relu_(x)
        y = self.second(x)
        self.relu(y)
        y.mul_(0.5).add_(x)
        F.leaky_relu(y, 0.1, inplace=True)
        return self.third(y)


def test_statements_are_read() -> None:
    model: Any = randomise(Statements()).double().eval()
    x = torch.randn(5, 4, dtype=torch.float64)
    program = capture(model, model_inputs(x))
    assert len(read_latest_names(program)) == 5
    assert len(make_functional(program)) == 5
    program.check()
    assert error(program.run(), model(x)) == 0
    assert read_latest_names(program) == []
    gated: Any = fxprune.instrument(model, x)
    assert close_half(gated) == 4  # the sum ties both
    small: Any = fxprune.finalize(gated)
    assert small.third.in_features == 4
    assert error(gated(x), small(x)) < 1e-12


class Before(nn.Module):
    """Reads a copy, and what a view of it became."""

    def forward(self, x: Tensor) -> Tensor:
        x = x * 2
        copy, view = x.clone(), x[:, 1:]
        view.relu_()
        return x * copy


class Turned(nn.Module):
    """What overwrites forms returns the same tensor, of another form."""

    def forward(self, x: Tensor) -> Tensor:
        x = x * 2
        y = x.unsqueeze_(0)
        return y * x


@pytest.mark.parametrize("model", [Before(), Turned()])
def test_others_are_left_alone(model: nn.Module) -> None:
    x = torch.randn(3, 3, dtype=torch.float64)
    program = capture(model.eval(), model_inputs(x))
    read_latest_names(program)
    make_functional(program)
    program.check()
    assert error(program.run(), model(x)) == 0
