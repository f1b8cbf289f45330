"""Models that run other operators in training: noise, auxiliary heads, losses, second views."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

import fxprune
from fxprune.errors import FxpruneError
from fxprune.gating.penalties import cost_of
from fxprune.testing import close_half
from fxprune.tracing.two_modes import CodeGenOfBothModes, join
from tests.conftest import randomise, reloaded

IMAGES = torch.randn(6, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Noisy(nn.Module):
    """Noise on the images and in the features, statistics kept by hand, two auxiliary heads."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.second, self.head = nn.Conv2d(16, 12, 3, padding=1), nn.Linear(12, 5)
        self.beside = nn.Conv2d(16, 4, 1)
        self.auxiliary = nn.Sequential(nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 5))
        self.register_buffer("seen", torch.zeros(12))

    def forward(self, x: Tensor) -> Any:
        if self.training:
            x = x + 0.1 * torch.randn_like(x)
        x = F.relu(self.norm(self.first(x)), inplace=True)
        y = torch.relu(self.second(x))
        if self.training:
            y = y * (1 + 0.1 * torch.randn_like(y))
        features = y.mean((2, 3))
        if not self.training:
            return self.head(features)
        seen: Any = self.seen
        seen.mul_(0.9).add_(features.detach().mean(0), alpha=0.1)
        return self.head(features), self.auxiliary(features), self.beside(x)


class Inside(nn.Module):
    """The same, and more around it."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.noisy = nn.Conv2d(3, 3, 1), Noisy()

    def forward(self, x: Tensor) -> Any:
        return self.noisy(F.relu(self.before(x)))


class TwoViews(nn.Module):
    """An encoder that sees a second view in training, behind a projection."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            *(nn.Conv2d(3, 10, 3), nn.BatchNorm2d(10), nn.ReLU(inplace=True)),
            *(nn.Conv2d(10, 8, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(128, 6)),
        )
        self.projection = nn.Sequential(nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 4))

    def forward(self, x: Tensor) -> Any:
        if not self.training:
            return self.encoder(x)
        one, other = self.encoder(x), self.encoder(x.flip(3))
        return self.projection(one), self.projection(other)


class Chain(nn.Module):
    """Layers that could be one, which take noise in between in training."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(size, 8) for size in (3, 8, 8))
        self.last = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = x.mean(2)[:, :, :3]
        for layer in self.layers:
            x = F.relu(layer(x))
            if self.training:
                x = x + torch.randn_like(x)
        return self.last(x)


class Loss(nn.Module):
    """A loss is returned in training, and wants labels."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU())
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        logits = self.head(self.body(x).amax((2, 3)))
        if self.training and labels is not None:
            return {"loss": F.cross_entropy(logits, labels), "logits": logits}
        return {"logits": logits}


class Deeper(nn.Module):
    """A layer more in training than in evaluation, called from the same line."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 16), nn.Linear(16, 2)
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x.mean((2, 3))))
        for layer in self.layers if self.training else self.layers[1:]:
            x = F.relu(layer(x))
        return self.last(x)


class Overwriting(nn.Module):
    """What is given is overwritten, in evaluation before training would read it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.beside = (
            nn.Conv2d(3, 6, 1),
            nn.Conv2d(6, 2, 1),
            nn.Conv2d(6, 2, 1),
        )

    def forward(self, x: Tensor) -> Any:
        x = self.first(F.relu(x, inplace=True))
        y = self.last(F.relu(x))
        return (y, self.beside(torch.relu(x))) if self.training else y


