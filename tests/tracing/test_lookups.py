"""Sizes, ranks and types that are looked up in tables, and memos that are kept by them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxprune


class Scaled(nn.Module):
    """Two layers, and a scale that is looked up."""

    def __init__(self, look_up: Callable[[Any, Tensor], float]) -> None:
        super().__init__()
        self.first, self.second, self.look_up = nn.Linear(8, 16), nn.Linear(16, 4), look_up
        self.memo: dict[int, float] = {}
        self.scale_3 = 5.0

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x))) * self.look_up(self, x)


LOOKUPS: dict[str, Callable[[Any, Tensor], float]] = {
    "get": lambda _, x: {3: 5.0}.get(x.shape[0], 1.0),
    "get int": lambda _, x: {3: 5.0}.get(int(x.shape[0]), 1.0),
    "get len": lambda _, x: {3: 5.0}.get(len(x), 1.0),
    "in a set": lambda _, x: 5.0 if x.shape[0] in {3} else 1.0,
    "a tuple": lambda _, x: {(3, 8): 5.0}.get((x.shape[0], x.shape[1]), 1.0),
    "a tuple of all": lambda _, x: 5.0 if tuple(x.shape) in {(3, 8)} else 1.0,
    "a shape": lambda _, x: {torch.Size([3, 8]): 5.0}.get(x.shape, 1.0),
    "a rank": lambda _, x: {3: 5.0}.get(x.ndim, 1.0),
    "a rank in a set": lambda _, x: 5.0 if x.dim() in {3} else 1.0,
    "a string": lambda _, x: 5.0 if str(x.shape[0]) == "3" else 1.0,
    "a format": lambda _, x: {"3": 5.0}.get(f"{x.shape[0]}", 1.0),
    "an old format": lambda _, x: {"3": 5.0}.get("%s" % x.shape[0], 1.0),  # noqa: UP031
    "a name": lambda net, x: getattr(net, f"scale_{x.shape[0]}", 1.0),
    "a type's name": lambda _, x: 5.0 if str(x.dtype) == "torch.float64" else 1.0,
    "a type": lambda _, x: {torch.float64: 5.0}.get(x.dtype, 1.0),
}


@pytest.mark.parametrize("name", LOOKUPS)
def test_what_a_table_has_not_is_assumed(name: str) -> None:
    model = Scaled(LOOKUPS[name]).eval()
    gated = fxprune.instrument(model, torch.randn(4, 8)).eval()
    x = torch.randn(3, 5, 8) if "rank" in name else torch.randn(3, 8)
    if name.startswith("a type"):
        x, gated = x.double(), gated.double()
    with pytest.raises(AssertionError, match="assumes"):
        gated(x)


def remembered(net: Any, x: Tensor) -> float:
    size = x.shape[0]
    if size not in net.memo:
        net.memo[size] = 1.0 + size / 4
    return net.memo[size]


def test_what_a_memo_has_not_is_made_for_any_size() -> None:
    model = Scaled(remembered).eval()
    gated = fxprune.instrument(model, torch.randn(4, 8)).eval()
    for rows in (4, 3, 7):
        x = torch.randn(rows, 8)
        assert torch.equal(gated(x), model(x))


def told(net: Any, x: Tensor) -> float:
    print(f"a batch of {x.shape[0]}, {x.shape}")
    return 2.0


def test_what_is_told_to_people_binds_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    model = Scaled(told).eval()
    gated = fxprune.instrument(model, torch.randn(4, 8)).eval()
    assert not gated.report.assumptions and "a batch of" in capsys.readouterr().out
    x = torch.randn(3, 8)
    assert torch.equal(gated(x), model(x))
