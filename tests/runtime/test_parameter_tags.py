"""What users wrote on parameters stands on those that come of them."""

from typing import Any

import torch
from torch import Tensor, nn

import fxprune
from fxprune.testing import close_half


class Net(nn.Module):
    """Layers, one of them called like a part of ours, and an embedding tied to a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.graph = nn.Embedding(11, 8), nn.Linear(8, 16)
        self.norm, self.down = nn.BatchNorm1d(16), nn.Linear(16, 8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.graph(self.embedding(x))))
        return self.head(torch.tanh(self.down(x)))


def tagged() -> Any:
    model: Any = Net()
    for name, parameter in model.named_parameters():
        parameter.tag, parameter.no_decay = {"of": [name]}, "bias" in name
        parameter.mask = torch.ones_like(parameter)
    return model


def tags(model: nn.Module) -> dict[str, Any]:
    return {name: vars(p) for name, p in model.named_parameters() if not name.startswith("gates.")}


def expected(*names: str) -> dict[str, Any]:
    return {
        name: {"tag": {"of": [name.replace("graph_", "graph")]}, "no_decay": "bias" in name}
        for name in names
    }


def test_tags_are_kept_by_every_verb() -> None:
    model, x = tagged(), torch.arange(6)
    names = [name.replace("graph", "graph_") for name, _ in model.named_parameters()]
    gated: Any = fxprune.instrument(model, x)
    assert tags(gated) == expected(*names)
    gated.gates.width.mine = True
    close_half(gated)
    small: Any = fxprune.compact(gated)
    assert tags(small) == expected(*names) and small.gates.width.mine is True
    assert small.graph_.weight.tag is not gated.graph_.weight.tag
    final = fxprune.finalize(small)
    assert tags(final) == expected(*(n for n in names if not n.startswith("norm.")))
    assert "mask" in vars(model.down.weight)


def test_a_new_parameter_has_no_tags() -> None:
    layers = [nn.Linear(4, 6, bias=False), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2)]
    model: Any = nn.Sequential(*layers)
    model[0].weight.tag = "first"
    nn.init.ones_(model[1].bias)
    found = tags(fxprune.finalize(model, torch.randn(3, 4)))
    assert found["0.weight"] == {"tag": "first"} and found["0.bias"] == {}