class Rereading(nn.Module):
    """What is returned in evaluation was overwritten under another name."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 16), nn.Linear(16, 8)
        self.beside = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Any:
        x = self.second(F.relu(self.first(x.mean((2, 3)))))
        x.view(-1).relu_()
        return (x, self.beside(x), torch.randn_like(x)) if self.training else x


LABELS = torch.tensor([0, 1, 2, 3, 0, 1])
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[Tensor, ...]]] = {
    "noise and auxiliary heads": (Noisy, (IMAGES,)),
    "noise in a part": (Inside, (IMAGES,)),
    "two views": (TwoViews, (IMAGES,)),
    "a chain of layers": (Chain, (IMAGES,)),
    "a loss": (Loss, (IMAGES, LABELS)),
    "a layer more": (Deeper, (IMAGES,)),
    "inputs overwritten": (Overwriting, (IMAGES,)),
    "read by an older name": (Rereading, (IMAGES,)),
}


# Noise that is added to what a gate gives is read, of a closed one as well; and in training a head
# may read what no gate closes.
STAYING = ("a chain of layers", "inputs overwritten")
SHRINKING = [name for name in MODELS if name not in STAYING]


def built(name: str) -> tuple[Any, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    kind, inputs = MODELS[name]
    return randomise(kind()).double().train(), inputs


def run(model: nn.Module, inputs: tuple[Tensor, ...], *, training: bool) -> list[Tensor]:
    """Run a copy in a mode, drawing the same numbers every time; its buffers come last."""
    twin = copy.deepcopy(model).train(training)
    torch.manual_seed(3)
    leaves = tree_leaves(twin(*(one.clone() for one in inputs)))
    kept = dict(twin.named_buffers())
    return [*leaves, *(kept[name] for name in ("seen", "noisy.seen") if name in kept)]


def gated(name: str) -> tuple[Any, Any, tuple[Tensor, ...]]:
    model, inputs = built(name)
    return model, fxprune.instrument(model, inputs), inputs


@pytest.mark.parametrize("instrumented_in", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_a_gated_model_does_in_each_mode_what_the_model_does(
    name: str, instrumented_in: bool
) -> None:
    model, inputs = built(name)
    ours: Any = fxprune.instrument(model.train(instrumented_in), inputs)
    assert len(ours.gates.width_sites) >= 1
    for mode in (True, False):
        expected, found = (run(one, inputs, training=mode) for one in (model, ours))
        assert len(found) == len(expected) and all(map(torch.equal, found, expected))


@pytest.mark.parametrize("name", SHRINKING)
def test_gates_close_the_same_units_in_both_modes(name: str) -> None:
    _, ours, inputs = gated(name)
    close_half(ours)
    small: Any = fxprune.finalize(ours, fold=False)
    assert small.report.after.parameters < small.report.before.parameters
    for mode in (True, False):
        whole, part = (run(one, inputs, training=mode) for one in (ours, small))
        assert max(one.std() for one in whole if one.dim()) > 1e-3
        torch.testing.assert_close(part[: len(whole)], whole, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", MODELS)
def test_a_finalised_model_is_one_of_evaluation(name: str) -> None:
    _, ours, inputs = gated(name)
    close_half(ours)
    small = fxprune.finalize(ours)
    expected = run(ours, inputs, training=False)
    for mode in (True, False):
        torch.testing.assert_close(
            run(small, inputs, training=mode)[:1], expected[:1], rtol=1e-9, atol=1e-10
        )
    names = {name.split(".")[0] for name, _ in small.named_parameters()}
    assert not names & {"auxiliary", "beside", "projection"}


@pytest.mark.parametrize("name", MODELS)
def test_costs_are_those_of_evaluation(name: str) -> None:
    _, ours, _ = gated(name)
    close_half(ours)
    after: Any = fxprune.finalize(ours).report.after
    found = [float(cost_of(ours.gates, kind).detach()) for kind in ("parameters", "macs")]
    assert found == [after.parameters, after.macs]


@pytest.mark.parametrize("name", SHRINKING)
def test_a_compacted_model_trains_on_alike(name: str) -> None:
    _, ours, inputs = gated(name)
    close_half(ours)
    small: Any = fxprune.compact(ours)
    numbers = [sum(p.numel() for p in one.parameters()) for one in (small, ours)]
    assert numbers[0] < numbers[1]
    losses = [_losses(one.train(), inputs) for one in (small, ours)]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-10, atol=1e-10)
    assert len({round(loss, 6) for loss in losses[0]}) == 3


def _loss(model: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
    leaves: list[Tensor] = tree_leaves(model(*(one.clone() for one in inputs)))
    return torch.stack([leaf.square().mean() for leaf in leaves]).sum()


def _losses(model: Any, inputs: tuple[Tensor, ...]) -> list[float]:
    """Train a few steps, in which no dead unit comes back."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    found: list[float] = []
    for step in range(3):
        torch.manual_seed(step)
        loss = _loss(model, inputs)
        optimizer.zero_grad()
        loss.backward()
        width = model.gates.width
        width.grad[width.detach() < 0.5] = 0
        optimizer.step()
        found.append(float(loss.detach()))
    return found


