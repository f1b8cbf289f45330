"""Arguments that inputs decide: another axis, other parts, other groups at the next run."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxprune
from fxprune.testing import close_half, error, spread
from tests.conftest import randomise


class Decided(nn.Module):
    """Two layers, whose channels something reads as another input says."""

    def __init__(self, read: Callable[[Any, Tensor, Any], Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 3)
        self.read = read

    def forward(self, x: Tensor, k: Any) -> Tensor:
        return self.read(self, torch.relu(self.second(torch.relu(self.first(x)))), k)


Read = Callable[[Any, Tensor, Any], Tensor]
tensor, zeros = torch.tensor, torch.zeros
READS: dict[str, tuple[Read, Any, Any]] = {
    "split": (lambda _, h, k: h.split(k.tolist(), 1)[0].sum(1), tensor([4, 12]), tensor([12, 4])),
    "tensor_split": (
        lambda _, h, k: h.tensor_split(k.tolist(), 1)[0].sum(1),
        tensor([4]),
        tensor([12]),
    ),
    "a list": (lambda _, h, k: h[:, k.tolist()].sum(1), tensor([0, 3]), tensor([5, 12])),
    "roll": (lambda m, h, k: m.third(h.roll(k.tolist(), 1)), tensor([4]), tensor([7])),
    "flip": (lambda m, h, k: m.third(h.flip(k.tolist())), tensor([0]), tensor([1])),
    "an axis": (lambda m, h, k: m.third(h.cumsum(k.item())), tensor(0), tensor(1)),
    "a rank": (lambda m, h, k: m.third(h.cumsum(k.dim() - 1)), zeros(3), zeros(3, 3)),
    "a size": (lambda m, h, k: m.third(h.cumsum(k.shape[1] % 2)), zeros(9, 4), zeros(9, 5)),
    "flip a size": (lambda m, h, k: m.third(h.flip(k.shape[1] % 2)), zeros(9, 4), zeros(9, 5)),
    "groups": (lambda m, h, k: m.third(F.group_norm(h, k.shape[1])), zeros(9, 4), zeros(9, 8)),
    "a slice": (lambda _, h, k: h[:, k].sum(1), slice(0, 4), slice(0, 12)),
    "slices": (lambda _, h, k: h[:, k[0]].sum(1), [slice(0, 4)], [slice(0, 12)]),
    "numpy's number": (lambda _, h, k: h[:, :k].sum(1), np.int64(4), np.int64(12)),
    "numpy's array": (lambda _, h, k: h[:, k].sum(1), np.array([0, 2]), np.array([5, 9])),
    "a flag": (lambda m, h, k: m.third(h) * (2.0 if k is True else 1.0), True, 1),
}


@pytest.mark.parametrize("name", READS)
def test_a_result_follows_other_inputs_or_refuses_them(name: str) -> None:
    read, example, other = READS[name]
    model: Any = randomise(Decided(read)).double()
    x = torch.randn(5, 8, dtype=torch.float64)
    gated: Any = fxprune.instrument(model, (x, example))
    close_half(gated)
    small: Any = fxprune.finalize(gated)
    assert error(gated(x, example), small(x, example)) < 1e-12
    assert small.first.out_features == 8
    try:
        expected = gated(x, other)
    except AssertionError:
        with pytest.raises(AssertionError, match="assumes"):
            small(x, other)
        return
    assert error(expected, small(x, other)) < 1e-12 < spread(expected)


def doubled(net: Any, h: Tensor, _: Any) -> Tensor:
    twice = torch.cat([h, h], h.dim() - 2)
    return net.third(twice.flip(twice.ndim - 2))


def test_an_axis_counted_from_the_end_is_no_reason_to_keep_channels() -> None:
    model: Any = randomise(Decided(doubled)).double()
    gated: Any = fxprune.instrument(model, (torch.randn(5, 8, dtype=torch.float64), tensor(1)))
    assert close_half(gated) == 16
    small: Any = fxprune.finalize(gated)
    assert (small.second.out_features, small.third.in_features) == (8, 8)
