"""Layers written as functions become modules, only where they are the same layer."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxprune
from fxprune.passes.layer_modules import make_layers_modules
from fxprune.programs.program import Program, capture
from fxprune.testing import check_rewrite, close_half, error, spread
from fxprune.user_models.inputs import model_inputs
from tests.conftest import randomise


class Conv(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self.weight, self.bias)


class NormAct(nn.BatchNorm2d):
    """A batch norm with its activation, as timm has them."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.act, self.drop = nn.ReLU(), nn.Identity()

    def forward(self, input: Tensor) -> Tensor:
        self._check_input_dim(input)
        x = F.batch_norm(
            input,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            self.training,
            self.momentum or 0.1,
            self.eps,
        )
        return self.act(self.drop(x))


class Linear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight, self.bias)


def network() -> nn.Module:
    convs = Conv(3, 8, 3, padding=1, bias=False), Conv(8, 8, 3, stride=2, padding=1, groups=2)
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), Linear(8, 5))
    return randomise(nn.Sequential(convs[0], NormAct(8), convs[1], NormAct(8), *head)).double()


def test_subclasses_of_layers_are_cut_and_folded_like_layers() -> None:
    model, x = network().eval(), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    gated = fxprune.instrument(model, x)
    assert torch.equal(gated(x), model(x))
    close_half(gated)
    small: Any = fxprune.finalize(gated)
    assert error(gated(x), small(x)) < 1e-12 < spread(gated(x))
    kinds = [type(small.get_submodule(name)) for name in ("0", "2", "6")]
    assert kinds == [nn.Conv2d, nn.Conv2d, nn.Linear]
    assert set(small.state_dict()) == {f"{i}.{n}" for i in (0, 2, 6) for n in ("weight", "bias")}


def test_it_trains_as_before() -> None:
    model, x = network().train(), torch.randn(4, 3, 8, 8, dtype=torch.float64)
    gated = fxprune.instrument(model, x).train()
    assert torch.equal(gated(x), model(x))
    for name in ("1.running_mean", "3.running_var"):
        assert torch.equal(gated.state_dict()[name], model.state_dict()[name])
    assert gated.state_dict().keys() - {"gates.width"} >= {"0.weight", "1.bias", "6.bias"}


class CountingNormAct(nn.BatchNorm2d):
    """A batch norm with its activation that counts its batches, as torch's and timm's do."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).relu()


def test_a_norm_that_counts_its_batches_is_the_same_layer_in_both_modes() -> None:
    layers = (Conv(3, 8, 3), CountingNormAct(8), nn.Flatten(), nn.LazyLinear(5), nn.Dropout())
    model, x = nn.Sequential(*layers), torch.randn(4, 3, 6, 6)
    model(x)
    gated = fxprune.instrument(model.train(), x).train()
    for _ in range(2):
        torch.manual_seed(1)
        expected = model(x)
        torch.manual_seed(1)
        assert torch.equal(gated(x), expected)
    for name in ("1.running_mean", "1.running_var"):
        assert torch.equal(gated.state_dict()[name], model.state_dict()[name])


class Written(nn.Module):
    """One function of a module's parameters."""

    def __init__(self, layer: nn.Module, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.layer, self.function = layer, function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.layer, x)


def program(model: nn.Module, x: Tensor) -> Program:
    inputs = model_inputs(x.double())
    return capture(randomise(model).double().eval(), inputs)


IMAGE, VECTOR = torch.randn(2, 4, 7, 7), torch.randn(2, 4)
LAYERS: dict[str, tuple[nn.Module, Callable[..., Tensor], Tensor, type[nn.Module] | None]] = {
    "strided": (
        nn.Conv2d(4, 6, 3),
        lambda m, x: F.conv2d(x, m.weight, m.bias, 2, (1, 2), dilation=2),
        IMAGE,
        nn.Conv2d,
    ),
    "same": (
        nn.Conv1d(4, 6, 3),
        lambda m, x: F.conv1d(x.flatten(2), m.weight, m.bias, padding="same"),
        IMAGE,
        nn.Conv1d,
    ),
    "transposed": (
        nn.ConvTranspose2d(4, 6, 3, groups=2),
        lambda m, x: F.conv_transpose2d(x, m.weight, m.bias, 2, 1, 1, 2),
        IMAGE,
        nn.ConvTranspose2d,
    ),
    "linear": (nn.Linear(4, 3), lambda m, x: F.linear(x, m.weight, bias=m.bias), VECTOR, nn.Linear),
    "without its bias": (nn.Linear(4, 3), lambda m, x: F.linear(x, m.weight), VECTOR, nn.Linear),
    "called too": (nn.Linear(4, 4), lambda m, x: m(F.linear(x, m.weight, m.bias)), VECTOR, None),
    "twice": (
        nn.Linear(4, 4),
        lambda m, x: F.linear(F.linear(x, m.weight, m.bias), m.weight, m.bias),
        VECTOR,
        nn.Linear,
    ),
    "twice, differently": (
        nn.Conv2d(4, 4, 3),
        lambda m, x: F.conv2d(F.conv2d(x, m.weight, m.bias), m.weight, m.bias, padding=1),
        IMAGE,
        None,
    ),
    "another weight": (
        nn.Bilinear(4, 4, 4),
        lambda m, x: F.linear(x, m.weight[0], m.bias),
        VECTOR,
        None,
    ),
    "frozen statistics": (
        nn.BatchNorm1d(4),
        lambda m, x: F.batch_norm(x, m.running_mean, m.running_var, m.weight, m.bias, False),
        VECTOR,
        None,
    ),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_function_becomes_the_layer_it_is(name: str) -> None:
    layer, function, x, kind = LAYERS[name]
    after = check_rewrite(make_layers_modules, program(Written(layer, function), x))
    called = [
        type(after.module.get_submodule(str(node.target)))
        for node in after.graph.nodes
        if node.op == "call_module"
    ]
    functions = [node for node in after.graph.nodes if node.op == "call_function"]
    if kind is None:
        assert functions
    else:
        assert called and set(called) == {kind} and not functions


def test_a_part_of_a_layer_kept_whole_is_left_alone() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix = nn.MultiheadAttention(4, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            mixed = self.mix(x, x, x, need_weights=False)[0]
            return F.linear(mixed, self.mix.out_proj.weight, self.mix.out_proj.bias)

    before = program(Attention(), torch.randn(2, 3, 4))
    after = check_rewrite(make_layers_modules, before)
    assert type(after.module.get_submodule("mix.out_proj")) is not nn.Linear
