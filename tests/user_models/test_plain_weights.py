"""Layers whose weights are computed: gated like plain ones, plain in the result."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm

import fxprune
from fxprune.errors import GateError, VerificationError
from fxprune.gating.gates import Gates
from fxprune.testing import close_half
from fxprune.user_models.plain_weights import computes_weights, plain_weights_in


def _masked(layer: nn.Module) -> nn.Module:
    return prune.random_unstructured(layer, "weight", 0.3)


KINDS: dict[str, Callable[[Any], Any]] = {
    "weight norm": parametrizations.weight_norm,
    "spectral norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "hooked weight norm": weight_norm,
    "hooked spectral norm": spectral_norm,
    "mask": _masked,
}
pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")


def _net(kind: str) -> Any:
    """Return three convolutions, all but the last with computed weights."""
    torch.manual_seed(3)
    compute = KINDS[kind]
    layers = [compute(nn.Conv1d(3, 8, 3)), nn.ReLU(), compute(nn.Conv1d(8, 6, 3)), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Conv1d(6, 6, 1), nn.ReLU(), nn.Conv1d(6, 2, 1))
    with torch.no_grad():
        model(_x())
    return model.eval()


def _x() -> Tensor:
    return torch.randn(2, 3, 12, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("kind", KINDS)
def test_computed_weights_are_plain_in_the_result(kind: str) -> None:
    model = _net(kind)
    model[6].weight.data[:, :3] = 0
    small: Any = fxprune.finalize(model, _x())
    assert small.report.verification.verdict == "equal"
    assert type(small.get_submodule("0")) is nn.Conv1d
    assert not any(map(computes_weights, small.modules()))
    assert small.report.after.parameters < small.report.before.parameters
    loaded = pickle.loads(pickle.dumps(small))
    assert torch.equal(loaded(_x()), small(_x()))


@pytest.mark.parametrize("kind", KINDS)
def test_layers_with_computed_weights_are_gated_like_plain_ones(kind: str) -> None:
    gated, plain = (fxprune.instrument(_net(k), _x()) for k in (kind, "mask"))
    assert fxprune.architecture(gated) == fxprune.architecture(plain)
    assert [s["total"] for s in fxprune.architecture(gated).values()] == [8, 6, 6]
    assert computes_weights(gated.get_submodule("0"))  # as a user trains it
    close_half(gated)
    small: Any = fxprune.finalize(gated)
    assert small.report.verification.verdict == "equal"
    assert [small.get_submodule(name).out_channels for name in "024"] == [4, 3, 3]


@pytest.mark.parametrize("kind", KINDS)
def test_a_training_step_is_that_of_the_model(kind: str) -> None:
    model = _net(kind).train()
    gated = fxprune.instrument(model, _x()).train()
    model = copy.deepcopy(model)
    outputs = []
    for one in (model, gated):
        optimizer = torch.optim.SGD([p for n, p in one.named_parameters() if "gates" not in n], 0.1)
        for _ in range(2):
            one(_x()).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        outputs.append(one(_x()))
    assert torch.equal(*outputs)
    trained = dict(gated.named_buffers())
    assert all(torch.equal(trained[name], buffer) for name, buffer in model.named_buffers())


@pytest.mark.parametrize("kind", KINDS)
def test_compacting_refuses_what_it_cannot_cut(kind: str) -> None:
    gated = fxprune.instrument(_net(kind), _x())
    optimizer = torch.optim.SGD(gated.parameters(), 0.1, momentum=0.9)
    gates = gated.gates
    assert isinstance(gates, Gates) and gates.width is not None
    close_half(gated)
    with pytest.raises(GateError, match=r"units cannot be removed .* its weights are computed"):
        fxprune.compact(gated, optimizer)
    assert gates.width in set(optimizer.param_groups[0]["params"])


class Tied(nn.Module):
    """Reads a computed weight a second time, so that a trace calls what computes it."""

    def __init__(self) -> None:
        super().__init__()
        self.normed = parametrizations.weight_norm(nn.Linear(6, 8))
        self.inner, self.last = parametrizations.weight_norm(nn.Linear(6, 10)), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        weight: Any = self.normed.weight
        x = functional.linear(torch.relu(self.normed(x)), weight.t())
        return self.last(torch.relu(self.inner(x)))


def test_what_a_trace_reads_of_a_computed_weight_stays() -> None:
    x = torch.randn(4, 6)
    gated = fxprune.instrument(Tied().eval(), x)
    close_half(gated)
    small: Any = fxprune.finalize(gated)
    assert small.report.verification.verdict == "equal"
    assert type(small.get_submodule("inner")) is nn.Linear and small.inner.out_features == 5
    assert computes_weights(small.get_submodule("normed"))
    assert any("weights are computed" in str(change) for change in small.report.refused)


class Fickle(nn.Module):
    """A parametrization that is never the same twice."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight * torch.rand(())


def test_weights_that_are_not_what_they_were_are_refused() -> None:
    layer = nn.Linear(3, 8)
    parametrize.register_parametrization(layer, "weight", Fickle())
    model = nn.Sequential(layer, nn.ReLU(), nn.Linear(8, 2)).eval()
    with pytest.raises(VerificationError, match=r"is not what its computed weights .* say"):
        fxprune.finalize(model, torch.randn(2, 3))


def test_modules_come_back_after_they_were_plain() -> None:
    shared = parametrizations.weight_norm(nn.Linear(4, 4))
    model = nn.Sequential(shared, nn.ReLU(), shared)
    with pytest.raises(RuntimeError), plain_weights_in(model):
        assert type(model[0]) is nn.Linear and model[2] is model[0]
        raise RuntimeError
    assert model[0] is shared and model[2] is shared


def test_a_mask_stays_whose_weight_a_graph_reads_itself() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)).eval()
    prune.ln_structured(model[0], "weight", amount=0.5, n=2, dim=0)
    graph = fx.Graph()
    x = graph.placeholder("x")
    y = graph.call_module("1", (graph.call_module("0", (x,)),))
    whole = graph.get_attr("0.weight_orig")
    size = graph.call_method("sum", (whole,))
    graph.output(graph.call_function(torch.mul, (graph.call_module("2", (y,)), size)))
    traced = fx.GraphModule(model, graph)
    x = torch.randn(3, 4)
    small = fxprune.finalize(traced, x)
    assert small.report.verification and small.report.verification.verdict == "equal"
    torch.testing.assert_close(small(x), traced(x))
