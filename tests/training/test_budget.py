"""A budget: met at the end of any run, by binary gates, in every way a run can go."""

import copy
import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxprune
from fxprune.errors import BudgetError, GateError
from fxprune.gating.gates import Gates
from fxprune.gating.owners import gates_by_name, gates_of
from models.lenet import LeNet
from tests.conftest import randomise
from tests.parts.test_regions import Untraceable
from tests.planning.test_accounts import Residual

STEPS = 60


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)  # the steps are too small to share


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(10, 64), nn.ReLU(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 3)]
    return nn.Sequential(*layers)


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(256, 10, generator=generator)
    return x, (x[:, 0] * x[:, 1] > 0).long() + (x[:, 2] > 1).long()


class Run:
    """A training run that can be stopped and taken up again."""

    def __init__(self, make: Callable[..., Any] = torch.optim.SGD, **options: Any) -> None:
        self.gated = fxprune.instrument(network(), data()[0][:2])
        groups = fxprune.parameter_groups(self.gated, lr=0.05, gate_lr=0.1)
        extra = {"momentum": 0.9} if make is torch.optim.SGD else {}
        self.optimizer = make(groups, **extra)
        options = {"steps": STEPS, **(options or {"macs": 0.3})}
        self.budget = fxprune.Budget(self.gated, **options)
        self.losses: list[float] = []

    def train(self, steps: int) -> "Run":
        x, y = data()
        self.gated.train()
        for _ in range(steps):
            first = 32 * (self.budget.steps_done % 8)
            picked = slice(first, first + 32)
            loss = F.cross_entropy(self.gated(x[picked]), y[picked])
            self.optimizer.zero_grad()
            (loss + self.budget.penalty()).backward()
            self.optimizer.step()
            self.budget.step(loss)
            self.losses.append(float(loss.detach()))
        return self

    def save(self) -> io.BytesIO:
        file = io.BytesIO()
        parts = (self.gated, self.optimizer, self.budget)
        torch.save([part.state_dict() for part in parts], file)
        file.seek(0)
        return file

    def load(self, file: io.BytesIO) -> "Run":
        parts = (self.gated, self.optimizer, self.budget)
        for part, state in zip(parts, torch.load(file, weights_only=True), strict=True):
            part.load_state_dict(state)
        return self


def width_of(gated: nn.Module) -> Tensor:
    gates: Gates = gates_of(gated)
    assert gates.width is not None
    return gates.width.detach()


def is_binary(gated: nn.Module) -> bool:
    return bool(((width_of(gated) == 0) | (width_of(gated) == 1)).all())


@pytest.mark.parametrize(
    "options",
    [
        *({"macs": 0.3}, {"parameters": 0.1}, {"neurons": 0.5}, {"parameters": 900}, {"macs": 1.0}),
        *({"macs": 0.3, "estimator": "taylor"}, {"parameters": 900, "estimator": "taylor"}),
    ],
    ids=str,
)
def test_a_run_ends_with_binary_gates_and_the_budget_met(options: dict[str, Any]) -> None:
    run = Run(**options).train(STEPS)
    budget = run.budget
    assert is_binary(run.gated) and budget.frozen and budget.phase == "settle"
    assert 0.95 * budget.target <= budget.cost <= budget.target
    assert all(site["live"] >= 1 for site in fxprune.architecture(run.gated).values())
    if budget.kind != "neurons":
        assert getattr(fxprune.finalize(run.gated).report.after, budget.kind) == budget.cost
    assert run.losses[-1] < run.losses[0]


def test_the_controller_comes_near_before_the_gates_are_fixed() -> None:
    run = Run(macs=0.3, steps=400).train(round(0.7 * 400) - 1)
    assert not run.budget.frozen
    assert 0.8 < run.budget.cost / run.budget.target < 1.2


def test_no_layer_is_emptied_by_a_tight_budget() -> None:
    model = Residual()
    x = torch.randn(8, 3, 8, 8)
    gated = fxprune.instrument(model, x)
    budget = fxprune.Budget(gated, macs=0.1, steps=60, strength=1.0)
    optimizer = torch.optim.SGD(fxprune.parameter_groups(gated, lr=0.01, gate_lr=1.0))
    for _ in range(60):
        optimizer.zero_grad()
        (gated(x).square().mean() + budget.penalty()).backward()
        optimizer.step()
        budget.step()
        assert all(site["live"] >= 1 for site in fxprune.architecture(gated).values())
    assert budget.cost <= budget.target and is_binary(gated)
    assert fxprune.finalize(gated).report.verification


