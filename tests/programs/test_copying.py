"""Copies of models with hooks."""

import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)

import fxprune
from fxprune.errors import ModelError


class Augmented(nn.Module):
    """Draws a number in Python, and has a hook that only looks."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        self.body[1].register_forward_hook(lambda *call: None)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x * random.random())


def test_a_hook_is_not_said_to_write_where_a_model_draws() -> None:
    with pytest.raises(fxprune.TraceError, match=r"draws random numbers \(Python's random\)"):
        fxprune.instrument(Augmented(), torch.randn(3, 4))


@pytest.mark.parametrize("kind", [nn.Linear, nn.Sequential])
def test_hooks_of_all_modules_that_change_outputs_are_said_to(kind: type[nn.Module]) -> None:
    def double(module: nn.Module, args: Any, output: Tensor) -> Any:
        return output * 2 if isinstance(module, kind) else None

    model, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)), torch.randn(2, 4)
    handle = register_module_forward_hook(double)
    try:
        with pytest.raises(ModelError, match=r"a hook of all modules .* changes what Sequential"):
            fxprune.instrument(model, x)
    finally:
        handle.remove()


def test_hooks_of_all_modules_that_only_look_are_called_afterwards_too() -> None:
    seen: list[nn.Module] = []
    model, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)), torch.randn(2, 4)
    handle = register_module_forward_pre_hook(lambda module, args: seen.append(module))
    try:
        gated: Any = fxprune.instrument(model, x)
        seen.clear()
        assert torch.equal(gated(x), model(x)) and seen
    finally:
        handle.remove()
