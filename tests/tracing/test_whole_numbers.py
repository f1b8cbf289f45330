"""`int(…)` of what is computed from sizes, and what else code may do with `int`."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.deployment.export import onnx_session
from fxprune.programs.program import capture
from fxprune.tracing.whole_numbers import _calls_int


class Between(nn.Module):
    """Two layers, and something that lays their map out by numbers it computes."""

    def __init__(self, layout: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.up, self.layout, self.down = nn.Conv2d(3, 8, 1), layout, nn.Linear(8, 4)
        self.scales = {8: 2.0, 12: 3.0}

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.layout(self, torch.relu(self.up(x))))


def windows(_: Any, x: Tensor) -> Tensor:
    b, c, h, w = x.shape
    parts = x.view(b, c, h // 4, 4, w // 4, 4).permute(0, 2, 4, 3, 5, 1).reshape(-1, 4, 4, c)
    samples = int(parts.shape[0] / (h * w / 4 / 4))
    return parts.view(samples, h // 4, w // 4, 4, 4, c).mean((1, 2, 3, 4))


def side(_: Any, x: Tensor) -> Tensor:
    tokens = x.flatten(2).transpose(1, 2)
    size = int(tokens.shape[1] ** 0.5)
    return tokens.reshape(tokens.shape[0], size, size, -1)[:, 1:].mean((1, 2))


def halved(_: Any, x: Tensor) -> Tensor:
    size = int(x.shape[2] * 0.5), int(x.shape[3])
    return nn.functional.interpolate(x, size).mean((2, 3))


def of_an_int(_: Any, x: Tensor) -> Tensor:
    size: Any = int(x.shape[2])
    if not isinstance(size, int):  # an assert would read int
        raise TypeError
    return x[:, :, : int(x.shape[2]) // 2].sum((2, 3)) / int("3") / int(3.9)


def length(_: Any, x: Tensor) -> Tensor:
    samples = len(x)
    scale = 0.5 * len(x) if len("ab") == 2 and len(x[0]) == 8 else 0
    return x.reshape(samples, 8, -1).mean(2) * scale


def spectrum(_: Any, x: Tensor) -> Tensor:
    rows = torch.fft.irfft(torch.fft.rfft(x), x.shape[3])
    both = torch.fft.irfft2(torch.fft.rfft2(x) * 1j, s=x.shape[-2:])
    return (rows + both.abs()).mean((2, 3))


@pytest.mark.parametrize("layout", [windows, side, halved, of_an_int, length, spectrum])
def test_a_number_that_int_makes_follows_the_input(layout: Any) -> None:
    torch.manual_seed(0)
    model = Between(layout)
    gated = fxprune.instrument(model, torch.randn(2, 3, 8, 8))
    assert len(gated.report.assumptions) == (layout is length)  # as many channels as there are
    for shape in ((2, 3, 8, 8), (5, 3, 8, 8), (1, 3, 16, 16), (3, 3, 12, 12)):
        x = torch.randn(*shape)
        assert torch.equal(gated(x), model(x))


class Turned(nn.Module):
    """Windows put together again by the number of samples, as Swin transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        windows = torch.relu(self.up(x)).reshape(-1, 4, 8)
        samples = int(windows.shape[0] / (x.shape[1] / 4))
        turned = windows.view(samples, 2, 4, -1).transpose(1, 2)
        return self.down(turned.reshape(x.shape[0], -1, 8))


def test_a_number_that_int_makes_of_a_batch_stays_open_in_a_file(tmp_path: Path) -> None:
    inputs, model, path = torch.randn(1, 8, 4), Turned().eval(), tmp_path / "turned.onnx"
    # Of Python that was not traced the exporter takes the example's number, unsaid.
    with pytest.raises(fxprune.ExportError, match=r"something else on .* leaves open: .*_batch"):
        fxprune.export_onnx(model, path, inputs)
    check = fxprune.export_onnx(fxprune.finalize(model, inputs), path, inputs)
    assert "batch 3 on CPU" in check.errors
    more = torch.randn(5, 8, 4)
    (found,) = onnx_session(path).run(None, {"x": more.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), model(more))


def test_python_that_needs_the_number_has_it_and_the_trace_says_so() -> None:
    torch.manual_seed(0)

    def looked_up(self: Any, x: Tensor) -> Tensor:
        total = x.mean((2, 3)) * self.scales[int(x.shape[2])]
        for row in range(int(x.shape[3] / 4)):
            total = total + x[:, :, row].mean(2)
        return total

    model, x = Between(looked_up), torch.randn(2, 3, 8, 8)
    gated = fxprune.instrument(model, x)
    assert torch.equal(gated(x), model(x))
    assumed = {one.what.partition("assumes ")[2] for one in gated.report.assumptions}
    assert {text.partition(" (at")[0] for text in assumed} == {
        "relu.shape[2] == 8",
        "int(relu.shape[3] / 4) == 2",
    }
    with pytest.raises(AssertionError, match="this model assumes"):
        gated(torch.randn(2, 3, 12, 8))


