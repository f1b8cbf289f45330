"""Functions that remember what they returned (`functools.lru_cache`): no trace stays in them."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.testing import close_half


@functools.lru_cache(maxsize=8)
def grid(rows: int, device: torch.device) -> Tensor:
    return torch.linspace(0, 1, rows, device=device)


@functools.cache
def forever(rows: int) -> list[Tensor]:
    return [torch.linspace(0, 1, rows)]


def around(function: Callable[..., Any]) -> Callable[..., Any]:
    remembering = functools.lru_cache(maxsize=8)(function)

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        return remembering(*args)

    return call


@around
def wrapped(rows: int) -> Tensor:
    return torch.linspace(0, 1, rows)


class Placed(nn.Module):
    """Adds to every row where it is."""

    def __init__(self, places: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.places = nn.Linear(8, 16), nn.Linear(16, 4), places
        self.scales = nn.Parameter(torch.randn(5))

    @functools.lru_cache(maxsize=8)  # noqa: B019
    def own(self, rows: int) -> Tensor:
        return torch.linspace(0, 1, rows)

    @functools.lru_cache(maxsize=8)  # noqa: B019
    def weighed(self) -> Tensor:
        return self.scales.detach() * 2

    def forward(self, x: Tensor) -> Tensor:
        rows = self.places(self, x)
        return self.second(torch.relu(self.first(x + rows.reshape(-1, 1))))


PLACES: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "a function": lambda _, x: grid(x.shape[1], x.device),
    "for ever, a list": lambda _, x: forever(x.shape[1])[0],
    "in a closure": lambda _, x: wrapped(x.shape[1]),
    "a method": lambda net, x: net.own(x.shape[1]),
    "of a parameter": lambda net, _: net.weighed(),
}


@pytest.mark.parametrize("name", PLACES)
def test_no_traced_value_stays_in_a_cache(name: str) -> None:
    grid.cache_clear()
    forever.cache_clear()
    model, x = Placed(PLACES[name]).eval(), torch.randn(2, 5, 8)
    gated = fxprune.instrument(model, x).eval()
    assert torch.equal(model(x), gated(x))
    small = fxprune.finalize(model, x)
    torch.testing.assert_close(small(x), model(x))
    for size in range(1, 9):  # of which some were run in float64
        again = Placed(PLACES[name]).eval()
        assert again(torch.randn(2, 5 if name == "of a parameter" else size, 8)).dtype is x.dtype


def test_what_else_a_cache_remembers_stays() -> None:
    grid.cache_clear()
    model, x = Placed(lambda _, x: grid(5, x.device)), torch.randn(2, 5, 8)
    known = grid(5, x.device)
    fxprune.instrument(model, x)
    assert grid(5, x.device) is known


@pytest.mark.parametrize("name", PLACES)
@pytest.mark.parametrize("warm", (False, True))
def test_sizes_that_a_function_remembers_by_stay_open(name: str, warm: bool) -> None:
    grid.cache_clear()
    forever.cache_clear()
    model, x = Placed(PLACES[name]).eval(), torch.randn(2, 5, 8)
    if warm:
        model(x)
    gated = fxprune.instrument(model, x).eval()
    assert not gated.report.assumptions
    if name != "of a parameter":
        x = torch.randn(3, 7, 8)
        assert torch.equal(gated(x), model(x))
    close_half(gated)
    small = fxprune.finalize(gated)
    assert small.report.verification is not None
    assert small.report.verification.verdict == "equal"


def test_functions_that_remember_are_what_they_were() -> None:
    before = [grid, forever, wrapped.__closure__[0].cell_contents, vars(Placed)["own"]]  # type: ignore
    fxprune.instrument(Placed(PLACES["in a closure"]), torch.randn(2, 5, 8))
    after = [grid, forever, wrapped.__closure__[0].cell_contents, vars(Placed)["own"]]  # type: ignore
    assert all(one is other for one, other in zip(before, after, strict=True))
