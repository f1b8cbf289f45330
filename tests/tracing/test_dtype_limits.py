"""`torch.finfo(x.dtype).min`, of attention masks, follows the dtype that a model runs in."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.testing import close_half
from fxprune.tracing.dtype_limits import asking_for_limits
from tests.conftest import reloaded


class Attention(nn.Module):
    """What is masked gets the least number there is: of scores, and of a mask of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(8, 8) for _ in range(3))
        self.rise, self.fall = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        scores = self.query(x) @ self.key(x).transpose(1, 2)
        scores = scores.masked_fill(mask[:, None] == 0, torch.finfo(scores.dtype).min)
        n = x.shape[1]
        causal = torch.full((n, n), -torch.finfo(x.dtype).max, dtype=x.dtype).triu(1)
        weights = (scores + causal / 2).softmax(-1) * (1 - torch.finfo(x.dtype).eps)
        x = x + weights @ self.value(x)
        return self.fall(torch.relu(self.rise(x)))


def _inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    mask = torch.ones(3, 5)
    mask[:, 3:] = 0
    return torch.randn(3, 5, 8, dtype=dtype), mask


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_limits_are_those_of_the_dtype_a_model_runs_in(dtype: torch.dtype) -> None:
    model = Attention()
    gated: Any = fxprune.instrument(model, _inputs())
    inputs = _inputs(dtype)
    expected = model.to(dtype)(*inputs)
    assert torch.equal(gated.to(dtype)(*inputs), expected)
    assert torch.equal(reloaded(gated)(*inputs), expected)
    assert bool(expected.isfinite().all())


def test_limits_follow_autocast() -> None:
    model = Attention()
    gated = fxprune.instrument(model, _inputs())
    inputs = _inputs()
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(*inputs)
        assert torch.equal(gated(*inputs), expected)


def test_what_is_finalised_still_asks() -> None:
    gated = fxprune.instrument(Attention(), _inputs())
    close_half(gated)
    small = fxprune.finalize(gated)
    assert small.get_submodule("rise").out_features == 8
    assert not any("dtype" in change.what for change in small.report.assumptions)
    inputs = _inputs()
    assert torch.allclose(small(*inputs), gated.eval()(*inputs), atol=1e-6)
    assert torch.equal(reloaded(small)(*inputs), small(*inputs))
    exact = _inputs(torch.float64)
    assert torch.equal(reloaded(small).double()(*exact), small.double()(*exact))


def test_limits_of_a_dtype_that_is_known_are_numbers() -> None:
    class Known(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            least = max(torch.finfo(torch.float16).min, torch.iinfo(torch.int8).min)
            return self.second(torch.relu(self.first(x)).clamp(least))

    x = torch.randn(3, 8)
    model = Known()
    assert torch.equal(fxprune.instrument(model, x)(x), model(x))


def test_who_is_imported_while_a_model_is_traced_may_keep_what_it_finds() -> None:
    with asking_for_limits():
        kept: Any = torch.finfo
    known = torch.finfo(torch.float32)
    assert kept is not torch.finfo and kept == torch.finfo
    assert isinstance(known, kept) and type(known) in {kept}
    assert kept(torch.float32).min == known.min
