"""Compaction: the training goes on as it would have, with less."""

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import fxprune
from fxprune.errors import GateError, ModelError
from fxprune.gating.owners import gates_of
from tests.conftest import randomise
from tests.planning.test_accounts import NETS

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda groups: torch.optim.SGD(groups, momentum=0.9),
    "adamw": torch.optim.AdamW,
    "amsgrad": lambda groups: torch.optim.Adam(groups, amsgrad=True),
}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


class Training:
    """A training in float64 whose dead gates stay dead."""

    def __init__(self, name: str, optimizer: str = "sgd") -> None:
        make, shape = NETS[name]
        torch.manual_seed(0)
        model = randomise(make()).double()
        self.inputs = torch.randn(12, *shape[1:], dtype=torch.float64)
        self.gated: Any = fxprune.instrument(model, self.inputs[:2])
        groups = fxprune.parameter_groups(self.gated, lr=0.01, gate_lr=0.01, weight_decay=0.01)
        self.optimizer = OPTIMIZERS[optimizer](groups)

    def close(self) -> "Training":
        width = gates_of(self.gated).width
        assert width is not None
        with torch.no_grad():
            width.copy_(torch.where(torch.arange(len(width)) % 3 == 0, 0.2, 0.8))
        return self

    def steps(self, count: int) -> list[Tensor]:
        losses: list[Tensor] = []
        self.gated.train()
        for step in range(count):
            output = self.gated(self.inputs[4 * (step % 3) :][:4])
            loss = (output - 1).square().mean()
            self.optimizer.zero_grad()
            loss.backward()
            width = gates_of(self.gated).width
            assert width is not None and width.grad is not None
            width.grad[width.detach() < 0.5] = 0  # no unit comes back
            self.optimizer.step()
            losses.append(loss.detach())
        return losses

    def size(self) -> int:
        return sum(p.numel() for p in self.gated.parameters())


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", NETS)
def test_losses_go_on_unchanged(name: str, optimizer: str) -> None:
    whole, cut = Training(name, optimizer).close(), Training(name, optimizer).close()
    assert torch.equal(torch.stack(whole.steps(3)), torch.stack(cut.steps(3)))
    before, size = cut.gated, cut.size()
    cut.gated = fxprune.compact(cut.gated, cut.optimizer)
    assert cut.size() < size and cut.gated is not before and cut.gated.training
    torch.testing.assert_close(
        torch.stack(cut.steps(5)), torch.stack(whole.steps(5)), rtol=1e-9, atol=1e-12
    )
    left, right = (fxprune.finalize(run.gated.eval(), fold=False) for run in (whole, cut))
    x = cut.inputs
    torch.testing.assert_close(left(x), right(x), rtol=1e-8, atol=1e-10)
    assert fxprune.count_costs(left, ((x,), {})) == fxprune.count_costs(right, ((x,), {}))
    grouped = {p for group in cut.optimizer.param_groups for p in group["params"]}
    assert grouped == set(cut.gated.parameters()) and set(cut.optimizer.state) <= grouped
    for parameter, state in cut.optimizer.state.items():
        shapes = {v.shape for v in state.values() if isinstance(v, Tensor) and v.dim()}
        assert shapes <= {parameter.shape}


def test_gates_costs_gradients_and_reports_go_along() -> None:
    run = Training("residual").close()
    run.steps(1)
    before = gates_of(run.gated)
    small = fxprune.compact(run.gated, run.optimizer)
    after = gates_of(small)
    assert before.width is not None and after.width is not None and after.costs is not None
    assert torch.equal(after.width, before.width[before.live()])
    assert after.width.grad is not None and before.width.grad is not None
    assert torch.equal(after.width.grad, before.width.grad[before.live()])
    assert after.costs.full("macs") == fxprune.count_costs(small, ((run.inputs,), {})).macs
    assert fxprune.architecture(small).keys() == fxprune.architecture(run.gated).keys()
    assert all(s["live"] == s["total"] for s in fxprune.architecture(small).values())
    assert [site.name for site in after.width_sites] == [s.name for s in before.width_sites]
    assert small.report is not None and "layer" in str(fxprune.inspect(small))
    assert copy.deepcopy(small).gates.costs is not None


