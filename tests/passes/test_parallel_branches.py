"""Sums of linear branches over one input as one layer."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.passes.no_ops import remove_no_ops
from fxprune.passes.parallel_branches import fold_parallel_branches
from fxprune.programs.pipeline import Change
from fxprune.programs.program import Program, capture
from fxprune.testing import check_rewrite, error
from tests.conftest import randomise


class Sum(nn.Module):
    """A stem, branches over what it says, their sum, read by a nonlinearity."""

    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.stem, self.branches = nn.Sigmoid(), nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        first, *others = [branch(x) for branch in self.branches]
        for other in others:
            first = other + first
        return first.relu()


def program(model: nn.Module, *shape: int) -> Program:
    model = randomise(model).double().eval()
    inputs = ((torch.randn(shape or (2, 4, 9, 9)).double(),), {})
    one = capture(model, inputs)
    remove_no_ops(one)
    one.check()
    return one


def layers(one: Program) -> list[Any]:
    names = [str(node.target) for node in one.graph.nodes if node.op == "call_module"]
    return [one.module.get_submodule(name) for name in names if name.startswith("branches")]


def conv(*args: Any, **options: Any) -> nn.Module:
    return nn.Conv2d(4, 4, *args, **options)


ONE: dict[str, tuple[Callable[[], list[nn.Module]], tuple[int, ...]]] = {
    "RepVGG": (lambda: [conv(3, padding=1), conv(1), nn.BatchNorm2d(4)], (3, 3)),
    "identity first": (lambda: [nn.Identity(), conv(3, padding=1, bias=False)], (3, 3)),
    "twice the identity": (lambda: [nn.Identity(), conv(3, padding=1), nn.Identity()], (3, 3)),
    "ACNet": (
        lambda: [conv((3, 1), padding=(1, 0)), conv((1, 3), padding=(0, 1)), conv(3, padding=1)],
        (3, 3),
    ),
    "strided": (lambda: [conv(1, 2, bias=False), conv(3, 2, 1)], (3, 3)),
    "groups": (lambda: [conv(3, padding=1, groups=2), conv(1, groups=2), nn.Identity()], (3, 3)),
    "depthwise": (lambda: [conv(3, padding=1, groups=4), nn.BatchNorm2d(4)], (3, 3)),
    "dilated": (lambda: [conv(3, padding=2, dilation=2), conv(1), nn.Identity()], (3, 3)),
    "dilations": (
        lambda: [conv(3, padding=2, dilation=2), conv(5, padding=2), conv(3, padding=1)],
        (5, 5),
    ),
    "cropped": (lambda: [conv(3), conv(5, padding=1), conv(3)], (5, 5)),
}


@pytest.mark.parametrize("name", ONE)
def test_branches_become_one_layer(name: str) -> None:
    build, kernel = ONE[name]
    before = program(Sum(*build()))
    after = check_rewrite(fold_parallel_branches, before)
    (left,) = layers(after)
    assert left.kernel_size == kernel and "add" not in after.text()
    for size in (6, 8, 11):
        x = torch.randn(2, 4, size, size, dtype=torch.float64)
        assert error(before.module(x), after.module(x)) < 1e-12


APART: dict[str, Callable[[], list[nn.Module]]] = {
    "strides": lambda: [nn.AvgPool2d(2), conv(2, 2, groups=4), nn.MaxPool2d(2)],
    "sizes": lambda: [conv(3, 2, 1), conv(2, 2, 0)],
    "dearer": lambda: [conv((3, 1), padding=(1, 0)), conv((1, 3), padding=(0, 1))],
    "dense and depthwise": lambda: [conv(1), conv(5, padding=2, groups=4)],
    "another border": lambda: [
        *(conv(3, padding=1, padding_mode="reflect"), conv(3, padding=1), nn.ReLU()),
    ],
    "batch statistics": lambda: [
        *(conv(3, padding=1), nn.BatchNorm2d(4, track_running_stats=False)),
    ],
}


@pytest.mark.parametrize("name", APART)
def test_what_is_not_one_layer_stays(name: str) -> None:
    assert fold_parallel_branches(program(Sum(*APART[name]()), 2, 4, 8, 8)) == []


def test_linear_layers_and_the_identity() -> None:
    after = check_rewrite(
        fold_parallel_branches, program(Sum(nn.Linear(6, 6), nn.Identity(), nn.Linear(6, 6)), 3, 6)
    )
    assert len(layers(after)) == 1


def test_some_of_the_terms_leave_a_sum() -> None:
    before = program(Sum(conv(3, padding=1), nn.MaxPool2d(3, 1, 1), conv(1), nn.Tanh()))
    after = check_rewrite(fold_parallel_branches, before)
    assert len(layers(after)) == 3 and after.text().count("+") == 2


def test_a_sum_that_broadcasts_or_a_branch_read_twice_stays() -> None:
    class Other(Sum):
        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            a, b = (branch(x) for branch in self.branches)
            return torch.cat([a + b, a], 1)

    assert fold_parallel_branches(program(Other(conv(1), conv(1)))) == []
    assert fold_parallel_branches(program(Sum(conv(1), nn.Conv2d(4, 1, 1)))) == []


def test_multiply_accumulates_may_be_the_cost() -> None:
    def fold(program: Program) -> list[Change]:
        return fold_parallel_branches(program, cost="macs")

    after = check_rewrite(fold, program(Sum(conv(3, padding=1), conv(1))))
    assert len(layers(after)) == 1


class RepVGGBlock(nn.Module):
    """Ding et al. 2021: 3×3, 1×1 and, where the sizes allow, the identity, each with its norm."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.dense = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.dense_norm = nn.BatchNorm2d(outputs)
        self.point = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
        self.point_norm = nn.BatchNorm2d(outputs)
        self.identity = nn.BatchNorm2d(inputs) if inputs == outputs and stride == 1 else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.dense_norm(self.dense(x)) + self.point_norm(self.point(x))
        return (y if self.identity is None else y + self.identity(x)).relu()


def test_repvgg_becomes_a_plain_stack() -> None:
    widths = [(3, 6, 2), (6, 6, 1), (6, 8, 2), (8, 8, 1), (8, 8, 1)]
    blocks = [RepVGGBlock(*sizes) for sizes in widths]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)]
    model = randomise(nn.Sequential(*blocks, *head)).eval().double()
    x = torch.randn(3, 3, 33, 33, dtype=torch.float64)
    small = fxprune.finalize(model, x)
    convs = [m for m in small.modules() if isinstance(m, nn.Conv2d)]
    assert [m.kernel_size for m in convs] == [(3, 3)] * 5
    assert not any("add" in str(node.target) for node in small.graph.nodes)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in small.modules())
    assert error(model(x), small(x)) < 1e-9


def test_an_inverted_residual_without_nonlinearities_is_one_convolution() -> None:
    inner = [
        *(nn.Conv2d(4, 48, 1), nn.BatchNorm2d(48)),
        *(nn.Conv2d(48, 48, 3, padding=1, groups=48, bias=False), nn.BatchNorm2d(48)),
        *(nn.Conv2d(48, 4, 1, bias=False), nn.BatchNorm2d(4)),
    ]
    model = randomise(Sum(nn.Sequential(*inner), nn.Identity())).eval().double()
    x = torch.randn(3, 4, 9, 9, dtype=torch.float64)
    small = fxprune.finalize(model, x)
    (left,) = [m for m in small.modules() if isinstance(m, nn.Conv2d)]
    assert left.weight.shape == (4, 5, 3, 3) and "add" not in small.code
    assert error(model(x), small(x)) < 1e-12
