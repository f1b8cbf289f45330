"""Hooks of a model's own code are traced like its forwards; those that listen go on listening."""

import io
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import fxprune
from fxprune.gating.owners import gates_by_name
from fxprune.testing import close_half, error
from tests.conftest import randomise, reloaded

COLLECTED: ContextVar[list[Tensor] | None] = ContextVar("collected", default=None)


def collect(module: nn.Module, args: Any, output: Tensor) -> None:
    """Keep what a layer returned, if anybody collects."""
    found = COLLECTED.get()
    if found is not None:
        found.append(output)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.act(self.up(x)))


class Collecting(nn.Module):
    """Returns what its blocks returned, if it is asked for, by hooks."""

    def __init__(self, *, collects: bool = False) -> None:
        super().__init__()
        self.blocks, self.collects = nn.Sequential(Block(), Block()), collects

    def forward(self, x: Tensor) -> Any:
        if not self.collects:
            return self.blocks(x)
        found: list[Tensor] = []
        token = COLLECTED.set(found)
        try:
            x = self.blocks(x)
        finally:
            COLLECTED.reset(token)
        return x, tuple(found)


def gated_alike(model: Any) -> Any:
    """Return a model with gates, seen to compute the same, and half of it finalised, too."""
    randomise(model)
    gated: Any = fxprune.instrument(model, torch.randn(3, 4))
    for training in (True, False):
        model.train(training)
        gated.train(training)
        x = torch.randn(5, 4)
        for one, other in zip(leaves(model(x)), leaves(gated(x)), strict=True):
            assert torch.equal(one, other)
    return gated


def leaves(output: Any) -> list[Tensor]:
    return pytree.tree_leaves(output)


@pytest.mark.parametrize("collects", [True, False])
def test_hooks_that_collect_if_anybody_does_are_traced(collects: bool) -> None:
    model = Collecting(collects=collects)
    for block in model.blocks:
        block.register_forward_hook(collect)
    gated = gated_alike(model)
    assert set(gates_by_name(gated)) == {""} and len(gated.gates.width) == 16
    close_half(gated)
    small: Any = fxprune.finalize(gated)
    assert small.get_submodule("blocks.0.up").out_features == 4
    x = torch.randn(2, 4)
    for other in (small, reloaded(small)):
        assert all(map(error_is_small, leaves(gated(x)), leaves(other(x))))


def error_is_small(one: Tensor, other: Tensor) -> bool:
    return error(one, other) < 1e-6


def doubling(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output * 2


def test_hooks_that_change_what_is_returned_are_traced() -> None:
    model = Collecting()
    model.blocks[0].register_forward_hook(doubling)
    model.blocks[1].register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    gated = gated_alike(model)
    assert set(gates_by_name(gated)) == {""} and len(gated.gates.width) == 16
    close_half(gated)
    assert fxprune.finalize(gated).report


def printing(heard: io.StringIO) -> Callable[..., None]:
    return lambda module, args, output: print("called", file=heard)


def writing(heard: io.StringIO) -> Callable[..., None]:
    def write(module: nn.Module, args: Any, output: Tensor) -> None:
        said(heard)

    return write


def said(heard: io.StringIO) -> None:
    heard.write("called")


def listing(seen: list[Tensor]) -> Callable[..., None]:
    def add(module: nn.Module, args: Any, output: Tensor) -> None:
        seen.append(output)

    return add


@pytest.mark.parametrize("kind", [printing, writing])
def test_hooks_that_tell_others_go_on_telling_them(kind: Callable[..., Any]) -> None:
    heard, model = io.StringIO(), Collecting()
    model.blocks[0].register_forward_hook(kind(heard))
    gated = gated_alike(model)
    heard.seek(0)
    heard.truncate()
    gated(torch.randn(2, 4))
    assert heard.getvalue().strip() == "called"


def test_hooks_that_write_beside_the_model_go_on_writing() -> None:
    model, seen = Collecting(), list[Tensor]()
    model.blocks[0].register_forward_hook(listing(seen))
    gated = gated_alike(model)
    seen.clear()
    gated(torch.randn(2, 4))
    assert [type(one) for one in seen] == [Tensor]


def test_backward_hooks_are_never_traced() -> None:
    heard: list[str] = []
    model = Collecting()
    model.blocks[0].register_full_backward_hook(lambda *call: heard.append("called"))
    gated: Any = fxprune.instrument(randomise(model), torch.randn(3, 4))
    gated(torch.randn(3, 4, requires_grad=True)).sum().backward()
    assert heard == ["called"]
