"""What a forward asks about gradients and autocast is answered when it runs, not when traced."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, is_autocast_enabled, nn

import fxprune
from fxprune.errors import TraceError
from fxprune.testing import close_half
from fxprune.tracing.call_state import CallState, asked_of
from tests.conftest import Layers, randomise


class Asking(nn.Module):
    """A part that asks, and has one that does not."""

    def __init__(self, ask: Callable[[], Any]) -> None:
        super().__init__()
        self.layers, self.ask = Layers(), ask

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x) * (2.0 if self.ask() else 1.0)


class Net(nn.Module):
    """A model with such a part, and layers of its own."""

    def __init__(self, ask: Callable[[], Any]) -> None:
        super().__init__()
        self.asking, self.wide, self.head = Asking(ask), nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.wide(self.asking(x))))


ANSWERS_MATTER: list[Callable[[], Any]] = [
    lambda: torch.is_autocast_enabled(),
    lambda: torch.is_autocast_enabled("cpu"),
    lambda: is_autocast_enabled("cpu"),
    lambda: torch.is_grad_enabled(),
    lambda: torch.is_inference_mode_enabled(),
    lambda: torch.is_autocast_enabled("cpu") and torch.is_grad_enabled(),
    lambda: torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16,
]


@pytest.mark.parametrize("kind", [Asking, Net])
@pytest.mark.parametrize("ask", ANSWERS_MATTER)
def test_what_a_call_is_in_is_asked_when_it_runs(kind: Any, ask: Callable[[], Any]) -> None:
    model, x = randomise(kind(ask)), torch.randn(5, 8)
    gated: Any = fxprune.instrument(model, x)
    refused = any("asks torch." in str(change) for change in gated.report.refused)
    assert refused or kind is Net  # whose part is kept whole
    for mode in (True, False):
        for one in (model, gated):
            one.train(mode)
        contexts = (torch.no_grad(), torch.inference_mode(), torch.enable_grad())
        for context in contexts:
            with context:
                assert torch.equal(gated(x), model(x))
        with torch.autocast("cpu"):
            torch.testing.assert_close(gated(x), model(x))
    close_half(gated)
    small: Any = fxprune.finalize(gated)
    assert any(one.out_features == 8 for one in small.modules() if isinstance(one, nn.Linear))
    with torch.autocast("cpu"), torch.no_grad():
        torch.testing.assert_close(small(x), gated.eval()(x), rtol=0.1, atol=0.1)


class Saving(nn.Module):
    """A model that asks where no answer matters, as those of diffusers do."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.saving = Layers(), False

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and self.saving:
            return self.layers(2 * x)
        return self.layers(x)


def test_a_question_whose_answer_does_not_matter_is_no_obstacle() -> None:
    model, x = randomise(Saving()), torch.randn(5, 8)
    gated: Any = fxprune.instrument(model, x)
    assert not gated.report.refused
    assert torch.equal(gated(x), model(x))


def constants() -> bool:
    jit: Any = torch.jit
    said = jit.is_scripting() or jit.is_tracing() or torch.compiler.is_compiling()
    return said or torch.onnx.is_in_onnx_export()


def test_whether_it_is_compiled_or_exported_may_be_asked(tmp_path: Any) -> None:
    model, x = randomise(Net(constants)), torch.randn(5, 8)
    gated: Any = fxprune.instrument(model, x)
    assert not gated.report.refused
    compiled = torch.compile(gated, backend="eager")
    torch.testing.assert_close(compiled(x), gated(x))
    fxprune.export_onnx(fxprune.finalize(gated), tmp_path / "small.onnx")


def test_who_is_imported_while_a_model_is_traced_may_keep_what_it_finds() -> None:
    tracer: Any = SimpleNamespace(answering=False)
    with asked_of(CallState(refused=True), [], tracer):
        kept: Any = torch.is_grad_enabled
        with pytest.raises(TraceError, match=r"it asks torch\.is_grad_enabled"):
            kept()
    assert torch.is_grad_enabled in {kept} and torch.is_grad_enabled in [kept]
    assert kept() is True
