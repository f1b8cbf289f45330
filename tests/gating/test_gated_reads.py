"""Layers that read through gates: the numbers of the plain product, and less to keep."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxprune.gating import gated_reads
from fxprune.gating.gated_reads import read

Read = Callable[[Any, Tensor, Tensor], Tensor]

CASES: dict[str, tuple[Callable[[], Any], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(6, 5), (4, 6)),
    "linear of tokens, no bias": (lambda: nn.Linear(6, 5, bias=False), (2, 3, 6)),
    "convolution": (lambda: nn.Conv2d(6, 5, 3, padding=1), (2, 6, 5, 4)),
    "strided": (lambda: nn.Conv2d(6, 4, (3, 2), (2, 1), (1, 0), (1, 2), bias=False), (2, 6, 5, 6)),
    "grouped": (lambda: nn.Conv1d(6, 4, 3, groups=2), (2, 6, 7)),
    "depthwise": (lambda: nn.Conv2d(6, 12, 3, groups=6), (2, 6, 4, 4)),
    "volume": (lambda: nn.Conv3d(6, 2, 2), (2, 6, 3, 3, 3)),
    "same": (lambda: nn.Conv1d(6, 4, 3, padding="same"), (2, 6, 7)),
    "circular": (lambda: nn.Conv1d(6, 4, 3, padding=1, padding_mode="circular"), (2, 6, 7)),
    "no batch": (lambda: nn.Conv1d(6, 4, 3), (6, 7)),
}


def plain(layer: Any, value: Tensor, gate: Tensor) -> Tensor:
    """Multiply the value, as the formula has it."""
    return layer(value * gate)


def sample(name: str, dtype: torch.dtype = torch.float64) -> tuple[Any, Tensor, Tensor]:
    make, shape = CASES[name]
    torch.manual_seed(0)
    layer = make().to(dtype)
    along = [size if place == shape.index(6) else 1 for place, size in enumerate(shape)]
    gate = torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0, 1.0], dtype=dtype).reshape(along)
    value = torch.randn(shape, dtype=dtype, requires_grad=True)
    return layer, value, gate.requires_grad_()


@pytest.fixture(params=[True, False], ids=["in value", "in weights"], autouse=True)
def in_value(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let gates be multiplied into the value, or into the weights, whichever is larger."""
    monkeypatch.setattr(gated_reads, "scales_value", lambda layer, value: request.param)
    monkeypatch.setattr(gated_reads, "LARGE", 0)


def gradients(
    one: Read, layer: Any, value: Tensor, gate: Tensor, *, twice: bool = False
) -> list[Tensor]:
    """Return ∂ of all that is differentiable, or of a loss of these."""
    wanted = [value, gate, *layer.parameters()]
    loss = one(layer, value, gate).sin().sum()
    first = torch.autograd.grad(loss, wanted, create_graph=twice)
    if not twice:
        return list(first)
    return list(torch.autograd.grad(torch.cat([p.flatten() for p in first]).square().sum(), wanted))


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_the_gated_value_once_and_twice(name: str) -> None:
    layer, value, gate = sample(name)
    torch.testing.assert_close(read(layer, value, gate), plain(layer, value, gate))
    for twice in (False, True):
        found = gradients(read, layer, value, gate, twice=twice)
        expected = gradients(plain, layer, value, gate, twice=twice)
        assert all(part.abs().max() > 1e-2 for part in expected)
        assert found[1].flatten()[0] != 0  # ∂w also where w is 0
        for mine, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["linear", "convolution", "grouped"])
def test_only_what_is_there_anyway_is_kept_for_the_backward(name: str) -> None:
    layer, value, gate = sample(name)
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        read(layer, value, gate)
    there = {t.untyped_storage().data_ptr() for t in (value, gate, *layer.parameters())}
    assert kept
    assert {tensor.untyped_storage().data_ptr() for tensor in kept} <= there


def test_small_products_are_left_to_autograd(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, value, gate = sample("convolution")
    functions = [type(read(layer, value, gate).grad_fn).__name__]
    monkeypatch.setattr(gated_reads, "LARGE", 2**19)
    functions.append(type(read(layer, value, gate).grad_fn).__name__)
    assert functions == ["_ConvolutionBackward", "ConvolutionBackward0"]


@pytest.mark.parametrize("frozen", ["value", "gate", "weights"])
def test_what_needs_no_gradient_gets_none(frozen: str) -> None:
    for name in ("linear", "convolution"):
        layer, value, gate = sample(name)
        parts = {"value": [value], "gate": [gate], "weights": list(layer.parameters())}
        for part in parts[frozen]:
            part.requires_grad_(False)
        read(layer, value, gate).sum().backward()
        for which, tensors in parts.items():
            assert all((tensor.grad is None) == (which == frozen) for tensor in tensors)


@pytest.mark.parametrize("name", ["linear", "convolution"])
def test_under_autocast_gradients_have_the_dtypes_of_what_they_are_of(name: str) -> None:
    layer, value, gate = sample(name, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = (gradients(one, layer, value, gate) for one in (read, plain))
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.dtype == theirs.dtype == torch.float32
        torch.testing.assert_close(mine, theirs, rtol=0.05, atol=0.05)


def test_gradients_of_every_sample() -> None:
    layer, value, gate = sample("convolution")

    def loss(gate: Tensor, one: Tensor) -> Tensor:
        return read(layer, one.unsqueeze(0), gate).sin().sum()

    found = torch.func.vmap(torch.func.grad(loss), (None, 0))(gate.detach(), value.detach())
    expected = [gradients(plain, layer, one.unsqueeze(0), gate)[1] for one in value]
    torch.testing.assert_close(found, torch.stack(expected))
