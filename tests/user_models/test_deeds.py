"""What a forward writes into its arguments, or beside the model, is done by all, or refused."""

import copy
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxprune
from fxprune.errors import FxpruneError
from fxprune.testing import close_half
from tests.conftest import Layers, randomise

LOG: list[Any] = []
NOTES: dict[str, Any] = {"calls": 0}
MASKS: dict[Any, Tensor] = {}


class Recorder:
    """An object that keeps what it is given."""

    def __init__(self) -> None:
        self.seen: list[Any] = []
        self.last: Any = None

    def add(self, value: Any) -> None:
        self.seen.append(value)


RECORDER = Recorder()


class Net(nn.Module):
    """A model that does something with what a part of it computed."""

    def __init__(self, deed: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.layers, self.deed = Layers(), deed
        self.wide, self.head = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor, cache: Any = None) -> Tensor:
        h = self.layers(x)
        self.deed(cache, h)
        return self.head(torch.relu(self.wide(h)))


class Part(nn.Module):
    """A part that does something with what it is given."""

    def __init__(self, deed: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.layers, self.deed = Layers(), deed

    def forward(self, x: Tensor, cache: Any = None) -> Tensor:
        h = self.layers(x)
        self.deed(cache, h)
        return h


class Outer(nn.Module):
    """A model with such a part."""

    def __init__(self, deed: Callable[[Any, Tensor], Any], *, own: bool = False) -> None:
        super().__init__()
        self.part, self.own = Part(deed), own
        self.wide, self.head = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor, cache: Any = None) -> Tensor:
        if self.own:
            cache = []
        h = torch.relu(self.wide(self.part(x, cache)))
        return self.head(h) + (cache[0].mean() if self.own else 0)


def append(cache: Any, h: Tensor) -> None:
    cache.append(h)


def append_nested(cache: Any, h: Tensor) -> None:
    cache[0]["hidden"].append(h)


def put(cache: Any, h: Tensor) -> None:
    cache["hidden"] = h


def update(cache: Any, h: Tensor) -> None:
    cache.update(hidden=h, twice=2 * h)


def clear(cache: Any, h: Tensor) -> None:
    cache.clear()


def count(cache: Any, h: Tensor) -> None:
    cache["calls"] = cache.get("calls", 0) + 1


def add(cache: Any, h: Tensor) -> None:
    cache.add(h)


def set_last(cache: Any, h: Tensor) -> None:
    cache.last = h


def append_to_seen(cache: Any, h: Tensor) -> None:
    cache.seen.append(h)


ARGUMENTS: list[tuple[Callable[[Any, Tensor], Any], Callable[[], Any]]] = [
    (append, list),
    (append_nested, lambda: [{"hidden": [torch.zeros(5, 8)]}]),
    (put, dict),
    (put, lambda: {"hidden": torch.zeros(5, 8)}),
    (put, OrderedDict),
    (update, dict),
    (clear, lambda: [torch.zeros(5, 8)]),
    (count, dict),
    (set_last, Recorder),
    (add, Recorder),
    (append_to_seen, Recorder),
]


def contents(value: Any) -> Any:
    return vars(value) if isinstance(value, Recorder) else value


@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize(("deed", "make"), ARGUMENTS)
@pytest.mark.parametrize("kind", [Net, Outer])
def test_what_is_written_into_arguments_is_written_by_all(
    kind: Any, deed: Callable[[Any, Tensor], Any], make: Callable[[], Any], check: bool
) -> None:
    model, x = randomise(kind(deed)).eval(), torch.randn(5, 8)
    gated: Any = fxprune.instrument(model, (x, make()), check=check)
    refused = any("cannot be traced" in str(change) for change in gated.report.refused)
    assert refused or kind is Outer  # an object is handed on to a part that is kept whole
    close_half(gated)
    small: Any = fxprune.finalize(gated, (x, make()))
    assert any(one.out_features == 8 for one in small.modules() if isinstance(one, nn.Linear))
    twin = fxprune.instrument(model, (x, make()))
    for one, other, atol in ((model, twin, 0.0), (gated, small, 1e-5)):
        caches = make(), make()
        expected, found = (m.eval()(x, c) for m, c in zip((one, other), caches, strict=True))
        torch.testing.assert_close(found, expected, rtol=0, atol=atol)
        torch.testing.assert_close(*map(contents, caches), rtol=0, atol=1e-5)


def test_the_refusal_names_argument_and_line() -> None:
    class Simple(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(8))

        def forward(self, x: Tensor, cache: list[Tensor]) -> Tensor:
            h = x * self.weight
            cache.append(h)
            return h

    with pytest.raises(FxpruneError, match=r"argument 'cache'.* at .*test_deeds\.py:\d+.*return"):
        fxprune.instrument(Simple(), (torch.randn(5, 8), []))


