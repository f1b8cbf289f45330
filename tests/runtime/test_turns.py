"""Threads that call verbs, or run models, while another thread does."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, fx, nn

import fxprune
from tests.conftest import randomise


class Swish(torch.autograd.Function):
    """A backward of its own, which traced code may not call."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x * x.sigmoid()


class Elsewhere(nn.Module):
    """Lets somebody do something in another thread while it is run, or traced."""

    def __init__(self, deed: Callable[[], object]) -> None:
        super().__init__()
        self.deed = deed
        self.layers = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        with ThreadPoolExecutor(1) as pool:
            pool.submit(self.deed).result()
        return self.layers(x)


def net() -> nn.Module:
    return randomise(nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)))


def test_what_other_threads_run_is_not_traced() -> None:
    other, x = net().train(), torch.randn(4, 6)
    expected = other(x)

    def deed() -> None:
        other.eval()
        other.train()
        assert torch.equal(other(x), expected)
        with torch.autocast("cpu", enabled=False):
            assert torch.equal(Swish.apply(x), x * x.sigmoid())

    model = Elsewhere(deed)
    gated = fxprune.instrument(model, x)
    assert isinstance(gated, fx.GraphModule)  # traced as a whole, as nothing failed
    assert torch.equal(gated(x), model(x))


def test_verbs_wait_for_each_other() -> None:
    x, nets = torch.randn(4, 6), [net() for _ in range(3)]

    def made_smaller(model: nn.Module) -> bool:
        gated: Any = fxprune.instrument(model, x)
        with torch.no_grad():  # by no numbers drawn: another thread's model would seem to draw
            gated.gates.width[::2] = 0
        return torch.allclose(fxprune.finalize(gated)(x), gated.eval()(x), rtol=1e-4, atol=1e-5)

    with ThreadPoolExecutor(3) as pool:
        assert all(pool.map(made_smaller, nets))
