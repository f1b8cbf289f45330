"""Plain attributes of a model say that a traced model does not go by them."""

import copy
import pickle
from io import BytesIO
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.errors import FxpruneError
from tests.conftest import randomise


class Scaled(nn.Module):
    """A part with a number of its own, and one of its class."""

    rate: float = 0.5
    note: str

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.scale = nn.Linear(8, 16), nn.Linear(16, 8), 2.0
        self.drop, self.sizes = nn.Dropout(0.5), [1, 2]

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.drop(torch.relu(self.first(x)))) * self.scale * self.rate


class Net(nn.Module):
    """A model with a temperature and such a part."""

    def __init__(self, *, whole: bool = True) -> None:
        super().__init__()
        self.part, self.head, self.temperature = Scaled(), nn.Linear(8, 4), 1.5
        self.whole, self.table = whole, torch.ones(4)

    def forward(self, x: Tensor) -> Tensor:
        if not self.whole and float(x.sum()) > 1e9:
            return x
        return self.head(torch.relu(self.part(x))) / self.temperature * self.table


def made(verb: str) -> Any:
    gated: Any = fxprune.instrument(randomise(Net()), torch.randn(5, 8))
    return fxprune.finalize(gated) if verb == "finalize" else gated


@pytest.mark.parametrize("verb", ["instrument", "finalize"])
@pytest.mark.parametrize("copied", [True, False])
def test_a_number_that_was_traced_cannot_be_set(verb: str, copied: bool) -> None:
    model = made(verb)
    model = copy.deepcopy(model) if copied else model
    with pytest.raises(FxpruneError, match=r"temperature was 1\.5 when .* buffer"):
        model.temperature = 0.5
    with pytest.raises(FxpruneError, match=r"part\.scale was 2\.0"):
        model.part.scale = 1.0
    with pytest.raises(FxpruneError, match=r"part\.rate was 0\.5"):
        model.part.rate = 0.1
    with pytest.raises(FxpruneError, match=r"part\.sizes"):
        model.part.sizes = [1]
    if verb == "finalize":  # where it went into the last layer
        with pytest.raises(FxpruneError, match="table was a tensor"):
            model.table = torch.zeros(4)
    else:
        model.table = torch.zeros(4)
        assert not model(torch.randn(5, 8)).any()
    model.temperature, model.part.scale = 1.5, 2.0


@pytest.mark.parametrize("verb", ["instrument", "finalize"])
def test_anything_else_can_be_set(verb: str) -> None:
    model = made(verb)
    model.epoch, model.part.epoch, model._hooked = 3, 4, True
    model.training = False
    assert model.epoch == 3 and model.part.epoch == 4
    model.extra = nn.Linear(2, 2)
    model.train()
    if verb == "instrument":
        model.part.drop.p = 0.1  # it is that of the model
        assert model.part.drop.p == 0.1


@pytest.mark.parametrize("verb", ["instrument", "finalize"])
def test_what_is_frozen_is_copied_saved_and_compiled(verb: str) -> None:
    model, x = made(verb).eval(), torch.randn(5, 8)
    expected = model(x)
    file = BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    again = pickle.loads(pickle.dumps(model))
    for one in (copy.deepcopy(model), copy.copy(model), loaded, again):
        torch.testing.assert_close(one(x), expected)
        model.load_state_dict(one.state_dict())
    assert type(loaded.part) is nn.Module
    compiled = torch.compile(copy.deepcopy(model), backend="eager")
    torch.testing.assert_close(compiled(x), expected)
    model.share_memory().double().to("cpu").requires_grad_(False)


def test_parts_refuse_where_the_whole_is_the_users() -> None:
    model, x = randomise(Net(whole=False)).eval(), torch.randn(5, 8)
    gated: Any = fxprune.instrument(model, x)
    small: Any = fxprune.finalize(gated)
    for one in (gated, small, copy.deepcopy(gated)):
        before = one(x)
        one.temperature = 3.0
        torch.testing.assert_close(one(x), before / 2)
        with pytest.raises(FxpruneError, match="scale was"):
            one.part.scale = 1.0


def test_compacting_goes_on() -> None:
    gated, x = made("instrument"), torch.randn(5, 8)
    for parameter in gated.gates.parameters():
        parameter.data.view(-1)[: parameter.numel() // 2] = 0
    optimizer = torch.optim.SGD(gated.parameters(), 0.1)
    fxprune.compact(gated, optimizer)
    assert gated(x).shape == (5, 4)
    with pytest.raises(FxpruneError, match="temperature"):
        gated.temperature = 0.5