def test_a_list_of_the_models_own_may_be_filled_by_its_parts() -> None:
    model, x = randomise(Outer(append, own=True)).eval(), torch.randn(5, 8)
    gated: Any = fxprune.instrument(model, x)
    assert not gated.report.refused
    assert torch.equal(gated.eval()(x), model(x))


def log(_: Any, h: Tensor) -> None:
    LOG.append(h)


def log_by_function(_: Any, h: Tensor) -> None:
    log(None, h)


def note(_: Any, h: Tensor) -> None:
    NOTES["hidden"] = h


def count_calls(_: Any, h: Tensor) -> None:
    NOTES["calls"] += 1


def record(_: Any, h: Tensor) -> None:
    RECORDER.add(h)


def set_on_object(_: Any, h: Tensor) -> None:
    RECORDER.last = h


def closed_over() -> Callable[[Any, Tensor], None]:
    seen = LOG

    def keep(_: Any, h: Tensor) -> None:
        seen.append(h)

    return keep


def forgotten() -> None:
    LOG.clear()
    NOTES.clear()
    NOTES["calls"] = 0
    RECORDER.seen.clear()
    RECORDER.last = None


def written() -> Any:
    return copy.copy(LOG), dict(NOTES), list(RECORDER.seen), RECORDER.last


@pytest.mark.parametrize(("training", "check"), [(True, True), (False, False)])
@pytest.mark.parametrize("kind", [Net, Outer])
@pytest.mark.parametrize(
    "deed",
    [log, log_by_function, note, count_calls, record, set_on_object, closed_over()],
)
def test_what_is_written_beside_the_model_is_written_by_all(
    deed: Callable[[Any, Tensor], Any], kind: Any, training: bool, check: bool
) -> None:
    model, x = randomise(kind(deed)).train(training), torch.randn(5, 8)
    forgotten()
    gated: Any = fxprune.instrument(model, x, check=check)
    small: Any = fxprune.finalize(gated)
    found: list[Any] = []
    for one in (model, gated, small):
        forgotten()
        one.eval()(x)
        found.append(written())
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-5, atol=1e-5)
    forgotten()


class Masked(nn.Module):
    """A model with a memo beside it, as many keep masks."""

    def __init__(self, key: Callable[[int], Any]) -> None:
        super().__init__()
        self.layers, self.key = Layers(), key

    def forward(self, x: Tensor) -> Tensor:
        key = self.key(x.shape[1])
        if key not in MASKS:
            MASKS[key] = torch.ones(1, x.shape[1])
        return self.layers(x) * MASKS[key]


@pytest.mark.parametrize("key", [lambda n: n, lambda n: (n, "cpu"), lambda n: "mask"])
def test_memos_beside_the_model_are_no_matter(key: Callable[[int], Any]) -> None:
    MASKS.clear()
    model, x = randomise(Masked(key)).eval(), torch.randn(5, 8)
    gated: Any = fxprune.instrument(model, x)
    assert all(type(value) is Tensor for value in MASKS.values())
    assert torch.equal(gated.eval()(x), model(x))


def in_place(x: Tensor) -> Tensor:
    return x.add_(1)


def all_of_it(x: Tensor) -> Tensor:
    x[:] = 0.5
    return x


def a_part_of_it(x: Tensor) -> Tensor:
    x[:, 0] = 0
    return x


def augmented(x: Tensor) -> Tensor:
    x += 1
    return x


class InPlace(nn.Module):
    """A model that begins by overwriting its input."""

    def __init__(self, deed: Callable[[Tensor], Tensor], *, nested: bool = False) -> None:
        super().__init__()
        self.layers, self.head, self.deed, self.nested = Layers(), nn.Linear(8, 4), deed, nested

    def forward(self, x: Any) -> Tensor:
        x = x[0] if self.nested else x
        return self.head(torch.relu(self.layers(self.deed(x))))


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize(
    "deed", [in_place, all_of_it, a_part_of_it, augmented, F.relu_, nn.ReLU(inplace=True)]
)
def test_an_overwritten_input_is_reported(deed: Callable[[Tensor], Tensor], nested: bool) -> None:
    model, x = randomise(InPlace(deed, nested=nested)).eval(), torch.randn(5, 8)
    given: Any = ([x.clone()],) if nested else x.clone()
    gated: Any = fxprune.instrument(model, given)
    close_half(gated)
    small: Any = fxprune.finalize(gated)
    for one in (gated, small):
        assert any("overwrites this argument" in str(change) for change in one.report.refused)
    for _ in range(2):
        args = [[x.clone()] if nested else x.clone() for _ in range(4)]
        assert torch.equal(fxprune.instrument(model, given).eval()(args[0]), model(args[1]))
        torch.testing.assert_close(small(args[2]), gated.eval()(args[3]))
