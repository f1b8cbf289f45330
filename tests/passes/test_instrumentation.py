"""Where gates go, where not, and that they change nothing until they are trained."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxprune.errors import NothingToDoError
from fxprune.gating.gates import Gates
from fxprune.passes.gate_removal import remove_gates
from fxprune.passes.instrumentation import insert_gates
from fxprune.programs.pipeline import Change
from fxprune.programs.program import Program, capture
from fxprune.testing import error
from tests.conftest import Golden, randomise, reloaded


def instrumented(model: nn.Module, *shape: int) -> tuple[Program, list[Change]]:
    inputs = ((torch.randn(shape, dtype=torch.float64),), {})
    before = capture(randomise(model).double(), inputs)
    expected = before.clone().module
    changes = insert_gates(before)
    before.check()
    for mode in (True, False):
        torch.manual_seed(3)
        reference = expected.train(mode)(*before.inputs()[0])
        torch.manual_seed(3)
        assert torch.equal(before.module.train(mode)(*before.inputs()[0]), reference)
    return before, changes


def gates_in(program: Program) -> Gates:
    gates = program.module.gates
    assert isinstance(gates, Gates)
    return gates


class Block(nn.Module):
    """A residual block between a stem and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn0 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv1, self.bn1 = nn.Conv2d(8, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.conv2, self.bn2 = nn.Conv2d(6, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.relu, self.head = nn.ReLU(inplace=True), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn0(self.stem(x)))
        y = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(y)) + x)
        return self.head(x.mean((2, 3)))


def test_sites_on_one_stream_share_their_units(golden: Golden) -> None:
    program, _ = instrumented(Block(), 2, 3, 6, 6)
    first, inner, last = gates_in(program).width_sites
    assert first.units == last.units
    assert set(inner.units).isdisjoint(first.units)
    gates: Any = gates_in(program)
    assert gates.width.shape == (14,)
    golden.check(program.text())


def test_a_gate_stands_behind_the_batch_norm_that_follows(golden: Golden) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.ReLU(), nn.BatchNorm2d(6), nn.Conv2d(6, 4, 3, padding=1)
    )
    program, _ = instrumented(model, 2, 3, 8, 8)
    golden.check(program.text())


ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
    "relu": (F.relu, True),
    "relu method": (lambda x: x.relu(), True),
    "relu in place": (lambda x: x.relu_(), True),
    "silu": (F.silu, True),
    "sine": (torch.sin, True),
    "sine in place, faster": (lambda x: (30 * x).sin_(), True),
    "gelu": (F.gelu, True),
    "tanh": (torch.tanh, True),
    "hardtanh around 0": (lambda x: F.hardtanh(x, -0.5, 2.0), True),
    "hardtanh above 0": (lambda x: F.hardtanh(x, 0.5, 2.0), False),
    "sigmoid": (torch.sigmoid, False),
    "softplus": (F.softplus, False),
    "threshold to 1": (lambda x: F.threshold(x, 0.1, 1.0), False),
}


