"""What stays though it is dead, and what it is then."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxprune


class Silent(nn.Module):
    """Constants that a function of a raw parameter makes 0, all of them, for `read` to add up."""

    def __init__(self, read: Callable[[Tensor, Any], Tensor]) -> None:
        super().__init__()
        self.first, self.layer, self.beside = nn.Linear(4, 6), nn.Linear(5, 3), nn.Linear(4, 3)
        self.inner, self.bias = nn.Parameter(-torch.rand(5, 6) - 0.5), nn.Parameter(torch.zeros(5))
        self.outer, self.read = nn.Parameter(torch.randn(5, 3)), read
        with torch.no_grad():
            self.first.weight.zero_()
            self.first.bias.fill_(1)
            self.bias.copy_(-0.9 * self.inner.sum(1))  # of fewer inputs a positive number comes out

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x, beside = F.relu(self.first(x)), self.beside(x)
        return self.read(F.relu(x @ self.inner.t() + self.bias), self), beside


READERS: dict[str, Callable[[Tensor, Any], Tensor]] = {
    "matrix product": lambda x, m: x @ m.outer,
    "transposed": lambda x, m: F.linear(x, m.outer.t()),
    "einsum": lambda x, m: torch.einsum("bi,io->bo", x, m.outer),
    "convolution": lambda x, m: F.conv1d(x[..., None], m.outer.t().unsqueeze(-1)).squeeze(-1),
    "layer": lambda x, m: m.layer(x),
    "sum": lambda x, m: x.sum(1),
}


@pytest.mark.parametrize("name", READERS)
def test_a_constant_that_stays_for_want_of_others_is_what_it_was(name: str) -> None:
    model, x = Silent(READERS[name]).double(), torch.randn(7, 4, dtype=torch.float64)
    small: Any = fxprune.finalize(model, x)
    for one, other in zip(model(x), small(x), strict=True):
        assert torch.allclose(one, other, rtol=0, atol=1e-12)
    assert sum(map(torch.numel, small.parameters())) < sum(map(torch.numel, model.parameters()))
