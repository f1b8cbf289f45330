"""Saved models: what torch.fx traces again when it loads them computes the same."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxprune
from fxprune.testing import close_half
from tests.conftest import Layers, reloaded


@torch.fx.wrap
def wrapped_by_a_user(x: Tensor) -> Tensor:
    """Python that no trace may look into."""
    return x * 2 if x.sum() > 0 else x


@dataclass
class Output:
    """What a model may return."""

    logits: Tensor
    hidden: Tensor


class Model(nn.Module):
    """Two layers, and a buffer; `ask` does something to what comes in, `give` to what goes out."""

    scale: Tensor

    def __init__(
        self,
        ask: Callable[["Model", Tensor, Tensor | None], Tensor],
        give: Callable[[Tensor], Any] = lambda y: y,
    ) -> None:
        super().__init__()
        self.ask, self.give = ask, give
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 4)
        self.register_buffer("scale", torch.rand(1, 12) + 1)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Any:
        x = self.ask(self, x, mask)
        return self.give(self.second(torch.relu(self.first(x))))


def _asks_for_a_mask(model: Model, x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else x + mask


def _slices_a_buffer(model: Model, x: Tensor, mask: Tensor | None) -> Tensor:
    return x * model.scale[:, : x.shape[1]]


def _computes_with_a_buffer(model: Model, x: Tensor, mask: Tensor | None) -> Tensor:
    return x * (model.scale + 1).exp()[:, :8]


def _calls_a_method_of_a_buffer(model: Model, x: Tensor, mask: Tensor | None) -> Tensor:
    return x + model.scale.narrow(1, 0, x.size(1))


def _asks_for_truth(model: Model, x: Tensor, mask: Tensor | None) -> Tensor:
    kept = [size for size in x.shape if size]
    return x * 2 if kept and not x.shape[1] % 2 and tuple(x.shape) else x


def _makes_tensors_of_sizes(model: Model, x: Tensor, mask: Tensor | None) -> Tensor:
    rows = x.shape[0]
    return torch.tril(torch.ones(rows, rows)) @ x + torch.zeros(rows, 1)


def _calls_a_wrapped_function(model: Model, x: Tensor, mask: Tensor | None) -> Tensor:
    return wrapped_by_a_user(x)


ASKS = (
    _asks_for_a_mask,
    _slices_a_buffer,
    _computes_with_a_buffer,
    _calls_a_method_of_a_buffer,
    _asks_for_truth,
    _makes_tensors_of_sizes,
    _calls_a_wrapped_function,
)


def _pair(model: nn.Module, *inputs: Any) -> tuple[Any, Any]:
    gated = fxprune.instrument(model, inputs)
    close_half(gated)
    return gated.eval(), fxprune.finalize(gated)


@pytest.mark.parametrize("ask", ASKS, ids=lambda ask: ask.__name__)
@pytest.mark.parametrize("mask", [None, torch.randn(3, 8)], ids=["", "mask"])
def test_a_loaded_model_computes_the_same(ask: Any, mask: Tensor | None) -> None:
    x = torch.randn(3, 8)
    for model in _pair(Model(ask), x, mask):
        assert torch.equal(reloaded(model)(x, mask), model(x, mask))
        assert torch.equal(reloaded(reloaded(model))(x, mask), model(x, mask))


@pytest.mark.parametrize("ask", [_slices_a_buffer, _computes_with_a_buffer])
def test_a_loaded_model_still_reads_its_buffers(ask: Any) -> None:
    x = torch.randn(3, 8)
    model, _ = _pair(Model(ask), x)
    other = reloaded(model)
    state = model.state_dict()
    state["scale"] = state["scale"] * 3
    before = model(x)
    for one in (model, other):
        one.load_state_dict(state)
    assert torch.equal(other(x), model(x)) and not torch.allclose(model(x), before)


def test_a_loaded_model_returns_the_class_it_returned() -> None:
    x = torch.randn(3, 8)
    for model in _pair(Model(_asks_for_a_mask, lambda y: Output(y, y + 1)), x):
        loaded = reloaded(model)(x)
        assert isinstance(loaded, Output)
        assert torch.equal(loaded.hidden, model(x).hidden)


class Scope:
    """A class around classes that models return."""

    @dataclass
    class Objects:
        """Two outputs."""

        logits: Tensor
        hidden: Tensor

    class Tuples(NamedTuple):
        """Two outputs."""

        logits: Tensor
        hidden: Tensor


@pytest.mark.parametrize("kind", [Scope.Objects, Scope.Tuples])
def test_what_could_not_be_loaded_is_said(kind: Any) -> None:
    gated = fxprune.instrument(Model(_asks_for_a_mask, lambda y: kind(y, -y)), torch.randn(2, 8))
    close_half(gated)
    for one in (gated, fxprune.finalize(gated)):
        refused = {change.where: change.what for change in one.report.refused}
        assert "cannot be loaded" in refused[kind.__qualname__]


def test_a_loaded_model_refuses_what_it_refused() -> None:
    x, mask = torch.randn(3, 8), torch.randn(3, 8)
    for example, other in ((None, mask), (mask, None)):
        for model in _pair(Model(_asks_for_a_mask), x, example):
            for one in (model, reloaded(model)):
                with pytest.raises(AssertionError, match="this model assumes mask is"):
                    one(x, other)


class Depth(nn.Module):
    """Stochastic depth as many models spell it, which a trace keeps whole."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        return x * torch.rand(x.shape[0], 1).bernoulli()