class Parallel(nn.Module):
    """Layers side by side, which only finalising makes one."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.last = nn.Linear(10, 300), nn.Linear(10, 300), nn.Linear(300, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.a(x) + self.b(x)))


def lenet() -> nn.Module:
    """LeNet of fewer channels: its last layers are merged where that is cheaper."""
    model = LeNet()
    model.conv1, model.conv2 = nn.Conv2d(1, 8, 5), nn.Conv2d(8, 16, 5)
    model.fc1, model.fc2 = nn.Linear(256, 100), nn.Linear(100, 10)
    return model


def wide() -> nn.Module:
    """Convolutions and their batch norms."""
    layers = [nn.Conv2d(3, 90, 1, bias=False), nn.BatchNorm2d(90), nn.ReLU(), nn.Conv2d(90, 70, 3)]
    return nn.Sequential(*layers, nn.BatchNorm2d(70), nn.ReLU(), nn.Conv2d(70, 5, 1))


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "lenet": (lenet, (2, 1, 28, 28)),
    "wide": (wide, (2, 3, 8, 8)),
    "parallel": (Parallel, (2, 10)),
}


class Parts(nn.Module):
    """Parts of a chunk, a convolution for each, and a shuffle of what they make."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 10, 1), nn.Conv2d(10, 3, 1)
        self.parts = nn.ModuleList([nn.Conv2d(5, 5, 3, padding=1), nn.Conv2d(5, 5, 1)])

    def forward(self, x: Tensor) -> Tensor:
        parts = F.relu(self.stem(x)).chunk(2, 1)
        both = [F.relu(conv(part)) for conv, part in zip(self.parts, parts, strict=True)]
        return self.head(F.channel_shuffle(torch.cat(both, 1), 2))


@pytest.mark.parametrize("part", [0.12, 0.2, 0.3])
def test_no_part_of_a_chunk_is_emptied(part: float) -> None:
    gated: Any = fxprune.instrument(Parts(), torch.randn(2, 3, 6, 6))
    budget = fxprune.Budget(gated, parameters=part, steps=STEPS)
    with torch.no_grad():  # the second part is the weaker
        gated.gates.width.copy_(torch.linspace(0.4, 0.1, len(gated.gates.width)))
    budget.finish()
    after = fxprune.finalize(gated, check=False).report.after
    assert after and after.parameters == budget.cost <= budget.target


@pytest.mark.parametrize("kind", ["parameters", "macs"])
@pytest.mark.parametrize("name", NETS)
def test_it_is_the_finalised_model_that_meets_the_budget(name: str, kind: str) -> None:
    make, shape = NETS[name]
    gated = fxprune.instrument(randomise(make()), torch.randn(shape))
    full = getattr(fxprune.finalize(gated, check=False).report.after, kind)
    for amount in (0.3, 0.5, 0.9):
        copied = copy.deepcopy(gated)
        gates = gates_of(copied)
        assert gates.width is not None
        gates.width.data.uniform_()
        if gates.linear is not None:
            gates.linear.data.fill_(0.9)
        target = amount * full
        budget = fxprune.Budget(copied, steps=10, **{kind: target})
        budget.finish()
        found = getattr(fxprune.finalize(copied, check=False).report.after, kind)
        assert is_binary(copied) and 0.98 * target <= found <= target


def test_of_a_model_in_regions_the_regions_meet_it() -> None:
    images = [torch.randn(3, 12, 12), torch.randn(3, 16, 16)]
    gated = fxprune.instrument(randomise(Untraceable()), (images,))
    for gates in gates_by_name(gated).values():
        if gates.width is not None:
            gates.width.data.uniform_()
    budget = fxprune.Budget(gated, parameters=0.6, steps=10)
    budget.finish()
    small = fxprune.finalize(gated)
    found = sum(
        sum(p.numel() for p in small.get_submodule(path).parameters())
        for path, gates in gates_by_name(gated).items()
        if gates.width is not None
    )
    assert 0.9 * budget.target <= found <= budget.target


