"""Linearity gates: where layers would merge, and that they do."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.errors import NothingToDoError
from tests.conftest import randomise


def linearised(model: nn.Module, x: Tensor) -> tuple[Any, Any]:
    """Instrument a model, open every linearity gate and finalise it."""
    gated: Any = fxprune.instrument(randomise(model).eval(), x)
    with torch.no_grad():
        gated.gates.linear.fill_(1)
    small = fxprune.finalize(gated)
    assert small.report.verification is not None
    assert small.report.verification.verdict == "equal"  # to 1e-9 in float64
    return gated, small


def left(small: nn.Module) -> list[nn.Module]:
    return [m for m in small.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]


def test_a_deep_perceptron_collapses() -> None:
    layers = [part for _ in range(20) for part in (nn.Linear(16, 16), nn.ReLU())]
    for layer in layers[::2]:
        assert isinstance(layer, nn.Linear)
        nn.init.orthogonal_(layer.weight)
    x = torch.randn(4, 16)
    gated, small = linearised(nn.Sequential(*layers[:-1]), x)
    assert len(gated.gates.depth_sites) == 19 and len(left(small)) == 1


class InvertedResidual(nn.Module):
    """Sandler et al. 2018, with an expansion that a fold makes up for."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.expand, self.norm1 = nn.Conv2d(width, inner, 1, bias=False), nn.BatchNorm2d(inner)
        self.depthwise = nn.Conv2d(inner, inner, 3, 1, 1, groups=inner, bias=False)
        self.norm2 = nn.BatchNorm2d(inner)
        self.project = nn.Conv2d(inner, width, 1, bias=False)
        self.norm3, self.act1, self.act2 = nn.BatchNorm2d(width), nn.ReLU6(), nn.ReLU6()

    def forward(self, x: Tensor) -> Tensor:
        y = self.act1(self.norm1(self.expand(x)))
        y = self.act2(self.norm2(self.depthwise(y)))
        return x + self.norm3(self.project(y))


def test_a_residual_block_with_a_linear_interior_becomes_one_convolution() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1), InvertedResidual(8, 64), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(8, 4),
    )  # fmt: skip
    x = torch.randn(2, 3, 12, 12)
    gated, small = linearised(model, x)
    assert [site.name for site in gated.gates.depth_sites] == ["1.act1", "1.act2"]
    assert len(left(small)) == 3 and "add" not in small.code


def conv(inputs: int, outputs: int, kernel: int, padding: int = 0) -> nn.Module:
    return nn.Conv2d(inputs, outputs, kernel, padding=padding)


NONE: dict[str, tuple[Callable[[], list[nn.Module]], str]] = {
    "border": (
        lambda: [conv(3, 64, 3, 1), nn.ReLU(), conv(64, 3, 3, 1)],
        "zeros are padded between them",
    ),
    "pool": (
        lambda: [conv(3, 64, 1), nn.ReLU(), nn.MaxPool2d(2), conv(64, 3, 1)],
        "_2 comes before another layer does",
    ),
    "dearer": (lambda: [conv(3, 3, 3), nn.ReLU(), conv(3, 3, 3)], "merged, 228 parameters; apart"),
}


@pytest.mark.parametrize("name", NONE)
def test_elsewhere_there_is_a_reason(name: str) -> None:
    build, reason = NONE[name]
    x = torch.randn(2, 3, 8, 8)
    gated: Any = fxprune.instrument(nn.Sequential(*build()), x)
    assert gated.gates.linear is None
    changes = [str(c) for log in gated.report.passes.values() for c in log]
    assert any("no linearity gate" in change and reason in change for change in changes), changes


def test_convolutions_with_a_norm_and_dropout_between_merge() -> None:
    model = nn.Sequential(
        conv(3, 64, 1), nn.ReLU(), nn.BatchNorm2d(64), nn.Dropout(), conv(64, 3, 3, 1), nn.Tanh()
    )
    x = torch.randn(2, 3, 8, 8)
    gated, small = linearised(model, x)
    assert len(gated.gates.depth_sites) == 1 and len(left(small)) == 1


def test_a_module_in_place_that_others_call_is_gated_by_itself() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(6, 64), nn.Linear(64, 6), nn.Linear(6, 3)
            self.act = nn.ReLU(inplace=True)

        def forward(self, x: Tensor) -> Tensor:
            seen = self.b(self.act(self.a(x)))
            return self.c(self.act(seen) + seen)  # the second call is felt in `seen`

    model, x = randomise(Twice()).eval(), torch.randn(4, 6)
    gated, small = linearised(model, x)
    assert [site.name for site in gated.gates.depth_sites] == ["act"]
    assert len(left(small)) == 2


class Residual(nn.Module):
    """A block over a stream, with a nonlinearity behind the sum."""

    def __init__(self, *inside: nn.Module, shortcut: nn.Module | None = None) -> None:
        super().__init__()
        self.inside, self.act = nn.Sequential(*inside), nn.ReLU()
        self.shortcut = nn.Identity() if shortcut is None else shortcut

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.inside(x) + self.shortcut(x))


