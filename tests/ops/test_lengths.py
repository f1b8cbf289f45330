"""Tables that are cut to the length of an input serve inputs of any length in the result, too."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.testing import close_half, error, spread
from tests.conftest import randomise

ROWS = 10


class Positions(nn.Module):
    """Layers of tokens, with something of a table of places between them."""

    mask: Tensor

    def __init__(self, take: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(3, 8), nn.Linear(8, 6), nn.Linear(6, 2)
        self.table, self.take = nn.Parameter(torch.randn(ROWS, 8)), take
        self.register_buffer("mask", torch.tril(torch.ones(1, ROWS, ROWS)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.take(self, self.first(x)).relu()
        return self.third(self.second(x).relu())


TAKES: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "the first": lambda m, x: x + m.table[: x.shape[1]],
    "all but the first": lambda m, x: x + m.table[1 : x.size(1) + 1],
    "the last": lambda m, x: x + m.table[x.shape[1] - 1],
    "narrow": lambda m, x: x + m.table.narrow(0, 0, x.size(1)),
    "split": lambda m, x: x + m.table.split([x.shape[1], ROWS - x.shape[1]])[0],
    "rolled": lambda m, x: x + m.table.roll(x.shape[1], 0)[:1],
    "a mask": lambda m, x: m.mask[:, : x.shape[1], : x.shape[1]].sum(-1, keepdim=True) * x,
}


def gated_and_small(model: nn.Module, length: int) -> tuple[Any, Any]:
    gated: Any = fxprune.instrument(model, torch.randn(2, length, 3, dtype=torch.float64))
    close_half(gated)
    return gated, fxprune.finalize(gated)


@pytest.mark.parametrize("name", TAKES)
@pytest.mark.parametrize("start", [None, 0.0, 1.5])
def test_tables_serve_other_lengths(name: str, start: float | None) -> None:
    model: Any = randomise(Positions(TAKES[name])).double()
    if start is not None:  # rows that are one constant are not all rows
        model.table.data[:5] = start
    gated, small = gated_and_small(model, 5)
    assert small.report.verification.verdict == "equal"
    assert small.second.in_features == (8 if name == "rolled" else 4)
    assert len(small.table) == ROWS if hasattr(small, "table") else name == "a mask"
    for length in (1, 4, 7, 9):
        x = torch.randn(3, length, 3, dtype=torch.float64)
        assert error(gated(x), small(x)) < 1e-12
        assert spread(small(x)) > 1e-3


class ClassToken(nn.Module):
    """Tokens with another one in front of them, which tells them apart."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(3, 8), nn.Linear(8, 6), nn.Linear(6, 2)
        self.token, self.table = (
            nn.Parameter(torch.randn(1, 1, 8)),
            nn.Parameter(torch.randn(12, 8)),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), self.first(x).relu()], 1)
        return self.third(self.second(x + self.table[: x.shape[1]]).relu())


@pytest.mark.parametrize("length", [1, 5])
@pytest.mark.parametrize("start", [None, 0.0])
def test_a_class_token_makes_no_channels_of_tokens(length: int, start: float | None) -> None:
    model: Any = randomise(ClassToken()).double()
    if start is not None:
        model.table.data[:6] = start
    gated, small = gated_and_small(model, length)
    assert len(small.table) == 12
    x = torch.randn(3, 9, 3, dtype=torch.float64)
    assert error(gated(x), small(x)) < 1e-12


class Halves(nn.Module):
    """Parts by numbers that are computed of the number of channels, and of places."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv1d(3, 8, 3, padding=1), nn.Conv1d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        half, middle = x.shape[1] // 2, x.shape[2] // 2
        left, right = x.split(middle, dim=2)
        x = torch.cat([right, left], 2)
        return self.second(x[:, :half] * x[:, half:].sigmoid())


def test_parts_of_channels_are_cut_and_parts_of_places_follow_the_size() -> None:
    model = randomise(Halves()).double()
    gated: Any = fxprune.instrument(model, torch.randn(2, 3, 6, dtype=torch.float64))
    close_half(gated)
    small: Any = fxprune.finalize(gated)
    assert small.second.in_channels == 2
    x = torch.randn(2, 3, 10, dtype=torch.float64)
    assert error(gated(x), small(x)) < 1e-12


def test_positions_that_rise_and_fall_are_no_slice() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), Picked(), nn.Linear(5, 3)).double()
    with torch.no_grad():
        for part in model[0].parameters():
            part[2:4] = 0
    small: Any = fxprune.finalize(model, torch.randn(4, 6, dtype=torch.float64), fold=False)
    assert small.report.verification.verdict == "equal"
    assert small.report.refused == []


class Picked(nn.Module):
    """Of its positions those remain that go up first, and end below where they began."""

    def forward(self, x: Tensor) -> Tensor:
        return x[:, [3, 5, 7, 1, 0]]


def test_channels_stay_around_a_size_that_is_a_tensor() -> None:
    def paired(model: Any, x: Tensor) -> Tensor:
        half: Any = torch.div(x.size(1), 2, rounding_mode="trunc")
        return x.view(x.size(0), half, 2, 8).flatten(1, 2)

    model: Any = randomise(Positions(paired)).double()
    x = torch.randn(2, 6, 3, dtype=torch.float64)
    gated: Any = fxprune.instrument(model, x)
    close_half(gated)
    small: Any = fxprune.finalize(gated)
    assert small.first.out_features == 8 and small.second.out_features == 3
    assert error(small(x), gated(x)) < 1e-12
