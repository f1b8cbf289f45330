"""Outputs are compared value by value, and what is not comparable is different."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fxprune.errors import VerificationError
from tests.functions import check_of, compare, verdicts


def test_nested_outputs_are_compared_by_path() -> None:
    def nested(x: Tensor, shift: float = 0.0) -> Any:
        return {"logits": x, "features": (x + 1, [x * 2 + shift]), "scale": 3, "none": None}

    assert compare(nested, nested).verdict == "equal"
    check = compare(nested, lambda x: nested(x, 1e-3)).checks[0]
    assert (check.verdict, check.output) == ("different", "output['features'][1][0]")
    assert check.index is not None and len(check.index) == 2


OTHER_STRUCTURES: dict[str, Callable[[Tensor], Any]] = {
    "is made of output['a'] instead of output['b']": lambda x: {"a": x},
    "is made of": lambda x: {"b": x, "c": x},
    "is (float32[2, 3])": lambda x: {"b": x[:, :3]},
    "is (float16[2, 4])": lambda x: {"b": x.half()},
    "is 3 instead": lambda x: {"b": 3},
    "ZeroDivisionError": lambda x: 1 / 0,
}


@pytest.mark.parametrize(("reason", "other"), OTHER_STRUCTURES.items(), ids=OTHER_STRUCTURES)
def test_another_structure_is_different(reason: str, other: Callable[[Tensor], Any]) -> None:
    found = compare(lambda x: {"b": x}, other)
    assert set(verdicts(found, "float32").values()) == {"different"}
    assert reason in found.checks[1].reason
    with pytest.raises(VerificationError):
        found.require()


def test_nan_must_be_in_the_same_places() -> None:
    found = compare(lambda x: x.sqrt(), lambda x: x.sqrt(), 4, 5)
    assert found.verdict == "equal"
    found = compare(lambda x: x.sqrt(), lambda x: x.abs().sqrt(), 4, 5)
    assert found.verdict == "different"
    assert found.error["float64"] == math.inf
    found = compare(lambda x: 1 / (x * 0), lambda x: -1 / (x * 0))
    assert found.verdict == "different"


def test_complex_outputs_are_compared_by_how_far_they_are() -> None:
    def turned(x: Tensor, by: float = 0.3) -> Tensor:
        return torch.polar(x.abs(), x + by)

    assert compare(turned, lambda x: turned(x) * (1 + 1e-12)).verdict == "equal"
    found = compare(turned, lambda x: turned(x, 0.301))
    assert found.verdict == "different" and found.error["float64"] < 1e-2
    assert compare(turned, lambda x: turned(x).conj()).verdict == "different"


def test_integer_outputs_must_be_equal() -> None:
    assert compare(lambda x: x.argmax(1), lambda x: x.argmax(1)).verdict == "equal"
    found = compare(lambda x: x.argmax(1), lambda x: x.argmax(1).clamp(max=2), 40, 4)
    check = check_of(found, "example", "float64")
    assert check.verdict == "different"
    assert 0 < check.error < 1
    assert "of 40 entries" in check.reason
