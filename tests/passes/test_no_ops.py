"""Removing what does nothing in evaluation, and only that."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import stochastic_depth

from fxprune.passes.no_ops import remove_no_ops, remove_products_with_ones
from fxprune.programs.program import Program, capture
from fxprune.testing import check_rewrite
from tests.conftest import Golden


def program(model: nn.Module, *shape: int) -> Program:
    x = torch.randn(shape, dtype=torch.float64)
    return capture(model.double().eval(), ((x,), {}))


class NoOps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.dropout, self.same = nn.Linear(4, 4), nn.Dropout(), nn.Identity()
        self.unused = nn.Linear(99, 99)
        self.ones: Tensor
        self.register_buffer("ones", torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.same(self.dropout(self.linear(x)))
        x = torch.mul(x, self.ones)
        x = F.dropout(x, 0.3, training=self.training)
        return stochastic_depth(x, 0.5, "row", self.training)


def test_no_ops_go(golden: Golden) -> None:
    after = check_rewrite(remove_no_ops, program(NoOps(), 3, 4))
    golden.check(after.text())
    assert [name for name, _ in after.module.named_children()] == ["linear"]


class Effects(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.same = nn.Identity()
        self.scale: Tensor
        self.wide: Tensor
        self.register_buffer("scale", torch.tensor([1.0, 1.0, 2.0, 1.0]))
        self.register_buffer("wide", torch.ones(3, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = x + 0
        x.relu_()  # nobody uses what it returns, and yet it counts
        dropped = F.dropout(x, 0.3, training=True) * 0
        scaled = torch.mul(x, self.scale)
        grown = torch.mul(scaled.sum(0), self.wide)
        return self.same(x).add_(1) + x + dropped.sum() + grown.sum()


def test_what_has_an_effect_stays() -> None:
    before = program(Effects(), 3, 4)
    text = before.text()
    assert remove_no_ops(before) == []
    assert before.text() == text


@pytest.mark.parametrize("view", [False, True])
def test_a_copy_stays_where_it_or_its_source_is_written_into(view: bool) -> None:
    class Overwritten(NoOps):
        def forward(self, x: Tensor) -> Tensor:
            x = self.linear(x)
            copy = torch.mul(x, self.ones)
            (copy.view(-1) if view else x).add_(1)
            return copy * x

    after = check_rewrite(remove_products_with_ones, program(Overwritten(), 3, 4))
    assert "mul(linear" in after.text()
