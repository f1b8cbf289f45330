"""A run left in a gated model is believed only while the model is what it was."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxprune
from fxprune.gating.remembered import memory_of
from fxprune.parts.piecewise import capture_any
from fxprune.programs.observation import Observation, observe
from fxprune.programs.program import Program


class Net(nn.Module):
    """Convolutions with gates of both kinds, one after an activation in place."""

    def __init__(self, middle: Callable[[Any, Tensor], Tensor] = lambda m, x: x) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.second, self.third = nn.Conv2d(8, 6, 1), nn.Conv2d(6, 8, 1)
        self.head = nn.Linear(8, 5)
        self.index: Tensor
        self.register_buffer("index", torch.tensor([1, 0, 2, 3, 4, 5, 6, 7]))
        self.middle = middle

    def forward(self, x: Tensor) -> Tensor:
        x = self.third(F.relu(self.second(self.first(x))))
        return self.head(self.middle(self, F.relu(x)).mean((2, 3)))


def gated(*args: Any) -> Any:
    return fxprune.instrument(Net(*args).eval(), torch.randn(2, 3, 9, 9), check=False)


def recalled(model: nn.Module, inputs: Any = None) -> tuple[Observation | None, Program]:
    found = memory_of(model)["example_inputs"] if inputs is None else inputs
    program = capture_any(model, found, check=False)
    return program.seen, program


@pytest.mark.parametrize("change", ["nothing", "training", "a copy"])
def test_what_is_recalled_is_what_a_run_shows(change: str) -> None:
    model = gated()
    if change == "training":
        model.train()
        with torch.no_grad():
            _ = [parameter.uniform_() for parameter in model.parameters()]
    told, program = recalled(copy.deepcopy(model) if change == "a copy" else model)
    program.seen = None
    shown = observe(program)
    assert told is not None
    assert told.values == shown.values and told.macs == shown.macs
    assert told.mutated == shown.mutated
    for node, group in shown.alias.items():  # what shares memory is known to
        assert told.alias[node] is told.alias[group]


def _another_stride(model: Any) -> None:
    model.first.get_submodule("0").stride = (2, 2)


def _another_operator(model: Any) -> None:
    node = next(n for n in model.graph.nodes if n.target == "mean")
    node.args = (node.args[0], (3, 2))
    model.recompile()


def _another_layer(model: Any) -> None:
    model.second = nn.Conv2d(8, 6, 3)


def _another_type(model: Any) -> None:
    model.double()


def _another_layout(model: Any) -> None:
    model.to(memory_format=torch.channels_last)


def _a_hook(model: Any) -> None:
    model.second.register_forward_hook(lambda module, args, output: output[:, :, 1:])


CHANGES: list[Callable[[Any], None]] = [
    _another_stride,
    _another_operator,
    _another_layer,
    _another_type,
    _another_layout,
    _a_hook,
]


@pytest.mark.parametrize("change", CHANGES)
def test_another_model_is_run_again(change: Callable[[Any], None]) -> None:
    model = gated()
    assert recalled(model)[0] is not None
    change(model)
    assert recalled(model)[0] is None


def test_other_inputs_are_run() -> None:
    model = gated()
    assert recalled(model, ((torch.randn(2, 3, 9, 9),), {}))[0] is not None
    assert recalled(model, ((torch.randn(1, 3, 9, 9),), {}))[0] is None
    assert recalled(model, ((torch.randn(2, 3, 9, 9).double(),), {}))[0] is None


MIDDLES: list[Callable[[Any, Tensor], Tensor]] = [
    lambda m, x: x[:, m.index],
    lambda m, x: x * (x > 0),
    lambda m, x: x + torch.histc(x).sum(),
]


@pytest.mark.parametrize("middle", MIDDLES)
def test_what_numbers_could_decide_is_not_kept(middle: Callable[[Any, Tensor], Tensor]) -> None:
    assert memory_of(gated(middle))["run"] is None


def test_a_result_keeps_nothing() -> None:
    assert "run" not in memory_of(fxprune.finalize(gated(), check=False))
