"""What a forward does to its own model, besides computing: no graph does, so that it is refused."""

import copy
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxprune
from fxprune.errors import FxpruneError
from fxprune.testing import close_half
from tests.conftest import randomise


class Net(nn.Module):
    """Two layers with a norm between them, and things a forward may do beside."""

    def __init__(self, act: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.first, self.norm, self.drop = nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Dropout(0.1)
        self.second, self.act = nn.Linear(16, 4), act
        self.weight, self.average = nn.Parameter(torch.ones(16)), nn.Buffer(torch.ones(16))
        self.aliases, self.random, self.calls = [self.second.weight], random.Random(0), 0
        self.counts = type("Counts", (), {"calls": 0})()

    def forward(self, x: Tensor) -> Any:
        return self.act(self, x)

    def hidden(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm(self.first(x)))

    def outputs(self, x: Tensor) -> Tensor:
        return self.second(self.drop(self.hidden(x)))


def follow(net: Any, x: Tensor) -> Tensor:
    if net.training:
        for one, other in zip(net.first.parameters(), net.second.parameters(), strict=True):
            one.data.mul_(0.9).add_(other.data.mean(), alpha=0.1)
    return net.outputs(x)


def clip(net: Any, x: Tensor) -> Tensor:
    if net.training:
        for one in net.parameters():
            one.data.clamp_(-0.01, 0.01)
    return net.outputs(x)


def load(net: Any, x: Tensor) -> Tensor:
    if net.training:
        net.first.load_state_dict({name: 0 * t for name, t in net.first.state_dict().items()})
    return net.outputs(x)


def fade(net: Any, x: Tensor) -> Tensor:
    for one in net.buffers():
        if one.is_floating_point():
            one.mul_(0.9)
    return net.outputs(x)


def drop_always(net: Any, x: Tensor) -> Tensor:
    net.drop.train()
    return net.outputs(x)


def freeze_norm(net: Any, x: Tensor) -> Tensor:
    net.norm.eval()
    return net.outputs(x)


def evaluate_inside(net: Any, x: Tensor) -> Tensor:
    was = net.training
    net.eval()
    y = net.outputs(x)
    net.train(was)
    return y


def set_flag(net: Any, x: Tensor) -> Tensor:
    net.norm.training = False
    return net.outputs(x)


def switch_gradients(net: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    net.second.requires_grad_(False)
    y = net.outputs(x)
    net.second.requires_grad_(True)
    return y, net.second(net.hidden(x).detach())


def decay(net: Any, x: Tensor) -> Any:
    return net.outputs(x), sum(one.square().sum() for one in net.parameters())


def by_name(net: Any, x: Tensor) -> Tensor:
    return F.linear(net.hidden(x), dict(net.named_parameters())["second.weight"].tanh())


def privately(net: Any, x: Tensor) -> Tensor:
    return net.second(net.hidden(x) - net.norm._buffers["running_mean"] * 0.5)


def alias(net: Any, x: Tensor) -> Tensor:
    return F.linear(net.outputs(x), net.aliases[0].detach().t() * 1)


def alias_of_data(net: Any, x: Tensor) -> Tensor:
    return F.linear(net.outputs(x), net.second._parameters["weight"].data)[:, :1]


def anneal(net: Any, x: Tensor) -> Tensor:
    scale = 1.0
    if net.training:
        net.calls += 1
        scale = max(0.5, 1 - 0.1 * net.calls)
    return net.outputs(x) * scale


def count_to_five(net: Any, x: Tensor) -> Tensor:
    net.calls += 1
    return net.outputs(x) * (2.0 if net.calls > 5 else 1.0)


def count_to_five_in_training(net: Any, x: Tensor) -> Tensor:
    net.calls += net.training
    return net.outputs(x) * (2.0 if net.calls > 5 and net.training else 1.0)


def count_and_forget(net: Any, x: Tensor) -> Tensor:
    net.calls += 1
    return net.outputs(x)


def initialise(net: Any, x: Tensor) -> Tensor:
    if not net.calls:
        net.weight.data = net.hidden(x).mean(0).data
        net.calls = 1
    return net.second(net.hidden(x) * net.weight)


def anneal_elsewhere(net: Any, x: Tensor) -> Tensor:
    scale = 1.0
    if net.training:
        net.counts.calls += 1
        scale = float(net.counts.calls)
    return net.outputs(x) * scale


def draw(net: Any, x: Tensor) -> Tensor:
    return net.outputs(x) * (1.0 + net.random.random() if net.training else 1.0)


def toggle(net: Any, x: Tensor) -> Tensor:
    drops = net.training and net.random.random() < 0.8  # not at first, but at the next
    return net.second(F.dropout(net.hidden(x), 0.5, drops))


def schedule_drop(net: Any, x: Tensor) -> Tensor:
    net.drop.p = min(0.5, net.drop.p + 0.1)
    return net.outputs(x)


def schedule_momentum(net: Any, x: Tensor) -> Tensor:
    if net.training:
        net.norm.momentum *= 0.5
    return net.outputs(x)


def first_batch(net: Any, x: Tensor) -> Tensor:
    if net.training and not net.calls:
        net.average.data = x.mean(0)
        net.calls = 1
    return net.outputs(x - net.average[:8])


def average_in_evaluation(net: Any, x: Tensor) -> Tensor:
    return net.second(net.hidden(x) * (net.weight if net.training else net.average))


DEEDS: list[Callable[[Any, Tensor], Any]] = [
    *(follow, clip, load, fade, drop_always, freeze_norm, evaluate_inside, set_flag),
    *(switch_gradients, decay, by_name, privately, alias, alias_of_data, anneal),
    *(count_to_five, count_to_five_in_training, count_and_forget, initialise, anneal_elsewhere),
    *(draw, toggle, schedule_drop, schedule_momentum, first_batch),
    average_in_evaluation,
]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("deed", DEEDS)
def test_a_gated_model_does_what_the_model_does_or_there_is_none(
    deed: Callable[[Any, Tensor], Any], training: bool
) -> None:
    model = randomise(Net(deed)).train(training)
    x, before = torch.randn(5, 8), copy.deepcopy(model)
    try:
        gated: Any = fxprune.instrument(model, x)
    except FxpruneError:
        gated = None
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before.state_dict()[name]), name
    parts: Any = model
    assert parts.calls == 0 and parts.drop.p == 0.1 and parts.norm.momentum == 0.1
    if gated is None:
        return
    reference = copy.deepcopy(model)
    modes = [False, False]
    if not any("in training" in str(change) for change in gated.report.refused):
        modes += [True, True, False]
    for mode in modes * 4:
        reference.train(mode)
        gated.train(mode)
        torch.manual_seed(1)
        expected = reference(x)
        torch.manual_seed(1)
        torch.testing.assert_close(gated(x), expected, rtol=0, atol=0)


class Handed(nn.Module):
    """A part that stays in evaluation is handed the flag of the model."""

    def __init__(self) -> None:
        super().__init__()
        self.part, self.head = Told(), nn.Linear(16, 4)

    def train(self, mode: bool = True) -> "Handed":
        super().train(mode)
        self.part.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.part(x, self.training))


