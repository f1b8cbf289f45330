"""Models that compute a part of what they do without gradients."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import fxprune
from fxprune.programs.program import capture
from fxprune.testing import close_half
from tests.conftest import randomise, reloaded

X = torch.randn(6, 3, 6, 6, dtype=torch.float64)


def encoder() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True)),
        *(nn.Conv2d(8, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(inplace=True)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)),
    )


class Teacher(nn.Module):
    """What a frozen copy of the encoder says weighs what the encoder says."""

    def __init__(self) -> None:
        super().__init__()
        self.student, self.teacher, self.head = encoder(), encoder(), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Any:
        with torch.no_grad():
            target = F.normalize(self.teacher(x.flip(3)), dim=1)
        return self.head(self.student(x) * target)


class Momentum(Teacher):
    """A teacher in training only, in a method, whose mean is kept; a list leaves the block."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("calls", torch.zeros(()))

    @torch.no_grad()
    def targets(self, x: Tensor, own: Tensor) -> Any:
        mean: Any = self.mean
        target = self.teacher(x)
        mean.mul_(0.9).add_(own.mean(0), alpha=0.1)
        self.calls += 1
        return (target - mean).chunk(2), target.argmax(1), F.one_hot(target.argmax(1), 4)

    def forward(self, x: Tensor) -> Any:
        own = self.student(x)
        if not self.training:
            return self.head(own)
        (first, second), best, hot = self.targets(x, own)
        return self.head(own), torch.cat([first, second]) * own, best, hot * own


class Inside(nn.Module):
    """The same, in a part."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inside, self.last = nn.Conv2d(3, 3, 1), Teacher(), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.inside(F.relu(self.first(x))))


class Codes(nn.Module):
    """A code book: what is nearest is looked for without gradients, which pass it by."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder(), nn.Sequential(nn.Linear(4, 8), nn.ReLU())
        self.last, self.book = nn.Linear(8, 3), nn.Parameter(torch.randn(5, 4))

    def forward(self, x: Tensor) -> Any:
        x = self.encoder(x)
        with torch.inference_mode(False), torch.no_grad():
            nearest = torch.cdist(x, self.book).argmin(1)
            scale = self.book.norm(dim=1).clamp_(min=0.1)
        code = self.book[nearest]
        return self.last(self.decoder(x + (code - x).detach())), (code - x) / scale[nearest, None]


class Switching(nn.Module):
    """No statistics' gradient, whichever way that is said."""

    def __init__(self, switch: Callable[[], AbstractContextManager[Any]]) -> None:
        super().__init__()
        self.switch = switch
        self.first, self.last = nn.Linear(8, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x.flatten(1)[:, :8])
        with self.switch():
            mean, deviation = x.mean(0), x.std(0)
        return self.last(F.relu((x - mean) / (deviation + 1)))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "teacher": Teacher,
    "momentum": Momentum,
    "inside": Inside,
    "codes": Codes,
    "no_grad": lambda: Switching(torch.no_grad),
    "set_grad_enabled": lambda: Switching(lambda: torch.set_grad_enabled(False)),
}


def step(model: nn.Module, mode: bool) -> list[Tensor | None]:
    """Return outputs, gradients, and buffers."""
    model.train(mode).zero_grad()
    outputs = [one for one in tree_leaves(model(X)) if one.is_floating_point()]
    torch.stack([one.square().mean() for one in outputs]).sum().backward()
    own = {n: p.grad for n, p in model.named_parameters() if "gates" not in n}
    held = {n: b for n, b in model.named_buffers() if "gates" not in n}
    return [*outputs, *(found[name] for found in (own, held) for name in sorted(found))]


def alike(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return torch.equal(one, other) and one.requires_grad == other.requires_grad


def built(name: str) -> Any:
    return randomise(MODELS[name]()).double()


@pytest.mark.parametrize("instrumented_in", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_gradients_go_where_they_went(name: str, instrumented_in: bool) -> None:
    model = built(name)
    gated: Any = fxprune.instrument(model.train(instrumented_in), X)
    assert len(gated.gates.width_sites) >= 1  # it is one program
    for mode in (True, False, True):
        expected, found = step(model, mode), step(gated, mode)
        own = {n for n, _ in gated.named_parameters() if "gates" not in n}
        assert own == {n for n, _ in model.named_parameters()}
        assert len(found) <= len(expected) and all(map(alike, found, expected))


@pytest.mark.parametrize("name", MODELS)
def test_what_gets_no_gradient_has_no_gates_and_is_finalised(name: str) -> None:
    gated: Any = fxprune.instrument(built(name), X)
    assert not any("teacher" in site.name for site in gated.gates.width_sites)
    close_half(gated)
    gated.eval()
    for one in (fxprune.finalize(gated), fxprune.finalize(gated, fold=False).eval()):
        for found, expected in zip(tree_leaves(one(X)), tree_leaves(gated(X)), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


def test_batch_norms_are_folded_there_too() -> None:
    small: Any = fxprune.finalize(built("teacher"), X)
    assert not any(isinstance(part, nn.BatchNorm2d) for part in small.modules())
    assert small(X).requires_grad
    detached = small.graph.find_nodes(op="call_method", target="detach")
    assert len(detached) < 5


@pytest.mark.parametrize("name", ["teacher", "momentum", "codes"])
def test_copies_and_compacted_models_keep_to_it(name: str) -> None:
    gated: Any = fxprune.instrument(built(name).train(), X)
    close_half(gated)
    small: Any = fxprune.compact(gated)
    for one in (reloaded(gated), small, reloaded(small)):
        expected, found = (tree_leaves(each.train()(X)) for each in (gated, one))
        gated.load_state_dict(gated.state_dict())
        for a, b in zip(found, expected, strict=True):
            assert a.requires_grad == b.requires_grad
            if name != "momentum":  # its mean has moved
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["teacher", "momentum"])
def test_it_is_compiled(name: str) -> None:
    gated: Any = fxprune.instrument(built(name).train(), X)
    torch.compiler.reset()
    compiled = torch.compile(reloaded(gated), backend="aot_eager", fullgraph=True)
    for found, expected in zip(tree_leaves(compiled(X)), tree_leaves(gated(X)), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)
        assert found.requires_grad == expected.requires_grad


class Writing(nn.Module):
    """Writes, without gradients, into what has some."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.first, self.scale = nn.Linear(8, 12), nn.Parameter(torch.ones(12))
        self.last = nn.Sequential(nn.ReLU(), nn.Linear(12, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x.flatten(1)[:, :8])
        with torch.no_grad():
            parts = x.chunk(2, 1)
            if self.how == "parameter":
                self.scale.clamp_(max=2)
            if self.how == "value":
                x.clamp_(max=2)
            if self.how == "inplace":
                F.leaky_relu(x, 0.5, True)
            if self.how == "part":
                x[:, 0] = 1
            if self.how == "list":
                torch._foreach_mul_([x], 2)  # pyright: ignore[reportPrivateImportUsage]
        if self.how == "structure":
            return self.last(torch.cat(parts, 1) * x)
        return self.last(x * self.scale)


@pytest.mark.parametrize("how", ["parameter", "value", "inplace", "part", "list", "structure"])
def test_what_no_graph_says_is_refused(how: str) -> None:
    model = randomise(Writing(how)).double()
    with pytest.raises(fxprune.TraceError, match=r"gradients off|while gradients are off"):
        capture(model, ((X,), {}))
    whole = nn.Sequential(model, nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    gated: Any = fxprune.instrument(whole, X)
    for mode in (True, False):
        one, other = (step(each, mode) for each in (whole, gated))
        assert all(map(alike, one, other))
