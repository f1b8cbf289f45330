"""Plain tensors that are sliced to the length of an input serve every length."""

import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.testing import close_half, error
from tests.conftest import randomise

SLICES: dict[str, Callable[[Tensor, int], Tensor]] = {
    "the first": lambda table, n: table[:n],
    "of several axes": lambda table, n: table[1 : n + 1, :],
    "one": lambda table, n: table[n - 1],
    "by numbers": lambda table, n: table[[0, 2]].sum(0),
}


class Positions(nn.Module):
    def __init__(self, cut: Callable[[Tensor, int], Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(3, 8), nn.Linear(8, 6), nn.Linear(6, 2)
        self.table, self.cut = torch.randn(10, 8, dtype=torch.float64), cut

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x) + self.cut(self.table, x.shape[1])
        return self.third(self.second(x.relu()).relu())


@pytest.mark.parametrize("name", SLICES)
def test_every_length_is_served(name: str) -> None:
    model: Any = randomise(Positions(SLICES[name])).double()
    before = vars(torch.Tensor).get("__getitem__")
    gated: Any = fxprune.instrument(model, torch.randn(2, 5, 3, dtype=torch.float64))
    assert vars(torch.Tensor).get("__getitem__") is before
    assert not gated.report.assumptions
    for length in (1, 4, 9):
        x = torch.randn(3, length, 3, dtype=torch.float64)
        assert torch.equal(gated(x), model(x))
    close_half(gated)
    small: Any = fxprune.finalize(gated)
    assert small.report.verification.verdict == "equal"
    assert small.second.in_features == 4
    loaded = pickle.loads(pickle.dumps(small))
    for length in (1, 4, 9):
        x = torch.randn(3, length, 3, dtype=torch.float64)
        assert error(gated(x), small(x)) < 1e-12
        assert torch.equal(loaded(x), small(x))


class Nested(nn.Module):
    """Holds a table in a part, and looks at its numbers too."""

    def __init__(self) -> None:
        super().__init__()
        self.part = Positions(SLICES["the first"])
        self.part.table[:, 0] = 1.0

    def forward(self, x: Tensor) -> Tensor:
        scale = 2.0 if float(self.part.table[0, 0]) > 0.5 else 1.0
        return self.part(x) * scale


def test_a_table_is_read_by_name_in_a_part() -> None:
    model: Any = randomise(Nested()).double()
    gated: Any = fxprune.instrument(model, torch.randn(2, 5, 3, dtype=torch.float64))
    x = torch.randn(2, 7, 3, dtype=torch.float64)
    assert torch.equal(gated(x), model(x))
    assert "part.table" in dict(gated.named_buffers())


SPREADS: dict[str, Callable[[int], Tensor]] = {
    "repeated": lambda n: torch.tensor([1.0, 0, 0, 2]).view(1, 4).repeat(n, 1),
    "expanded": lambda n: torch.eye(2).view(1, 4).expand(n, -1),
    "to sizes": lambda n: torch.tensor([[0.5, 2, 1, 3]]).expand((n, 4)),
}


class Spreading(nn.Module):
    """Adds what its forward makes of numbers, once for each sample (PointNet's identity)."""

    def __init__(self, spread: Callable[[int], Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.spread = nn.Linear(3, 8), nn.Linear(8, 4), spread

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu()) + self.spread(x.size(0))


@pytest.mark.parametrize("name", SPREADS)
def test_constants_are_spread_over_any_batch(name: str) -> None:
    model: Any = randomise(Spreading(SPREADS[name]))
    gated: Any = fxprune.instrument(model, torch.randn(2, 3))
    assert not gated.report.assumptions
    x = torch.randn(5, 3)
    assert torch.equal(gated(x), model(x))
    assert close_half(gated) > 0
    assert error(gated(x), fxprune.finalize(gated)(x)) < 1e-5
