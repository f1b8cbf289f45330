"""Float64 shows what float32 hides, and the other way round."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fxprune.compiler import finalize
from fxprune.errors import VerificationError
from fxprune.verification import verify
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