def test_a_model_can_be_compacted_again_and_again() -> None:
    run = Training("joined").close()
    sizes = [run.size()]
    for unit in (0, 1, 2):
        run.gated = fxprune.compact(run.gated, run.optimizer)
        sizes.append(run.size())
        width = gates_of(run.gated).width
        assert width is not None
        width.data[unit::4] = 0.1
        run.steps(1)
    assert sizes == sorted(set(sizes), reverse=True)


def test_nothing_dead_is_nothing_done() -> None:
    run = Training("grouped")
    assert fxprune.compact(run.gated, run.optimizer) is run.gated


def test_a_unit_goes_only_when_it_was_dead_often_enough() -> None:
    run = Training("flattened").close()
    assert fxprune.compact(run.gated, run.optimizer, patience=2) is run.gated
    width = gates_of(run.gated).width
    assert width is not None
    width.data[0] = 0.9  # came back in time
    assert fxprune.compact(run.gated, run.optimizer, patience=2) is run.gated
    width.data[0] = 0.1
    small = fxprune.compact(run.gated, run.optimizer, patience=2)
    assert len(gates_of(small).live()) - int(gates_of(small).live().sum()) == 1


def test_no_tensor_is_emptied() -> None:
    run = Training("residual")
    width = gates_of(run.gated).width
    assert width is not None
    width.data.fill_(0.1)
    small = fxprune.compact(run.gated, run.optimizer)
    assert all(s["total"] == 1 for s in fxprune.architecture(small).values())
    assert torch.isfinite(small(run.inputs)).all()


def test_zero_weights_are_not_dead_in_training() -> None:
    run = Training("residual").close()
    run.gated.bn2.weight.data.zero_()  # as a residual network may start
    small = fxprune.compact(run.gated, run.optimizer)
    assert len(gates_of(small).live()) == int(gates_of(run.gated).live().sum())
    assert torch.allclose(small(run.inputs), run.gated(run.inputs))


def test_constants_that_are_not_zero_are_not_folded_in_training() -> None:
    layers = [nn.Conv2d(3, 6, 1), nn.ReLU(), nn.Conv2d(6, 6, 1, groups=6), nn.Conv2d(6, 2, 1)]
    gated = fxprune.instrument(randomise(nn.Sequential(*layers)), torch.randn(2, 3, 4, 4))
    assert gated.gates.width is not None
    gated.gates.width.data[::2] = 0.1
    small, x = fxprune.compact(gated), torch.randn(2, 3, 4, 4)
    assert torch.allclose(small(x), gated(x), atol=1e-6)
    assert torch.equal(small.state_dict()["3.bias"], gated.state_dict()["3.bias"])


def test_states_that_cannot_be_cut_are_refused() -> None:
    run = Training("flattened").close()
    optimizer = torch.optim.Adafactor(run.gated.parameters(), lr=0.01)
    run.optimizer = optimizer
    run.steps(1)
    before = [p for group in optimizer.param_groups for p in group["params"]]
    with pytest.raises(GateError, match="Adafactor keeps row_var"):
        fxprune.compact(run.gated, optimizer)
    assert [p for group in optimizer.param_groups for p in group["params"]] == before


def test_units_that_something_keeps_are_refused_by_name() -> None:
    run = Training(next(iter(NETS))).close()
    layer = next(m for m in run.gated.modules() if isinstance(m, nn.Conv2d))
    layer.register_forward_hook(lambda *given: None)
    before = [id(p) for group in run.optimizer.param_groups for p in group["params"]]
    with pytest.raises(GateError, match=r"dead units cannot be removed .* has forward hooks"):
        fxprune.compact(run.gated, run.optimizer)
    assert before == [id(p) for group in run.optimizer.param_groups for p in group["params"]]


def test_a_budget_goes_on_with_the_compacted_model() -> None:
    run = Training("residual").close()
    budget = fxprune.Budget(run.gated, parameters=0.5, steps=10)
    cost = budget.cost
    run.gated = fxprune.compact(run.gated, run.optimizer)
    budget.follow(run.gated)
    assert budget.cost == cost
    budget.finish()
    assert budget.cost <= budget.target


def groups_of(optimizer: torch.optim.Optimizer) -> list[int]:
    return [id(p) for group in optimizer.param_groups for p in group["params"]]