@pytest.mark.parametrize("name", MODELS)
def test_gates_are_trained_in_training(name: str) -> None:
    _, ours, inputs = gated(name)
    _loss(ours.train(), inputs).backward()
    assert ours.gates.width.grad.abs().gt(0).float().mean() > 0.5


@pytest.mark.parametrize("name", ["noise and auxiliary heads", "a loss", "inputs overwritten"])
@pytest.mark.parametrize("what", ["gated", "fold=False", "compacted"])
def test_both_modes_are_saved(name: str, what: str) -> None:
    _, ours, inputs = gated(name)
    close_half(ours)
    if what == "fold=False":
        ours = fxprune.finalize(ours, fold=False)
    if what == "compacted":
        ours = fxprune.compact(ours)
    loaded = reloaded(ours)
    again = copy.deepcopy(loaded)
    for mode in (True, False):
        expected = run(ours, inputs, training=mode)
        for one in (loaded, again):
            assert all(map(torch.equal, run(one, inputs, training=mode), expected))
    if what != "fold=False":
        small = fxprune.finalize(loaded, inputs)
        expected = run(ours, inputs, training=False)[:1]
        found = run(small, inputs, training=False)[:1]
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


def test_a_plain_model_that_is_not_folded_keeps_what_it_does_in_training() -> None:
    model, inputs = built("noise and auxiliary heads")
    with torch.no_grad():
        model.first.weight[::2] = 0
        model.first.bias[::2] = 0
        model.norm.weight[::2] = 0
        model.norm.bias[::2] = 0
    small: Any = fxprune.finalize(model, inputs, fold=False)
    assert small.first.weight.shape[0] == 8
    for mode in (True, False):
        expected, found = (run(one, inputs, training=mode) for one in (model, small))
        torch.testing.assert_close(found[: len(expected)], expected, rtol=1e-9, atol=1e-10)


@pytest.mark.filterwarnings("ignore")
def test_both_modes_are_compiled() -> None:
    _, ours, inputs = gated("two views")
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    for mode in (True, False, True):
        expected = run(ours, inputs, training=mode)
        ours.train(mode)
        found = tree_leaves(compiled(*inputs))
        torch.testing.assert_close(found, expected[: len(found)], rtol=1e-9, atol=1e-10)


class Smooth(nn.Module):
    """A nonlinearity is another one in training."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        x = F.gelu(self.second(x)) if self.training else F.relu(self.second(x))
        return self.last(x)


def test_a_gate_goes_where_both_modes_do_the_same() -> None:
    ours: Any = fxprune.instrument(randomise(Smooth()).train(), torch.randn(4, 8))
    assert [site.name for site in ours.gates.width_sites] == ["relu"]
    assert "relu_1: no gate: not so in training" in str(ours.report)


class Remembering(nn.Module):
    """What training leaves behind in an attribute, no graph would."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 2)
        self.penalties_of_mine: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        if self.training:
            self.penalties_of_mine.append(x.square().mean())
        return self.last(x)


