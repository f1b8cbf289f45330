"""The two modes: who asks for one, and how many traces that takes."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxprune.modes import mode_questions
from fxprune.tracing import ModelTracer, bound_arguments, trace


class Layer(nn.Module):
    """A layer, and dropout that may ask for a mode."""

    def __init__(self, *, asks: bool) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.asks = asks

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x)
        return F.dropout(x, 0.5, vars(self)["asks"] and self.training)


@pytest.mark.parametrize(("asks", "traces"), [(False, 1), (True, 2)])
def test_only_a_model_that_asks_for_its_mode_is_traced_in_both(
    asks: bool, traces: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[ModelTracer] = []
    plain = ModelTracer.trace

    def counted(self: ModelTracer, *args: object, **kwargs: object) -> torch.fx.Graph:
        found.append(self)
        return plain(self, *args, **kwargs)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(ModelTracer, "trace", counted)
    model = Layer(asks=asks)
    module = trace(model, bound_arguments(model, (torch.ones(2, 4),), {}))
    module.recompile()
    assert len(found) == traces
    torch.manual_seed(0)
    expected = model.train()(torch.ones(2, 4))
    torch.manual_seed(0)
    assert torch.equal(module.train()(torch.ones(2, 4)), expected)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
def test_flags_are_read_and_written_as_ever_while_questions_are_noted() -> None:
    model, other = Layer(asks=True), nn.Linear(2, 2)
    scripted = torch.jit.script(nn.Linear(2, 2))
    with mode_questions() as asked:
        model.eval()
        assert not asked
        assert (model.training, scripted.training) == (False, True)
        model.train()
        assert model.training is True
        with pytest.raises(AttributeError, match="training"):
            _ = nn.Module.__new__(nn.Module).training
    assert asked >= {model, scripted}
    assert other not in asked
    assert "training" not in vars(nn.Module)
