"""Folding linear layers with nothing between them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fxprune.passes.linear_chains import fold_linear_chains
from fxprune.program import Program, capture
from fxprune.testing import check_rewrite
from tests.conftest import Golden, randomise


def program(model: nn.Module, *shape: int) -> Program:
    model = randomise(model).double().eval()
    return capture(model, ((torch.randn(shape).double(),), {}), make_masks_permanent=False)


def test_a_wide_middle_is_folded(golden: Golden) -> None:
    after = check_rewrite(
        fold_linear_chains, program(nn.Sequential(nn.Linear(8, 64), nn.Linear(64, 5)), 3, 8)
    )
    assert after.module.get_submodule("1").weight.shape == (5, 8)
    golden.check(after.text())


def test_a_bottleneck_is_kept() -> None:
    one = program(nn.Sequential(nn.Linear(32, 4), nn.Linear(4, 32)), 3, 32)
    assert fold_linear_chains(one) == []


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 12), min_size=3, max_size=6),
    biases=st.lists(st.booleans(), min_size=5, max_size=5),
    tokens=st.booleans(),
)
def test_any_chain_stays_the_same_function(
    sizes: list[int], biases: list[bool], tokens: bool
) -> None:
    pairs = zip(sizes, sizes[1:], biases, strict=False)
    model = nn.Sequential(*(nn.Linear(i, o, bias=b) for i, o, b in pairs))
    shape = (3, 4, sizes[0]) if tokens else (3, sizes[0])
    before = program(model, *shape)
    after = before.clone()
    fold_linear_chains(after)
    after.check()
    assert torch.allclose(after.run(), before.run(), rtol=1e-9, atol=1e-12)
    count = [sum(p.numel() for p in one.module.parameters()) for one in (before, after)]
    after.module.delete_all_unused_submodules()
    assert sum(p.numel() for p in after.module.parameters()) <= count[0]


@pytest.mark.parametrize("kind", ["twice read", "shared", "tied"])
def test_a_layer_somebody_else_needs_is_kept(kind: str) -> None:
    class Needed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 64), nn.Linear(64, 8)
            self.c = nn.Linear(8, 64)
            if kind == "tied":
                self.c.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            y = self.b(h)
            if kind == "twice read":
                return y.sum() + h
            return (self.a if kind == "shared" else self.c)(y.relu())

    assert fold_linear_chains(program(Needed(), 3, 8)) == []
