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


def _queries(n: Any) -> Any:
    """Informer attends to as many queries as the logarithm of their number says."""
    return 5 * np.ceil(np.log(n)).astype("int").item() + np.maximum(n, 2)


def _checked(n: Any) -> Any:
    """MONAI's SwinUNETR asks whether its maps can be halved often enough."""
    wrong = np.array([n, 2 * n]) % np.power(5, 1) > 0
    if wrong.any():
        raise ValueError(f"axes {np.where(wrong)[0]}")
    return n


@pytest.mark.parametrize("number", [_queries, _checked, np.sinc])
def test_what_python_would_not_compute_to_the_bit_is_assumed(number: Any) -> None:
    torch.manual_seed(0)
    model = OfSizes(number)
    gated = fxprune.instrument(model, torch.randn(2, 5, 6))
    assert "shape[1] == 5" in str(gated.report.assumptions[0])
    x = torch.randn(3, 5, 6)
    assert torch.equal(gated(x), model(x))
    with pytest.raises(AssertionError, match="assumes"):
        gated(torch.randn(2, 9, 6))


def test_a_shape_that_numpy_is_given_is_assumed() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4), Halved())
    gated = fxprune.instrument(model, torch.randn(2, 4, 6))
    (assumed,) = gated.report.assumptions
    assert "shape[1:] == (4, 4)" in str(assumed)


class Halved(nn.Module):
    """Asks numpy whether its input can be halved."""

    def forward(self, x: Tensor) -> Tensor:
        return x if (np.array(x.shape[1:]) % 2 == 0).all() else x * 2


class ToNumpy(nn.Module):
    """Gives a tensor to numpy."""

    def forward(self, x: Tensor) -> Tensor:
        return x + float(np.asarray(x.detach()).mean())


def test_a_tensor_that_numpy_is_given_is_refused() -> None:
    with pytest.raises(fxprune.TraceError, match="a traced tensor to numpy"):
        capture(ToNumpy(), ((torch.randn(2, 5, 6),), {}))


def test_what_is_not_known_of_numpy_is_refused() -> None:
    with pytest.raises(fxprune.TraceError, match="cannot be traced"):
        capture(OfSizes(lambda n: np.array([1.0, 2.0]) * n), ((torch.randn(2, 5, 6),), {}))
