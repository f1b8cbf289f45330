"""Errors of those who call: one clear sentence, whatever was given."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import fxprune
from fxprune.errors import FxpruneError, GateError, ModelError

VERBS: dict[str, Callable[[Any], Any]] = {
    "instrument": fxprune.instrument,
    "finalize": fxprune.finalize,
    "inspect": fxprune.inspect,
    "compact": fxprune.compact,
    "penalty": fxprune.penalty,
    "freeze": fxprune.freeze,
    "architecture": fxprune.architecture,
    "replicate_gates": fxprune.replicate_gates,
    "parameter_groups": lambda model: fxprune.parameter_groups(model, lr=0.1),
    "Budget": lambda model: fxprune.Budget(model, macs=0.5, steps=3),
    "count_costs": lambda model: fxprune.count_costs(model, ((torch.randn(1, 3),), {})),
    "verify": lambda model: fxprune.verify(nn.Linear(3, 3), model, torch.randn(1, 3)),
    "export_onnx": lambda model: fxprune.export_onnx(model, "model.onnx"),
}


@pytest.mark.parametrize(
    ("given", "what"),
    [(nn.ReLU, "the class ReLU"), (None, "a NoneType"), ({}, "a dict")],
    ids=["class", "none", "state"],
)
@pytest.mark.parametrize("verb", VERBS)
def test_what_is_no_model_is_refused(verb: str, given: Any, what: str) -> None:
    with pytest.raises(ModelError, match=f"a model is an nn.Module, not {what}; pass the model"):
        VERBS[verb](given)


def test_a_cost_there_is_not_is_refused() -> None:
    cost: Any = "flops"
    with pytest.raises(FxpruneError, match="there is no cost 'flops'; take one of parameters, ma"):
        fxprune.finalize(nn.Linear(3, 3), torch.randn(1, 3), cost=cost)


def test_terms_without_names_are_refused() -> None:
    terms: Any = [fxprune.Cost(1.0)]
    with pytest.raises(FxpruneError, match=r"are no nn\.ModuleDict"):
        fxprune.instrument(nn.Linear(3, 3), torch.randn(1, 3), penalties=terms)


@pytest.mark.parametrize("term", [nn.Linear(4, 4), nn.Module(), nn.Sequential(nn.ReLU())])
def test_what_takes_no_gates_is_no_term(term: nn.Module) -> None:
    model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 3))
    terms = fxprune.paper_penalties()
    terms["mine"] = term
    with pytest.raises(GateError, match=r"penalties\['mine'\] is a .* computes nothing of gates"):
        fxprune.instrument(model, torch.randn(2, 3), penalties=terms)


def test_whatever_has_a_forward_of_its_own_is_a_term() -> None:
    class Mine(nn.Module):
        def forward(self, gates: Any) -> torch.Tensor:
            return gates.width.sum()

    model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 3))
    terms = nn.ModuleDict({"mine": nn.Sequential(Mine(), nn.ReLU())})
    gated: Any = fxprune.instrument(model, torch.randn(2, 3), penalties=terms)
    assert fxprune.penalty(gated) == 8 * 0.75
