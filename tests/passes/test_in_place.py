"""Ordinary forms for in-place operators, where that changes nothing."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxprune
from fxprune.passes.in_place import make_functional
from fxprune.programs.observation import observe
from fxprune.programs.program import Program, capture
from fxprune.testing import error


def program(model: nn.Module, *shape: int) -> Program:
    x = torch.randn(shape, dtype=torch.float64)
    return capture(model.double().eval(), ((x,), {}))


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.relu = nn.Linear(4, 4), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.linear(x))
        x = F.elu(self.linear(x), inplace=True)
        x = self.linear(x).tanh_()
        x = torch.relu_(self.linear(x))
        return x


def test_a_chain_no_longer_overwrites_anything() -> None:
    before = program(Chain(), 3, 4)
    after = before.clone()
    assert len(make_functional(after)) == 4
    after.check()
    assert not observe(after).mutated
    assert error(before.run(), after.run()) == 0
    assert make_functional(after) == []


class ReadAgain(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x = x * 2
        view = x[:, 1:]
        y = x.relu_()
        return y.sum() + view


def test_memory_read_again_keeps_its_form() -> None:
    before = program(ReadAgain(), 3, 4)
    expected = before.run()
    assert make_functional(before) == []
    assert error(expected, before.run()) == 0


class OfAnotherType(nn.Module):
    """Overwrites numbers with truth values, and with sums of more bits: both stay numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 3)
        self.positions: Tensor
        self.register_buffer("positions", torch.linspace(0, 1, 6, dtype=torch.float64))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = torch.relu(self.first(x))
        z = (y * 2).add_(self.positions)
        return self.second(z.relu()), (y * 1).gt_(0.5)


def test_what_would_be_of_another_type_keeps_its_form() -> None:
    model = OfAnotherType().eval()
    x = torch.randn(3, 4)
    found = fxprune.finalize(model, x)(x)
    assert [one.dtype for one in found] == [torch.float32, torch.float32]
    assert error(model(x), found) < 1e-6


class AskedAgain(nn.Module):
    """Asks for the rank of what was overwritten, as a norm with an activation does."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = y = self.first(x)
        y = F.relu_(y)
        return self.second(y) * x.ndim + x.shape[0]


def test_questions_for_a_form_do_not_read_what_was_overwritten() -> None:
    before = program(AskedAgain(), 3, 4)
    after = before.clone()
    assert len(make_functional(after)) == 1
    after.check()
    assert error(before.run(), after.run()) == 0
    gated = fxprune.instrument(AskedAgain().double(), torch.randn(3, 4, dtype=torch.float64))
    assert [site["live"] for site in fxprune.architecture(gated).values()] == [6]


class Transposing(nn.Module):
    """Changes the form of what is asked for it later."""

    def forward(self, x: Tensor) -> Tensor:
        x = y = x * 2
        y = y.t_()
        return y.relu() * x.shape[0]


def test_forms_that_are_overwritten_are_read() -> None:
    before = program(Transposing(), 3, 4)
    expected = before.run()
    assert make_functional(before) == []
    before.check()
    assert error(expected, before.run()) == 0


class SharedStatement(nn.Module):
    """One module called twice, once only for what it does to its input."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.relu = nn.Linear(4, 4), nn.Linear(4, 4), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(self.relu(self.a(x)))
        self.relu(x)
        return self.b(x)


def test_a_module_keeps_its_flag_if_one_call_needs_it() -> None:
    before = program(SharedStatement(), 5, 4)
    expected = before.run()
    assert make_functional(before) == []
    assert error(expected, before.run()) == 0