class Sorting(nn.Module):
    """Python that no trace gets past."""

    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


def test_a_loaded_model_knows_why_modules_are_whole() -> None:
    layers = [nn.Linear(8, 16), Depth(), nn.ReLU(), nn.Linear(16, 4), Sorting()]
    gated = fxprune.instrument(nn.Sequential(*layers), torch.randn(3, 8))
    close_half(gated)
    small, again = fxprune.finalize(gated), fxprune.finalize(reloaded(reloaded(gated)))
    assert again.get_submodule("0").out_features == 8
    reasons, found = ([change.what for change in m.report.refused] for m in (small, again))
    assert found == reasons  # its lines are of code that is gone
    assert any("symbolically traced" in str(change) for change in again.report.refused)


class Experts(nn.Module):
    """Loops over what the data says, so that nothing is known of what it returns."""

    def forward(self, x: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        for row in (x.sum(1) > 0).nonzero():
            y.index_add_(0, row, x[row])
        return y


def test_a_loaded_model_still_asks_whether_something_is_a_tensor() -> None:
    def ask(model: Model, x: Tensor, mask: Tensor | None) -> Tensor:
        y = model.get_submodule("experts")(x)
        return y if isinstance(y, Tensor) else y[0]

    model, x = Model(ask), torch.randn(3, 8)
    model.add_module("experts", Experts())
    for one in _pair(model, x):
        assert torch.equal(reloaded(one)(x), one(x))
        assert "this model assumes hasattr(experts," in reloaded(one).code


class Positions(nn.Module):
    """Adds to tokens what a buffer says of their places, by number."""

    places: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 4)
        self.table = nn.Embedding(12, 8)
        self.register_buffer("places", torch.arange(12).flip(0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.table(self.places[: x.shape[0]] // 2)
        return self.second(torch.relu(self.first(x)))


def test_a_plain_model_is_loaded_without_fxprune(
    without_fxprune: Callable[[nn.Module, str], str],
) -> None:
    gated = fxprune.instrument(Positions(), torch.randn(3, 8))
    close_half(gated)
    small = fxprune.finalize(gated)
    assert small.get_submodule("first").out_features == 8
    seen = without_fxprune(
        reloaded(small), "(m.places.fill_(3), m(torch.ones(3, 8)).std(0))[1].max().item()"
    )
    assert seen == "0.0"  # as all places are one, so are the rows


def test_a_second_time_nothing_is_left_of_what_saving_took() -> None:
    small = fxprune.finalize(fxprune.instrument(Positions(), torch.randn(3, 8)))
    again = fxprune.finalize(small)
    targets, before = ([str(node.target) for node in m.graph.nodes] for m in (again, small))
    assert targets == before and "places_read" in targets


class Moody(nn.Module):
    """A dropout and a rate that follow the mode, written as functions, at two depths."""

    def __init__(self, inner: nn.Module | None = None) -> None:
        super().__init__()
        self.layer, self.inner = nn.Linear(8, 8), inner

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(torch.relu(self.layer(x)), 0.5, self.training)
        x = x * (0.7 if self.training else 1.3)
        return x if self.inner is None else self.inner(x)


def _alike_in_both_modes(one: nn.Module, other: nn.Module, x: Tensor) -> None:
    seen: list[Tensor] = []
    for mode in (True, False):
        outputs: list[Tensor] = []
        for model in (one, other):
            torch.manual_seed(0)
            outputs.append(model.train(mode)(x))
        assert torch.equal(*outputs)
        seen.append(outputs[0])
    assert not torch.allclose(seen[0], seen[1])


@pytest.mark.parametrize("saved_in_training", [True, False])
def test_a_loaded_model_follows_the_mode(saved_in_training: bool) -> None:
    x = torch.randn(3, 8)
    gated = fxprune.instrument(nn.Sequential(Moody(Moody()), nn.Linear(8, 4)), x)
    close_half(gated)
    for model in (gated, fxprune.finalize(gated, fold=False)):
        loaded = reloaded(reloaded(model.train(saved_in_training)))
        _alike_in_both_modes(model, loaded, x)


def test_a_folded_model_has_one_mode() -> None:
    x = torch.randn(3, 8)
    gated = fxprune.instrument(nn.Sequential(Moody(Moody()), nn.Linear(8, 4)), x).eval()
    small = fxprune.finalize(gated)
    assert torch.allclose(small(x), gated(x), atol=1e-6)
    assert torch.equal(small.train()(x), small.eval()(x))
    assert not any("training" in str(node.target) for node in small.graph.nodes)
    assert torch.equal(reloaded(small)(x), small(x))


class Deciding(nn.Module):
    """Python that depends on data, between layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Layers(), Layers()

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.second(x) if float(x.detach().sum()) > -1e9 else x


@pytest.mark.parametrize("kind", [Layers, Deciding])
def test_a_copy_of_a_loaded_model_knows_its_inputs(kind: type[nn.Module]) -> None:
    x = torch.randn(3, 8)
    gated = fxprune.instrument(kind(), x)
    close_half(gated)
    small = fxprune.finalize(gated)
    twin = copy.deepcopy(copy.deepcopy(reloaded(gated)))
    for copied in (twin, reloaded(twin), torch.optim.swa_utils.AveragedModel(reloaded(gated))):
        again: Any = fxprune.finalize(copied)
        assert torch.equal(again(x), small(x)) and again.report.before == small.report.before


@pytest.mark.parametrize("what", [reloaded, lambda gated: copy.deepcopy(reloaded(gated))])
def test_so_does_what_it_was_compacted_to(what: Callable[[nn.Module], Any]) -> None:
    gated = fxprune.instrument(Layers(), torch.randn(3, 8))
    close_half(gated)
    compacted = fxprune.compact(what(gated))
    after = fxprune.finalize(what(compacted)).report.after
    assert after == fxprune.finalize(gated).report.after


class MadeOfData(nn.Module):
    """Numbers and tensors that are made tensors, which torch's own functions do not dispatch."""

    def __init__(self, make: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.up, self.down, self.make = nn.Linear(4, 8), nn.Linear(8, 2), make

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.make(F.relu(self.up(x))))


MADE: dict[str, Callable[[Tensor], Tensor]] = {
    "a size": lambda x: x * torch.tensor(x.shape[1]),
    "a size with a dtype": lambda x: x * torch.tensor(x.shape[1] * 0.5, dtype=x.dtype),
    "a batch": lambda x: x * torch.as_tensor(x.shape[0]),
    "sizes": lambda x: x * torch.tensor([x.shape[1], 3]).sum(),
    "sizes and a number": lambda x: x * torch.as_tensor((x.shape[0], 1.5), dtype=None).prod(),
    "a tensor": lambda x: torch.as_tensor(x),
    "a tensor of a dtype": lambda x: torch.as_tensor(x, dtype=torch.float64).to(x.dtype),
    "a tensor where it is": lambda x: torch.as_tensor(x, device=x.device, dtype=None),
}


@pytest.mark.parametrize("made", MADE)
def test_what_is_made_of_data_is_loaded_and_follows_it(made: str) -> None:
    model = MadeOfData(MADE[made])
    x, other = torch.randn(2, 3, 4), torch.randn(5, 7, 4)
    gated = reloaded(fxprune.instrument(model, x))
    assert torch.equal(gated(other), model(other))
    close_half(gated)
    small = fxprune.finalize(gated)
    torch.testing.assert_close(reloaded(small)(other), gated(other))
