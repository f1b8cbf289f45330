"""Layers whose weights a forward computes: gated like plain ones, plain in the result."""

import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxprune
from fxprune.errors import GateError
from fxprune.gating.penalties import cost_of
from fxprune.passes.computed_weights import join_computed_weights
from fxprune.programs.program import Program, capture
from fxprune.testing import close_half, error, spread
from fxprune.user_models.computed_layers import ComputedLayer
from fxprune.user_models.inputs import model_inputs
from tests.conftest import randomise, reloaded


class Standardised(nn.Conv2d):
    """The weights of ResNetV2 (Qiao et al., 2019) with a gain, as NFNets have one."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.gain = nn.Parameter(torch.rand(self.out_channels) + 0.5)

    def forward(self, input: Tensor) -> Tensor:
        rows = self.weight.reshape(1, self.out_channels, -1)
        normal = F.batch_norm(rows, None, None, weight=self.gain, training=True, momentum=0.0)
        weight = normal.reshape_as(self.weight)
        return F.conv2d(input, weight, self.bias, self.stride, self.padding, groups=self.groups)


class Equalised(nn.Conv2d):
    """The weights of StyleGAN (Karras et al., 2018): scaled, and so is the bias."""

    def forward(self, input: Tensor) -> Tensor:
        scale = 4 / self.weight[0].numel() ** 0.5
        assert self.bias is not None
        return F.conv2d(input, self.weight * scale, bias=self.bias * 0.5, padding=self.padding)


class Masked(nn.Conv2d):
    mask: Tensor

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_buffer("mask", (torch.rand_like(self.weight) < 0.7).to(self.weight))

    def forward(self, input: Tensor) -> Tensor:
        return F.conv2d(input, self.weight * self.mask, self.bias, padding=self.padding)


class LowRank(nn.Conv2d):
    """A weight that is trained by an update of rank 2."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        rows, columns = self.weight.shape[0], self.weight[0].numel()
        self.left = nn.Parameter(torch.randn(rows, 2))
        self.right = nn.Parameter(torch.randn(2, columns))

    def forward(self, input: Tensor) -> Tensor:
        update = (self.left @ self.right).view(self.weight.shape) * 0.1
        return self._conv_forward(input, self.weight + update, self.bias)


class Spread(nn.ConvTranspose2d):
    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        return F.conv_transpose2d(input, self.weight.tanh(), self.bias, padding=1)


class Rows(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, F.normalize(self.weight, dim=1), self.bias)


KINDS = (Standardised, Equalised, Masked, LowRank, Spread)


def network(kind: Callable[..., nn.Module]) -> Any:
    torch.manual_seed(1)
    layers = [kind(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), kind(8, 6, 3, padding=1)]
    head = (nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), Rows(24, 9), nn.ReLU(), Rows(9, 4))
    return randomise(nn.Sequential(*layers, *head)).double()


def images() -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return 3 * torch.randn(3, 3, 8, 8, dtype=torch.float64, generator=generator)


def computed(module: nn.Module) -> list[str]:
    return [path for path, one in module.named_modules() if isinstance(one, ComputedLayer)]


@pytest.mark.parametrize("kind", KINDS)
def test_computed_weights_are_gated_and_cut_like_plain_ones(kind: type[nn.Module]) -> None:
    model, x = network(kind).eval(), images()
    gated: Any = fxprune.instrument(model, x)
    assert torch.equal(gated(x), model(x))
    assert computed(gated) == ["0", "3", "7", "9"]
    assert {site["live"] for site in fxprune.architecture(gated).values()} == {8, 6, 9}
    assert {*model.state_dict()} <= {*gated.state_dict()}
    close_half(gated)
    small: Any = fxprune.finalize(gated)
    assert small.report.verification.verdict == "equal"
    assert error(gated(x), small(x)) < 1e-12
    assert spread(small(x)) > 1e-3
    assert computed(small) == []
    layer = small.get_submodule("3")
    assert type(layer) is kind.__mro__[1]
    assert sorted(layer.weight.shape[:2]) == [3, 4]
    assert torch.equal(pickle.loads(pickle.dumps(small))(x), small(x))


