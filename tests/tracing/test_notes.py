"""Attributes that a forward sets, for others to read after a call."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import fxprune
from fxprune.gating.penalties import cost_of
from fxprune.testing import close_half
from tests.conftest import randomise, reloaded

X = torch.randn(6, 8, dtype=torch.float64)


class Scores(nn.Module):
    """A part without weights that shows what it last made."""

    def forward(self, x: Tensor) -> Tensor:
        self.last = x.softmax(-1)
        return self.last


class Experts(nn.Module):
    """Experts, and what they would have their loads cost."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.scores = nn.Linear(8, 3), Scores()
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)) for _ in range(3)
        )
        self.balance = torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        loads = self.scores(self.router(x))
        self.balance = loads.mean(0).square().sum()
        outputs = [expert(x) for expert in self.experts]
        return torch.stack([loads[:, i, None] * y for i, y in enumerate(outputs)]).sum(0)


class Mixture(nn.Module):
    """Everything is set in every call: a loss, a map of features, a list and a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.experts, self.last = nn.Linear(8, 8), Experts(), nn.Linear(8, 4)
        self.losses: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.losses = []
        x = F.relu(self.first(x))
        self.features = x
        x = x + self.experts(x)
        self.losses.append(self.experts.balance)
        self.losses.append(x.abs().mean())
        self.shown = {"sum": x.sum(-1), "experts": (self.experts.scores.last,)}
        return self.last(x)


class InTraining(nn.Module):
    """A part with a random code, of which training wants the divergence."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.mean, self.spread = nn.Linear(8, 16), nn.Linear(16, 4), nn.Linear(16, 4)
        self.decoder = nn.Sequential(nn.Linear(4, 12), nn.ReLU(), nn.Linear(12, 8))
        self.divergence: Any = 0.0

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.encoder(x))
        code = self.mean(x)
        if self.training:
            spread = self.spread(x)
            self.divergence = (code.square() + spread.exp() - spread).mean()
            code = code + spread.mul(0.5).exp() * torch.randn_like(code)
        return self.decoder(code)


