"""What a forward writes into its own module is not lost without a word."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxprune
from fxprune.errors import TraceError
from fxprune.testing import close_half, error
from tests.conftest import randomise

X = torch.randn(3, 3, 8, 8)


class Net(nn.Module):
    """Three layers; features are looked at behind the first."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 1)
        self.third = nn.Conv2d(6, 2, 1)
        self.seen: Any = None
        self.calls = 0

    def look(self, x: Tensor) -> Tensor:
        return x

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.look(F.relu(self.first(x))))
        return self.third(F.relu(x)).mean((2, 3))


class Noting(Net):
    def look(self, x: Tensor) -> Tensor:
        self.seen, self.calls = [x, x], self.calls + 1
        return x


class LazilyMade(Net):
    def look(self, x: Tensor) -> Tensor:
        if self.seen is None:
            self.seen = torch.linspace(0.5, 1, 6)
        return x * self.seen


class NotingInAList(Net):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def look(self, x: Tensor) -> Tensor:
        self.seen.append(x)
        return x


class CachedInEvaluation(Net):
    """Keeps what depends on weights alone while these stay, as LeViT does with attention biases."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.place = nn.Parameter(torch.rand(8) + 0.5), torch.randperm(8)
        self.seen: dict[str, list[Tensor]] = {}

    def look(self, x: Tensor) -> Tensor:
        if not self.training and not self.seen:
            self.seen["scale"] = [self.scale[self.place]]
        scale = self.scale[self.place] if self.training else self.seen["scale"][0]
        return x * scale.view(-1, 1, 1)


class Counting(Net):
    def look(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * self.calls


class Remembering(Net):
    def look(self, x: Tensor) -> Tensor:
        if self.seen is not None:
            x = x + self.seen
        self.seen = x.detach()
        return x


class RememberingInAList(Net):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def look(self, x: Tensor) -> Tensor:
        self.seen.append(x.detach())
        return x + self.seen[0]


class Averaging(nn.Module):
    """Keep an average of what is seen in training, in a new tensor or in the one there is."""

    def __init__(self, *, in_place: bool, always: bool) -> None:
        super().__init__()
        self.mean: Tensor
        self.register_buffer("mean", torch.zeros(8))
        self.in_place, self.always = in_place, always

    def forward(self, x: Tensor) -> Tensor:
        if self.always or self.training:
            new = x.detach().mean((0, 2, 3))
            if self.in_place:
                self.mean.mul_(0.9).add_(new, alpha=0.1)
            else:
                self.mean = self.mean * 0.9 + new * 0.1
        return x * 2


class Averaged(Net):
    def __init__(self, *, in_place: bool, always: bool = False) -> None:
        super().__init__()
        self.average = Averaging(in_place=in_place, always=always)

    def look(self, x: Tensor) -> Tensor:
        return self.average(x)


class AveragedHere(Net):
    def __init__(self) -> None:
        super().__init__()
        self.mean: Tensor
        self.register_buffer("mean", torch.zeros(8))

    def look(self, x: Tensor) -> Tensor:
        self.mean = self.mean * 0.9 + x.detach().mean((0, 2, 3)) * 0.1
        return x


@pytest.mark.parametrize("kind", [Noting, LazilyMade, NotingInAList])
@pytest.mark.parametrize("ran", [False, True])
def test_notes_of_what_was_seen_are_dropped(kind: type[Net], ran: bool) -> None:
    model: Any = randomise(kind()).eval()
    if ran:
        model(X)
    seen, calls = model.seen, model.calls
    gated: Any = fxprune.instrument(model, X)
    assert close_half(gated) == 7
    small: Any = fxprune.finalize(gated)
    assert small.report.verification.verdict == "equal" and small.second.in_channels == 4
    assert error(gated.eval()(X), small(X)) < 1e-5
    assert model.seen is seen and model.calls == calls


@pytest.mark.parametrize(("kind", "name"), [(Counting, "calls"), (Remembering, "seen")])
@pytest.mark.parametrize("ran", [False, True])
def test_a_model_that_remembers_is_refused(kind: type[Net], name: str, ran: bool) -> None:
    model: Any = randomise(kind()).eval()
    if ran:
        model(X)
    with pytest.raises(TraceError, match=f"keeps something in self.{name}"):
        fxprune.instrument(model, X)


def test_what_is_cached_in_evaluation_is_computed_in_a_gated_model() -> None:
    model: Any = randomise(CachedInEvaluation())
    gated: Any = fxprune.instrument(model, X)
    assert model.seen == {}
    gated.train()(X).sum().backward()
    assert bool(gated.scale.grad.abs().sum() > 0)
    with torch.no_grad():
        gated.scale += 0.5
        model.scale += 0.5
    assert torch.equal(gated.eval()(X), model.eval()(X))
    assert close_half(gated) == 7
    small: Any = fxprune.finalize(gated)
    assert small.report.verification.verdict == "equal" and small.second.in_channels == 4


def test_a_model_that_keeps_the_first_it_sees_is_refused() -> None:
    model = randomise(RememberingInAList()).eval()
    with pytest.raises(TraceError, match=r"keeps something in self.seen"):
        fxprune.instrument(model, X)


class Augmented(nn.Module):
    """Buffers that are counted and averaged by augmented arithmetic, under two names."""

    def __init__(self, *, always: bool) -> None:
        super().__init__()
        self.first, self.second, self.always = nn.Linear(4, 8), nn.Linear(8, 3), always
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("mean", torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(F.relu(self.first(x)))
        if self.training or self.always:
            self.calls += 1
            calls: Any = self.calls
            calls -= 3
            self.mean *= 0.9
            self.mean += 0.1 * x.detach().mean(0)
            self.mean /= 1.5
        return x


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("always", [False, True])
def test_augmented_arithmetic_writes_into_buffers(always: bool, inside: bool) -> None:
    part: Any = randomise(Augmented(always=always))
    x = torch.randn(5, 4)
    model = nn.Sequential(part, nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 2)) if inside else part
    gated: Any = fxprune.instrument(model.train(), x)
    assert not [node for node in gated.graph.nodes if node.meta.get("leaf_because")]
    for training in (True, False, True):
        assert torch.equal(model.train(training)(x), gated.train(training)(x))
        buffers = dict(model.named_buffers())
        assert all(torch.equal(one, buffers[name]) for name, one in gated.named_buffers())
    assert int(part.calls) == (-6 if always else -4)
    assert close_half(gated) == (7 if inside else 4)
    small: Any = fxprune.finalize(gated)
    assert small.report.verification.verdict == "equal"
    gated.eval()(x)
    small(x)
    written = {name: one for name, one in small.named_buffers() if name.endswith(("calls", "mean"))}
    assert len(written) == (2 if always else 0)
    for name, one in written.items():
        torch.testing.assert_close(one, dict(gated.named_buffers())[name])


def test_a_replaced_buffer_is_refused_and_said_how_to_mend() -> None:
    model: Any = randomise(AveragedHere()).eval()
    before = model.mean.clone()
    with pytest.raises(TraceError, match=r"replaces its tensor 'mean'.*self.mean.copy_"):
        fxprune.instrument(model, X)
    assert torch.equal(model.mean, before)


@pytest.mark.parametrize("always", [False, True])
@pytest.mark.parametrize("in_place", [False, True])
def test_a_part_that_averages_does_so_in_training(in_place: bool, always: bool) -> None:
    model: Any = randomise(Averaged(in_place=in_place, always=always))
    start = model.average.mean.clone()
    gated: Any = fxprune.instrument(model, X)
    for one in (model, gated):
        one.train()
        one(X)
        one(X + 1)
    assert torch.allclose(gated.average.mean, model.average.mean)
    assert not torch.allclose(model.average.mean, start)
    assert close_half(gated) == 3  # the averaging part keeps its channels
    small: Any = fxprune.finalize(gated)
    assert small.report.verification.verdict == "equal"
