"""The rules of folding by name, through `finalize`: exact where layers go, and the others stay.

C1 … C14 are linear layers, convolutions without and with a border, biases before a border, 1×1s,
groups, batch norms, average pools, sums, residual blocks, flattened maps, transposed convolutions,
what is not affine, and gates. How each part works is tested beside it; here is what comes out.
"""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fxprune
from fxprune.folding.convolutions import Inexact, composed, geometry_of
from fxprune.runtime.kinds import CONVS
from fxprune.testing import close_half, error, spread
from tests.conftest import randomise

EXACT = 1e-12
CONV, BN, AVG, MAX, T = nn.Conv2d, nn.BatchNorm2d, nn.AvgPool2d, nn.MaxPool2d, nn.ConvTranspose2d
KINDS = (nn.Linear, *CONVS, T, BN, nn.BatchNorm1d, AVG, MAX, nn.LayerNorm, nn.GroupNorm)


class Sum(nn.Module):
    """Branches over one input, and their sum."""

    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        first, *others = [branch(x) for branch in self.branches]
        for other in others:
            first = first + other
        return first


def left(
    *parts: nn.Module,
    shape: Sequence[int] = (2, 3, 9, 9),
    sizes: Sequence[int] = (8, 12),
    cost: Any = "parameters",
) -> list[nn.Module]:
    """Finalise a sequence, hold it against the whole one, and return what is left of its layers.

    sizes: of other maps to hold it against.
    """
    model = randomise(nn.Sequential(*parts)).double().eval()
    x = torch.randn(*shape, dtype=torch.float64)
    small = fxprune.finalize(model, x, cost=cost, check=False)
    others = [torch.randn(3, shape[1], n, n, dtype=torch.float64) for n in sizes]
    with torch.no_grad():
        for given_ in (x, *(others if len(shape) == 4 else ())):
            expected = model(given_)
            assert error(expected, small(given_)) < EXACT
            assert spread(expected) > 1e-3
    calls = [node for node in small.graph.nodes if node.op == "call_module"]
    modules = [small.get_submodule(str(node.target)) for node in calls]
    return [module for module in modules if type(module) in KINDS]


def test_c1_linear_layers() -> None:
    assert len(left(nn.Linear(6, 40), nn.Linear(40, 5), shape=(3, 6))) == 1
    assert len(left(nn.Linear(6, 40), nn.Linear(40, 5), shape=(3, 4, 6))) == 1
    assert len(left(nn.Linear(20, 3), nn.Linear(3, 20), shape=(3, 20))) == 2


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("dilation", [1, 2])
def test_c2_convolutions_without_a_border_between(stride: int, dilation: int) -> None:
    (one,) = left(CONV(3, 64, 3, stride, 2, dilation), CONV(64, 3, 2), sizes=(10, 14))
    assert isinstance(one, CONV) and one.stride == (stride, stride)


def test_c3_a_border_between_stays() -> None:
    assert len(left(CONV(3, 64, 3, padding=1, bias=False), CONV(64, 3, 3, padding=1))) == 2
    patches = CONV(3, 64, 3, 3, bias=False)  # exact only where 3 divides the size
    assert len(left(patches, CONV(64, 3, 3, padding=1))) == 2


def test_c3_a_border_that_only_zeros_are_read_beyond() -> None:
    assert len(left(CONV(3, 64, 3, padding=2, bias=False), CONV(64, 3, 3, padding=1))) == 1
    assert len(left(CONV(3, 64, 1, 2, bias=False), CONV(64, 3, 3, 2, 1))) == 1


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_c3_other_borders_stay(mode: Any) -> None:
    second = CONV(64, 3, 3, padding=1, padding_mode=mode)
    assert len(left(CONV(3, 64, 1, bias=False), second)) == 2


def test_c4_a_bias_before_a_border_is_a_channel_of_ones() -> None:
    (one,) = left(CONV(3, 64, 1, 2), CONV(64, 4, 5, padding=2))
    assert isinstance(one, CONV) and one.in_channels == 4
    assert len(left(CONV(4, 64, 1, groups=2), CONV(64, 4, 3, padding=1, groups=2),
                    shape=(2, 4, 9, 9))) == 2  # fmt: skip
    assert len(left(CONV(3, 64, 3, padding=2), CONV(64, 4, 3, padding=1))) == 2


def test_c5_a_1x1_behind_is_always_one_with_what_is_before() -> None:
    assert len(left(CONV(3, 64, 5, 2, 2), CONV(64, 4, 1, 2))) == 1
    assert len(left(CONV(3, 4, 5, 2, 2), CONV(4, 64, 1))) == 2


