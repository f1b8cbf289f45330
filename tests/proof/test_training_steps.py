"""A step of training is compared where evaluation sees no difference, and left where it is chance.

What was cut left buffers that are cut, too.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from fxprune.programs.program import narrowed
from fxprune.proof.training_steps import verify_step
from fxprune.proof.verdicts import Check
from tests.conftest import randomise


class Net(nn.Module):
    """Has what evaluation mode does not see: statistics of a batch, dropout, gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 6)
        self.norm: Any = randomise(nn.BatchNorm1d(6))
        self.drop, self.last = nn.Dropout(0.5), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.drop(self.norm(self.first(x)).relu()))


class Detaching(Net):
    """Does not train its first layers."""

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.drop(self.norm(self.first(x)).relu().detach()))


class Noisy(Net):
    """Draws more than dropout does."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + torch.randn_like(x))


def step(reference: nn.Module, candidate: nn.Module) -> Check | None:
    inputs = (torch.randn(4, 5),), {}
    return verify_step(reference, copy.deepcopy(candidate).double(), inputs, {}, 1e-9)


def like(model: nn.Module, kind: type[Net]) -> Net:
    other = kind()
    other.load_state_dict(model.state_dict())
    return other.eval()


def test_a_copy_takes_the_same_step_and_both_stay_as_they_are() -> None:
    model = Net().eval()
    before = copy.deepcopy(model.state_dict())
    check = step(model, model)
    assert check is not None and (check.verdict, check.error) == ("equal", 0.0)
    assert not model.training
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_gradients_are_compared() -> None:
    model = Net().eval()
    check = step(model, like(model, Detaching))
    assert check is not None and check.verdict == "different"
    assert "gradients" in check.reason


def test_statistics_are_compared() -> None:
    model = Net().eval()
    other = like(model, Net)
    other.norm.momentum = 0.2
    check = step(model, other)
    assert check is not None and check.verdict == "different"
    assert "norm.running" in check.reason


def test_where_more_is_drawn_than_dropout_nothing_is_compared() -> None:
    assert step(Noisy(), Noisy()) is None


def test_what_was_cut_leaves_buffers_that_are_cut() -> None:
    kept = torch.tensor([0, 2, 3, 5])
    model, small = Net().double(), Net().double()
    with torch.no_grad():
        model.last.weight[:, [1, 4]] = 0.0
    cuts = {name: [(0, kept)] for name in model.state_dict() if "first" in name or "norm" in name}
    del cuts["norm.num_batches_tracked"]
    cuts["last.weight"] = [(1, kept)]
    small.first, small.norm, small.last = nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)
    state = {name: narrowed(t, cuts.get(name, [])) for name, t in model.state_dict().items()}
    small.load_state_dict(state)
    inputs = (torch.randn(4, 5),), {}
    check = verify_step(model, small.double(), inputs, cuts, 1e-9)
    assert check is not None and check.verdict == "equal"
    small.norm.momentum = 0.2
    check = verify_step(model, small, inputs, cuts, 1e-9)
    assert check is not None and check.verdict == "different"
