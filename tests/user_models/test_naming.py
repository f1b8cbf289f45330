"""Parts of a model may have names that graph modules, or fxprune, use for something else."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxprune
from fxprune.gating.gates import Gates
from fxprune.testing import close_half, error
from fxprune.user_models.naming import RESERVED, free_names_
from tests.conftest import randomise, reloaded

NAMES = (
    "gates",
    "penalties",
    "report",
    "graph",
    "meta",
    "code",
    "_code",
    "recompile",
    "self",
    "if",
)


class Named(nn.Module):
    """A batch norm, a scale and a mask of any name."""

    def __init__(self, name: str, kind: str) -> None:
        super().__init__()
        self.names = {part: name if part == kind else part for part in ("norm", "scale", "mask")}
        self.first, self.last = nn.Conv2d(3, 8, 3), nn.Linear(8, 2)
        setattr(self, self.names["norm"], nn.BatchNorm2d(8))
        setattr(self, self.names["scale"], nn.Parameter(torch.rand(8, 1, 1) + 0.5))
        self.register_buffer(self.names["mask"], torch.rand(8, 1, 1) + 0.5, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        norm, scale, mask = (getattr(self, name) for name in self.names.values())
        x = F.relu(norm(self.first(x)) * torch.exp(scale) * mask)
        return self.last(x.mean((2, 3)))


class AskingData(nn.Module):
    """What no trace follows, around a part that can be traced."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, x: Tensor) -> Tensor:
        return self.part(x * 2 if float(x.sum()) > 0 else x)


class Around(nn.Module):
    """A traceable module with a part of any name, which is not."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name, self.last = name, nn.Linear(8, 8)
        inner = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
        setattr(self, name, AskingData(inner))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(getattr(self, self.name)(x))


@pytest.mark.parametrize("at_the_top", [True, False])
@pytest.mark.parametrize("name", ["self", "graph", "plain"])
def test_a_part_of_any_name_may_hold_a_region(name: str, at_the_top: bool) -> None:
    model, x = Around(name) if at_the_top else AskingData(Around(name)), torch.randn(4, 8)
    gated: Any = fxprune.instrument(randomise(model).eval(), x)
    assert torch.equal(gated(x), model(x))
    assert close_half(gated) == 8
    small = fxprune.finalize(gated)
    assert error(gated(x), small(x)) < 1e-5


@pytest.mark.parametrize("kind", ["norm", "scale", "mask"])
@pytest.mark.parametrize("name", NAMES)
def test_a_part_may_have_any_name(name: str, kind: str) -> None:
    model = randomise(Named(name, kind))
    x = torch.randn(3, 3, 8, 8)
    statistics = {key: value.clone() for key, value in model.state_dict().items()}
    gated: Any = fxprune.instrument(model, x)
    assert isinstance(gated.gates, Gates) and f"is called {name}_" in str(gated.report)
    assert all(torch.equal(value, statistics[key]) for key, value in model.state_dict().items())
    own = gated.state_dict()
    for key, value in statistics.items():  # unchanged by the runs that looked at the model
        first, _, rest = key.partition(".")
        found = own[f"{name}_.{rest}".rstrip(".")] if first == name else own[key]
        assert torch.equal(found, value), key
    assert close_half(gated) == 4
    small: Any = fxprune.finalize(gated)
    assert small.report.verification.verdict == "equal" and small.last.in_features == 4
    assert torch.equal(reloaded(small)(x), small(x))
    assert error(gated.eval()(x), small(x)) < 1e-5


@pytest.mark.parametrize("name", ["gates", "graph"])
def test_a_region_may_hold_any_name(name: str) -> None:
    model = AskingData(randomise(Named(name, "norm"))).eval()
    x = torch.randn(3, 3, 8, 8)
    gated: Any = fxprune.instrument(model, x)
    trained = model.part.get_buffer(f"{name}.running_mean")
    assert torch.equal(gated.part.get_buffer(f"{name}_.running_mean"), trained)
    assert close_half(gated) == 4
    small: Any = fxprune.finalize(gated)
    assert small.report.verification.verdict == "equal"
    assert error(gated.eval()(x), small(x)) < 1e-5


def test_a_new_name_is_free_and_keeps_the_order() -> None:
    model: Any = nn.Sequential()
    for name in ("graph_", "graph", "code", "last"):
        model.add_module(name, nn.Linear(2, 2))
    parts = list(model._modules.values())
    assert free_names_(model) == {"code": "code_", "graph": "graph__"}
    assert list(model._modules) == ["graph_", "graph__", "code_", "last"]
    assert list(model._modules.values()) == parts and model.graph is parts[1]
    assert free_names_(model) == {}
    assert {"graph", "meta", "code", "gates", "class"} <= RESERVED
    assert not RESERVED & {"forward", "training", "weight", "width"}
