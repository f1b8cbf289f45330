"""Assignments to parts of tensors are traced, and what is assigned followed."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxprune
from fxprune.errors import TraceError
from fxprune.testing import close_half, error
from fxprune.tracing import asked_tracer
from tests.conftest import randomise


def halves(x: Tensor) -> Tensor:
    y = torch.zeros(x.shape, dtype=x.dtype)
    y[:, :4] = x[:, :4]
    y[:, 4:, 1:] = x[:, 4:, :-1]
    return y


def shifted_in_time(x: Tensor) -> Tensor:
    """The shift of TSM (Lin et al., 2019), of every second image."""
    y = torch.empty_like(x)
    y[:, :2, ..., 1:], y[:, :2, ..., 0] = x[:, :2, ..., :-1], 0
    y[:, 2:] = x[:, 2:]
    return y


def dots(x: Tensor) -> Tensor:
    y = x * 2
    y[..., 0] = x[..., 1]
    y[..., 1, -1] = x.mean((2, 3))
    return y


def cut(x: Tensor) -> Tensor:
    y = x.clone()
    y[:, :, : x.shape[2] // 2] *= 0.5
    y[:, :, x.shape[2] - 1] = 1.0
    return y


def masked(x: Tensor) -> Tensor:
    y = x + 1
    y[x < 0.2] = 0.1
    return y


def broadcast(x: Tensor) -> Tensor:
    y = x * 1.5
    y[:, :, 1:3] = x.amax((2, 3), keepdim=True)
    y[:] = y.sigmoid()
    return y


def collected(x: Tensor) -> Tensor:
    y = x.new_zeros(x.shape)
    for row in range(x.shape[2]):
        y[:, :, row] = x[:, :, row].tanh()
    return y


def at_positions(x: Tensor) -> Tensor:
    y, rows = x * 2, torch.arange(x.shape[0])
    y[rows, rows, rows, rows] = 0.5
    return y


def whole_rows(x: Tensor) -> Tensor:
    y, rows = x * 2, torch.arange(x.shape[0])
    y[rows, rows, :, :] = x[rows, rows].tanh()
    y[rows[:, None], rows, ...] = 0.5
    return y


def nearest(x: Tensor) -> Tensor:
    """What PointNet++ does with neighbours that are too few: views that nobody else reads."""
    y = x.sort(dim=-1)[0][..., :4]
    first = y[..., :1].repeat(1, 1, 1, 4)
    y[y < 0.3] = first[y < 0.3]
    z = torch.zeros_like(y)
    z[..., 0] = y[..., 1]
    row = z[..., 0]
    z[..., 1] = row * 2  # beside what goes by another name
    return torch.cat([z + row[..., None], y[..., :2]], -1)


WRITES: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "halves": (halves, 4),
    "shifted in time": (shifted_in_time, 5),  # of two that are shifted one stays
    "with dots": (dots, 4),
    "cut": (cut, 8),  # what is 1 in one row is no constant
    "masked": (masked, 4),
    "broadcast": (broadcast, 4),
    "collected": (collected, 4),
    "at positions": (at_positions, 8),
    "whole rows": (whole_rows, 8),
    "nearest": (nearest, 8),
}


class Writing(nn.Module):
    def __init__(self, write: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 6, 1)
        self.third, self.write = nn.Conv2d(6, 2, 1), write

    def forward(self, x: Tensor) -> Tensor:
        return self.third(self.second(self.write(self.first(x).relu())).relu())


@pytest.mark.parametrize("name", WRITES)
def test_assignments_are_followed(name: str) -> None:
    write, channels = WRITES[name]
    model: Any = randomise(Writing(write)).double()
    x = torch.randn(3, 3, 6, 6, dtype=torch.float64)
    gated: Any = fxprune.instrument(model, x)
    assert torch.equal(gated(x), model(x))
    close_half(gated)
    small: Any = fxprune.finalize(gated)
    assert small.report.verification.verdict == "equal"
    assert small.second.in_channels == channels
    size = 6 if name == "collected" else 8
    x = torch.randn(4, 3, size, size, dtype=torch.float64)
    assert error(gated(x), small(x)) < 1e-12


def view(x: Tensor) -> Tensor:
    part = x[:, :2]
    part[:, 0] = 0
    return x


def stale(x: Tensor) -> Tensor:
    y = x * 2
    part = y[:, :2]
    y[:, 0] = 0
    return F.pad(part, (0, 0, 0, 0, 0, 6))


def never_true(x: Tensor) -> Tensor:
    y = x * 2
    part = y[:, :2]
    y[y > 50] = 0
    return F.pad(part, (0, 0, 0, 0, 0, 6)) + y


def of_a_view(x: Tensor) -> Tensor:
    part = x[:, :2]
    part[part > 50] = 0
    return x


def through_two(x: Tensor) -> Tensor:
    y = x * 2
    part = y[:, :2]
    y[:, 4] = 0
    y[y > 50] = 0
    return F.pad(part, (0, 0, 0, 0, 0, 6)) + y


def augmented(x: Tensor) -> Tensor:
    y = x * 2
    part = y[:, :2]
    y *= torch.where(y > 50, 2.0, 1.0).to(y)
    return F.pad(part, (0, 0, 0, 0, 0, 6)) + y


def added(x: Tensor) -> Tensor:
    y = x * 2
    other = y
    y += (y > 50) * 2
    return y + other


STALE = [view, stale, never_true, of_a_view, through_two, augmented, added]


@pytest.mark.parametrize("write", STALE)
def test_what_has_another_name_is_refused(write: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(TraceError):
        fxprune.instrument(randomise(Writing(write)), torch.randn(3, 3, 6, 6))


class Kept(nn.Module):
    """Writes to its buffer: the next call would see that."""

    memory: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 8), nn.Linear(8, 2)
        self.register_buffer("memory", torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        self.memory[0] = x.mean()
        return self.second(x + self.memory)


def test_buffers_are_not_assigned_to() -> None:
    with pytest.raises(TraceError, match="another name"):
        fxprune.instrument(randomise(Kept()), torch.randn(4, 3))


class Spectral(nn.Module):
    """Keeps low frequencies, as Fourier neural operators do."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.low = nn.Linear(3, 8), nn.Linear(8, 6), Low()
        self.third = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.third(self.second(self.low(self.first(x)).relu()).relu())


