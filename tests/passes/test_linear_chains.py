"""Folding linear layers and convolutions with nothing between them."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fxprune.costs import costs_of, count_costs
from fxprune.passes.linear_chains import fold_linear_chains
from fxprune.programs.pipeline import Change, Pass
from fxprune.programs.program import Program, capture
from fxprune.testing import check_rewrite
from tests.conftest import Golden, randomise


def program(model: nn.Module, *shape: int) -> Program:
    model = randomise(model).double().eval()
    return capture(model, ((torch.randn(shape).double(),), {}))


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


FLAT: dict[str, tuple[Callable[[], list[nn.Module]], int]] = {
    "convolution": (lambda: [nn.Conv2d(3, 32, 3, padding=1), nn.Linear(32 * 49, 5)], 1),
    "strided, grouped": (lambda: [nn.Conv2d(3, 33, 3, 2, 2, 2, 3), nn.Linear(33 * 16, 5)], 1),
    "borders and biases between": (
        lambda: [
            *(nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(32, 32, 3, 2, 1, groups=4)),
            *(nn.Linear(32 * 16, 9), nn.Linear(9, 7)),
        ],
        1,
    ),
    "1x1 before a border": (
        lambda: [nn.Conv2d(3, 32, 1), nn.Conv2d(32, 8, 3, 2, 1), nn.Linear(8 * 16, 40)],
        2,
    ),
    "wide behind": (lambda: [nn.Conv2d(3, 4, 3), nn.Linear(100, 300), nn.Linear(300, 5)], 2),
    "dearer": (lambda: [nn.Conv2d(3, 4, 3, 2), nn.Linear(36, 40)], 2),
}


def flat(layers: list[nn.Module]) -> nn.Module:
    """Put a flattening in front of the first linear layer."""
    place = next(i for i, layer in enumerate(layers) if isinstance(layer, nn.Linear))
    return nn.Sequential(*layers[:place], nn.Flatten(), *layers[place:])


@pytest.mark.parametrize("name", FLAT)
def test_layers_around_a_flattening_become_one(name: str) -> None:
    build, left = FLAT[name]
    before = program(flat(build()), 2, 3, 7, 7)
    after = check_rewrite(fold_linear_chains, before)
    assert sum(isinstance(m, (nn.Linear, nn.Conv2d)) for m in called(after)) == left
    x = torch.randn(5, 3, 7, 7, dtype=torch.float64)
    assert torch.allclose(before.module(x), after.module(x), rtol=1e-9, atol=1e-12)


def called(one: Program) -> list[nn.Module]:
    names = [str(node.target) for node in one.graph.nodes if node.op == "call_module"]
    return [one.module.get_submodule(name) for name in names]


class Between(nn.Module):
    """A convolution and a linear layer with a function between them."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.linear = nn.Conv2d(1, 8, 3, padding=1), nn.Linear(128, 2)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.between(self.conv(x)))


def test_a_size_is_asked_of_what_goes() -> None:
    before = program(Between(lambda x: x.view(x.size(0), -1)), 2, 1, 4, 4)
    after = check_rewrite(fold_linear_chains, before)
    assert len(called(after)) == 1 and "size" not in after.text()


STAY: dict[str, Callable[[Tensor], Tensor]] = {
    "rows of any map": lambda x: x.view(-1, 128),
    "channels last": lambda x: x.permute(0, 2, 3, 1).flatten(1),
    "maximum": lambda x: torch.max_pool2d(x, 1).flatten(1),
    "read twice": lambda x: x.flatten(1) + x.sum(),
    "size read elsewhere": lambda x: x.flatten(1) * x.size(1),
}


@pytest.mark.parametrize("name", STAY)
def test_what_is_not_flattened_and_no_more_stays(name: str) -> None:
    assert fold_linear_chains(program(Between(STAY[name]), 2, 1, 4, 4)) == []


def test_a_linear_layer_of_the_last_axis_of_a_map_stays() -> None:
    one = program(nn.Sequential(nn.Conv2d(3, 64, 1), nn.Linear(7, 2)), 2, 3, 7, 7)
    assert fold_linear_chains(one) == []


