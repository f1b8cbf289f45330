"""Exchanging units checks the analysis: right ones change nothing, wrong ones everything."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxprune.dataflow.rules import RULES, OpRule
from fxprune.ops.elementwise import passing_flow
from fxprune.permutation import Permutation, exchange_units
from fxprune.programs.program import capture
from tests.conftest import randomise
from tests.test_micro import CASES, Micro


def exchange(model: nn.Module, *shape: int) -> Permutation:
    x = torch.randn(shape, dtype=torch.float64)
    return exchange_units(capture(model.double(), ((x,), {})))


def norms() -> nn.Module:
    layers: list[nn.Module] = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3)]
    return randomise(nn.Sequential(*layers))


@pytest.mark.parametrize("name", CASES)
def test_units_change_places(name: str) -> None:
    model: Any = randomise(Micro(CASES[name], headless="output" in name))
    assert exchange(model, 3, 3, 6, 6).error < 1e-9


def test_all_units_of_a_stream_move_together() -> None:
    found = exchange(norms(), 2, 3, 8, 8)
    assert found.error < 1e-12
    assert 4 <= found.moved <= 8


def test_what_a_slice_tells_apart_does_not_change_places() -> None:
    class Sliced(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 2), nn.Linear(1, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x).relu()[:, :1])

    assert exchange(Sliced(), 2, 4).moved == 0


def test_a_norm_nobody_ties_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RULES, nn.BatchNorm2d, OpRule("wrong", passing_flow))
    assert exchange(norms(), 2, 3, 8, 8).error > 1e-3


class RolledTwins(nn.Module):
    """Every unit is met twice in what is rolled, the last one torn apart."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 1), nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.second(torch.cat([x.relu(), x], 1).roll(1, 1))


def test_units_torn_by_a_roll_stay_where_they_are() -> None:
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    model = randomise(RolledTwins()).double().eval()
    for seed in range(5):
        assert exchange_units(capture(model, ((x,), {})), seed).error < 1e-12