@pytest.mark.parametrize("kind", KINDS)
def test_costs_count_plain_weights(kind: type[nn.Module]) -> None:
    gated: Any = fxprune.instrument(network(kind).eval(), images())
    close_half(gated)
    small: Any = fxprune.finalize(gated)
    for cost in ("parameters", "macs"):
        with torch.no_grad():
            found = float(cost_of(gated.gates, cost))
        assert found == getattr(small.report.after, cost)


@pytest.mark.parametrize("kind", KINDS)
def test_models_that_were_never_gated_are_cut_too(kind: type[nn.Module]) -> None:
    model, x = network(kind).eval(), images()
    model[1].weight.data[:4] = 0
    model[1].bias.data[:4] = 0
    small: Any = fxprune.finalize(model, x)
    assert small.report.verification.verdict == "equal"
    assert error(model(x), small(x)) < 1e-12
    assert small.get_submodule("0").weight.numel() == 4 * 3 * 9
    assert computed(small) == []


def test_weights_are_computed_anew_in_every_step() -> None:
    model, x = network(Standardised), images()
    gated: Any = fxprune.instrument(model, x)
    twin = reloaded(gated)
    for one in (model, gated):
        one.train()
        optimizer = torch.optim.SGD(
            [p for name, p in one.named_parameters() if not name.startswith("gates.")], 0.1
        )
        for _ in range(3):
            optimizer.zero_grad()
            one(x).square().sum().backward()
            optimizer.step()
    own = dict(gated.named_parameters())
    assert all(torch.equal(own[name], p) for name, p in model.named_parameters())
    twin.load_state_dict(gated.state_dict())
    assert torch.equal(twin.eval()(x), gated.eval()(x))


def test_compaction_leaves_them_alone_and_says_so() -> None:
    gated: Any = fxprune.instrument(network(Standardised).eval(), images())
    close_half(gated)
    with pytest.raises(GateError, match="computed"):
        fxprune.compact(gated)


def joined(model: nn.Module, x: Tensor) -> Program:
    program = capture(model.double().eval(), model_inputs(x))
    join_computed_weights(program)
    program.check()
    assert torch.equal(program.run(), model(x))
    return program


class Shared(nn.Module):
    """Calls a layer twice, another one with two scales."""

    def __init__(self) -> None:
        super().__init__()
        self.same, self.other = Equalised(3, 3, 3, padding=1), nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.same(self.same(x).relu())
        w = self.other.weight
        return F.conv2d(x, w * 2, self.other.bias) + F.conv2d(x.relu(), w * 3, self.other.bias)


def test_calls_that_compute_the_same_share_a_layer() -> None:
    program = joined(Shared(), images())
    assert computed(program.module) == ["same"]
    assert [node.target for node in program.graph.nodes].count("same") == 2


class Watched(Equalised):
    """Somebody else reads the weights, too."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + self.weight.mean()


class Noisy(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight + torch.bernoulli(torch.full_like(self.weight, 0.5))
        return F.conv2d(input, weight, self.bias, padding=self.padding)


class Counting(nn.Conv2d):
    """Writes to what its weights are computed from, as spectral norms do."""

    u: Tensor

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_buffer("u", torch.ones(()))

    def forward(self, input: Tensor) -> Tensor:
        return F.conv2d(input, self.weight * self.u.mul_(1.0), self.bias, padding=self.padding)


class Dropped(nn.Conv2d):
    """Follows the mode: in training some weights are left out."""

    def forward(self, input: Tensor) -> Tensor:
        weight = F.dropout(self.weight, 0.5, self.training)
        return F.conv2d(input, weight, self.bias, padding=self.padding)


class Generated(nn.Conv2d):
    """Weights that depend on the input are no numbers."""

    def forward(self, input: Tensor) -> Tensor:
        return F.conv2d(input, self.weight * input.mean(), self.bias, padding=self.padding)


@pytest.mark.parametrize("kind", [Watched, Counting, Dropped, Generated])
def test_weights_that_are_more_than_a_layers_own_stay_as_they_are(kind: type[nn.Module]) -> None:
    model = nn.Sequential(kind(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 1))
    assert computed(joined(model, images()).module) == []


def test_random_weights_are_no_numbers() -> None:
    model = nn.Sequential(Noisy(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 1)).double()
    program = capture(model.eval(), model_inputs(images()), check=False)
    assert join_computed_weights(program) == []
