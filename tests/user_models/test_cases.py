"""Every case catches a fault that the others do not."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fxprune.proof.verification import verify
from fxprune.user_models.cases import random_inputs
from tests.functions import check_of, compare, verdicts

RIGHT_AT_BATCH_ONE: dict[str, Callable[[Tensor], Tensor]] = {
    "mixes the batch": lambda x: x - x.mean(0) + x.mean(0)[:1],
    "repeats its first sample": lambda x: x[:1].expand_as(x),
    "has its batch size written in": lambda x: x.view(1, 4),
    "drops samples": lambda x: x[:1],
}


@pytest.mark.parametrize("wrong", RIGHT_AT_BATCH_ONE.values(), ids=RIGHT_AT_BATCH_ONE)
def test_what_is_right_only_at_batch_one_is_caught(wrong: Callable[[Tensor], Tensor]) -> None:
    found = compare(lambda x: x.clone(), wrong, 1, 4)
    assert verdicts(found, "float64")["batch 3"] == "different"
    assert found.verdict == "different"


def test_what_differs_in_saturation_is_caught() -> None:
    found = compare(lambda x: x, lambda x: x.clamp(-6, 6))
    assert verdicts(found, "float64")["example"] == "equal"
    assert verdicts(found, "float64")["×10"] == "different"


def test_what_is_right_at_one_size_only_is_caught() -> None:
    found = compare(lambda x: x.mean((2, 3)), lambda x: x.sum((2, 3)) / 64, 1, 3, 8, 8)
    assert verdicts(found, "float64")["size +32"] == "different"


def test_what_is_right_at_one_length_only_is_caught() -> None:
    table = torch.randn(9, 4)
    found = compare(lambda x: x + table[: x.shape[1]], lambda x: x + table[:5], 2, 5, 4)
    assert verdicts(found, "float64")["batch 3"] == "equal"
    assert verdicts(found, "float64")["length +1"] == "different"


def test_sequences_grow_together() -> None:
    inputs = (
        (torch.randn(2, 5, 4), torch.ones(2, 5), torch.randn(5, 3)),
        {"ids": torch.ones(2, 5).long()},
    )
    (x, mask, other), named = random_inputs(inputs, seed=0, batch=3, length=1)
    assert x.shape == (3, 6, 4) and mask.shape == named["ids"].shape == (3, 6)
    assert other.shape == (5, 3)


def test_a_size_the_reference_rejects_is_skipped() -> None:
    found = compare(lambda x: x.view(-1, 192), lambda x: x.flatten(1), 1, 3, 8, 8)
    assert verdicts(found, "float64")["size +32"] == "different"
    rejecting = nn.Sequential(nn.Flatten(), nn.Linear(192, 2))
    found = verify(rejecting, copy.deepcopy(rejecting), torch.randn(1, 3, 8, 8))
    check = check_of(found, "size +32", "float64")
    assert (check.verdict, found.verdict) == ("skipped", "equal")
    assert "shapes cannot be multiplied" in check.reason


def test_extra_inputs_are_tried() -> None:
    extra = torch.full((2, 4), 1000.0)
    found = compare(lambda x: x, lambda x: x.clamp(max=999), extra_inputs=[extra])
    assert verdicts(found, "float64")["extra 0"] == "different"
    assert verdicts(found, "float64")["×10"] == "equal"


def test_integer_inputs_are_drawn_from_the_example() -> None:
    embedding = nn.Embedding(1000, 4)
    ids = torch.tensor([[3, 999, 5], [7, 3, 3]])
    found = verify(embedding, copy.deepcopy(embedding), ids)
    assert found.verdict == "equal"
    (drawn,), _ = random_inputs(((ids,), {}), seed=0, batch=50)
    assert drawn.shape == (50, 3)
    assert set(drawn.flatten().tolist()) == {3, 5, 7, 999}
    other = copy.deepcopy(embedding)
    other.weight.data[999] *= 1.001
    assert verify(embedding, other, ids).verdict == "different"


def test_keyword_inputs_and_plain_values_are_passed_on() -> None:
    class Scaled(nn.Module):
        def forward(self, x: Tensor, *, factor: float, mask: Tensor) -> Tensor:
            return torch.where(mask, x * factor, x)

    inputs = {"x": torch.randn(2, 4), "factor": 2.5, "mask": torch.rand(2, 4) > 0.5}
    assert verify(Scaled(), Scaled(), inputs).verdict == "equal"
    inputs = ((torch.randn(2, 4),), {"factor": 2.5, "mask": torch.rand(2, 4) > 0.5})
    assert verify(Scaled(), Scaled(), inputs).verdict == "equal"


def test_one_seed_gives_one_result() -> None:
    model, other = nn.Linear(4, 4), nn.Linear(4, 4)
    example = torch.randn(2, 4)
    first, second, third = (verify(model, other, example, seed=seed).error for seed in (1, 1, 2))
    assert first == second != third
