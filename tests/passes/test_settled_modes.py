"""What is folded is a model of evaluation, whatever mode it is put in."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxprune.passes.settled_modes import settle_modes
from fxprune.programs.program import capture
from fxprune.testing import check_rewrite


class Rates(nn.Module):
    """A flag in a keyword, and rates in and beside a call, at two depths."""

    def __init__(self, inner: nn.Module | None = None) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(x, 0.5, training=self.training)
        x = F.leaky_relu(x, 0.3 if self.training else 0.1) * (2.0 if self.training else 3.0)
        return x if self.inner is None else self.inner(x)


def test_flags_and_rates_are_those_of_evaluation() -> None:
    x = torch.randn(3, 4, dtype=torch.float64)
    after = check_rewrite(settle_modes, capture(Rates(Rates()).train(), ((x,), {})))
    assert not any("training" in str(node.target) for node in after.graph.nodes)
    expected = Rates(Rates()).eval()(x)
    assert torch.equal(after.module.train()(x), expected)


def test_what_does_not_follow_the_mode_is_left_alone() -> None:
    x = torch.randn(3, 4, dtype=torch.float64)
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(), nn.ReLU()).double()
    assert not settle_modes(capture(model, ((x,), {})))