def test_c6_groups() -> None:
    shape = (2, 4, 9, 9)
    (one,) = left(CONV(4, 64, 3, groups=4), CONV(64, 4, 2, groups=2), shape=shape)
    assert isinstance(one, CONV) and one.groups == 2
    inverted = [CONV(4, 64, 1), CONV(64, 64, 3, padding=1, groups=64), CONV(64, 4, 1)]
    assert len(left(*inverted, shape=shape)) == 1
    assert len(left(CONV(4, 4, 3, groups=4), CONV(4, 32, 1), shape=shape)) == 2  # dearer


def test_c7_batch_norms() -> None:
    assert len(left(CONV(3, 4, 3, 2, 1, bias=False), BN(4))) == 1
    assert len(left(BN(3), CONV(3, 4, 3, 2))) == 1
    assert len(left(BN(3), CONV(3, 4, 3, 2, 1))) == 2  # it would shift the zeros at the border
    batch_statistics = BN(4, track_running_stats=False)
    assert len(left(CONV(3, 4, 3), batch_statistics)) == 2
    assert len(left(T(3, 4, 3, 2, 1), BN(4))) == 1


def test_c8_average_pools() -> None:
    def kinds(*parts: nn.Module, cost: str = "macs") -> list[type]:
        return [type(module) for module in left(*parts, shape=(2, 3, 8, 8), cost=cost)]

    assert kinds(CONV(3, 4, 3, padding=1), AVG(2)) == [CONV]
    assert kinds(CONV(3, 4, 3, padding=1), AVG(2), cost="parameters") == [CONV, AVG]
    assert kinds(CONV(3, 4, 3), AVG(2, padding=1)) == [CONV, AVG]
    assert kinds(CONV(3, 4, 3), AVG(2, padding=1, count_include_pad=False)) == [CONV, AVG]
    assert kinds(CONV(3, 4, 3), AVG(4, ceil_mode=True)) == [CONV, AVG]
    assert kinds(CONV(3, 4, 3), MAX(2), CONV(4, 4, 1)) == [CONV, MAX, CONV]


def test_c8_a_1x1_and_an_average_change_places() -> None:
    def kinds(*parts: nn.Module) -> list[type]:
        return [type(module) for module in left(*parts, shape=(2, 3, 8, 8))]

    assert kinds(CONV(3, 8, 1), AVG(2)) == [AVG, CONV]
    assert kinds(CONV(3, 64, 1), AVG(2), CONV(64, 4, 1)) == [AVG, CONV]
    assert kinds(CONV(3, 8, 1), AVG(3, 2, 1)) == [CONV, AVG]  # fewer of its windows hold the bias
    assert kinds(CONV(3, 64, 1), AVG(3, 2, 1), CONV(64, 4, 1)) == [CONV]  # with a channel of ones
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 4)]
    assert kinds(CONV(3, 64, 1), *head) == [nn.Linear]
    assert kinds(CONV(3, 64, 3), *head) == [CONV, nn.Linear]  # or it would freeze the size


def test_c9_sums() -> None:
    branches = [CONV(3, 3, 3, padding=1), CONV(3, 3, 1), BN(3), nn.Identity()]
    assert len(left(Sum(*branches))) == 1
    assert len(left(Sum(CONV(3, 3, 3, padding=1), MAX(3, 1, 1)))) == 2


def test_c10_residual_blocks() -> None:
    bottleneck = [CONV(4, 48, 1, bias=False), CONV(48, 48, 3, padding=1), CONV(48, 4, 1)]
    (one,) = left(Sum(nn.Sequential(*bottleneck), nn.Identity()), shape=(2, 4, 9, 9))
    assert isinstance(one, CONV) and one.kernel_size == (3, 3)
    strided = Sum(CONV(3, 4, 3, 2, 1), CONV(3, 4, 1, 2))
    assert len(left(strided)) == 1


def test_c11_flattened_maps() -> None:
    for conv in (CONV(3, 64, 3, padding=1), CONV(3, 64, 3, 2, 2, 2), CONV(3, 66, 5, 3, 1, 1, 3)):
        with torch.no_grad():
            features = conv(torch.zeros(1, 3, 9, 9)).numel()
        parts = [conv, BN(conv.out_channels), nn.Dropout(), nn.Flatten(), nn.Linear(features, 4)]
        assert [type(m) for m in left(*parts, sizes=())] == [nn.Linear]
    dear = [CONV(3, 4, 3, 2), nn.Flatten(), nn.Linear(64, 64)]
    assert len(left(*dear, sizes=())) == 2
    pooled = [CONV(3, 64, 3), MAX(2), nn.Flatten(), nn.Linear(576, 4)]
    assert len(left(*pooled, sizes=())) == 3


