"""Numbers of numpy in a forward: a graph holds them as Python's."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.programs.program import capture
from fxprune.testing import close_half


class Attention(nn.Module):
    """One head, scaled as most people write it."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 4)
        self.query, self.key = nn.Linear(4, 4), nn.Linear(4, 4)
        self.width, self.heads = np.int64(4), np.array([2, 2])

    def forward(self, x: Tensor) -> Tensor:
        x = self.down(torch.relu(self.up(x)) / np.sqrt(8))
        scores = self.query(x) @ self.key(x).transpose(1, 2) / np.sqrt(self.width)
        shape = (x.shape[0], np.prod(x.shape[1:2]), self.width)
        return np.float64(2.5) * (scores.softmax(-1) @ x).reshape(shape) * np.float32(0.3)


class OfSizes(nn.Module):
    """What numpy is asked of a size."""

    def __init__(self, number: Any) -> None:
        super().__init__()
        self.up, self.down, self.number = nn.Linear(6, 8), nn.Linear(8, 4), number

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x))) * self.number(x.shape[1])


def test_numbers_of_numpy_become_pythons() -> None:
    torch.manual_seed(0)
    model, x = Attention(), torch.randn(3, 5, 6)
    gated = fxprune.instrument(model, x)
    assert torch.equal(gated(x), model(x)) and "np." not in gated.code
    close_half(gated)
    small: Any = fxprune.finalize(gated)
    assert small.report.verification.verdict == "equal"
    assert small.up.out_features == 4


NUMBERS: dict[str, Any] = {
    "root": np.sqrt,
    "scaled": lambda n: np.float64(3) / n + np.int64(2) * n - np.float32(0.5),
    "power": lambda n: np.int64(2) ** n % np.int64(5) // np.float64(0.3),
    "both": lambda n: math.sqrt(n) / np.sqrt(n + np.int64(1)),
    "rounded": lambda n: np.ceil(n / 4) + np.floor(n / np.int64(2)) * 0.5,
}


@pytest.mark.parametrize("name", NUMBERS)
def test_what_numpy_makes_of_a_size_follows_the_input(name: str) -> None:
    torch.manual_seed(0)
    model = OfSizes(NUMBERS[name])
    gated = fxprune.instrument(model, torch.randn(2, 5, 6))
    assert gated.report.assumptions == []
    for length in (5, 9, 12):
        x = torch.randn(2, length, 6)
        assert torch.equal(gated(x), model(x))


def test_what_python_would_not_compute_to_the_bit_is_assumed() -> None:
    """Informer attends to as many queries as the logarithm of their number says."""
    torch.manual_seed(0)
    model = OfSizes(lambda n: 5 * np.ceil(np.log(n)).astype("int").item() + np.maximum(n, 2))
    gated = fxprune.instrument(model, torch.randn(2, 5, 6))
    (assumed,) = gated.report.assumptions
    assert "shape[1] == 5" in str(assumed)
    x = torch.randn(3, 5, 6)
    assert torch.equal(gated(x), model(x))
    with pytest.raises(AssertionError, match="assumes"):
        gated(torch.randn(2, 9, 6))


@pytest.mark.parametrize("number", [np.sinc, lambda n: np.array([1.0, 2.0]) * n], ids=["f", "[]"])
def test_what_is_not_known_of_numpy_is_refused(number: Any) -> None:
    with pytest.raises(fxprune.TraceError, match="cannot be traced"):
        capture(OfSizes(number), ((torch.randn(2, 5, 6),), {}))
