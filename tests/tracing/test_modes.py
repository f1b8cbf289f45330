"""The two modes: who asks for one, and how many traces that takes."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxprune
from fxprune.testing import close_half
from fxprune.tracing.both_modes import trace
from fxprune.tracing.model_tracer import ModelTracer
from fxprune.tracing.modes import mode_questions
from fxprune.tracing.signatures import bound_arguments
from tests.conftest import randomise, reloaded


class Layer(nn.Module):
    """A layer, and dropout that may ask for a mode."""

    def __init__(self, *, asks: bool) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.asks = asks

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x)
        return F.dropout(x, 0.5, vars(self)["asks"] and self.training)


@pytest.mark.parametrize(("asks", "traces"), [(False, 1), (True, 3)])
def test_only_a_model_that_asks_for_its_mode_is_traced_in_both_and_again_in_training(
    asks: bool, traces: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[ModelTracer] = []
    plain = ModelTracer.trace

    def counted(self: ModelTracer, *args: object, **kwargs: object) -> torch.fx.Graph:
        found.append(self)
        return plain(self, *args, **kwargs)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(ModelTracer, "trace", counted)
    model = Layer(asks=asks)
    module = trace(model, bound_arguments(model, (torch.ones(2, 4),), {}))
    module.recompile()
    assert len(found) == traces
    torch.manual_seed(0)
    expected = model.train()(torch.ones(2, 4))
    torch.manual_seed(0)
    assert torch.equal(module.train()(torch.ones(2, 4)), expected)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
def test_flags_are_read_and_written_as_ever_while_questions_are_noted() -> None:
    model, other = Layer(asks=True), nn.Linear(2, 2)
    scripted = torch.jit.script(nn.Linear(2, 2))
    with mode_questions() as asked:
        model.eval()
        assert not asked
        assert (model.training, scripted.training) == (False, True)
        model.train()
        assert model.training is True
        with pytest.raises(AttributeError, match="training"):
            _ = nn.Module.__new__(nn.Module).training
    assert asked >= {model, scripted}
    assert other not in asked
    assert "training" not in vars(nn.Module)


class FrozenNorms(nn.Module):
    """A model whose norms stay in evaluation while it trains, and a part that stays as a whole."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)
        self.teacher = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.Dropout(0.5))
        self.second, self.other = nn.Conv2d(8, 6, 1), nn.BatchNorm2d(6)
        self.last = nn.Conv2d(6, 2, 1)

    def train(self, mode: bool = True) -> "FrozenNorms":
        super().train(mode)
        self.norm.eval()
        self.teacher.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.first(x)))
        x = F.relu(x + self.teacher(x))
        return self.last(F.relu(self.other(self.second(x))))


def _training(model: nn.Module) -> dict[str, bool]:
    names = ("norm", "teacher.1", "teacher.2", "other")
    return {name: model.get_submodule(name).training for name in names}


def test_norms_that_stay_in_evaluation_do_so_in_what_is_made_of_a_model() -> None:
    model: Any = randomise(FrozenNorms()).train()
    x = torch.randn(4, 3, 5, 5)
    expected = {"norm": False, "teacher.1": False, "teacher.2": False, "other": True}
    assert _training(model) == expected
    gated: Any = fxprune.instrument(model, x)
    assert "norm: stays in evaluation" in str(gated.report)
    for one in (gated, reloaded(gated), copy.deepcopy(gated)):
        assert _training(one) == expected
        one.eval()
        assert not any(_training(one).values())
        one.train()
        assert _training(one) == expected
        assert torch.equal(one(x), model.train()(x))
    assert torch.equal(gated.norm.running_mean, model.norm.running_mean)
    assert close_half(gated) > 0
    compacted: Any = fxprune.compact(gated, torch.optim.SGD(gated.parameters(), 0.1))
    compacted.eval().train()
    assert _training(compacted) == expected and compacted.norm.num_features < 8
    small: Any = fxprune.finalize(gated, fold=False)
    assert small.report.verification.verdict == "equal"
    assert not small.train().norm.training and small.other.training


def test_what_a_model_does_with_its_flag_follows_its_own_train() -> None:
    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 8)

        def train(self, mode: bool = True) -> "Inner":
            return super().train(False)

        def forward(self, x: Tensor) -> Tensor:
            return F.dropout(self.layer(x), 0.5, self.training)

    model = nn.Sequential(Inner(), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 2)).train()
    gated: Any = fxprune.instrument(model, torch.randn(3, 4))
    gated.train()
    x = torch.randn(3, 4)
    torch.manual_seed(0)
    expected = model(x)
    torch.manual_seed(0)
    assert torch.equal(gated(x), expected)
    assert gated.get_submodule("2").training
    alone = nn.Sequential(*model[0].children(), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 2))
    assert fxprune.instrument(alone, x).train().get_submodule("2").training


def test_a_model_that_stays_in_evaluation_does_so_gated() -> None:
    class Still(nn.Sequential):
        def train(self, mode: bool = True) -> "Still":
            return super().train(False)

    model = Still(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 2))
    x, model = torch.randn(3, 4), model.train()
    gated: Any = fxprune.instrument(model, x)
    for one in (gated, copy.deepcopy(gated)):
        assert torch.equal(one.train()(x), model(x))
        assert not one.get_submodule("1").training and one.gates.training


class Copying(nn.Module):
    """Copies in one mode only, as the residual blocks of diffusers do in training."""

    def __init__(self, mode: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1)
        self.last, self.mode = nn.Conv2d(8, 2, 1), mode

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        shortcut = x.contiguous() if self.training is self.mode else x
        x = F.relu(self.second(shortcut))
        return self.last(F.dropout(x, 0.5, self.training) + shortcut).contiguous()


@pytest.mark.parametrize("mode", [True, False])
def test_copies_in_one_mode_only_are_made_in_both(mode: bool) -> None:
    model, x = randomise(Copying(mode)).train(), torch.randn(2, 3, 4, 4)
    gated: Any = fxprune.instrument(model, x)
    assert not gated.report.refused
    for training in (True, False):
        outputs: list[Tensor] = []
        for one in (model.train(training), gated.train(training)):
            torch.manual_seed(0)
            outputs.append(one(x))
        assert torch.equal(*outputs)
    assert close_half(gated) == 4
    small: Any = fxprune.finalize(gated)
    assert small.report.verification.verdict == "equal"
