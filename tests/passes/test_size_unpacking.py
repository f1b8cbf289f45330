"""Computed shapes come apart, so that the sizes in them can follow."""
# ruff: noqa: RUF005 (adding tuples is what is tested)

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxprune
from fxprune.passes.size_unpacking import unpack_sizes
from fxprune.programs.program import capture
from fxprune.testing import check_rewrite, close_half, error, spread
from fxprune.user_models.inputs import model_inputs
from tests.conftest import randomise

SPELLINGS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "size": lambda x, n: x.view(x.size()[:-1] + (n,)),
    "shape": lambda x, n: torch.reshape(x, x.shape[:2] + (n,)),
    "keyword": lambda x, n: x.reshape(shape=x.shape[:-1] + (n,)),
    "expand": lambda x, n: x.expand(x.shape[:-1] + (n,)),
    "split": lambda x, n: x.view(x.shape[:-1] + (2, n // 2)).flatten(2),
    "a star": lambda x, n: x.view(*x.shape[:2], n),
    "a list": lambda x, n: x.reshape([*x.size()[:-1], n]),
    "a star of the last": lambda x, n: x.view(-1, *x.shape[1:]),
    "unpacked": lambda x, n: x.view(x.shape[0], *x.shape[1:][:2]),
}


class Flattened(nn.Module):
    """An MLP over rows, as Conv1D of GPT-2: shapes are put together behind each product."""

    def __init__(self, spelling: Callable[[Tensor, int], Tensor]) -> None:
        super().__init__()
        self.spelling = spelling
        self.inner, self.outer = nn.Linear(6, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(F.relu(self.spelling(self.inner(x), 16)))


@pytest.mark.parametrize("name", SPELLINGS)
def test_a_size_in_a_computed_shape_follows(name: str) -> None:
    model = randomise(Flattened(SPELLINGS[name])).double().eval()
    x = torch.randn(3, 4, 6, dtype=torch.float64)
    gated = fxprune.instrument(model, x)
    close_half(gated)
    small: Any = fxprune.finalize(gated)
    for inputs in (x, torch.randn(2, 7, 6, dtype=torch.float64)):
        assert error(gated(inputs), small(inputs)) < 1e-12 < spread(gated(inputs))
    assert small.inner.out_features < 16


def test_the_pass_alone() -> None:
    model = randomise(Flattened(SPELLINGS["size"])).double().eval()
    inputs = model_inputs(torch.randn(3, 4, 6, dtype=torch.float64))
    program = capture(model, inputs)
    unpacked = check_rewrite(unpack_sizes, program)
    assert ".view((getitem" in unpacked.text() and "add" not in unpacked.text()
    assert unpack_sizes(unpacked) == []


def test_what_it_does_not_understand_stays() -> None:
    class Odd(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.reshape(x.shape[::-1][:1] + x.shape[1:-1] + x.shape[:1]).relu()

    inputs = model_inputs(torch.randn(3, 4, 6))
    program = capture(Odd(), inputs)
    check_rewrite(unpack_sizes, program)
