"""Models that compute activations a second time, to save memory."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import fxprune
from fxprune.testing import close_half
from tests.conftest import randomise

X = torch.randn(4, 6, dtype=torch.float64)


class Again(nn.Module):
    """Blocks that are checkpointed, and what stands before them."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.stem = nn.Linear(6, 8)
        self.blocks = nn.Sequential(nn.Linear(8, 10), nn.ReLU(), nn.Linear(10, 8), nn.ReLU())
        self.head = nn.Sequential(nn.Linear(8, 7), nn.ReLU(), nn.Linear(7, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.how == "inputs" else F.relu(self.stem(x))
        return self.head(self._blocks(x.detach() if self.how == "detached" else x))

    def _blocks(self, x: Tensor) -> Tensor:
        found: Any
        if self.how == "training" and not self.training:
            return self.blocks(x)
        if self.how == "sequential":
            found = checkpoint_sequential(self.blocks, 2, x, use_reentrant=True)
        elif self.how == "list":
            found = checkpoint(lambda many: self.blocks(many[0]), [x], use_reentrant=True)
        else:
            found = checkpoint(self.blocks, x, use_reentrant=self.how != "recorded")
        return found


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor | None]:
    model.zero_grad()
    model(x).square().sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def alike(one: Tensor | None, other: Tensor | None) -> bool:
    return one is other if one is None or other is None else torch.equal(one, other)


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("how", ["reentrant", "sequential", "training", "recorded"])
def test_they_get_the_gradients_they_got(how: str, mode: bool) -> None:
    model = randomise(Again(how).double())
    gated = fxprune.instrument(model.train(mode), X)
    for training in (True, False):
        expected = gradients(model.train(training), X[:3])
        found = gradients(gated.train(training), X[:3])
        for name, gradient in expected.items():
            assert gradient is not None and alike(gradient, found[name])
    close_half(gated)
    assert torch.allclose(fxprune.finalize(gated)(X), gated.eval()(X), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("how", ["inputs", "detached", "list", "frozen"])
def test_what_torch_gives_no_gradients_gets_none(how: str) -> None:
    model = randomise(Again(how).double())
    if how == "frozen":
        model.get_submodule("stem").requires_grad_(False)
    if how == "inputs":
        model.set_submodule("blocks.0", nn.Linear(6, 10).double())
    gated = fxprune.instrument(model, X)
    assert any("use_reentrant=False" in change.what for change in gated.report.refused)
    expected, found = gradients(model, X[:3]), gradients(gated, X[:3])
    for name, gradient in expected.items():
        assert alike(gradient, found.get(name))