def scaling(factor: float) -> Callable[[Tensor], Tensor]:
    def scaled(value: Tensor) -> Tensor:
        return value * factor

    return scaled


def test_functions_of_one_name_are_told_apart() -> None:
    graphs = [fx.Graph(), fx.Graph()]
    for graph, factor in zip(graphs, (2.0, 3.0), strict=True):
        graph.output(graph.call_function(scaling(factor), (graph.placeholder("x"),)))
    evaluation, training = graphs
    join(evaluation, training)
    evaluation.set_codegen(CodeGenOfBothModes())
    module, x = fx.GraphModule(nn.Module(), evaluation), torch.randn(3)
    assert torch.equal(module.train()(x), 3 * x) and torch.equal(module.eval()(x), 2 * x)


class Pooling(nn.Module):
    """A head for training that wants larger maps than evaluation does."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.beside = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Any:
        x = F.relu(self.first(x))
        if self.training:
            return self.last(x), self.beside(F.avg_pool2d(x, 5).mean((2, 3)))
        return self.last(x)


def test_inputs_too_small_for_training_are_those_of_evaluation() -> None:
    model, x = randomise(Pooling()), torch.randn(2, 3, 4, 4)
    with pytest.raises(FxpruneError, match=r"avg_pool2d.* fails on the example inputs"):
        fxprune.instrument(model.train(), x)
    ours: Any = fxprune.instrument(model.eval(), x)
    assert close_half(ours) == 4
    assert any(change.where == "training" for change in ours.report.refused)
    for fold in (True, False):
        small: Any = fxprune.finalize(ours, fold=fold)
        assert small.report.verification.verdict == "equal"
    plain: Any = fxprune.finalize(model, x, fold=False)
    assert any(change.where == "training" for change in plain.report.refused)


class Detached(nn.Module):
    """In training, gradients of what evaluation gives stop halfway."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        return self.last(F.relu(self.second(x.detach() if self.training else x)))


def test_gradients_are_those_of_training() -> None:
    ours: Any = fxprune.instrument(randomise(Detached()).train(), torch.randn(4, 8))
    assert [site.name for site in ours.gates.width_sites] == ["relu_1"]
    assert "relu: no gate: no gradient reaches it" in str(ours.report)


class Deciding(nn.Module):
    """Python that depends on data, around a part that does not."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x) if float(x.detach().sum()) > -1e9 else x


class Beside(nn.Module):
    """A head for training that cannot be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.beside = nn.Linear(8, 8), nn.Linear(8, 2), Deciding()

    def forward(self, x: Tensor) -> Any:
        x = F.relu(self.first(x))
        return (self.last(x), self.beside(x)) if self.training else self.last(x)


def test_what_training_alone_calls_has_no_gates() -> None:
    model, x = randomise(Beside()).train(), torch.randn(4, 8)
    ours: Any = fxprune.instrument(model, x)
    assert not ours._fxprune["regions"] and len(ours.gates.width) == 8
    for mode in (True, False):
        assert all(
            map(torch.equal, run(ours, (x,), training=mode), run(model, (x,), training=mode))
        )
    close_half(ours)
    assert fxprune.finalize(ours).report.after == fxprune.finalize(ours.eval()).report.after


class Scaled(nn.Module):
    """Weights that are computed, otherwise in training."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        scale = 1.0 + 0.1 * torch.rand_like(self.first.weight) if self.training else 1.5
        x = F.relu(F.linear(x, self.first.weight * scale, self.first.bias))
        return self.last(F.relu(self.second(x)))


def test_weights_that_training_computes_otherwise_stay_what_they_are() -> None:
    model, x = randomise(Scaled()).double().train(), torch.randn(4, 8).double()
    ours: Any = fxprune.instrument(model, x)
    assert close_half(ours) == 4  # of the second layer
    small: Any = fxprune.finalize(ours, fold=False)
    assert small.second.out_features == 4
    for mode in (True, False):
        expected = run(ours, (x,), training=mode)
        torch.testing.assert_close(run(small, (x,), training=mode), expected, rtol=1e-9, atol=1e-10)


class Backbone(nn.Module):
    """Noise in training, between layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        if self.training:
            x = x + torch.randn_like(x)
        return self.last(F.relu(self.second(x)))


