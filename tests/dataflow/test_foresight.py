"""What is foretold of a cut program is what a run of it shows."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxprune.passes.dead_channels import eliminate_dead_channels
from fxprune.programs.observation import observe
from fxprune.programs.program import Program, capture
from tests.conftest import randomise

Middle = Callable[[Any, Tensor], Tensor]


class Cut(nn.Module):
    """Two layers, of which half of the channels between them are not read."""

    def __init__(self, middle: Middle, *, groups: int = 1) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.inner = nn.Conv2d(8, 8, 3, padding=1, stride=2, groups=groups)
        self.spread = nn.ConvTranspose2d(8, 8, 2)
        self.scale = nn.Parameter(torch.rand(8, 1, 1))
        self.last = nn.Conv2d(8, 5, 1)
        self.middle = middle
        with torch.no_grad():
            self.last.weight[:, ::2] = 0

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.middle(self, self.norm(self.first(x))))


TOLD: dict[str, Middle] = {
    "nothing": lambda m, x: x,
    "in place": lambda m, x: F.relu(x),
    "a layer": lambda m, x: m.inner(x),
    "a parameter": lambda m, x: x * m.scale,
    "parts": lambda m, x: torch.cat(x.chunk(2, 1), 1),
}


@pytest.mark.parametrize("name", TOLD)
@pytest.mark.parametrize("groups", [1, 8])
def test_shapes_and_costs_are_those_of_a_run(name: str, groups: int) -> None:
    program = cut(Cut(TOLD[name], groups=groups))
    told = program.seen
    program.seen = None
    shown = observe(program)
    assert told is not None
    assert told.values == shown.values and told.macs == shown.macs
    assert not shown.mutated


UNTOLD: dict[str, Middle] = {
    "a write": lambda m, x: x.add_(1),
    "a transposed convolution": lambda m, x: m.spread(x),
    "a product of matrices": lambda m, x: torch.einsum("nchw,ncxw->nchx", x, x.tanh()),
}


@pytest.mark.parametrize("name", UNTOLD)
def test_what_is_not_sure_is_observed(name: str) -> None:
    program = cut(Cut(UNTOLD[name]))
    assert program.seen is None
    assert observe(program).macs


def cut(model: nn.Module) -> Program:
    randomise(model)
    with torch.no_grad():
        model.get_submodule("last").get_parameter("weight")[:, ::2] = 0
    inputs = ((torch.randn(2, 3, 6, 6),), {})
    program = capture(model.eval(), inputs)
    assert eliminate_dead_channels(program)
    return program
