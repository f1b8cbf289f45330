"""Models that rearrange with einops are traced, and their channels followed."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from einops import einsum, rearrange, reduce, repeat
from einops.layers.torch import Rearrange, Reduce
from torch import Tensor, nn

import fxprune
from fxprune.testing import close_half, error
from tests.conftest import randomise


class Between(nn.Module):
    """Two convolutions and something of einops between them."""

    def __init__(self, between: Callable[[Tensor], Tensor], channels: int) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(channels, 6, 1)
        self.third, self.between = nn.Linear(6, 2), between

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.between(self.first(x).relu())).relu()
        return self.third(reduce(x, "b c h w -> b c", "mean"))


BETWEEN: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "space to depth": (lambda x: rearrange(x, "b c (h a) (w e) -> b (c a e) h w", a=2, e=2), 32),
    "as a layer": (Rearrange("b c (h a) (w e) -> b (c a e) h w", a=2, e=2), 32),
    "pooled": (lambda x: reduce(x, "b c (h a) (w e) -> b c h w", "max", a=2, e=2), 8),
    "pooled by a layer": (Reduce("b c (h a) (w e) -> b c h w", "mean", a=2, e=2), 8),
    "repeated": (lambda x: repeat(x, "b c h w -> b c (h n) w", n=2), 8),
    "tokens and back": (
        lambda x: rearrange(
            rearrange(x, "b c h w -> b (h w) c").sigmoid(), "b (h w) c -> b c h w", h=x.shape[2]
        ),
        8,
    ),
    "heads": (
        lambda x: rearrange(
            rearrange(x, "b (h d) x y -> b h (x y) d", h=2).tanh(),
            "b h (x y) d -> b (h d) x y",
            x=x.shape[2],
        ),
        8,
    ),
    "einsum": (lambda x: einsum(x, x.mean((2, 3)), "b c h w, b c -> b c h w"), 8),
}


@pytest.mark.parametrize("name", BETWEEN)
def test_channels_are_followed(name: str) -> None:
    between, channels = BETWEEN[name]
    model: Any = randomise(Between(between, channels)).double()
    gated: Any = fxprune.instrument(model, torch.randn(2, 3, 8, 8, dtype=torch.float64))
    close_half(gated)
    small: Any = fxprune.finalize(gated)
    assert small.report.verification.verdict == "equal"
    assert small.second.in_channels == channels // 2
    x = torch.randn(3, 3, 12, 16, dtype=torch.float64)
    assert error(gated(x), small(x)) < 1e-12