@pytest.mark.parametrize("stop", [1, 20, 33, 42, 50])
@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW], ids=["sgd", "adamw"])
@pytest.mark.parametrize("estimator", ["gates", "taylor"])
def test_a_run_taken_up_again_ends_as_if_it_had_not_stopped(
    stop: int, make: Callable[..., Any], estimator: str
) -> None:
    options = {"macs": 0.3, "estimator": estimator}
    whole = Run(make, **options).train(STEPS)
    resumed = Run(make, **options).load(Run(make, **options).train(stop).save())
    resumed.train(STEPS - stop)
    assert torch.equal(width_of(resumed.gated), width_of(whole.gated))
    for left, right in zip(
        resumed.gated.state_dict().values(), whole.gated.state_dict().values(), strict=True
    ):
        assert torch.equal(left, right)
    assert resumed.budget.status == whole.budget.status


class Split(nn.Module):
    """Units of which half matter: the rest is multiplied by zeros behind a layer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(10, 32), nn.Linear(32, 3)
        self.scale = nn.Parameter(torch.where(torch.arange(32) % 2 == 0, 1.0, 1e-6), False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.first(x)) * self.scale)


def test_units_that_matter_are_kept() -> None:
    x, y = data()
    gated = fxprune.instrument(Split(), x[:2])
    optimizer = torch.optim.SGD(fxprune.parameter_groups(gated, lr=0.0, gate_lr=0.1))
    budget = fxprune.Budget(gated, neurons=16, steps=STEPS, estimator="taylor")
    for _ in range(STEPS):
        optimizer.zero_grad()
        (F.cross_entropy(gated(x), y) + budget.penalty()).backward()
        optimizer.step()
        budget.step()
    assert width_of(gated).tolist() == [1.0, 0.0] * 16


def test_a_ranked_run_goes_on_after_a_compaction() -> None:
    run = Run(macs=0.3, estimator="taylor").train(45)
    dead = int((width_of(run.gated) < 0.5).sum())
    before = run.gated(data()[0])
    run.gated = fxprune.compact(run.gated, run.optimizer)
    run.budget.follow(run.gated)
    assert dead > 20 and (width_of(run.gated) == 1).all()
    torch.testing.assert_close(run.gated(data()[0]), before)
    run.train(STEPS - 45)
    assert is_binary(run.gated) and 0.95 <= run.budget.cost / run.budget.target <= 1


@pytest.mark.parametrize("estimator", ["gates", "taylor"])
def test_depth_pulls_nonlinearities_while_it_shrinks(estimator: str) -> None:
    gated = fxprune.instrument(network(), data()[0][:2])
    linear, pulls = gates_of(gated).linear, []
    assert linear is not None
    for depth in (0.0, 0.5):
        budget = fxprune.Budget(gated, macs=0.3, steps=50, estimator=estimator, depth=depth)
        assert float(budget.penalty()) == 0  # it warms up
        budget.steps_done = 10
        pulls.append(torch.autograd.grad(budget.penalty(), linear)[0])
    assert torch.allclose(pulls[1] - pulls[0], torch.tensor([-0.5, -0.5]))


@pytest.mark.parametrize("maps, stays", [(5, True), (4, False)])
def test_what_whole_units_leave_brings_no_nonlinearity_back(maps: int, stays: bool) -> None:
    gated = fxprune.instrument(LeNet(), torch.randn(2, 1, 28, 28))
    gates = gates_of(gated)
    assert gates.width is not None and gates.linear is not None
    for part, live in zip(gates.width.data.split([20, 50, 500]), (7, maps, 18), strict=True):
        part[live:] = 0
    gates.linear.data.fill_(0.9)
    gated = fxprune.compact(gated)
    budget = fxprune.Budget(gated, parameters=2000, steps=10, estimator="taylor")
    budget.finish()
    assert bool(gates_of(gated).linearised().all()) == stays
    assert budget.cost <= 2000


def test_ranking_needs_gradients() -> None:
    run = Run(macs=0.3, estimator="taylor")
    with pytest.raises(BudgetError, match=r"before optimizer\.zero_grad"):
        run.budget.step()


def test_gates_the_user_freezes_stay_as_they_are() -> None:
    run = Run(macs=0.3).train(15)
    fxprune.freeze(run.gated)
    before = width_of(run.gated).clone()
    run.train(STEPS - 15)
    assert torch.equal(width_of(run.gated), before) and run.budget.phase == "settle"


def test_a_run_can_be_finished_early() -> None:
    run = Run(macs=0.3).train(10)
    run.budget.finish()
    assert is_binary(run.gated) and 0.95 <= run.budget.cost / run.budget.target <= 1


def test_its_status_is_one_line() -> None:
    run = Run(macs=0.3)
    assert run.budget.phase == "warm-up" and not run.budget.penalty().requires_grad
    phases = [run.train(1).budget.phase for _ in range(STEPS)]
    assert list(dict.fromkeys(phases)) == ["warm-up", "shrink", "hold", "settle"]
    assert run.budget.status.startswith("step 60/60 settle: macs ")
    assert "\n" not in run.budget.status


def test_nan_is_an_error_that_says_what_to_do() -> None:
    run = Run(macs=0.3).train(5)
    with pytest.raises(BudgetError, match=r"^the loss became NaN by step 6; take up the last"):
        run.budget.step(torch.tensor(torch.nan))
    (run.gated(data()[0]).sum() * torch.nan).backward()
    run.optimizer.step()
    with pytest.raises(BudgetError, match=r"^the gates became NaN by step 7"):
        run.budget.step()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give one of neurons, parameters, macs and latency, not 0"),
        ({"macs": 0.5, "parameters": 0.5}, "not 2"),
        ({"macs": 0.001}, "cannot be met: with a unit in every layer they are"),
        ({"parameters": 1e9}, "with all units"),
        ({"macs": 0.5, "strength": 0.0}, "must be positive, depth not negative"),
        ({"macs": 0.5, "depth": -1.0}, "must be positive, depth not negative"),
        ({"macs": 0.5, "estimator": "luck"}, "there is no estimator 'luck'; take one of gates, ta"),
    ],
)
def test_impossible_budgets_are_refused(options: dict[str, Any], message: str) -> None:
    gated = fxprune.instrument(network(), data()[0][:2])
    with pytest.raises(BudgetError, match=message):
        fxprune.Budget(gated, steps=10, **options)


@pytest.mark.parametrize("given", [{"warm_up": 0.5, "shrink": 0.4}, {"settle": None}], ids=str)
def test_the_phases_follow_each_other(given: dict[str, Any]) -> None:
    with pytest.raises(BudgetError, match="are no phases"):
        fxprune.Phases(**given)


def test_steps_that_numpy_counted_are_saved_as_others() -> None:
    run = Run(macs=0.3, steps=np.int64(STEPS)).train(2)
    assert type(run.budget.state_dict()["steps"]) is int
    assert Run(macs=0.3).load(run.save()).budget.steps_done == 2


def test_two_budgets_do_not_move_one_models_gates_in_turn() -> None:
    run = Run(macs=0.5)
    other = fxprune.Budget(run.gated, parameters=0.3, steps=STEPS)
    run.train(1)
    other.step()
    with pytest.raises(BudgetError, match="another budget moves these gates in turn"):
        run.budget.step()


def test_one_budget_may_follow_another_and_copies_go_on() -> None:
    run = Run(macs=0.5).train(3)
    gated, budget = copy.deepcopy((run.gated, run.budget))
    run.budget = fxprune.Budget(run.gated, parameters=0.3, steps=STEPS)
    run.train(STEPS)
    assert run.budget.cost <= run.budget.target
    budget.step()
    assert budget.gated is gated and budget.steps_done == 4


def test_an_optimizer_that_is_none_is_refused() -> None:
    optimizer: Any = 3
    with pytest.raises(GateError, match="int is no optimizer"):
        fxprune.Budget(Run().gated, macs=0.5, steps=9, optimizer=optimizer)


def test_a_state_of_another_budget_is_refused() -> None:
    state = Run(macs=0.3).budget.state_dict()
    with pytest.raises(BudgetError, match="make the budget as it was made then"):
        Run(macs=0.4).budget.load_state_dict(state)


@pytest.mark.parametrize("estimator", ["gates", "taylor"])
def test_a_run_that_goes_back_to_before_the_freezing_ends_as_it_did(estimator: str) -> None:
    run = Run(macs=0.3, estimator=estimator).train(30)
    state = run.save()
    run.train(STEPS - 30)
    width = width_of(run.gated).clone()
    assert run.budget.frozen
    run.load(state)
    assert not run.budget.frozen
    run.train(STEPS - 30)
    assert run.budget.frozen
    assert torch.equal(width_of(run.gated), width)


def test_gates_the_user_froze_are_not_trained_by_a_state() -> None:
    state = Run(macs=0.3).budget.state_dict()
    run = Run(macs=0.3)
    fxprune.freeze(run.gated)
    with pytest.raises(BudgetError, match="those of this model are frozen"):
        run.budget.load_state_dict(state)


def test_a_state_stays_as_it_was_when_another_is_loaded() -> None:
    run = Run(macs=0.3, estimator="taylor").train(22)
    early = copy.deepcopy(run.budget.state_dict())
    late = run.train(18).budget.state_dict()
    kept = copy.deepcopy(late["kept"])
    run.budget.load_state_dict(early)
    assert all(map(torch.equal, late["kept"], kept))


def test_a_linearity_gate_that_is_nan_is_an_error_too() -> None:
    run = Run(macs=0.3)
    linear = gates_of(run.gated).linear
    assert linear is not None
    with torch.no_grad():
        linear[0] = torch.nan
    with pytest.raises(BudgetError, match=r"^the gates became NaN by step 1"):
        run.budget.step()


def test_a_loss_may_be_a_number() -> None:
    budget = Run(macs=0.3).budget
    budget.step(0.5)
    with pytest.raises(BudgetError, match=r"^the loss became NaN"):
        budget.step(float("nan"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": "x"}, "no state of a budget: steps='x'"),
        ({"steps_done": -1}, "steps_done=-1"),
        ({"log_strength": None}, "the state has no log_strength that fits"),
        ({"log_strength": torch.tensor(torch.nan)}, "log_strength of the state is not finite"),
        ({"calls": None}, "the state has no calls"),
        ({"kept": [torch.ones(1)]}, "the state has no kept that fits; make the budget as it was"),
        ({"importance": None}, "the state has no importance that fits"),
    ],
    ids=str,
)
def test_a_damaged_state_is_refused_and_changes_nothing(
    change: dict[str, Any], message: str
) -> None:
    estimator = "gates" if "log_strength" in change else "taylor"
    run = Run(macs=0.3, estimator=estimator).train(3)
    before = run.budget.state_dict()
    with pytest.raises(BudgetError, match=message):
        run.budget.load_state_dict({**before, **change})
    assert repr(run.budget.state_dict()) == repr(before)


@pytest.mark.parametrize("state", [None, {}, [1]], ids=str)
def test_what_is_no_state_is_refused(state: Any) -> None:
    with pytest.raises(BudgetError, match="no state of a budget: it has no kind, target"):
        Run(macs=0.3).budget.load_state_dict(state)


def test_a_state_of_another_estimator_is_refused() -> None:
    pull, rank = Run(macs=0.3).budget, Run(macs=0.3, estimator="taylor").budget
    for one, other in ((pull, rank), (rank, pull)):
        with pytest.raises(BudgetError, match="make the budget as it was made then"):
            one.load_state_dict(other.state_dict())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"macs": "half"}, "macs='half' is no number"),
        ({"macs": float("nan")}, "macs=nan is not finite"),
        ({"macs": 0.5, "strength": float("inf")}, "strength=inf is not finite"),
        ({"macs": 0.5, "steps": 1.5}, r"steps=1\.5, .* a whole number"),
        ({"macs": 0.5, "steps": "3"}, "a whole number"),
        ({"macs": 0.5, "phases": (0, 0.1, 0.2)}, r"are no fxprune\.Phases"),
    ],
    ids=str,
)
def test_what_is_no_number_is_refused(options: dict[str, Any], message: str) -> None:
    gated = fxprune.instrument(network(), data()[0][:2])
    given: dict[str, Any] = {"steps": 10, **options}
    with pytest.raises(BudgetError, match=message):
        fxprune.Budget(gated, **given)