class Tuned(nn.Module):
    """A head on a backbone, with another one for training."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.head, self.beside = Backbone(), nn.Linear(8, 4), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Any:
        x = torch.relu(self.backbone(x))
        return (self.head(x), self.beside(x)) if self.training else self.head(x)


def drawn(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Run a model as it is, drawing the same numbers every time."""
    torch.manual_seed(3)
    return tree_leaves(model(x))


@pytest.mark.parametrize("training", [True, False])
def test_a_model_with_a_part_in_another_mode_is_gated_in_parts(training: bool) -> None:
    model, x = randomise(Tuned()).train(training), torch.randn(4, 8)
    model.get_submodule("backbone").train(not training)
    ours = fxprune.instrument(model, x)
    assert all(map(torch.equal, drawn(ours, x), drawn(model, x)))
    assert "backbone is in" in str(ours.report) and "of the whole model" in str(ours.report)
    assert close_half(ours) > 0
    plain = fxprune.finalize(model, x)  # which is one of evaluation, whatever it is given in
    assert torch.equal(plain(x), model.eval()(x)) and "the whole" not in str(plain.report)


@pytest.mark.parametrize("how", ["gated", "copied", "saved", "compacted", "fold=False"])
def test_a_part_that_is_put_into_another_mode_is_refused(how: str) -> None:
    model, x = randomise(Tuned()).train(), torch.randn(4, 8)
    ours: Any = fxprune.instrument(model, x)
    if how in ("copied", "saved"):
        ours = copy.deepcopy(reloaded(ours) if how == "saved" else ours)
    if how in ("compacted", "fold=False"):
        close_half(ours)
        ours = fxprune.compact(ours) if how == "compacted" else fxprune.finalize(ours, fold=False)
    for mode in (True, False):
        ours.train(mode)
        drawn(ours, x)
        ours.backbone.train(not mode)
        with pytest.raises(FxpruneError, match=r"backbone is in .* of the whole model"):
            drawn(ours, x)
    small = fxprune.finalize(ours, x)
    assert "require_mode" not in small.code


class Frozen(Tuned):
    """Its backbone stays as it is in evaluation, whatever happens."""

    def train(self, mode: bool = True) -> "Frozen":
        super().train(mode)
        self.backbone.eval()
        return self


def test_a_part_that_train_leaves_alone_stays_as_it_is() -> None:
    model, x = randomise(Frozen()).train(), torch.randn(4, 8)
    ours = fxprune.instrument(model, x)
    for one in (ours, copy.deepcopy(ours), reloaded(ours)):
        for mode in (True, False):
            assert all(map(torch.equal, drawn(one.train(mode), x), drawn(model.train(mode), x)))


def test_the_choice_of_a_mode_is_no_operator_to_report() -> None:
    _, ours, _ = gated("noise and auxiliary heads")
    small = fxprune.finalize(ours, fold=False)
    assert "in_either_mode" not in str(small.report) + str(fxprune.inspect(ours))


def test_what_is_kept_in_training_only_is_refused() -> None:
    with pytest.raises(FxpruneError, match="sets penalties_of_mine in training only"):
        fxprune.instrument(Remembering().train(), torch.randn(3, 4))


def test_onnx_is_of_evaluation(tmp_path: Any) -> None:
    model, inputs = built("noise and auxiliary heads")
    inputs = tuple(one.float() for one in inputs)
    ours = fxprune.instrument(model.float(), inputs)
    check = fxprune.export_onnx(ours, tmp_path / "model.onnx")
    assert check.outputs == ("output",) and max(check.errors.values()) < 1e-4
