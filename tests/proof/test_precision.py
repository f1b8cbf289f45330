"""Float64 shows what float32 hides, and the other way round."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fxprune.compiler import finalize
from fxprune.errors import VerificationError
from fxprune.proof.verification import verify
from tests.functions import EXACT, compare, verdicts


def test_precision_settings_are_restored() -> None:
    before = torch.backends.cuda.matmul.fp32_precision
    seen: list[object] = []

    def spy(x: Tensor) -> Tensor:
        seen.append(torch.backends.cuda.matmul.fp32_precision)
        return x

    compare(spy, spy)
    assert set(seen) == {"ieee"}
    assert torch.backends.cuda.matmul.fp32_precision == before


def test_a_cast_to_float32_does_not_blind_float64() -> None:
    def cast(x: Tensor) -> Tensor:
        return (x.float() * 3).softmax(1, dtype=torch.float32).type_as(x)

    assert compare(cast, cast).verdict == "equal"
    found = compare(cast, lambda x: cast(x) * (1 + 1e-8), float64_tolerance=EXACT)
    assert set(verdicts(found, "float64").values()) == {"different"}
    assert compare(cast, lambda x: x.mul(3).softmax(1)).verdict == "equal"


MADE = {
    "zeros": lambda x: torch.zeros(4, 3),
    "a range": lambda x: torch.arange(0.0, 12.0).view(4, 3),
    "integers": lambda x: torch.arange(12).view(4, 3).float(),
    "a mask": lambda x: torch.full((4, 3), -2.0).triu(1),
    "noughts": lambda x: torch.eye(4, 3, dtype=torch.float32),
    "a quotient": lambda x: torch.arange(12, dtype=torch.uint8).view(4, 3) / 7.0,
    "a root": lambda x: torch.arange(12).view(4, 3).sqrt(),
}


@pytest.mark.parametrize("name", MADE)
def test_what_is_made_in_float32_does_not_blind_float64(name: str) -> None:
    def made(x: Tensor) -> Tensor:
        return x @ MADE[name](x) + x[:, :3]

    assert set(verdicts(compare(made, made), "float64").values()) == {"equal"}
    found = compare(made, lambda x: made(x) * (1 + 1e-8), float64_tolerance=EXACT)
    assert set(verdicts(found, "float64").values()) == {"different"}


def test_integers_that_are_made_stay_integers() -> None:
    def made(x: Tensor) -> Tensor:
        places = torch.arange(3).repeat(1), torch.full((3,), 1), torch.randperm(3).sort()[0]
        return x[:, places[0]] + x[:, places[1]] * x[:, places[2]]

    assert compare(made, made).verdict == "equal"


def test_a_model_without_float64_is_not_called_equal() -> None:
    table = torch.randn(4, 3)

    def stubborn(x: Tensor) -> Tensor:
        return x @ table

    found = compare(stubborn, stubborn)
    assert set(verdicts(found, "float64").values()) == {"skipped"}
    assert set(verdicts(found, "float32").values()) == {"equal"}
    assert found.verdict == "inconclusive"


def test_precision_lost_in_float32_is_different() -> None:
    found = compare(lambda x: x, lambda x: x + 1e6 - 1e6)
    assert verdicts(found, "float64")["example"] == "equal"
    assert found.verdict == "different"
    with pytest.raises(VerificationError, match="float32_tolerance"):
        found.require()


def test_half_models_are_compared_in_float32() -> None:
    model = nn.Linear(4, 4).half()
    found = verify(model, copy.deepcopy(model), torch.randn(2, 4).half())
    assert found.verdict == "equal"
    other = copy.deepcopy(model)
    other.weight.data *= 1.01
    assert verify(model, other, torch.randn(2, 4).half()).verdict == "different"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_is_held_to_full_precision() -> None:
    model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 8, 3))
    found = verify(model, copy.deepcopy(model).cuda(), torch.randn(1, 3, 16, 16))
    assert found.verdict == "equal"
    assert found.error["float32"] < 1e-5


CONSTANTS: dict[str, Any] = {
    "linspace": lambda: torch.linspace(0.1, 1, 7),
    "frequencies": lambda: torch.exp(-torch.arange(7) / 7),
    "of numpy": lambda: torch.tensor(np.linspace(0.1, 1, 7)).float(),
}


class Scaled(nn.Module):
    """Multiplies by numbers that its forward makes of nothing."""

    def __init__(self, constants: Any) -> None:
        super().__init__()
        self.up, self.down, self.constants = nn.Linear(6, 7), nn.Linear(7, 4), constants

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)) * self.constants())


@pytest.mark.parametrize("name", CONSTANTS)
def test_constants_that_a_forward_makes_are_those_of_its_trace(name: str) -> None:
    model, x = Scaled(CONSTANTS[name]), torch.randn(5, 6)
    with torch.no_grad():
        model.down.weight[:, 2] = 0
    small: Any = finalize(model, x, fold=False)
    assert small.up.out_features == 6
    assert small.report.verification.verdict == "equal"