def test_a_map_without_a_batch_stays() -> None:
    model = nn.Sequential(nn.Conv2d(3, 64, 1), nn.Flatten(), nn.Linear(49, 2))
    assert fold_linear_chains(program(model, 3, 7, 7)) == []


def with_pools(cost: str) -> Pass:
    def fold(program: Program) -> list[Change]:
        return fold_linear_chains(program, cost=cost, pools=True)

    return fold


POOLED: dict[str, tuple[Callable[[], list[nn.Module]], str]] = {
    "behind": (lambda: [nn.Conv2d(3, 8, 3, padding=1), nn.AvgPool2d(2)], "macs"),
    "two": (lambda: [nn.Conv2d(3, 2, 3), nn.AvgPool2d(2), nn.AvgPool2d(3)], "macs"),
    "odd": (
        lambda: [nn.Conv2d(3, 8, 3), nn.AvgPool2d((2, 3), (2, 1), divisor_override=5)],
        "macs",
    ),
    "between": (
        lambda: [nn.Conv2d(3, 64, 1), nn.AvgPool2d(2), nn.Conv2d(64, 3, 1)],
        "parameters",
    ),
    "flattened": (
        lambda: [
            *(nn.Conv2d(3, 64, 3, padding=1), nn.AvgPool2d(2), nn.Flatten()),
            nn.Linear(64 * 16, 4),
        ],
        "parameters",
    ),
}


@pytest.mark.parametrize("name", POOLED)
def test_average_pools_are_part_of_a_chain(name: str) -> None:
    build, cost = POOLED[name]
    before = program(nn.Sequential(*build()), 2, 3, 9, 9)
    after = check_rewrite(with_pools(cost), before)
    assert len(called(after)) == 1
    after.module.delete_all_unused_submodules()
    assert costs_of(after) == count_costs(after.module, (after.args, after.kwargs))


UNPOOLED: dict[str, tuple[Callable[[], list[nn.Module]], str]] = {
    "dearer": (lambda: [nn.Conv2d(3, 8, 3), nn.AvgPool2d(2)], "parameters"),
    "as dear": (lambda: [nn.Conv2d(3, 8, 1), nn.AvgPool2d(3)], "macs"),
    "two pools": (lambda: [nn.AvgPool2d(2), nn.AvgPool2d(2)], "macs"),
    "border of uncounted zeros": (
        lambda: [nn.Conv2d(3, 8, 3), nn.AvgPool2d(3, 3, 1, count_include_pad=False)],
        "macs",
    ),
    "over the edge": (lambda: [nn.Conv2d(3, 8, 3), nn.AvgPool2d(2, ceil_mode=True)], "macs"),
    "border between": (lambda: [nn.Conv2d(3, 8, 3), nn.AvgPool2d(3, 3, 1)], "macs"),
    "maximum": (lambda: [nn.Conv2d(3, 8, 3), nn.MaxPool2d(2)], "macs"),
}


@pytest.mark.parametrize("name", UNPOOLED)
def test_other_pools_stay(name: str) -> None:
    build, cost = UNPOOLED[name]
    assert with_pools(cost)(program(nn.Sequential(*build()), 2, 3, 9, 9)) == []


def test_transposed_convolutions_are_part_of_a_chain() -> None:
    layers = [
        *(nn.Conv2d(3, 32, 1, bias=False), nn.ConvTranspose2d(32, 48, 4, 2, 1, groups=4)),
        *(nn.Conv2d(48, 32, 1), nn.Conv2d(32, 2, 3)),
    ]
    before = program(nn.Sequential(*layers), 2, 3, 5, 5)
    for cost in ("parameters", "macs"):
        after = check_rewrite(with_pools(cost), before)
        (left,) = called(after)
        assert isinstance(left, nn.ConvTranspose2d) and left.weight.shape == (3, 2, 6, 6)
        after.module.delete_all_unused_submodules()
        assert costs_of(after) == count_costs(after.module, (after.args, after.kwargs))
        x = torch.randn(1, 3, 8, 6, dtype=torch.float64)
        assert torch.allclose(before.module(x), after.module(x), rtol=1e-9, atol=1e-12)
