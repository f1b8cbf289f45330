"""Modules with a backward of their own: which of them are activations."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxprune
from fxprune.testing import close_half, error, spread
from tests.conftest import randomise


class Swish(torch.autograd.Function):
    """x·σ(x), with a gradient nobody else would have."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * torch.sigmoid(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return 3 * grads[0] * ctx.saved_tensors[0].sigmoid()


class NewStyle(torch.autograd.Function):
    """The same, as torch 2 writes it."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.mul(torch.tanh(F.softplus(x)))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return 2 * grads[0] * ctx.saved_tensors[0].cos()


def function(forward: Callable[[Any, Tensor], Tensor]) -> Any:
    """Return an autograd function that computes `forward`."""
    members = {"forward": staticmethod(forward), "backward": staticmethod(lambda ctx, grad: grad)}
    return type("Function", (torch.autograd.Function,), members)


class Applies(nn.Module):
    def __init__(self, function: Any, *, in_training: bool = False, scale: bool = False) -> None:
        super().__init__()
        self.function, self.in_training = function, in_training
        self.scale = nn.Parameter(torch.ones(1)) if scale else 1.0

    def forward(self, x: Tensor) -> Tensor:
        if self.in_training and not self.training:
            return x * x.sigmoid()
        return self.function.apply(x) * self.scale


class Net(nn.Module):
    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(3, 12, 3), nn.BatchNorm2d(12), act
        self.last = nn.Conv2d(12, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.act(self.norm(self.conv(x))))


@pytest.mark.parametrize(
    "act",
    [Applies(Swish), Applies(NewStyle), Applies(Swish, in_training=True)],
    ids=["swish", "mish", "in training only"],
)
def test_an_activation_with_a_backward_of_its_own_is_gated_and_keeps_it(act: nn.Module) -> None:
    model = randomise(Net(act)).double()
    x = torch.randn(2, 3, 9, 9, dtype=torch.float64)
    gated: Any = fxprune.instrument(model.train(), x)
    (site,) = gated.gates.width_sites
    assert len(site.units) == 12
    outputs = [one(x) for one in (model, gated)]
    assert torch.equal(*outputs)
    for one in outputs:
        (one**2).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert torch.equal(gated.get_parameter(name).grad, parameter.grad)
    close_half(gated)
    small: Any = fxprune.finalize(gated.eval())
    assert error(gated(x), small(x)) < 1e-12 < spread(gated(x))
    assert small.last.in_channels == 6


OTHERS: dict[str, nn.Module] = {
    "reversed channels": Applies(function(lambda ctx, x: x.flip(1) * x)),
    "a mean": Applies(function(lambda ctx, x: x * (x - x.mean()))),
    "in place": Applies(function(lambda ctx, x: x.mul_(2).tanh())),
    "in place, by a flag": Applies(function(lambda ctx, x: F.relu(x, True).tanh())),
    "its shape": Applies(function(lambda ctx, x: x.tanh() * x.shape[1])),
    "a parameter": Applies(Swish, scale=True),
    "another tensor": Applies(function(lambda ctx, x: x * torch.linspace(0, 1, 7))),
    "data": Applies(function(lambda ctx, x: x.tanh() if x.sum() > 0 else x)),
    "draws": Applies(function(lambda ctx, x: F.rrelu(x, 0.1, 0.9, training=True))),
    "nothing": Applies(function(lambda ctx, x: x.view_as(x))),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_not_certain_to_be_one_keeps_all_channels(name: str) -> None:
    model = randomise(Net(OTHERS[name])).eval()
    with pytest.raises((fxprune.NothingToDoError, fxprune.TraceError)):
        fxprune.instrument(model, torch.randn(2, 3, 9, 9))


class Sign(torch.autograd.Function):
    """What binary networks round by: a straight-through estimator."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.sign()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


class Binary(nn.Module):
    """Applies a function with a backward of its own where no submodule is kept whole for it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 12), nn.Linear(16, 4)
        self.middle = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 16))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.middle(Sign.apply(self.first(x)))))


@pytest.mark.parametrize("training", [True, False])
def test_a_model_does_not_lose_a_backward_of_its_own(training: bool) -> None:
    model, x = Binary().double().train(training), torch.randn(3, 6, dtype=torch.float64)
    gated: Any = fxprune.instrument(model, x)  # its parts are
    for one in (model, gated):
        one.train()(x).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert torch.equal(gated.get_parameter(name).grad, parameter.grad)
    assert any("whose backward is its own" in str(change) for change in gated.report.refused)


def test_without_parts_to_gate_the_remedy_is_told() -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(6, 12), nn.Linear(12, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.relu(Sign.apply(self.first(x))))

    with pytest.raises(fxprune.TraceError, match=r"Sign\.apply.*module of its own"):
        fxprune.instrument(Bare().eval(), torch.randn(3, 6))
    small = fxprune.finalize(Bare().eval(), torch.randn(3, 6))
    assert small.report.verification is not None
