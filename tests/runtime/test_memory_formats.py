"""What comes in channels_last stays there, cut or folded; so does what an optimizer keeps of it."""

from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxprune
from fxprune.runtime.memory_formats import channels_last
from fxprune.testing import close_half
from tests.conftest import randomise
from tests.planning.test_accounts import DenseNet, InvertedResidual, Residual, depthwise, grouped


def solid() -> nn.Module:
    layers = [nn.Conv3d(3, 8, 3, padding=1), nn.BatchNorm3d(8), nn.ReLU(), nn.Conv3d(8, 6, 1)]
    return nn.Sequential(*layers, nn.ReLU(), nn.Conv3d(6, 2, 3))


class Written(nn.Module):
    """A convolution written as a function, and a map of parameters that is added."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(8, 3, 3, 3))
        self.places, self.last = nn.Parameter(torch.randn(1, 8, 6, 6)), nn.Conv2d(8, 3, 1)
        self.middle = nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(F.conv2d(x, self.kernel) + self.places)
        return self.last(F.relu(self.middle(x)))


IMAGES, SOLIDS = (2, 3, 8, 8), (2, 3, 6, 6, 6)
NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "residual": (Residual, IMAGES),
    "depthwise": (depthwise, IMAGES),
    "grouped": (grouped, IMAGES),
    "inverted residual": (InvertedResidual, IMAGES),
    "densenet": (DenseNet, IMAGES),
    "written": (Written, IMAGES),
    "solid": (solid, SOLIDS),
}


def laid_out(name: str) -> tuple[Any, Tensor, torch.memory_format]:
    """Return a model with channels last, an input, and the format."""
    make, shape = NETS[name]
    last: Any = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
    model = nn.Module.to(randomise(make()), memory_format=last)
    return model, torch.randn(shape).to(memory_format=last), last


def others(module: nn.Module, last: torch.memory_format) -> Iterator[str]:
    """Yield the names of maps that lie in memory otherwise."""
    for name, tensor in chain(module.named_parameters(), module.named_buffers()):
        maps = tensor.dim() in (4, 5)
        if maps and tensor.stride() != tensor.detach().clone().to(memory_format=last).stride():
            yield name


@pytest.mark.parametrize("name", NETS)
def test_a_training_keeps_its_channels_last(name: str) -> None:
    model, x, last = laid_out(name)
    gated: Any = fxprune.instrument(model, x)
    assert not list(others(gated, last))
    optimizer = torch.optim.Adam(gated.parameters())
    gated(x).square().sum().backward()
    optimizer.step()
    with torch.no_grad():
        close_half(gated)
    small = fxprune.compact(gated, optimizer)
    assert small is not gated and not list(others(small, last))
    for parameter in small.parameters():
        state = optimizer.state[parameter]
        assert {state[key].stride() for key in ("exp_avg", "exp_avg_sq")} == {parameter.stride()}
        assert parameter.grad is not None and parameter.grad.shape == parameter.shape


@pytest.mark.parametrize("fold", [True, False])
@pytest.mark.parametrize("name", NETS)
def test_what_is_finalised_has_its_channels_last(name: str, fold: bool) -> None:
    model, x, last = laid_out(name)
    gated: Any = fxprune.instrument(model, x)
    close_half(gated)
    if gated.gates.linear is not None:
        gated.gates.linear.data.fill_(1)
    assert not list(others(fxprune.finalize(gated, fold=fold), last))


def test_each_part_of_a_model_is_as_it_was() -> None:
    model: Any = randomise(Residual())
    model.second.to(memory_format=torch.channels_last)
    gated: Any = fxprune.instrument(model, torch.randn(IMAGES))
    close_half(gated)
    for small in (fxprune.compact(gated), fxprune.finalize(gated)):
        found = {n for n, p in small.named_parameters() if channels_last(p)}
        assert found == {"second.weight"}


def test_what_is_in_both_formats_is_left_alone() -> None:
    plain = torch.randn(4, 1, 3, 3)
    assert plain.is_contiguous(memory_format=torch.channels_last)
    assert channels_last(plain) is None
    assert channels_last(plain.to(memory_format=torch.channels_last)) is torch.channels_last
    for odd in (torch.randn(3, 3), torch.randn(4, 4, 4, 4).to_sparse(), torch.randn(3, 1, 1, 1)):
        assert channels_last(odd) is None
