"""The proof of a result is of the result, not of a model that the passes have already been over."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune import compiler
from fxprune.errors import VerificationError
from fxprune.programs.pipeline import Change
from fxprune.programs.program import Program


class ConstantBranch(nn.Module):
    """Adds what a branch without weights computes: a constant, which a pass writes down."""

    def __init__(self) -> None:
        super().__init__()
        self.branch, self.head = nn.Linear(4, 4), nn.Linear(4, 3)
        nn.init.zeros_(self.branch.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.tanh() + self.branch(x).relu())


def spoil(program: Program) -> list[Change]:
    """Change the weights by what float32 could not tell from rounding."""
    program.module.get_parameter("head.weight").data.mul_(1 + 1e-6)
    return [Change("head", "spoilt")]


def test_constants_that_passes_write_leave_the_proof_its_reference(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, x = ConstantBranch(), torch.randn(2, 4)
    small = fxprune.finalize(model, x, fold=False)
    assert any("is constant" in str(one) for one in small.report.passes["remove_dead_units"])
    monkeypatch.setattr(compiler, "CUT_TO_BE_TRAINED", (*compiler.CUT_TO_BE_TRAINED, spoil))
    with pytest.raises(VerificationError, match="float64"):
        fxprune.finalize(model, x, fold=False)


def negate_in_place(program: Program) -> list[Change]:
    """Write into a weight that a program may have borrowed from the model it was made from."""
    program.module.get_parameter("2.weight").data.neg_()
    return [Change("2", "negated")]


def test_who_writes_into_borrowed_weights_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    gated = fxprune.instrument(model, torch.randn(2, 4))
    monkeypatch.setattr(compiler, "CUT", (*compiler.CUT, negate_in_place))
    with pytest.raises(VerificationError, match=r"2\.weight .* overwritten"):
        fxprune.finalize(gated)
    assert torch.equal(gated.get_parameter("2.weight"), model.get_parameter("2.weight"))


class Trained(nn.Module):
    """Has a batch norm, which does something else in training."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.first(x)).relu())


def count_slower(program: Program) -> list[Change]:
    """Change what training does, and leave evaluation as it is."""
    norm: Any = program.module.norm
    norm.momentum = 0.01
    return [Change("norm", "counts slower")]


def leave_in_training(program: Program) -> list[Change]:
    """Make a layer anew, as a pass may: layers are made in training mode."""
    norm: Any = program.module.norm
    norm.train()
    return [Change("norm", "made anew")]


def test_who_trains_otherwise_is_caught_where_that_matters(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, x = Trained(), torch.randn(5, 4)
    proof = fxprune.finalize(model, x, fold=False).report.verification
    assert proof is not None
    assert proof.checks[-1].name == "a step of training"
    monkeypatch.setattr(compiler, "CUT", (*compiler.CUT, count_slower))
    fxprune.finalize(model, x)
    cut = (*compiler.CUT_TO_BE_TRAINED, count_slower)
    monkeypatch.setattr(compiler, "CUT_TO_BE_TRAINED", cut)
    with pytest.raises(VerificationError, match="a step of training"):
        fxprune.finalize(model, x, fold=False)


def test_no_pass_leaves_a_layer_in_training_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    cut = (*compiler.CUT_TO_BE_TRAINED, leave_in_training)
    monkeypatch.setattr(compiler, "CUT_TO_BE_TRAINED", cut)
    small = fxprune.finalize(Trained(), torch.randn(5, 4), fold=False)
    assert not any(part.training for part in small.modules())