class Told(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(8, 16), nn.BatchNorm1d(16)

    def forward(self, x: Tensor, training: bool) -> Tensor:
        return F.dropout(torch.relu(self.norm(self.layer(x))), 0.5, training)


def test_a_count_that_nobody_reads_is_no_reason_to_refuse() -> None:
    gated = fxprune.instrument(randomise(Net(count_and_forget)), torch.randn(5, 8))
    assert not gated.report.assumptions


def test_a_flag_that_is_handed_on_is_that_of_the_model() -> None:
    model = randomise(Handed()).train()
    x = torch.randn(5, 8)
    gated = fxprune.instrument(model, x).train()
    for mode in (True, False):
        model.train(mode)
        gated.train(mode)
        torch.manual_seed(1)
        expected = model(x)
        torch.manual_seed(1)
        assert torch.equal(gated(x), expected)


class Tabled(Net):
    """A class keeps a table for all its models."""

    table: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if Tabled.table is None:
            Tabled.table = torch.arange(x.shape[1]).float()
        return self.outputs(x * Tabled.table)


def test_a_class_keeps_nothing_of_a_trace() -> None:
    model, x = randomise(Tabled(fade)).eval(), torch.randn(5, 8)
    with pytest.raises(FxpruneError, match=r"Tabled\.table"):
        fxprune.instrument(model, x)
    assert isinstance(model(x), Tensor) and type(Tabled.table) is Tensor


def added_later(net: Any, x: Tensor) -> Tensor:
    if not hasattr(net, "late"):
        net.late = nn.Linear(4, 3)
    return net.late(net.outputs(x))


def asking_for_gradients(net: Any, x: Tensor) -> Tensor:
    hidden = net.hidden(x)
    if hidden.requires_grad:
        hidden.retain_grad()
    return net.second(hidden)


def mapped(net: Any, x: Tensor) -> Tensor:
    return torch.func.vmap(net.first)(x) @ net.second.weight.t()


@pytest.mark.parametrize("deed", [added_later, asking_for_gradients, mapped])
def test_what_cannot_be_traced_is_refused_or_left_alone(deed: Callable[[Any, Tensor], Any]) -> None:
    model, x = randomise(Net(deed)), torch.randn(5, 8)
    try:
        gated: Any = fxprune.instrument(model, x)
    except FxpruneError:
        return
    assert type(gated.train()(x)) is Tensor


def test_lazy_layers_are_asked_to_be_made() -> None:
    model = nn.Sequential(nn.LazyLinear(16), nn.LazyBatchNorm1d(), nn.ReLU(), nn.LazyLinear(4))
    with pytest.raises(FxpruneError, match="not initialised yet"):
        fxprune.instrument(model, torch.randn(4, 8))


class Scaled(nn.Module):
    """An array of numpy's is an argument."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor, scale: Any) -> Tensor:
        return self.second(torch.relu(self.first(x))) * torch.from_numpy(scale)


def test_arrays_may_be_arguments() -> None:
    scale, x = np.full(4, 2.0, np.float32), torch.randn(4, 8)
    gated: Any = fxprune.instrument(randomise(Scaled()), (x, scale))
    close_half(gated)
    small: Any = fxprune.finalize(gated)
    assert small.first.out_features == 8
    torch.testing.assert_close(small(x, 3 * scale), gated.eval()(x, 3 * scale))
