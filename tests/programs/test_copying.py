"""Copies of models with hooks."""

import random

import pytest
import torch
from torch import Tensor, nn

import fxprune


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
