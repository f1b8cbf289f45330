"""Branches that compute constants: gone, and the same numbers."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxprune
from fxprune.passes.constant_branches import remove_constant_branches
from fxprune.programs.program import Program, capture
from fxprune.testing import check_rewrite, close_half, error, spread
from tests.conftest import randomise


class Block(nn.Module):
    """A stem, a branch whose middle layer falls silent, what they are joined by, a head."""

    def __init__(self, join: Callable[[Tensor, Tensor], Tensor], *, shift: bool = True) -> None:
        super().__init__()
        self.join = join
        self.stem, self.inner = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 6, 3, padding=1)
        self.inner_norm = nn.BatchNorm2d(6)
        self.outer = nn.Conv2d(6, 8, 3, padding=1, bias=False)
        self.outer_norm = nn.BatchNorm2d(8) if shift else nn.Identity()
        self.head = nn.Conv2d(8, 5, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        inner = self.inner_norm(self.inner(x)).relu() * 1.0
        return self.head(self.join(x, self.outer_norm(self.outer(inner))).relu())


def silent(model: Block) -> Program:
    """Let the branch's inner activations be 0 whatever comes."""
    randomise(model).double().eval()
    assert model.inner_norm.weight is not None and model.inner_norm.bias is not None
    model.inner_norm.weight.data.zero_()
    model.inner_norm.bias.data.fill_(-0.5)
    x = torch.randn(2, 3, 7, 7, dtype=torch.float64)
    return capture(model, ((x,), {}))


JOINS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sum": lambda x, y: x + y,
    "sum the other way": lambda x, y: torch.add(y, x, alpha=0.5),
    "difference": lambda x, y: x - y,
    "product": lambda x, y: x * y.sigmoid(),
    "maximum": lambda x, y: torch.maximum(x, y),
    "choice": lambda x, y: torch.where(x > 0.1, x, y),
}


@pytest.mark.parametrize("name", JOINS)
def test_a_constant_operand_becomes_a_buffer(name: str) -> None:
    before = silent(Block(JOINS[name]))
    after = check_rewrite(remove_constant_branches, before)
    assert not hasattr(after.module, "inner") and not hasattr(after.module, "outer_norm")
    assert spread(after.run()) > 1e-3
    sizes = [tuple(buffer.shape) for buffer in after.module.buffers(recurse=False)]
    assert sizes == [(1, 8, 1, 1)]  # no size of a map is frozen


def test_a_sum_with_nothing_is_its_other_operand() -> None:
    before = silent(Block(lambda x, y: x + y, shift=False))
    after = check_rewrite(remove_constant_branches, before)
    assert not list(after.module.buffers()) and "add" not in after.text()


def test_a_branch_that_still_says_something_stays() -> None:
    before = silent(Block(lambda x, y: x + y))
    norm: Any = before.module.get_submodule("inner_norm")
    norm.bias.data[0], norm.weight.data[0] = 0.5, 1
    assert remove_constant_branches(before) == []


class Gated(nn.Module):
    def __init__(self, join: Callable[..., Tensor]) -> None:
        super().__init__()
        self.join = join
        self.stem, self.act = nn.Conv2d(3, 8, 3, padding=1), nn.ReLU()
        self.inner, self.norm, self.inner_act = (
            *(nn.Conv2d(8, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU()),
        )
        self.outer, self.outer_norm = nn.Conv2d(6, 8, 1), nn.BatchNorm2d(8)
        self.last, self.wide = nn.Conv2d(8, 5, 3, padding=1), nn.Conv2d(14, 5, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.stem(x))
        return self.join(self, x, self.inner_act(self.norm(self.inner(x)))).relu()


WHOLE: dict[str, tuple[Callable[..., Tensor], int]] = {
    "residual block": (lambda m, x, y: m.last((x + m.outer_norm(m.outer(y))).relu()), 8 * 5 * 9),
    "concatenation": (lambda m, x, y: m.wide(torch.cat([x, y], 1)), 8 * 5 * 9),
    "first of a concatenation": (lambda m, x, y: m.wide(torch.cat([y, x], 1)), 8 * 5 * 9),
    "squeezed gate": (
        lambda m, x, y: m.last(x * m.outer(y.mean((2, 3), keepdim=True)).sigmoid()),
        8 * 5 * 9,
    ),
}


@pytest.mark.parametrize("name", WHOLE)
def test_a_branch_whose_gates_are_all_closed_goes(name: str) -> None:
    join, weights = WHOLE[name]
    model = randomise(Gated(join)).eval()
    x = torch.randn(3, 3, 8, 8)
    gated: Any = fxprune.instrument(model, x)
    site = next(site for site in gated.gates.width_sites if site.name == "inner_act")
    with torch.no_grad():
        gated.gates.width[list(site.units)] = 0
    small = fxprune.finalize(gated)
    assert small.report.verification is not None
    assert small.report.verification.verdict == "equal"
    names = {name.partition(".")[0] for name, _ in small.named_parameters()}
    assert names == {"stem", "wide" if "concatenation" in name else "last"}
    assert sum(p.numel() for p in small.parameters()) == weights + 5 + 3 * 8 * 9 + 8


def overwritten_sum(x: Tensor, y: Tensor) -> Tensor:
    total = x + y
    total.add_(1.0)
    return total * x


def test_a_sum_that_is_written_into_does_not_become_its_operand() -> None:
    after = check_rewrite(remove_constant_branches, silent(Block(overwritten_sum, shift=False)))
    assert spread(after.run()) > 1e-3


def test_both_operands_may_be_constant_where_one_is_written_into() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 2), nn.Linear(2, 2)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            left = self.first(x).relu()
            right = self.second(left).relu()
            total = left + right
            return total.add_(right), total * x[:, :2]

    model: Any = randomise(Twice()).double().eval()
    for layer in (model.first, model.second):
        layer.weight.data.zero_()
    x = torch.randn(2, 3, dtype=torch.float64)
    check_rewrite(remove_constant_branches, capture(model, ((x,), {})))


