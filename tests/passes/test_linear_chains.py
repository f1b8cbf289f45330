"""Folding linear layers and convolutions with nothing between them."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fxprune.passes.linear_chains import fold_linear_chains
from fxprune.pipeline import Change
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


CHAINS: dict[str, tuple[Callable[[], list[nn.Module]], int]] = {
    "1x1 between": (
        lambda: [nn.Conv2d(3, 32, 1, bias=False), nn.Conv2d(32, 4, 3, padding=1)],
        1,
    ),
    "a bias before a border": (lambda: [nn.Conv2d(3, 32, 1), nn.Conv2d(32, 4, 3, padding=1)], 1),
    "expanded and contracted": (
        lambda: [
            *(nn.Conv2d(3, 32, 1, padding=0), nn.Conv2d(32, 64, 3, 2), nn.Conv2d(64, 4, 1)),
        ],
        1,
    ),
    "an inverted bottleneck": (
        lambda: [
            *(nn.Conv2d(3, 48, 1), nn.Conv2d(48, 48, 3, padding=1, groups=48)),
            nn.Conv2d(48, 3, 1),
        ],
        1,
    ),
    "a bottleneck": (lambda: [nn.Conv2d(3, 1, 1), nn.Conv2d(1, 8, 1)], 2),
    "a border between": (
        lambda: [nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(32, 4, 3, padding=1)],
        2,
    ),
    "volumes": (lambda: [nn.Conv3d(3, 32, 1), nn.Conv3d(32, 4, 2)], 1),
}


@pytest.mark.parametrize("name", CHAINS)
def test_convolutions_become_one(name: str) -> None:
    build, left = CHAINS[name]
    layers = build()
    size = (2, 3, *(7,) * (3 if "volumes" in name else 2))
    before = program(nn.Sequential(*layers), *size)
    after = check_rewrite(fold_linear_chains, before)
    calls = [node for node in after.graph.nodes if node.op == "call_module"]
    assert len(calls) == left
    for changed in (9, 12):  # no size is frozen
        x = torch.randn(1, 3, *(changed,) * (len(size) - 2), dtype=torch.float64)
        assert torch.allclose(before.module(x), after.module(x), rtol=1e-9, atol=1e-12)


def test_multiply_accumulates_may_be_the_cost() -> None:
    layers = [nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 2, 2)]
    one = program(nn.Sequential(*layers), 2, 8, 8, 8)

    def fold(program: Program) -> list[Change]:
        return fold_linear_chains(program, cost="macs")

    assert fold_linear_chains(one.clone()) == []  # 1168 numbers against 840
    after = check_rewrite(fold, one)
    assert after.module.get_submodule("1").weight.shape == (8, 8, 4, 4)


def test_a_long_chain_becomes_one_layer() -> None:
    layers = [nn.Linear(40, 40) for _ in range(70)]
    for layer in layers:
        layer.weight.data.mul_(1.7)  # or nothing would come through
    before = program(nn.Sequential(*layers), 3, 40)
    after = before.clone()
    assert fold_linear_chains(after)
    after.check()
    assert torch.allclose(after.run(), before.run(), rtol=1e-9)
    assert sum(node.op == "call_module" for node in after.graph.nodes) == 1
