"""Reports as text, data, and pickled with their models."""

import json
import pickle

import torch

import fxprune
from fxprune.costs import Costs
from fxprune.programs.pipeline import Change
from fxprune.report import Report
from models.lenet import LeNet


def test_a_report_says_what_was_done() -> None:
    done = {"cut": [Change("conv1", "20 → 12", (("before", 20), ("after", 12)))]}
    refused = [Change("odd", "unknown operator")]
    report = Report("finalize", "Net", done, refused, Costs(100, 50, 400), Costs(25, 10, 100))
    text = str(report)
    assert "100 → 25 (25.0%)" in text and "conv1: 20 → 12" in text and "unknown operator" in text
    assert json.loads(report.to_json())["passes"]["cut"][0]["after"] == 12
    assert pickle.loads(pickle.dumps(report))["refused"][0]["where"] == "odd"


def test_the_reports_of_both_verbs_are_json() -> None:
    gated = fxprune.instrument(LeNet(), torch.randn(2, 1, 28, 28))
    small = fxprune.finalize(gated)
    for model, verb in ((gated, "instrument"), (small, "finalize")):
        data = json.loads(model.report.to_json())
        assert data["verb"] == verb and data["model"] == "LeNet"
    assert data["verification"]["verdict"] == "equal"