class Twice(nn.Module):
    """A part that is called twice, and shows the second."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.experts, self.last = nn.Linear(8, 8), Experts(), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.experts(F.relu(self.layer(self.experts(x)))))


LOSSES: dict[str, tuple[Callable[[], nn.Module], Callable[[Any], Any]]] = {
    "experts": (Mixture, lambda m: [*m.losses, m.features, *m.shown.values(), m.experts.balance]),
    "in training": (InTraining, lambda m: [m.divergence]),
    "called twice": (Twice, lambda m: [m.experts.balance, m.experts.scores.last]),
}


def built(name: str) -> tuple[Any, Callable[[Any], Any]]:
    kind, notes = LOSSES[name]
    return randomise(kind()).double().train(), notes


def run(model: nn.Module, notes: Callable[[Any], Any]) -> list[Tensor]:
    """Return outputs, notes, and the gradients of all of them."""
    torch.manual_seed(1)
    outputs = [model(X), *tree_leaves(notes(model))]
    model.zero_grad()
    torch.stack([one.square().mean() for one in outputs]).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if "gates" not in name}
    return [*outputs, *(one for _, one in sorted(gradients.items()) if one is not None)]


@pytest.mark.parametrize("ran", [False, True])
@pytest.mark.parametrize("instrumented_in", [True, False])
@pytest.mark.parametrize("name", LOSSES)
def test_a_gated_model_sets_what_the_model_sets(
    name: str, instrumented_in: bool, ran: bool
) -> None:
    model, notes = built(name)
    if ran:
        model(X * 2)
    gated: Any = fxprune.instrument(model.train(instrumented_in), X)
    if name == "in training" and not ran:
        assert gated.divergence == 0.0
    with pytest.raises(AttributeError):  # nothing is left of the run on the example inputs
        assert [one.shape for one in tree_leaves(notes(gated))]
    for one in (model, gated):
        one.train()
    expected, found = run(model, notes), run(gated, notes)
    assert len(found) == len(expected) and all(map(torch.equal, found, expected))
    assert min(one.abs().max() for one in found[:2]) > 1e-3
    if name != "in training":
        for one in (model, gated):
            one.eval()(X)
        assert all(map(torch.equal, tree_leaves(notes(gated)), tree_leaves(notes(model))))


def test_the_report_says_what_is_set() -> None:
    gated: Any = fxprune.instrument(built("experts")[0], X)
    told = [change.where for change in gated.report.passes["notes"]]
    assert told == ["experts.balance", "experts.scores.last", "features", "losses", "shown"]
    assert not gated.report.refused


@pytest.mark.parametrize("name", LOSSES)
def test_what_is_set_plans_nothing(name: str) -> None:
    """A model without notes is gated, and counted, alike."""
    model, _ = built(name)
    plain: Any = fxprune.finalize(model, X, fold=False)
    for one in (plain, plain.train()):
        assert not hasattr(one, "features")
    close_half(gated := fxprune.instrument(model, X))
    small: Any = fxprune.finalize(gated)
    told = [change.where for change in small.report.passes["drop_notes"]]
    assert told or name == "in training"
    found = float(cost_of(gated.gates, "parameters").detach())
    assert found == small.report.after.parameters < small.report.before.parameters


def test_a_finalised_model_sets_nothing(without_fxprune: Callable[[nn.Module, str], str]) -> None:
    model, notes = built("experts")
    gated: Any = fxprune.instrument(model, X)
    gated(X)
    close_half(gated)
    small: Any = fxprune.finalize(gated)
    small(X)
    with pytest.raises(AttributeError):
        notes(small)
    assert not any(hasattr(part, "balance") for part in small.modules())
    assert "Linear" in without_fxprune(small, "m")


@pytest.mark.parametrize("name", LOSSES)
def test_a_compacted_model_sets_what_the_gated_one_does(name: str) -> None:
    model, notes = built(name)
    gated: Any = fxprune.instrument(model, X)
    gated(X)
    close_half(gated)
    small: Any = fxprune.compact(gated)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in gated.parameters())
    with pytest.raises(AttributeError):
        assert [one.shape for one in tree_leaves(notes(small))]
    one, other = ([found.train()(X), *tree_leaves(notes(found))] for found in (gated, small))
    if name != "in training":
        torch.testing.assert_close(other, one, rtol=1e-10, atol=1e-12)
    assert [part.shape for part in one] == [part.shape for part in other]


@pytest.mark.parametrize("name", LOSSES)
def test_a_saved_model_sets_it_still(name: str) -> None:
    model, notes = built(name)
    gated: Any = fxprune.instrument(model, X)
    expected = run(gated, notes)
    for one in (reloaded(gated), copy.deepcopy(reloaded(gated))):
        assert all(map(torch.equal, run(one, notes), expected))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", LOSSES)
def test_a_compiled_model_sets_it_too(name: str) -> None:
    model, notes = built(name)
    gated: Any = fxprune.instrument(model, X)
    expected = [gated.train()(X), *tree_leaves(notes(gated))]
    if name == "in training":
        expected = expected[1:]
    torch.compiler.reset()
    compiled = torch.compile(gated, backend="aot_eager", fullgraph=True)
    found = [compiled(X), *tree_leaves(notes(gated))][-len(expected) :]
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_onnx_files_are_of_the_outputs(name: str, tmp_path: Any) -> None:
    model, _ = built(name)
    gated: Any = fxprune.instrument(model.float(), X.float())
    gated.eval()(X.float())
    close_half(gated)
    small: Any = fxprune.finalize(gated)
    for place, one in enumerate((gated, small)):
        assert fxprune.export_onnx(one, tmp_path / f"{place}.onnx").outputs


class Forgetful(nn.Module):
    """What is set is no value: a count, a list that goes on, an object."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 2)
        self.calls, self.seen = 0, list[Tensor]()

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        x = F.relu(self.first(x))
        self.seen.append(x)
        return self.last(x)


class Beside(nn.Module):
    """What is left has a layer of its own, sums over channels, and reads what is overwritten."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 4)
        self.beside = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        self.sparsity, self.auxiliary = x.abs().sum(1).mean(), self.beside(x)
        x = self.second(x)
        self.before = x.mean(0)
        x.relu_()
        self.after = x
        return self.last(x)


def test_what_is_computed_for_notes_alone_plans_nothing() -> None:
    model = randomise(Beside()).double()
    gated: Any = fxprune.instrument(model, X)
    assert [len(site.units) for site in gated.gates.width_sites] == [16, 16]
    for one in (model, gated):
        torch.manual_seed(0)
        one(X)
    for name in ("sparsity", "auxiliary", "before", "after"):
        assert torch.equal(getattr(gated, name), getattr(model, name))
    close_half(gated)
    gated(X)
    assert gated.after.eq(0).all(0).sum() >= 8
    found = float(cost_of(gated.gates, "parameters").detach())
    small: Any = fxprune.finalize(gated)
    assert found == small.report.after.parameters == 8 * 8 + 8 + 8 * 8 + 8 + 8 * 4 + 4


class Overwritten(nn.Module):
    """What an attribute holds is overwritten before the call ends."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.last = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        self.seen, self.sum = x, x.sum()
        x += F.relu(self.second(x))
        return self.last(x)


def test_what_is_overwritten_is_not_set_to_what_it_was() -> None:
    model: Any = randomise(Overwritten()).double()
    gated: Any = fxprune.instrument(model, X)
    told = [change.where for change in gated.report.refused if "forward" in change.what]
    for one in (model, gated):
        one(X)
    assert torch.equal(gated.sum, model.sum)
    assert torch.equal(gated.seen, model.seen) if hasattr(gated, "seen") else told == ["seen"]


