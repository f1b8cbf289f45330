"""Folding batch norms into the layers before them."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fxprune.passes.batch_norm import fold_batch_norm
from fxprune.programs.program import Program, capture
from fxprune.testing import check_rewrite
from tests.conftest import Golden, randomise

IMAGE, LINE, VOLUME = (3, 4, 6, 6), (3, 4, 9), (2, 4, 5, 5, 5)
PAIRS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6)), (3, 4)),
    "conv1d": (lambda: nn.Sequential(nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6)), LINE),
    "no bias": (
        lambda: nn.Sequential(nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6)),
        IMAGE,
    ),
    "grouped, strided, padded": (
        lambda: nn.Sequential(nn.Conv2d(4, 6, 3, 2, 1, groups=2), nn.BatchNorm2d(6)),
        IMAGE,
    ),
    "not affine": (
        lambda: nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6, affine=False)),
        IMAGE,
    ),
    "conv3d": (lambda: nn.Sequential(nn.Conv3d(4, 6, 3), nn.BatchNorm3d(6)), VOLUME),
    "transposed": (
        lambda: nn.Sequential(nn.ConvTranspose2d(4, 6, 3, 2), nn.BatchNorm2d(6)),
        IMAGE,
    ),
    "transposed, grouped": (
        lambda: nn.Sequential(nn.ConvTranspose2d(4, 6, 3, groups=2), nn.BatchNorm2d(6)),
        IMAGE,
    ),
}


def program(model: nn.Module, shape: tuple[int, ...]) -> Program:
    model = randomise(model).double().eval()
    return capture(model, ((torch.randn(shape).double(),), {}))


@pytest.mark.parametrize("name", PAIRS)
def test_a_batch_norm_behind_a_layer_goes(name: str, golden: Golden) -> None:
    build, shape = PAIRS[name]
    after = check_rewrite(fold_batch_norm, program(build(), shape))
    assert all("batchnorm" not in type(m).__name__.lower() for m in _called(after))
    golden.check(after.text())


def _called(one: Program) -> list[nn.Module]:
    return [
        one.module.get_submodule(str(node.target))
        for node in one.graph.nodes
        if node.op == "call_module"
    ]


class Branches(nn.Module):
    """A layer two others read; a norm over another axis; a shared layer; a norm without a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.shared, self.after_shared = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.linear, self.other_axis = nn.Linear(6, 6), nn.BatchNorm1d(4)
        self.alone = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.alone(x)
        once = self.conv(x)
        both = self.norm(once) + once
        again = self.after_shared(self.shared(self.shared(both)))
        return self.other_axis(self.linear(again.mean(-1)))


def test_what_must_not_fold_stays() -> None:
    one = program(Branches(), (3, 4, 6, 6))
    assert fold_batch_norm(one) == []


def test_a_norm_that_uses_the_batch_stays() -> None:
    norm = nn.BatchNorm2d(6, track_running_stats=False)
    one = program(nn.Sequential(nn.Conv2d(4, 6, 1), norm), IMAGE)
    assert fold_batch_norm(one) == []