def inside(width: int, inner: int) -> list[nn.Module]:
    return [
        *(nn.Conv2d(width, inner, 1, bias=False), nn.BatchNorm2d(inner), nn.ReLU()),
        *(nn.Conv2d(inner, width, 1, bias=False), nn.BatchNorm2d(width)),
    ]


STREAMS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "perceptron": lambda: (
        nn.Sequential(
            nn.Linear(5, 8),
            *(Residual(nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 8)) for _ in range(3)),
        ),
        torch.randn(3, 5),
    ),
    "convolutions": lambda: (
        nn.Sequential(
            *(nn.Conv2d(3, 8, 3, padding=1), Residual(*inside(8, 24)), Residual(*inside(8, 24))),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Sigmoid()),
        ),
        torch.randn(3, 3, 9, 9),
    ),
    "shortcuts": lambda: (
        nn.Sequential(
            *(nn.Linear(5, 8), nn.ReLU(), Residual(nn.Linear(8, 8), shortcut=nn.Linear(8, 8))),
            *(Residual(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)), nn.Linear(8, 3)),
        ),
        torch.randn(3, 5),
    ),
}


@pytest.mark.parametrize("name", STREAMS)
def test_blocks_on_a_stream_become_one_layer(name: str) -> None:
    gated, small = linearised(*STREAMS[name]())
    names = [site.name for site in gated.gates.depth_sites]
    assert any(name.endswith("act") for name in names)
    last = 1 if name != "shortcuts" else 0  # a nonlinearity that nothing follows stays
    assert len(left(small)) == 1 and small.code.count(".act(") == last, small.code


def test_a_stream_that_others_read_too_is_no_chain() -> None:
    class Read(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.act = nn.Linear(5, 8), nn.ReLU()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            x = self.act(self.stem(x))
            return (x + self.a(x)) * self.b(x).sigmoid()

    with pytest.raises(NothingToDoError, match="no linearity gate: act has several readers"):
        fxprune.instrument(Read(), torch.randn(3, 5))


def test_blocks_within_blocks_become_one_layer() -> None:
    class Sum(nn.Module):
        def __init__(self, inside: nn.Module) -> None:
            super().__init__()
            self.inside = inside

        def forward(self, x: Tensor) -> Tensor:
            return x + self.inside(x)

    model: nn.Module = nn.Linear(8, 8)
    for _ in range(4):
        model = Sum(nn.Sequential(nn.Linear(8, 8), model, nn.Linear(8, 8)))
    small = fxprune.finalize(randomise(model).eval(), torch.randn(3, 8))
    assert len(left(small)) == 1 and "add" not in small.code


FLAT: dict[str, Callable[[], list[nn.Module]]] = {
    "before": lambda: [conv(1, 16, 3, 1), nn.ReLU(), nn.Flatten(), nn.Linear(1024, 4)],
    "behind": lambda: [conv(1, 16, 3, 1), nn.Flatten(), nn.ReLU(), nn.Linear(1024, 4)],
    "normed": lambda: [
        *(conv(1, 16, 3, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.Dropout(), nn.Flatten()),
        nn.Linear(1024, 4),
    ],
}


@pytest.mark.parametrize("name", FLAT)
def test_a_flattening_may_stand_between(name: str) -> None:
    x = torch.randn(3, 1, 8, 8)
    gated, small = linearised(nn.Sequential(*FLAT[name]()), x)
    assert len(gated.gates.depth_sites) == 1
    (layer,) = left(small)
    assert isinstance(layer, nn.Linear) and layer.weight.shape == (4, 64)


def test_a_whole_network_of_images_may_become_linear() -> None:
    layers = [
        *(conv(1, 16, 3, 1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU(), nn.Flatten()),
        *(nn.Linear(512, 100), nn.ReLU(), nn.Linear(100, 4)),
    ]
    gated, small = linearised(nn.Sequential(*layers), torch.randn(3, 1, 8, 8))
    assert len(gated.gates.depth_sites) == 3 and len(left(small)) == 1


UNFLAT: dict[str, tuple[Callable[[], list[nn.Module]], str]] = {
    "norm of places": (
        lambda: [conv(1, 8, 1), nn.ReLU(), nn.Flatten(), nn.BatchNorm1d(512), nn.Linear(512, 4)],
        "comes before another layer does",
    ),
    "last axis": (
        lambda: [conv(1, 8, 1), nn.ReLU(), nn.Linear(8, 4)],
        "work along different axes",
    ),
    "unfolded": (
        lambda: [conv(1, 8, 1), nn.ReLU(), nn.Flatten(2), nn.Linear(64, 4)],
        "moves what it reads",
    ),
}


@pytest.mark.parametrize("name", UNFLAT)
def test_what_is_no_flattened_map_is_refused(name: str) -> None:
    build, reason = UNFLAT[name]
    model = nn.Sequential(conv(1, 2, 1), nn.ReLU(), conv(2, 1, 1), *build())
    gated: Any = fxprune.instrument(model, torch.randn(3, 1, 8, 8))
    changes = [str(c) for log in gated.report.passes.values() for c in log]
    assert any("no linearity gate" in change and reason in change for change in changes), changes
