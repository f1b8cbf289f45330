"""Costs in units: for any gates, the sum is what the finalised model is then counted to cost."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxprune
from fxprune.errors import GateError
from fxprune.gating.owners import gates_of
from fxprune.gating.penalties import Cost, cost_of
from fxprune.gating.unit_costs import KINDS, UnitCosts
from fxprune.testing import close_half
from models.lenet import LeNet
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


class InvertedResidual(nn.Module):
    """Sandler et al. 2018: an expansion, which linear nonlinearities make one convolution of."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 6, 3, 2, 1, bias=False), nn.BatchNorm2d(6)
        self.expand, self.bn1 = nn.Conv2d(6, 24, 1, bias=False), nn.BatchNorm2d(24)
        self.depthwise = nn.Conv2d(24, 24, 3, 1, 1, groups=24, bias=False)
        self.bn2, self.bn3 = nn.BatchNorm2d(24), nn.BatchNorm2d(6)
        self.project, self.head = nn.Conv2d(24, 6, 1, bias=False), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.bn(self.stem(x)))
        y = F.relu6(self.bn1(self.expand(x)))
        y = self.project(F.relu6(self.bn2(self.depthwise(y))))
        return self.head((x + self.bn3(y)).mean((2, 3)))


class ResNeXt(nn.Module):
    """Xie et al. 2017: a block with a grouped convolution between two 1×1, and its shortcut."""

    def __init__(self) -> None:
        super().__init__()
        sizes = [(3, 8, 3, 1), (8, 12, 1, 1), (12, 12, 3, 3), (12, 8, 1, 1)]
        self.convs = nn.ModuleList(
            nn.Conv2d(i, o, k, padding=k // 2, groups=g, bias=False) for i, o, k, g in sizes
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(o) for _, o, _, _ in sizes)
        self.act, self.head = nn.ReLU(inplace=True), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        streams: list[Tensor] = []
        for place in range(3):
            x = self.act(self.norms[place](self.convs[place](x)))
            streams.append(x)
        x = self.act(streams[0] + self.norms[3](self.convs[3](x)))
        return self.head(x.mean((2, 3)))


class DenseNet(nn.Module):
    """Huang et al. 2017: a layer beside what it reads, norms before layers, and a transition."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm0 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.norm1, self.conv1 = nn.BatchNorm2d(8), nn.Conv2d(8, 16, 1, bias=False)
        self.norm2, self.conv2 = nn.BatchNorm2d(16), nn.Conv2d(16, 6, 3, padding=1, bias=False)
        self.norm3, self.transition = nn.BatchNorm2d(14), nn.Conv2d(14, 7, 1, bias=False)
        self.norm4, self.pool, self.head = nn.BatchNorm2d(7), nn.AvgPool2d(2), nn.Linear(7, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm0(self.stem(x)))
        new = self.conv2(F.relu(self.norm2(self.conv1(F.relu(self.norm1(x))))))
        x = self.transition(F.relu(self.norm3(torch.cat([x, new], 1))))
        return self.head(F.relu(self.norm4(self.pool(x))).mean((2, 3)))


class Normed(nn.Module):
    """Norms behind nonlinearities, which go forward or, where these are linear, back."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.bn1 = nn.Conv2d(3, 12, 1, bias=False), nn.BatchNorm2d(12)
        self.second, self.bn2 = nn.Conv2d(12, 5, 3, bias=False), nn.BatchNorm2d(5)
        self.third, self.bn3 = nn.Conv2d(5, 20, 3, padding=1, bias=False), nn.BatchNorm2d(20)
        self.prelu, self.last = nn.PReLU(20), nn.Conv2d(20, 3, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn2(F.relu(self.second(self.bn1(F.relu(self.first(x))))))
        return self.last(self.bn3(self.prelu(self.third(x))))


def deep() -> nn.Module:
    """A chain of layers with many ways to cut it."""
    widths = [12, 30, 14, 26, 8, 28, 5]
    pairs = itertools.pairwise(widths)
    layers = [part for i, o in pairs for part in (nn.Linear(i, o), nn.BatchNorm1d(o), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(5, 3))


def mapped() -> nn.Module:
    """A map, flattened: layers before and behind could be one."""
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 10, 3, 2), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(90, 20), nn.ReLU(), nn.Linear(20, 4))


class Recurrent(nn.Module):
    """A recurrent network whose inputs may go, its hidden state not."""

    def __init__(self, recurrent: nn.Module, made: int) -> None:
        super().__init__()
        self.first, self.recurrent = nn.Linear(7, 9), recurrent
        self.hidden, self.last = nn.Linear(made, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        found = self.recurrent(F.relu(self.first(x)))
        found = found[0] if isinstance(found, tuple) else found
        return self.last(F.relu(self.hidden(found)))


def recurrent(kind: Any, made: int = 6, **options: Any) -> Callable[[], nn.Module]:
    return lambda: Recurrent(kind(9, 6, **options), made)


class Bilinear(nn.Module):
    """A layer that reads two inputs, and a product with a vector."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(7, 5), nn.Linear(7, 6)
        self.both, self.last = nn.Bilinear(5, 6, 8), nn.Linear(8, 3)
        self.vector = nn.Parameter(torch.randn(5))

    def forward(self, x: Tensor) -> Tensor:
        left, right = F.relu(self.left(x)), F.relu(self.right(x))
        return self.last(F.relu(self.both(left, right))) + (left @ self.vector).unsqueeze(-1)


class SelfAttention(nn.Module):
    """torch's own attention module, which evaluation may run as one operator."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.hidden, self.last = nn.Linear(8, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.gelu(self.hidden(self.attention(x, x, x, need_weights=False)[0])))


IMAGES, STEPS = (2, 3, 8, 8), (2, 5, 7)
NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "residual": (Residual, IMAGES),
    "joined": (Joined, IMAGES),
    "depthwise": (depthwise, IMAGES),
    "grouped": (grouped, IMAGES),
    "flattened": (flattened, IMAGES),
    "attention": (Attention, (2, 5, 6)),
    "attention module": (SelfAttention, (2, 5, 8)),
    "bilinear": (Bilinear, STEPS),
    "inverted residual": (InvertedResidual, IMAGES),
    "resnext": (ResNeXt, IMAGES),
    "densenet": (DenseNet, IMAGES),
    "normed": (Normed, IMAGES),
    "deep": (deep, (3, 12)),
    "lenet": (LeNet, (2, 1, 28, 28)),
    "mapped": (mapped, IMAGES),
    "lstm": (recurrent(nn.LSTM), STEPS),
    "lstm, two layers": (recurrent(nn.LSTM, num_layers=2, batch_first=True), STEPS),
    "lstm, both ways": (recurrent(nn.LSTM, 12, num_layers=2, bidirectional=True), STEPS),
    "lstm, projected": (recurrent(nn.LSTM, 4, proj_size=4, batch_first=True), STEPS),
    "lstm, one sequence": (recurrent(nn.LSTM), (5, 7)),
    "gru": (recurrent(nn.GRU, 12, bidirectional=True, bias=False), STEPS),
    "rnn": (recurrent(nn.RNN, num_layers=2), STEPS),
    "lstm cell": (recurrent(nn.LSTMCell), (5, 7)),
    "gru cell": (recurrent(nn.GRUCell), (5, 7)),
    "rnn cell": (recurrent(nn.RNNCell), (5, 7)),
}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def decide(gated: nn.Module, seed: int) -> None:
    """Set gates at random, leaving every tensor a unit, and more or fewer of them."""
    gates = gates_of(gated)
    assert gates.width is not None and gates.costs is not None
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        shift = 0.4 * torch.rand((), generator=generator) - 0.2
        gates.width.copy_(torch.rand(len(gates.width), generator=generator) + shift)
        for group in gates.costs.groups():
            chosen = group[int(torch.randint(len(group), (), generator=generator))]
            gates.width[chosen] = 0.9
        if gates.linear is not None:
            gates.linear.copy_(torch.rand(len(gates.linear), generator=generator) + 2 * shift)


def counted(gated: nn.Module) -> tuple[int, int]:
    """Return the parameters and MACs of the finalised model."""
    after = fxprune.finalize(gated, check=False).report.after
    assert after is not None
    return after.parameters, after.macs


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize("name", NETS)
def test_the_sum_is_what_the_finalised_model_costs(name: str) -> None:
    make, shape = NETS[name]
    model = randomise(make())
    gated = fxprune.instrument(model, torch.randn(shape))
    gates = gates_of(gated)
    assert gates.costs is not None
    full = gates.costs.full("parameters"), gates.costs.full("macs")
    assert full == counted(gated)
    seen: set[tuple[int, int]] = set()
    for seed in range(6):
        decide(gated, seed)
        after = counted(gated)
        found = [float(cost_of(gates, kind).detach()) for kind in ("parameters", "macs")]
        assert found == list(after), gates.linearised()
        assert float(cost_of(gates, "neurons").detach()) == int(gates.live().sum())
        seen.add(after)
    assert len(seen) > 2 and max(seen) < full


@pytest.mark.filterwarnings("ignore:LSTM with projections")
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


@pytest.mark.parametrize("name", ["normed", "deep", "lenet", "mapped", "inverted residual"])
def test_the_gradient_of_a_linearity_gate_is_what_its_other_state_costs_more(name: str) -> None:
    make, shape = NETS[name]
    gated = fxprune.instrument(make(), torch.randn(shape))
    gates = gates_of(gated)
    assert gates.costs is not None and gates.linear is not None
    rises: list[float] = []
    for seed in range(4):
        decide(gated, seed)
        live, linear = gates.live().double(), gates.linearised().double().requires_grad_()
        for kind in ("parameters", "macs"):
            now = gates.costs(kind, live, linear)
            (gradient,) = torch.autograd.grad(now, linear)
            for site in range(len(linear)):
                other = linear.detach().clone()
                other[site] = 1 - other[site]
                rise = gates.costs(kind, live, other) - now
                rise = rise * (other - linear)[site]
                torch.testing.assert_close(gradient[site], rise.detach())
                rises.append(float(rise.detach()))
    assert min(rises) < 0


def test_recurrent_weights_that_are_computed_stay() -> None:
    layer = nn.utils.parametrizations.weight_norm(nn.GRU(9, 6), "weight_ih_l0")
    gated = fxprune.instrument(Recurrent(layer, 6), torch.randn(STEPS))
    gates = gates_of(gated)
    assert gates.width is not None
    gates.width.data[::2] = 0
    assert float(cost_of(gates, "macs").detach()) == counted(gated)[1]


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


@pytest.mark.parametrize("kind", ["seconds", ""])
def test_unknown_costs_are_refused(kind: str) -> None:
    with pytest.raises(GateError, match="take one of neurons, parameters, macs, latency"):
        Cost(1.0, kind)


def test_a_parameter_without_numbers_costs_nothing() -> None:
    class Continuous(nn.Module):
        """Has no categories, and an embedding for each of none."""

        def __init__(self) -> None:
            super().__init__()
            self.none = nn.Parameter(torch.zeros(0, 6))
            self.up, self.down = nn.Linear(6, 10), nn.Linear(10, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.cat([x, self.none.expand(0, 6)])
            return self.down(torch.relu(self.up(x)))

    gated: Any = fxprune.instrument(Continuous(), torch.randn(4, 6))
    assert len(gated.gates.width_sites[0].units) == 10


class Picking(nn.Module):
    """An expert for what a mask picks, which may be nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(8, 6), nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        picked = torch.where(x[:, 0] > 100)[0]
        out = torch.zeros_like(x).index_add(0, picked, self.second(F.relu(self.first(x[picked]))))
        return self.head(F.relu(x + out))


def test_layers_that_nothing_reached_are_kept_and_cost_no_macs() -> None:
    tail = nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)
    gated: Any = fxprune.instrument(nn.Sequential(Picking(), *tail), torch.randn(4, 8))
    assert gated.gates.width_sites[0].name == "2" and len(gated.gates.width_sites) == 1
    costs = {
        kind: float(cost_of(gates_of(gated), kind).detach()) for kind in ("parameters", "macs")
    }
    mine, its = 6 * 9 + 8 * 7 + 3 * 9, 8 * 4 + 2 * 9
    assert costs == {"parameters": mine + its, "macs": 8 * 3 + 3 * 8 + 8 * 2}
    close_half(gated.double())
    x = torch.randn(4, 8, dtype=torch.float64)
    small, other = fxprune.finalize(gated, x), 500 * torch.cat([x, x + 1])
    reasons = [str(change) for change in small.report.refused]
    assert any("it gives nothing on the example inputs" in reason for reason in reasons)
    assert torch.allclose(small(other), gated.eval()(other), rtol=1e-12)