class Activated(nn.Module):
    def __init__(self, f: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.f, self.b = nn.Conv2d(3, 6, 3), f, nn.Conv2d(6, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.f(self.a(x)))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_nonlinearity_that_keeps_zero_is_gated(name: str) -> None:
    function, gated = ACTIVATIONS[name]
    if gated:
        program, _ = instrumented(Activated(function), 2, 3, 8, 8)
        assert len(gates_in(program).width_sites) == 1
    else:
        with pytest.raises(NothingToDoError, match="f\\(0\\) is not 0"):
            instrumented(Activated(function), 2, 3, 8, 8)


class Blocked(nn.Module):
    """A gated channel that somebody reads before the gate."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 1), nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return self.b(F.relu(h)) + self.c(h)


def test_a_gate_that_would_free_nothing_is_refused_with_its_reason() -> None:
    with pytest.raises(NothingToDoError, match=r"reads it where it is not a constant.*c "):
        instrumented(Blocked(), 2, 3, 6, 6)


def test_a_gate_on_an_output_is_refused_with_its_reason() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3), nn.ReLU())
    _, changes = instrumented(model, 2, 4)
    assert any(c.where == "3" and "it reaches an output" in c.what for c in changes)


def test_linearity_gates_stand_only_where_merging_pays() -> None:
    model = nn.Sequential(
        *(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 16), nn.Tanh()),
        *(nn.Linear(16, 2), nn.ReLU(), nn.Linear(2, 16)),
    )
    program, changes = instrumented(model, 3, 16)
    assert [site.name for site in gates_in(program).depth_sites] == ["1", "3"]
    assert any(c.where == "5" and "no linearity gate: merged" in c.what for c in changes)


def test_a_trained_verdict_becomes_zeros_and_bypasses(golden: Golden) -> None:
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 4))
    program, _ = instrumented(model, 3, 6)
    gates: Any = gates_in(program)
    with torch.no_grad():
        gates.width[:5] = 0.2
        gates.linear[0] = 0.9
    program.module.eval()
    after = program.clone()
    changes = remove_gates(after)
    after.check()
    assert error(program.run(), after.run()) == 0
    assert {str(change) for change in changes} == {"1: is linear", "1: keeps 11 of 16 channels"}
    assert not any(isinstance(m, Gates) for m in after.module.modules())
    golden.check(after.text())


def test_a_neuron_comes_back() -> None:
    """A unit whose gate fell below ½ is trained up again, as its gradient is alive."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 1))
    x = torch.randn(64, 2)
    y = model(x).detach()
    program = capture(model, ((x,), {}))
    insert_gates(program)
    program.check()
    gates: Any = gates_in(program)
    with torch.no_grad():
        gates.width.fill_(0.45)
        gates.width[0] = 0.75
    optimizer = torch.optim.SGD([gates.width], lr=0.1)
    for step in range(50):
        loss = F.mse_loss(program.module(x), y)
        optimizer.zero_grad()
        loss.backward()
        if step == 0:
            assert bool((gates.width.grad[1:] != 0).any())
        optimizer.step()
    assert bool((gates.width[1:] >= 0.5).any())
    assert float(F.mse_loss(program.module(x), y).detach()) < 0.1 * float(y.var())


def test_a_pickled_model_keeps_its_gates() -> None:
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 4))
    program, _ = instrumented(model, 3, 6)
    again = reloaded(program.module)
    for module in (program.module, again):
        module(*program.inputs()[0]).square().sum().backward()
    for name in ("width", "linear"):
        grads = [getattr(module.gates, name).grad for module in (program.module, again)]
        assert torch.equal(grads[0], grads[1]) and bool((grads[0] != 0).any())


class Detached(nn.Module):
    """A teacher whose features are detached, a probe of the student's, and picks by an argmax."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5))
        self.student = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5))
        self.router = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
        self.probe = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 2))
        self.table = nn.Embedding(3, 5)

    def forward(self, x: Tensor) -> Tensor:
        features = F.relu(self.student(x)) + self.table(self.router(x).argmax(-1))
        return torch.cat([features - self.teacher(x).detach(), self.probe(features.detach())], 1)


def test_what_no_gradient_reaches_is_not_gated() -> None:
    program, changes = instrumented(Detached(), 4, 6)
    assert {site.name for site in gates_in(program).width_sites} == {"student.1", "probe.1"}
    refused = {c.where for c in changes if "no gradient reaches it" in c.what}
    assert refused == {"teacher.1", "router.1"}
    program.module.train()(*program.inputs()[0]).sum().backward()
    width: Any = gates_in(program).width
    assert bool((width.grad != 0).any(0))


class Halved(nn.Module):
    """No operator that anybody knows."""

    def forward(self, x: Tensor) -> Tensor:
        return x / 2 if float(x.sum()) > 1e9 else x


def test_the_reason_is_the_operator_that_keeps_its_channels() -> None:
    model = nn.Sequential(nn.Linear(6, 8), Halved(), nn.Identity(), nn.ReLU(), nn.Linear(8, 2))
    with pytest.raises(NothingToDoError, match="3: no width gate: it could not be traced into"):
        instrumented(model, 4, 6)


class Doubled(nn.Module):
    """A stream beside the layers, to which there are as many ways as sums double."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for _ in range(60):
            y = y + y * 0.5
        return self.second(F.relu(self.first(x))) + F.relu(y)


def test_the_reason_is_found_in_as_many_steps_as_there_are_nodes() -> None:
    _, changes = instrumented(Doubled(), 4, 6)
    assert [c.where for c in changes if "no width gate" in c.what] == ["relu_1"]