def test_c12_transposed_convolutions() -> None:
    assert len(left(T(3, 64, 4, 2, 1), CONV(64, 3, 1))) == 1
    assert len(left(CONV(3, 64, 1, bias=False), T(64, 3, 4, 2, 1))) == 1
    assert len(left(CONV(3, 64, 1), T(64, 3, 4, 2, 1))) == 2  # the bias is cut at the border
    assert len(left(T(3, 64, 2, 2, 1), CONV(64, 3, 3))) == 1
    assert len(left(T(3, 64, 2, 2, bias=False), CONV(64, 3, 3, padding=1))) == 1
    assert len(left(T(3, 64, 2, 2, 1, bias=False), CONV(64, 3, 3, padding=1))) == 2


@pytest.mark.parametrize(
    "middle",
    [
        *(nn.ReLU(), nn.Softmax(1), nn.GroupNorm(4, 64), nn.InstanceNorm2d(64)),
        nn.LayerNorm([64, 9, 9]),
    ],
    ids=lambda module: type(module).__name__,
)
def test_c13_what_is_not_affine_stays(middle: nn.Module) -> None:
    found = left(CONV(3, 64, 1), middle, CONV(64, 3, 1), sizes=())
    assert sum(isinstance(module, CONV) for module in found) == 2


def test_c14_units_go_first_then_layers_fold() -> None:
    model = nn.Sequential(
        *(nn.Conv2d(1, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU(), nn.Conv2d(24, 12, 1)),
        *(nn.ReLU(), nn.Flatten(), nn.Linear(12 * 36, 40), nn.ReLU(), nn.Linear(40, 3)),
    )
    x = torch.randn(4, 1, 6, 6, dtype=torch.float64)
    gated: Any = fxprune.instrument(randomise(model).double().eval(), x)
    assert len(gated.gates.depth_sites) == 3
    with torch.no_grad():
        close_half(gated)
        gated.gates.linear[:2] = 1
    small = fxprune.finalize(gated)
    assert [type(m) for m in small.modules() if type(m) in KINDS] == [nn.Linear, nn.Linear]
    with torch.no_grad():
        assert error(gated(x), small(x)) < EXACT
        assert spread(gated(x)) > 1e-3


@st.composite
def convolutions(draw: st.DrawFn, axes: int, inputs: int, outputs: int) -> Any:
    def sizes(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(low, high)) for _ in range(axes))

    kernel, stride, padding, dilation = sizes(1, 5), sizes(1, 3), sizes(0, 4), sizes(1, 2)
    groups, bias = draw(st.sampled_from([1, 2])), draw(st.booleans())
    kind: Any = CONVS[axes - 1]
    return kind(inputs, outputs, kernel, stride, padding, dilation, groups, bias)


@settings(max_examples=40, deadline=None)
@given(data=st.data(), axes=st.integers(1, 2), cost=st.sampled_from(["parameters", "macs"]))
def test_any_two_convolutions_stay_or_are_one_exactly(
    data: st.DataObject, axes: int, cost: Any
) -> None:
    first = data.draw(convolutions(axes, 2, 24))
    second = data.draw(convolutions(axes, 24, 2))
    model = randomise(nn.Sequential(first, second)).double().eval()
    x = torch.randn(2, 2, *(40, 43)[:axes], dtype=torch.float64)
    small = fxprune.finalize(model, x, cost=cost, check=False)
    for smaller in (0, 1, 2, 3):
        given_ = x[..., smaller:]
        with torch.no_grad():
            assert error(model(given_), small(given_)) < 1e-9


@settings(max_examples=200, deadline=None)
@given(first=convolutions(2, 4, 4), second=convolutions(2, 4, 4))
def test_two_convolutions_are_one_wherever_that_holds_for_every_size(
    first: Any, second: Any
) -> None:
    """C2, C3: nothing is padded between them, or nothing but zeros is read beyond; C4: no bias."""
    covered = [
        border == 0 or padding >= dilation * (kernel - 1)
        for border, padding, dilation, kernel in zip(
            second.padding, first.padding, first.dilation, first.kernel_size, strict=True
        )
    ]
    pointwise = first.kernel_size == (1, 1) and first.padding == (0, 0)
    carried = pointwise and (first.groups == 1 or second.groups == 1)
    bias = first.bias is None or second.padding == (0, 0) or carried
    geometries = [g for module in (first, second) if (g := geometry_of(module))]
    try:
        composed(*geometries)
        one = True
    except Inexact:
        one = False
    assert one == (all(covered) and bias)
