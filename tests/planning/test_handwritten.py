"""Activations written out as products get gates; other products do not."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxprune
from fxprune.testing import close_half, error, spread
from tests.conftest import randomise


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


def gated_unit(x: Tensor) -> Tensor:
    a, b = x.chunk(2, 1)
    return a * torch.sigmoid(b)


def simple_gate(x: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=1)
    return a * b


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "quick gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "gelu of tanh": gelu,
    "gelu of erf": lambda x: x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0))),
    "swish, in place": lambda x: x.mul(x.sigmoid()),
    "hard swish": lambda x: x * F.hardsigmoid(x),
    "gated unit": gated_unit,
    "simple gate": simple_gate,
}


class Network(nn.Module):
    def __init__(self, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.activation = activation
        inner = 24 if activation in (gated_unit, simple_gate) else 12
        self.conv, self.norm = nn.Conv2d(3, inner, 3, padding=1), nn.BatchNorm2d(inner)
        self.last = nn.Conv2d(12, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.activation(self.norm(self.conv(x))))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_it_is_gated_and_cut(name: str) -> None:
    model = randomise(Network(ACTIVATIONS[name])).double().eval()
    x = torch.randn(2, 3, 7, 7, dtype=torch.float64)
    gated: Any = fxprune.instrument(model, x)
    assert torch.equal(gated(x), model(x))
    (site,) = gated.gates.width_sites
    assert len(site.units) == 12 and not gated.gates.depth_sites
    close_half(gated)
    small: Any = fxprune.finalize(gated)
    assert error(gated(x), small(x)) < 1e-12 < spread(gated(x))
    assert small.last.in_channels < 12


def test_a_factor_that_can_be_gated_gates_the_product() -> None:
    gated: Any = fxprune.instrument(
        Network(lambda x: x * F.relu6(x + 3) / 6), torch.randn(2, 3, 7, 7)
    )
    assert [site.name for site in gated.gates.width_sites] == ["relu6"]


def test_attention_over_channels_is_no_activation() -> None:
    def attended(x: Tensor) -> Tensor:
        return F.relu(x) * x.mean((2, 3), keepdim=True).sigmoid()

    gated: Any = fxprune.instrument(Network(attended), torch.randn(2, 3, 7, 7))
    assert [site.name for site in gated.gates.width_sites] == ["relu"]


def test_a_product_of_other_tensors_is_no_activation() -> None:
    def multiplied(x: Tensor) -> Tensor:
        parts = torch.relu(x).chunk(2, 1)
        return torch.cat([parts[0] * x.chunk(2, 1)[0], parts[1]], 1)

    gated: Any = fxprune.instrument(Network(multiplied), torch.randn(2, 3, 7, 7))
    assert [site.name for site in gated.gates.width_sites] == ["relu"]