def test_a_constant_that_varies_over_a_map_does_not_freeze_its_size() -> None:
    class Shuffled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return F.pixel_shuffle(self.first(x), 2) + F.interpolate(x[:, :1], scale_factor=2)

    model: Any = randomise(Shuffled()).double().eval()
    model.first.weight.data.zero_()
    small: Any = fxprune.finalize(model, torch.randn(2, 3, 5, 5, dtype=torch.float64))
    larger = torch.randn(2, 3, 7, 7, dtype=torch.float64)
    assert error(model(larger), small(larger)) < 1e-12


class Placed(nn.Module):
    """Adds what it computes of a sample to learnt positions, the same for all samples."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.outer, self.head = nn.Linear(3, 6), nn.Linear(6, 4), nn.Linear(4, 2)
        self.positions = nn.Parameter(torch.randn(1, 5, 4))
        nn.init.zeros_(self.outer.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((self.positions + self.outer(self.hidden(x).relu())).tanh())


def test_what_grows_with_the_batch_is_not_left_out_for_an_example_of_one_sample() -> None:
    model = Placed().double().eval()
    final = fxprune.finalize(model, torch.randn(1, 5, 3, dtype=torch.float64))
    x = torch.randn(4, 5, 3, dtype=torch.float64)
    assert error(model(x), final(x)) < 1e-12


class Weighed(nn.Module):
    """Weighs a map by what its mean says, which is one place whatever the size of the map."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner, self.outer = (nn.Conv2d(n, 4, 1) for n in (3, 4, 4))
        self.mean = nn.AdaptiveAvgPool2d(1)
        nn.init.zeros_(self.outer.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.outer(self.inner(x).relu()) * self.mean(x)


def test_what_grows_with_the_map_is_not_left_out_for_an_example_of_one_pixel() -> None:
    model = Weighed().double().eval()
    final = fxprune.finalize(model, torch.randn(2, 3, 1, 1, dtype=torch.float64))
    x = torch.randn(2, 3, 3, 3, dtype=torch.float64)
    assert error(model(x), final(x)) < 1e-12


def test_a_factor_of_a_matrix_product_is_not_broadcast() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query, self.key = nn.Linear(4, 6), nn.Linear(4, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.query(x).relu() @ self.key(x).transpose(1, 2)

    model: Any = randomise(Attention()).double().eval()
    model.query.weight.data.zero_()
    x = torch.randn(2, 5, 4, dtype=torch.float64)
    check_rewrite(remove_constant_branches, capture(model, ((x,), {})))
    assert error(model(x), fxprune.finalize(model, x)(x)) < 1e-12


class Scaled(nn.Module):
    """Similarities, as CLIP computes them, times what parameters alone compute."""

    def __init__(self, scale: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.scale = nn.Linear(8, 16), nn.Linear(16, 4), scale
        self.learnt, self.inner = nn.Parameter(torch.tensor([0.5])), nn.Linear(1, 1)
        self.register_buffer("ones", torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(torch.relu(self.first(x)))
        return y * self.scale(self, y)


LEARNT: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "of itself": lambda net, _: net.learnt.exp(),
    "on a device": lambda net, y: net.learnt.exp().to(y.device),
    "of a dtype": lambda net, y: net.learnt.exp().to(y.dtype),
    "as a tensor is": lambda net, y: net.learnt.exp().to(y),
    "type_as": lambda net, y: net.learnt.exp().type_as(y),
    "of a size": lambda net, y: net.learnt.exp().expand(y.shape[1]),
    "expanded as a tensor": lambda net, y: net.learnt.exp().expand_as(y),
    "times ones": lambda net, _: net.learnt.exp() * torch.ones(1),
    "times ones of a size": lambda net, y: net.learnt.exp() * torch.ones(y.shape[1]),
    "times ones like": lambda net, y: net.learnt.exp() * torch.ones_like(y),
    "times new ones": lambda net, y: net.learnt.exp() * y.new_ones(y.shape[1]),
    "of a layer": lambda net, _: net.inner(net.ones).exp(),
}


@pytest.mark.parametrize("name", LEARNT)
def test_what_parameters_alone_compute_is_still_learnt(name: str) -> None:
    x = torch.randn(3, 8)
    gated = fxprune.instrument(Scaled(LEARNT[name]).eval(), x)
    close_half(gated)
    small: Any = fxprune.finalize(gated, fold=False)
    gated.eval()(x).sum().backward()
    small(x).sum().backward()
    part = "inner.weight" if name == "of a layer" else "learnt"
    expected = gated.get_parameter(part).grad
    assert expected is not None and expected.abs().max() > 0
    torch.testing.assert_close(small.get_parameter(part).grad, expected)


class Shifted(nn.Module):
    """A branch whose last layer has a bias: all that is left of it once its units are dead."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner = nn.Linear(4, 8), nn.Linear(8, 16)
        self.outer, self.head = nn.Linear(16, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).tanh()
        return self.head(x + self.outer(self.inner(x).relu()))


def test_the_bias_of_a_dead_branch_is_still_learnt_without_folding() -> None:
    x = torch.randn(5, 4, dtype=torch.float64)
    gated: Any = fxprune.instrument(Shifted().double(), x)
    with torch.no_grad():
        gated.gates.width.zero_()
    small: Any = fxprune.finalize(gated, fold=False)
    assert "outer" not in dict(small.named_modules())
    gates = {id(parameter) for parameter in gated.gates.parameters()}
    learnt = [parameter for parameter in gated.parameters() if id(parameter) not in gates]
    optimizers = [torch.optim.SGD(one, lr=0.05) for one in (small.parameters(), learnt)]
    for _ in range(3):
        for model, optimizer in zip((small, gated), optimizers, strict=True):
            optimizer.zero_grad()
            model.train()(x).square().sum().backward()
            optimizer.step()
    assert error(small(x), gated(x)) < 1e-12


class Mixed(nn.Module):
    """A branch by a raw parameter, and a layer beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.beside, self.last = nn.Linear(4, 6), nn.Linear(4, 5), nn.Linear(5, 3)
        self.weight = nn.Parameter(torch.randn(6, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.relu(F.relu(self.first(x)) @ self.weight + self.beside(x)))


def test_parameters_of_a_dead_branch_go_without_folding_too() -> None:
    model, x = randomise(Mixed()).double(), torch.randn(7, 4).double()
    gated: Any = fxprune.instrument(model, x)
    with torch.no_grad():
        gated.gates.width[:6] = 0
    small: Any = fxprune.finalize(gated, fold=False)
    assert error(small(x), gated.eval()(x)) < 1e-12 < spread(gated(x))
    names = [name for name, _ in small.named_parameters()]
    assert names == ["beside.weight", "beside.bias", "last.weight", "last.bias"]


class TwoModes(nn.Module):
    """What a bias alone computes is added in either mode; training has a head more."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head, self.auxiliary = nn.Linear(4, 4), nn.Linear(4, 3), nn.Linear(4, 2)
        with torch.no_grad():
            self.stem.weight.zero_()

    def forward(self, x: Tensor) -> Any:
        learnt = self.stem(x)
        y = self.head(x.tanh() + learnt.sigmoid())
        return (y, self.auxiliary(learnt.tanh() + x)) if self.training else y


def test_what_either_mode_reads_stays_one_parameter() -> None:
    model, x = TwoModes().double(), torch.randn(5, 4, dtype=torch.float64)
    small: Any = fxprune.finalize(model.train(), x, fold=False)
    assert set(dict(small.named_parameters())) <= set(dict(model.named_parameters()))
    for one in (model, small):
        optimizer = torch.optim.SGD(one.parameters(), lr=0.5)
        one.train()(x)[0].square().sum().backward()
        optimizer.step()
    before = small.eval()(x)
    assert error(before, model.eval()(x)) < 1e-12 < spread(before)