def test_what_cannot_be_set_is_said() -> None:
    gated: Any = fxprune.instrument(randomise(Forgetful()).double().eval(), X)
    told = {change.where for change in gated.report.refused if "forward" in change.what}
    assert told >= {"calls", "seen"}


class SetBack(nn.Module):
    """What training sets, evaluation sets back; what a part sets, the model around it holds."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 16), nn.Linear(16, 4)
        self.auxiliary: Any = None
        self.losses: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        self.losses = []
        self.auxiliary = None
        if self.training:
            self.auxiliary = x.mean()
            self.losses = [x.square().mean()]
        return self.last(x)


@pytest.mark.parametrize("instrumented_in", [True, False])
@pytest.mark.parametrize("ran", [True, False])
def test_what_one_mode_sets_the_other_sets_back(instrumented_in: bool, ran: bool) -> None:
    model: Any = randomise(SetBack()).double().train(instrumented_in)
    if ran:
        model(X)
    gated: Any = fxprune.instrument(model, X)
    for mode in (True, False, True, False):
        for one in (model, gated):
            one.train(mode)(X)
        assert gated.losses == model.losses
        assert gated.auxiliary == model.auxiliary
        assert (gated.auxiliary is None) != mode
    for one in (reloaded(gated), copy.deepcopy(gated)):
        one.train()(X)
        assert one.eval()(X) is not None and one.auxiliary is None and one.losses == []


class Child(nn.Module):
    """A part that tells the model around it what it made."""

    def __init__(self, parent: nn.Module) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        vars(self)["parent"] = parent

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.layer(x))
        vars(self)["parent"].told = x.mean(0)
        return x


class Parent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.child, self.last = Child(self), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.child(x))


def test_a_part_may_set_what_the_model_around_it_holds() -> None:
    model: Any = randomise(Parent()).double()
    gated: Any = fxprune.instrument(model, X)
    for one in (model, gated):
        one(X)
    assert torch.equal(gated.told, model.told)


class Remembering(nn.Module):
    """What is left comes from earlier calls, too."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 4)
        self.history: list[Tensor] = []
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        self.history = [*self.history, x.mean()][-5:]
        self.average = 0.5 * getattr(self, "average", 0.0) + x.mean().detach()
        self.calls += 1
        self.shown = {"call": self.calls, "mean": x.mean()}
        self.features = x
        return self.last(F.relu(self.second(x)))


@pytest.mark.parametrize("ran", [True, False])
def test_what_earlier_calls_have_a_part_in_is_not_set(ran: bool) -> None:
    """And gates go where they would without it."""
    model: Any = randomise(Remembering()).double()
    if ran:
        with torch.no_grad():
            model(X)
    gated: Any = fxprune.instrument(model, X)
    told = {change.where for change in gated.report.refused if "forward" in change.what}
    assert told == {"average", "calls", "history", "shown"}
    assert [change.where for change in gated.report.passes["notes"]] == ["features"]
    assert [len(site.units) for site in gated.gates.width_sites] == [16, 16]


class Viewed(nn.Module):
    """What is left is overwritten under another name by an operator that gets a gate."""

    def __init__(self, in_training: bool = False) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 16), nn.Linear(16, 4)
        self.in_training = in_training

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if self.training or not self.in_training:
            part = x[:, :2]
            self.view, self.early = part, part.sum()
            x = F.relu(x, inplace=True)
            self.late = part.mean()
        else:
            x = F.relu(x, inplace=True)
        return self.last(x)


@pytest.mark.parametrize("in_training", [True, False])
@pytest.mark.parametrize("check", [True, False])
def test_views_of_what_a_gate_stands_behind_are_not_set(in_training: bool, check: bool) -> None:
    model: Any = randomise(Viewed(in_training)).double().train()
    gated: Any = fxprune.instrument(model, X, check=check)
    told = {change.where for change in gated.report.refused if "overwritten" in change.what}
    assert told == {"late", "view"}
    for one in (model, gated):
        one.train()(X)
    assert torch.equal(gated.early, model.early)
    assert not hasattr(gated, "view") and not hasattr(gated, "late")


class OddNames(nn.Module):
    """Attributes of names that are taken, or no path can say."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 16), nn.Linear(16, 4)
        self.rate = 0

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        for name in NAMES:
            setattr(self, name, x.std())
        self.mode = "train" if self.training else "eval"
        return self.last(F.dropout(x, 0.1, self.training))


NAMES = ("a.b", "gates", "report", "_fxprune", "graph", "meta", "_tensor_constant0")


def test_names_that_cannot_be_set_are_said() -> None:
    model: Any = randomise(OddNames()).double().eval()
    with torch.no_grad():
        model(X)
    gated: Any = fxprune.instrument(model, X)
    told = {change.where for change in gated.report.refused if "forward" in change.what}
    assert told == {*NAMES, "mode"}
    assert [len(site.units) for site in gated.gates.width_sites] == [16]
    gated(X)
    assert torch.equal(reloaded(gated).eval()(X), model(X))