def test_a_list_is_as_long_as_the_example() -> None:
    torch.manual_seed(0)

    def one_by_one(_: Any, x: Tensor) -> Tensor:
        rows = [None] * len(x)
        for place in range(len(x)):
            rows[place] = x[place].mean((1, 2))  # type: ignore[call-overload]
        return torch.stack(rows)  # type: ignore[arg-type]

    model, x = Between(one_by_one), torch.randn(2, 3, 8, 8)
    gated = fxprune.instrument(model, x)
    assert torch.equal(gated(x), model(x))
    (assumed,) = gated.report.assumptions
    assert "relu.size(0) == 2" in assumed.what


def test_an_int_of_data_follows_the_data() -> None:
    torch.manual_seed(0)
    model = Between(lambda _, x: x.mean((2, 3)) * (int(x.sum() > 0) + int(x.argmax())))
    traced = capture(model, ((torch.randn(2, 3, 8, 8),), {})).module
    for x in (torch.randn(2, 3, 8, 8), torch.zeros(1, 3, 8, 8), torch.full((3, 3, 4, 4), -9.0)):
        assert torch.equal(traced(x), model(x))


def test_python_cannot_be_told_what_data_are() -> None:
    model = Between(lambda _, x: torch.stack([x] * int(x.argmax() + 1)).sum((0, 3, 4)))
    with pytest.raises(fxprune.TraceError, match="cannot be used as inputs to control flow"):
        capture(model, ((torch.randn(2, 3, 8, 8),), {}))


CODE = {
    "called": ("def f(x):\n    return int(x / 2)", True),
    "called in a method": (
        "class A:\n    def f(self, x):\n        return [int(y) for y in x]",
        True,
    ),
    "called, and instances": ("def f(x):\n    return x if isinstance(x, int) else int(x)", True),
    "one of several": ("def f(x):\n    return isinstance(x, (int, float)) and int(x)", True),
    "not called": ("def f(x):\n    return isinstance(x, int)", True),
    "not read": ("def f(x):\n    return x", False),
    "identity": ("def f(x):\n    return int(x) if type(x) is float else type(x) is int", False),
    "passed on": ("def f(x):\n    return int(x), list(map(int, x))", False),
    "a dtype": ("def f(x):\n    return int(x), x.astype(dtype=int)", False),
    "in a decorated one": (
        "import functools\ndef d(g):\n    @functools.wraps(g)\n    def h(x):\n        return g(x)\n"
        "    return h\n@d\ndef f(x):\n    return type(x) is int or int(x)",
        False,
    ),
    "in a property": (
        "class A:\n    @property\n    def f(self):\n        return int, int(1)",
        False,
    ),
}


@pytest.mark.parametrize("name", CODE)
def test_modules_that_take_int_for_what_it_is_keep_it(name: str) -> None:
    code, expected = CODE[name]
    module = ModuleType("written_here")
    exec(code, vars(module))
    assert _calls_int(module) is expected


class Missing:
    """What stands for a package that is not installed: it says so whatever one asks it for."""

    def __getattr__(self, name: str) -> Any:
        raise ImportError("there is no such package")

    def __call__(self) -> Any:
        raise ImportError("there is no such package")


missing = Missing()


class Halved:
    backend = missing

    def __call__(self, _: Any, x: Tensor) -> Tensor:
        size = int(x.shape[2] * 0.5)
        return (missing() if size < 0 else x)[:, :, :size].mean((2, 3))


def test_nobody_asks_what_stands_for_a_package_that_is_not_installed() -> None:
    model = Between(Halved())
    gated = fxprune.instrument(model, torch.randn(2, 3, 8, 8))
    other = torch.randn(1, 3, 12, 12)
    assert torch.equal(gated(other), model(other))


def test_a_module_has_its_names_again_afterwards() -> None:
    here: Any = sys.modules[__name__]
    before = set(vars(here))
    fxprune.instrument(Between(side), torch.randn(2, 3, 8, 8))
    assert set(vars(here)) == before


def test_a_module_may_stand_under_two_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tests.another_name_of_this", sys.modules[__name__])
    before = set(vars(sys.modules[__name__]))
    fxprune.instrument(Between(side), torch.randn(2, 3, 8, 8))
    assert set(vars(sys.modules[__name__])) == before


def test_a_tensor_that_a_forward_casts_for_itself_does_not_hide_sizes() -> None:
    class Normalises(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mean, self.size = torch.tensor([0.4, 0.5, 0.6]).view(1, 3, 1, 1), (8, 8)
            self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            self.mean = self.mean.type_as(x)
            x = torch.relu(self.conv(x - self.mean))
            size = x.shape[2] + 2, x.shape[3] + 2
            return self.head(x) if self.size == size else self.head(x * 2)

    torch.manual_seed(0)
    model, x = Normalises(), torch.randn(2, 3, 8, 8)
    gated = fxprune.instrument(model, x)
    assert torch.equal(gated(x), model(x))
    assert len(gated.gates.state_dict()) >= 1 and gated.report.assumptions
