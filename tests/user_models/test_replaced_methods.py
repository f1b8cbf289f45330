"""Modules of which one object does something else than its class: methods put in its attributes."""

import functools
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxprune
from fxprune.errors import FxpruneError, ModelError
from fxprune.testing import close_half, error
from fxprune.user_models.replaced_methods import replaced_methods
from tests.conftest import randomise

X = torch.randn(3, 3, 6, 6, dtype=torch.float64)


def network() -> Any:
    layers = (
        *(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 12, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1)),
        *(nn.Flatten(), nn.Linear(12, 5)),
    )
    return randomise(nn.Sequential(*layers)).double().eval()


def flipped(self: Any, x: Tensor) -> Tensor:
    return type(self).forward(self, x).flip(1)


def of_three(self: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.conv2d(x, weight.flip(0), bias, padding=1)


@pytest.mark.parametrize("place", [0, 1, 2, 3])
def test_the_forward_of_one_layer_is_what_is_analysed(place: int) -> None:
    model = network()
    model[place].forward = types.MethodType(flipped, model[place])
    require_halves_equal(model)


def test_a_method_beneath_forward_is_analysed() -> None:
    model = network()
    model[3]._conv_forward = types.MethodType(of_three, model[3])
    require_halves_equal(model)


def test_a_forward_may_be_bound_by_partial() -> None:
    model = network()
    model[3].forward = functools.partial(flipped, model[3])
    require_halves_equal(model)


def test_the_forward_of_a_whole_model_is_what_is_analysed() -> None:
    model = network()
    model.forward = types.MethodType(flipped, model)
    require_halves_equal(model)


def test_classes_of_torch_that_somebody_has_changed_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    forward = nn.Conv2d.forward
    monkeypatch.setattr(nn.Conv2d, "forward", lambda self, x: forward(self, x).flip(1))
    with pytest.raises(ModelError, match="into all of torch's Conv2d"):
        fxprune.instrument(network(), X)


class Doubling(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x) * 2


def test_an_activation_of_ones_own_is_not_what_its_class_is() -> None:
    model = network()
    model[2] = Doubling()
    model[2].forward = types.MethodType(untraced, model[2])
    require_halves_equal(model)


def untraced(self: Any, x: Tensor) -> Tensor:
    if x.detach().sum().item() > 1e9:
        return x
    return type(self).forward(self, x).flip(1)


def test_a_layer_that_cannot_be_traced_is_not_taken_for_one_of_its_class() -> None:
    model = network()
    model[3].forward = types.MethodType(data_dependent, model[3])
    try:
        require_halves_equal(model)
    except FxpruneError as refusal:
        assert not isinstance(refusal, fxprune.VerificationError)


def data_dependent(self: Any, x: Tensor) -> Tensor:
    return flipped(self, x) if x.detach().sum().item() < 1e9 else x


def closing_over(model: Any) -> None:
    layer, forward = model[3], model[3].forward
    layer.forward = lambda x: forward(x) * 2


def closing_over_weights(model: Any) -> None:
    layer = model[3]
    layer.forward = lambda x: F.conv2d(x, layer.weight, layer.bias, padding=1)


def hooked(model: Any) -> None:
    scale = model[1].weight
    model[3].register_forward_hook(lambda module, given, made: made * scale[:12, None, None])


def hooked_in_training(model: Any) -> None:
    def scaled(module: nn.Module, given: Any, made: Tensor) -> Tensor:
        return made * model[1].weight[:12, None, None] if module.training else made

    model[3].register_forward_hook(scaled)


def naming(model: Any) -> None:
    HELD["layer"] = model[3]
    model[3].forward = lambda x: F.conv2d(x, HELD["layer"].weight, HELD["layer"].bias, padding=1)


HELD: Any = nn.ModuleDict()
CHANGES = [closing_over, closing_over_weights, hooked, hooked_in_training, naming]


@pytest.mark.parametrize("change", CHANGES)
def test_a_copy_that_computes_with_the_weights_of_the_model_is_refused(
    change: Callable[[Any], None],
) -> None:
    model = network()
    change(model)
    before = [buffer.clone() for buffer in model.buffers()]
    with pytest.raises(ModelError, match=r"of the model itself: .*test_replaced_methods.py:\d+"):
        fxprune.instrument(model, X)
    assert all(map(torch.equal, before, model.buffers()))
    assert not model.training


def test_hooks_that_know_their_model_and_only_look_are_no_reason() -> None:
    model, seen = network(), list[Any]()
    model[4].register_forward_hook(lambda *call: seen.append(model[3].weight.shape))
    gated: Any = fxprune.instrument(model, X)
    assert torch.equal(gated(X), model(X))


def test_methods_of_the_class_are_not_replaced_ones() -> None:
    assert not any(map(replaced_methods, network().modules()))
    assert not replaced_methods(nn.TransformerEncoderLayer(8, 2))
    model = network()
    model[3].forward = types.MethodType(flipped, model[3])
    assert replaced_methods(model[3]) == {"forward"}


def require_halves_equal(model: Any) -> None:
    gated: Any = fxprune.instrument(model, X)
    assert torch.equal(gated(X), model(X))
    close_half(gated)
    small: Any = fxprune.finalize(gated)
    assert small.report.verification.verdict == "equal"
    x = torch.randn(5, 3, 6, 6, dtype=torch.float64)
    assert float(gated(x).detach().std()) > 1e-3
    assert error(small(x), gated(x)) < 1e-12
