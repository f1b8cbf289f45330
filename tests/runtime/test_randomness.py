"""Random numbers that Python draws are not drawn once for all."""

import random
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxprune
from fxprune.errors import TraceError
from fxprune.runtime.randomness import Generators
from fxprune.testing import close_half
from tests.conftest import randomise

X = torch.randn(3, 3, 8, 8)
DRAWS: dict[str, Callable[[], float]] = {
    "Python's random": random.random,
    "numpy.random": lambda: float(numpy.random.rand()),
    "torch, on no tensor": lambda: float(torch.rand([])),
}


class Mixing(nn.Module):
    """Mix two branches by a random share in training (shake-shake, Gastaldi 2017)."""

    def __init__(self, draw: Callable[[], float]) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.draw = draw

    def forward(self, x: Tensor) -> Tensor:
        share = self.draw() if self.training else 0.5
        return share * F.relu(self.left(x)) + (1 - share) * F.relu(self.right(x))


def net(draw: Callable[[], float]) -> nn.Sequential:
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 1), Mixing(draw), nn.Conv2d(8, 6, 1), nn.ReLU(), nn.Conv2d(6, 2, 1))
    )


@pytest.mark.parametrize("who", DRAWS)
def test_a_model_that_draws_by_itself_is_refused(who: str) -> None:
    model, x = Mixing(DRAWS[who]), torch.randn(3, 8, 4, 4)
    before = Generators()
    with pytest.raises(TraceError, match=f"draws random numbers .{who}"):
        fxprune.instrument(model, x)
    assert not before.drew()


@pytest.mark.parametrize("who", DRAWS)
def test_a_part_that_draws_is_kept_whole(who: str) -> None:
    model = randomise(net(DRAWS[who])).train()
    gated: Any = fxprune.instrument(model, X)
    assert [str(n.target) for n in gated.graph.nodes if n.meta.get("leaf_because")] == ["1"]
    outputs = torch.stack([gated(X) for _ in range(4)])
    assert bool((outputs.std(0) > 1e-4).any())
    assert close_half(gated.eval()) == 3
    small: Any = fxprune.finalize(gated)
    assert small.report.verification.verdict == "equal"


@pytest.mark.parametrize("who", DRAWS)
def test_in_evaluation_it_is_a_model_like_any_other(who: str) -> None:
    gated: Any = fxprune.instrument(randomise(net(DRAWS[who])).eval(), X)
    assert "runs other operators then" in str(gated.report)
    assert close_half(gated) > 3
    small: Any = fxprune.finalize(gated)
    assert small.report.verification.verdict == "equal"


def test_a_layer_that_is_skipped_now_and_then_is_not_always_there() -> None:
    class Skipping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.first(x))
            if self.training and float(torch.rand([])) < 0.001:
                return x
            return self.second(x)

    with pytest.raises(TraceError, match="draws random numbers"):
        fxprune.instrument(Skipping(), X)


class Sampling(nn.Module):
    """Draws by itself in evaluation as well, and asks for its mode for something else."""

    def __init__(self, draw: Callable[[], float]) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.draw = draw

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x) if self.draw() < 0.999 else x  # so seldom that no check would notice
        return self.second(F.dropout(F.relu(x), 0.1, self.training))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("who", DRAWS)
def test_what_is_drawn_in_evaluation_is_not_drawn_once_for_all(who: str, training: bool) -> None:
    part = Sampling(DRAWS[who])
    with pytest.raises(TraceError, match=f"draws random numbers .{who}"):
        fxprune.instrument(part.train(training), torch.randn(3, 8, 4, 4))
    model = nn.Sequential(part, nn.Conv2d(8, 6, 1), nn.ReLU(), nn.Conv2d(6, 2, 1))
    gated: Any = fxprune.instrument(model.train(training), torch.randn(3, 8, 4, 4))
    assert [str(n.target) for n in gated.graph.nodes if n.meta.get("leaf_because")] == ["0"]


class Drawing(nn.Module):
    """Draws with operators in evaluation, too: variational autoencoders, Monte Carlo dropout."""

    def __init__(self, draw: Callable[[Tensor], Tensor], *, in_the_middle: bool) -> None:
        super().__init__()
        self.first, self.mean, self.scale = nn.Linear(4, 8), nn.Linear(8, 3), nn.Linear(8, 3)
        self.second, self.last = nn.Linear(3, 6), nn.Linear(6, 4)
        self.draw, self.in_the_middle = draw, in_the_middle

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = F.relu(self.first(x))
        if self.in_the_middle:
            x = self.draw(x)
        mean, scale = self.mean(x), self.scale(x).exp()
        if not self.in_the_middle:
            mean = mean + self.draw(mean) * scale
        return self.last(F.relu(self.second(mean))), scale


OPERATORS: dict[str, Callable[[Tensor], Tensor]] = {
    "randn_like": torch.randn_like,
    "randn of a shape": lambda x: torch.randn(x.shape, dtype=x.dtype),
    "in place": lambda x: torch.zeros_like(x).normal_(),
    "dropout": lambda x: F.dropout(x, 0.5, training=True),
    "a slope": lambda x: F.rrelu(x - 0.5, training=True),
}


@pytest.mark.parametrize("in_the_middle", [False, True])
@pytest.mark.parametrize("how", OPERATORS)
def test_what_operators_draw_in_evaluation_is_drawn_again(how: str, in_the_middle: bool) -> None:
    model = randomise(Drawing(OPERATORS[how], in_the_middle=in_the_middle)).eval()
    x = torch.randn(5, 4)
    before = Generators()
    gated: Any = fxprune.instrument(model, x).eval()
    assert close_half(gated) == (3 if in_the_middle else 7)  # what is drawn for stays
    small: Any = fxprune.finalize(gated)
    assert not before.drew()
    assert small.report.verification.verdict == "equal"
    outputs: list[Tensor] = []
    for one in (gated, small):
        torch.manual_seed(5)
        outputs.append(one(x)[0])
    assert torch.allclose(outputs[0], outputs[1], atol=1e-5)
    assert not torch.allclose(small(x)[0], outputs[1], atol=1e-3)