class Low(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        found = torch.fft.rfft(x)
        low = torch.zeros_like(found)
        low[:, :2] = found[:, :2]
        return torch.fft.irfft(low, n=8)


def test_parts_of_complex_numbers_keep_their_gradients() -> None:
    model: Any = randomise(Spectral())
    x = torch.randn(4, 3)
    gated: Any = fxprune.instrument(model, x)
    for one in (model, gated):
        one(x).square().sum().backward()
    assert torch.equal(gated.first.weight.grad, model.first.weight.grad)


@pytest.mark.parametrize("name", WRITES)
def test_gradients_are_those_of_assignments(name: str) -> None:
    model: Any = randomise(Writing(WRITES[name][0])).double()
    x = torch.randn(3, 3, 6, 6, dtype=torch.float64)
    gated: Any = fxprune.instrument(model, x)
    for one in (model, gated):
        one(x).square().sum().backward()
    for layer in ("first", "second", "third"):
        left, right = getattr(gated, layer).weight.grad, getattr(model, layer).weight.grad
        assert torch.allclose(left, right, rtol=1e-12)


class Summing(nn.Module):
    """A residual block as torchvision writes it: what is overwritten is not read again."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.hidden = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 8, 1)
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        y += x
        return self.head(self.hidden(y.relu_()).relu_().mean((2, 3)))


def test_sums_in_place_are_traced_without_example_values(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any) -> None:
        raise AssertionError("example values are dear: a fake copy of the model, run node by node")

    monkeypatch.setattr(asked_tracer, "ExampleValues", never)
    model: Any = randomise(Summing()).double()
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    gated: Any = fxprune.instrument(model, x)
    close_half(gated)
    assert error(fxprune.finalize(gated)(x), gated(x)) < 1e-12
