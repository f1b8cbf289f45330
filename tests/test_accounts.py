"""Costs in units: for any gates, the sum is what the finalised model is then counted to cost."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxprune
from fxprune.errors import GateError
from fxprune.penalties import Cost, cost_of, gates_of
from fxprune.unit_costs import KINDS, UnitCosts
from tests.conftest import randomise


class Residual(nn.Module):
    """Two streams that meet, with batch norms, and a head without a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.first, self.bn1 = nn.Conv2d(8, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.second, self.bn2 = nn.Conv2d(6, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.stem(x)))
        y = F.relu(self.bn1(self.first(x)))
        return self.head(F.relu(x + self.bn2(self.second(y))).mean((2, 3)))


class Joined(nn.Module):
    """Branches of unlike widths, concatenated before their nonlinearity, a PReLU of the result."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 5, 1), nn.Conv2d(3, 7, 3, padding=1)
        self.bn, self.prelu = nn.BatchNorm2d(12), nn.PReLU(12)
        self.last, self.head = nn.ConvTranspose2d(12, 6, 2, 2), nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        both = torch.cat([self.left(x), self.right(x)], 1)
        return self.head(F.silu(self.last(self.prelu(self.bn(both)))))


class Attention(nn.Module):
    """Four heads, after whose values a gate stands."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(6, 16) for _ in range(3))
        self.hidden, self.out = nn.Linear(16, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        heads = [
            p(x).reshape(x.shape[0], 5, 4, 4).transpose(1, 2) for p in (self.q, self.k, self.v)
        ]
        found = F.scaled_dot_product_attention(*heads)
        merged = F.gelu(found.transpose(1, 2).reshape(x.shape[0], 5, 16))
        return self.out(F.relu(self.hidden(merged)))


def depthwise() -> nn.Module:
    layers = [nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.BatchNorm2d(8)]
    layers += [nn.ReLU6(), nn.Conv2d(8, 6, 1), nn.ReLU(), nn.Conv2d(6, 12, 3, groups=6)]
    return nn.Sequential(*layers, nn.Hardswish(), nn.Conv2d(12, 3, 1))


def grouped() -> nn.Module:
    layers = [nn.Conv2d(3, 12, 1), nn.ReLU(), nn.Conv2d(12, 8, 3, groups=2), nn.BatchNorm2d(8)]
    return nn.Sequential(*layers, nn.ReLU(), nn.Conv2d(8, 6, 2), nn.ReLU(), nn.Conv2d(6, 2, 1))


def flattened() -> nn.Module:
    layers = [nn.Conv2d(3, 5, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(45, 9)]
    return nn.Sequential(*layers, nn.ReLU(), nn.Linear(9, 4))


IMAGES = (2, 3, 8, 8)
NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "residual": (Residual, IMAGES),
    "joined": (Joined, IMAGES),
    "depthwise": (depthwise, IMAGES),
    "grouped": (grouped, IMAGES),
    "flattened": (flattened, IMAGES),
    "attention": (Attention, (2, 5, 6)),
}


def decide(gated: nn.Module, seed: int) -> None:
    """Set gates at random, leaving every tensor a unit."""
    gates = gates_of(gated)
    assert gates.width is not None and gates.costs is not None
    with torch.no_grad():
        gates.width.uniform_(0, 1)
        generator = torch.Generator().manual_seed(seed)
        gates.width.copy_(torch.rand(len(gates.width), generator=generator))
        for group in gates.costs.groups():
            chosen = group[int(torch.randint(len(group), (), generator=generator))]
            gates.width[chosen] = 0.9


@pytest.mark.parametrize("name", NETS)
def test_the_sum_is_what_the_finalised_model_costs(name: str) -> None:
    make, shape = NETS[name]
    model, x = randomise(make()), torch.randn(shape)
    gated = fxprune.instrument(model, x)
    gates = gates_of(gated)
    assert gates.costs is not None
    before = fxprune.count_costs(model, ((x,), {}))
    assert gates.costs.full("parameters") == before.parameters
    assert gates.costs.full("macs") == before.macs
    seen: set[tuple[int, int]] = set()
    for seed in range(4):
        decide(gated, seed)
        after = fxprune.count_costs(fxprune.finalize(gated, fold=False, check=False), ((x,), {}))
        assert float(cost_of(gates, "parameters").detach()) == after.parameters
        assert float(cost_of(gates, "macs").detach()) == after.macs
        assert float(cost_of(gates, "neurons").detach()) == int(gates.live().sum())
        seen.add((after.parameters, after.macs))
    assert len(seen) > 1 and max(p for p, _ in seen) < before.parameters


@pytest.mark.parametrize("name", NETS)
def test_the_gradient_is_the_marginal_cost_of_a_unit(name: str) -> None:
    make, shape = NETS[name]
    gated = fxprune.instrument(make(), torch.randn(shape))
    decide(gated, 0)
    gates = gates_of(gated)
    assert gates.costs is not None and gates.width is not None
    live = gates.live().double().requires_grad_()
    for kind in KINDS:
        (gradient,) = torch.autograd.grad(gates.costs(kind, live), live)
        for unit in range(0, len(live), 3):
            with torch.no_grad():
                low, high = live.clone(), live.clone()
                low[unit], high[unit] = 0, 1
                rise = gates.costs(kind, high) - gates.costs(kind, low)
            torch.testing.assert_close(gradient[unit], rise)


def test_a_cost_is_a_term_like_any_other() -> None:
    gated = fxprune.instrument(flattened(), torch.randn(IMAGES))
    gated.penalties = nn.ModuleDict({"cost": Cost(1e-6, "parameters")})
    total = fxprune.penalty(gated)
    torch.testing.assert_close(total, torch.tensor(1e-6 * (3 * 5 * 9 + 5 + 45 * 9 + 9 + 40)))
    total.backward()
    assert gated.gates.width is not None and gated.gates.width.grad is not None
    assert (gated.gates.width.grad > 0).all()
    assert "of='parameters'" in repr(gated.penalties)


def test_costs_follow_the_model_and_stay_out_of_its_state() -> None:
    gated = fxprune.instrument(depthwise(), torch.randn(IMAGES))
    assert not [name for name in gated.state_dict() if "costs" in name]
    expected = float(cost_of(gates_of(gated), "macs").detach())
    gated.half()
    assert float(cost_of(gates_of(gated), "macs").detach()) == expected
    assert fxprune.count_costs(gated.float(), ((torch.randn(IMAGES),), {})).bytes == (
        fxprune.count_costs(depthwise(), ((torch.randn(IMAGES),), {})).bytes
    )


def test_units_that_died_can_be_left_out() -> None:
    gated = fxprune.instrument(Residual(), torch.randn(IMAGES))
    decide(gated, 1)
    gates = gates_of(gated)
    assert isinstance(gates.costs, UnitCosts)
    rest = gates.costs.restricted(gates.live().nonzero().reshape(-1).tolist())
    for kind in KINDS:
        assert rest.full(kind) == float(cost_of(gates, kind).detach())


@pytest.mark.parametrize("kind", ["latency", ""])
def test_unknown_costs_are_refused(kind: str) -> None:
    with pytest.raises(GateError, match="take one of neurons, parameters, macs"):
        Cost(1.0, kind)