def test_an_optimizer_that_keeps_a_list_of_its_own_is_refused() -> None:
    run = Training("flattened").close()
    optimizer = torch.optim.LBFGS(run.gated.parameters(), max_iter=2)
    before = groups_of(optimizer)
    with pytest.raises(GateError, match=r"LBFGS keeps parameters in _params, .* make a new one"):
        fxprune.compact(run.gated, optimizer)
    assert groups_of(optimizer) == before


class Listing(torch.optim.SGD):
    """An optimizer with a history in its state."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["history"] = [p.detach().clone(), torch.ones(())]


def test_lists_in_a_state_are_cut_too() -> None:
    run = Training("flattened").close()
    optimizer = Listing(run.gated.parameters(), lr=0.1)
    optimizer.step()
    run.gated = fxprune.compact(run.gated, optimizer)
    for parameter in run.gated.parameters():
        assert torch.equal(optimizer.state[parameter]["history"][0], parameter)


def test_each_of_several_optimizers_goes_on() -> None:
    run = Training("flattened").close()
    weights, gates = run.optimizer.param_groups
    pair = [torch.optim.Adam(weights["params"]), torch.optim.SGD(gates["params"], momentum=0.9)]
    run.gated = fxprune.compact(run.gated, pair)
    trained = {one for optimizer in pair for one in groups_of(optimizer)}
    assert trained == {id(p) for p in run.gated.parameters()}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda run: torch.optim.SGD(nn.Linear(2, 2).parameters()), "SGD holds no parameter of"),
        (lambda run: "adam", "str is no optimizer"),
        (lambda run: torch.optim.lr_scheduler.StepLR(run.optimizer, 1), "StepLR is no optimizer"),
    ],
    ids=["another", "name", "schedule"],
)
def test_what_does_not_train_the_model_is_refused(make: Callable[[Any], Any], message: str) -> None:
    run = Training("flattened").close()
    with pytest.raises(GateError, match=message):
        fxprune.compact(run.gated, make(run))


@pytest.mark.parametrize("when", ["register_hook", "register_post_accumulate_grad_hook"])
def test_gradient_hooks_are_not_lost(when: str) -> None:
    run = Training("flattened").close()
    name, parameter = next(iter(run.gated.named_parameters()))
    getattr(parameter, when)(lambda given: None)
    with pytest.raises(ModelError, match=f"{name} has gradient hooks, .* on what compact returns"):
        fxprune.compact(run.gated, run.optimizer)


def test_gates_without_numbers_are_not_dead() -> None:
    run = Training("flattened").close()
    with torch.no_grad():
        next(iter(gates_of(run.gated).parameters()))[1] = torch.nan
    with pytest.raises(GateError, match="gates are NaN"):
        fxprune.compact(run.gated)
    with pytest.raises(GateError, match="gates are NaN"):
        fxprune.freeze(run.gated)


def test_who_trains_on_with_the_old_model_is_told() -> None:
    run = Training("flattened").close()
    budget = fxprune.Budget(run.gated, parameters=0.5, steps=10)
    small = fxprune.compact(run.gated, run.optimizer)
    with pytest.raises(GateError, match=r"trains what fxprune\.compact returned; take that model"):
        fxprune.penalty(run.gated)
    for act in (budget.penalty, budget.step):
        with pytest.raises(GateError, match=r"call budget\.follow"):
            act()
    fxprune.penalty(copy.deepcopy(run.gated))  # somebody else's
    budget.follow(small)
    budget.penalty()
    budget.step()
    fxprune.penalty(small)


def test_without_an_optimizer_both_models_can_be_trained() -> None:
    run = Training("flattened").close()
    small = fxprune.compact(run.gated)
    fxprune.penalty(small)
    fxprune.penalty(run.gated)


class Averaging(Training):
    """A training that averages its weights."""

    def __init__(self, name: str, **options: Any) -> None:
        super().__init__(name)
        self.close()
        self.averaged = AveragedModel(self.gated, **options)

    def go(self, count: int) -> None:
        for _ in range(count):
            self.steps(1)
            self.averaged.update_parameters(self.gated)


@pytest.mark.parametrize("use_buffers", [True, False])
@pytest.mark.parametrize("name", ["residual", "joined", "grouped", "flattened"])
def test_averages_go_on_unchanged(name: str, use_buffers: bool) -> None:
    options: Any = {"multi_avg_fn": get_ema_multi_avg_fn(0.6), "use_buffers": use_buffers}
    whole, cut = (Averaging(name, **options) for _ in range(2))
    whole.averaged.eval()
    cut.averaged.eval()
    whole.go(3)
    cut.go(3)
    cut.gated = fxprune.compact(cut.gated, cut.optimizer, averaged=cut.averaged)
    assert not cut.averaged.module.training and cut.gated.training
    whole.go(4)
    cut.go(4)
    assert int(cut.averaged.n_averaged) == 7
    torch.testing.assert_close(cut.averaged(cut.inputs), whole.averaged(whole.inputs))
    small, large = fxprune.finalize(cut.averaged), fxprune.finalize(whole.averaged)
    torch.testing.assert_close(small(cut.inputs), large(cut.inputs))
    assert small.report.after == large.report.after


def test_several_averages_are_cut_and_load_again() -> None:
    run = Averaging("residual")
    slow = AveragedModel(run.gated)
    run.gated = fxprune.compact(run.gated, run.optimizer, averaged=[run.averaged, slow])
    for averaged in (run.averaged, slow):
        for (name, own), other in zip(
            averaged.module.state_dict().items(), run.gated.state_dict().values(), strict=True
        ):
            assert torch.equal(own, other) and own.data_ptr() != other.data_ptr(), name
    AveragedModel(run.gated).load_state_dict(slow.state_dict())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda run: run.gated, "holds no copy of the model"),
        (lambda run: AveragedModel(nn.Linear(2, 2)), "holds no copy of the model"),
        (lambda run: AveragedModel(fxprune.compact(run.gated)), "holds a copy of another model"),
        (lambda run: {"decay": 0.9}, "dict averages no model"),
    ],
    ids=["itself", "another", "compacted", "options"],
)
def test_what_averages_another_model_is_refused(make: Callable[[Any], Any], message: str) -> None:
    run = Training("flattened").close()
    before = groups_of(run.optimizer)
    with pytest.raises(GateError, match=message):
        fxprune.compact(run.gated, run.optimizer, averaged=make(run))
    assert groups_of(run.optimizer) == before


@pytest.mark.parametrize("patience", ["a", -1, 1.5, None])
def test_what_is_no_patience_is_refused(patience: Any) -> None:
    run = Training("flattened").close()
    with pytest.raises(GateError, match=r"patience=.* is no whole number"):
        fxprune.compact(run.gated, run.optimizer, patience=patience)


def test_a_state_of_another_size_says_what_it_is_of() -> None:
    run = Training("flattened").close()
    small = fxprune.compact(run.gated)
    with pytest.raises(RuntimeError, match=r"fewer units .* by fxprune\.compact; .*torch\.save"):
        run.gated.load_state_dict(small.state_dict())
    with pytest.raises(RuntimeError, match=r"more units .* before fxprune\.compact"):
        small.load_state_dict(run.gated.state_dict())
    with pytest.raises(RuntimeError, match="fewer units"):
        AveragedModel(run.gated).load_state_dict(AveragedModel(small).state_dict())
    small.load_state_dict(small.state_dict())


def test_a_compacted_model_is_saved_whole() -> None:
    run = Training("flattened").close()
    small, file = fxprune.compact(run.gated), io.BytesIO()
    torch.save(small, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert torch.equal(loaded(run.inputs), small(run.inputs))
    loaded.load_state_dict(small.state_dict())
    fxprune.penalty(loaded).backward()


class Partly(nn.Module):
    """A gate over channels that others read ungated, so that no tensor could be left empty."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.second(torch.relu(x)) + self.third(x[:, :2])


def test_where_no_tensor_could_be_left_empty_all_that_is_dead_goes() -> None:
    gated: Any = fxprune.instrument(randomise(Partly()), torch.randn(5, 3))
    with torch.no_grad():
        gated.gates.width.zero_()
    small: Any = fxprune.compact(gated)
    assert small.first.out_features == 2 and not len(small.gates.width)
    x = torch.randn(5, 3)
    assert torch.allclose(small(x), gated(x), atol=1e-6)
