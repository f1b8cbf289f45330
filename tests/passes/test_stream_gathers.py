"""Picks of channels out of a stream: exact, where they pay, and nothing of ours left behind."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxprune
from fxprune.ops.gather import pick_channels
from fxprune.testing import error, spread
from tests.conftest import randomise


class Block(nn.Module):
    """A pre-activation block: its batch norm may switch channels off for it alone."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(width)
        self.conv1 = nn.Conv2d(width, inner, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.relu(self.bn2(self.conv1(F.relu(self.bn1(x))))))


class Dense(nn.Module):
    """Two layers of a dense block."""

    def __init__(self) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(24), nn.Conv2d(24, 40, 3, padding=1)
        self.bn2, self.conv2 = nn.BatchNorm2d(64), nn.Conv2d(64, 40, 3, padding=1)
        self.bn3 = nn.BatchNorm2d(104)

    def forward(self, x: Tensor) -> Tensor:
        one = self.conv1(F.relu(self.bn1(x)))
        two = self.conv2(F.relu(self.bn2(torch.cat([x, one], 1))))
        return F.relu(self.bn3(torch.cat([x, one, two], 1)))


def network(stream: nn.Module, width: int) -> Any:
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))
    first = nn.Conv2d(3, 24 if isinstance(stream, Dense) else 64, 3, padding=1)
    return randomise(nn.Sequential(first, stream, *head)).double().eval()


def switch_off(norm: Any, channels: Tensor) -> None:
    with torch.no_grad():
        norm.weight[channels] = 0
        norm.bias[channels] = 0


def finalized(model: nn.Module) -> Any:
    x = torch.randn(2, 3, 12, 12, dtype=torch.float64)
    small: Any = fxprune.finalize(model, x)
    assert small.report.verification.verdict == "equal"
    assert error(model(x), small(x)) < 1e-12 < spread(model(x))
    assert all(node.target is not pick_channels for node in small.graph.nodes)
    return small


def picks(small: Any) -> list[str]:
    return [str(c) for c in small.report.passes["remove_dead_units"] if "picks" in c.what]


def test_a_block_gets_its_own_channels_of_the_stream() -> None:
    model = network(nn.Sequential(Block(64, 48), Block(64, 48)), 64)
    blocks: Any = model[1]
    switch_off(blocks[0].bn1, torch.arange(0, 64, 2))
    switch_off(blocks[1].bn1, torch.arange(1, 64, 3))
    small = finalized(model)
    assert picks(small) == [
        "_1_0_conv1: picks 32 of 64 channels of _0",
        "_1_1_conv1: picks 43 of 64 channels of add",
    ]
    assert small.get_submodule("1.0.conv1").weight.shape == (48, 32, 3, 3)
    assert small.get_submodule("1.1.bn1").num_features == 43
    assert small.get_submodule("0").weight.shape[0] == 64


def test_neighbouring_channels_are_a_slice() -> None:
    model = network(Block(64, 2), 64)
    block: Any = model[1]
    switch_off(block.bn1, torch.arange(40, 64))
    small = finalized(model)
    assert small.get_submodule("1.conv1").weight.shape == (2, 40, 3, 3)
    assert "index_select" not in small.code


@pytest.mark.parametrize(("inner", "pays"), [(2, False), (48, True)])
def test_only_where_it_pays(inner: int, pays: bool) -> None:
    model = network(Block(64, inner), 64)
    block: Any = model[1]
    switch_off(block.bn1, torch.randperm(64)[:32])
    small = finalized(model)
    assert bool(picks(small)) == pays
    assert small.get_submodule("1.conv1").weight.shape[1] == (32 if pays else 64)


def test_layers_of_a_dense_block_read_what_they_need() -> None:
    model = network(Dense(), 104)
    dense: Any = model[1]
    switch_off(dense.bn2, torch.arange(0, 64, 2))
    switch_off(dense.bn3, torch.arange(0, 104, 5))
    small = finalized(model)
    assert any("_1_conv2: picks 32" in line for line in picks(small))
    assert small.get_submodule("1.conv2").weight.shape[1] == 32


def test_zero_columns_of_one_reader_are_not_read() -> None:
    model = network(Block(64, 48), 64)
    block: Any = model[1]
    block.bn1, block.forward = nn.Identity(), Block.forward.__get__(block)
    with torch.no_grad():
        block.conv1.weight[:, ::2] = 0
    small = finalized(model)
    assert small.get_submodule("1.conv1").weight.shape == (48, 32, 3, 3)


def test_the_verdict_counts_what_is_dead_for_all() -> None:
    model = network(nn.Sequential(Block(64, 48), Block(64, 48)), 64)
    blocks: Any = model[1]
    head: Any = model[4]
    with torch.no_grad():  # nobody needs channel 5
        head.weight[:, 5] = 0
    for block in blocks:
        switch_off(block.bn1, torch.arange(5, 64, 2))
    small = finalized(model)
    assert small.get_submodule("0").weight.shape[0] == 63
    assert small.get_submodule("1.0.conv1").weight.shape[1] == 64 - 30


def test_without_partly_dead_streams_nothing_is_picked() -> None:
    model = network(Block(64, 48), 64)
    small = finalized(model)
    assert not picks(small)
