"""The table of layers: live and total widths, gates, and reasons."""

from collections import OrderedDict
from typing import Any

import networkx as nx
import torch
import torchvision
from torch import nn
from torch.nn.utils import parametrizations

import fxprune
from fxprune.testing import close_half
from models.lenet import LeNet
from tests.conftest import randomise

IMAGE = torch.randn(2, 1, 28, 28)


def test_the_table_follows_the_gates() -> None:
    gated = fxprune.instrument(randomise(LeNet()), IMAGE)
    gates: Any = gated.gates
    with torch.no_grad():
        gates.width[:7] = 0
        gates.linear[0] = 1
    rows = {row.layer: row for row in fxprune.inspect(gated).rows}
    assert (rows["conv1"].live, rows["conv1"].total, rows["conv1"].gate) == (13, 20, "relu1")
    assert (rows["fc1"].live, rows["fc1"].linear) == (500, "linear")
    assert rows["fc2"].gate == "" and "reaches an output" in rows["fc2"].why_not
    assert gates.width[0] == 0  # it only looked


def test_a_model_without_gates_shows_what_is_dead_and_what_could_be_gated() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Sigmoid())
    reader: Any = model[2]
    reader.weight.data[:, 2:5] = 0
    rows = {row.layer: row for row in fxprune.inspect(model, torch.randn(1, 3, 9, 9)).rows}
    assert (rows["0"].live, rows["0"].total, rows["0"].gate) == (5, 8, "1")


def test_a_model_no_gate_fits_is_shown_with_the_reason() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Softmax(1), nn.Linear(8, 2))
    inspection = fxprune.inspect(model, torch.randn(2, 4))
    why = {row.layer: row.why_not for row in inspection.rows}
    assert "it normalises over channels" in why["1"]
    assert all(row.gate == "" for row in inspection.rows)
    assert "Softmax" in str(inspection)


def test_residual_layers_name_all_sites_of_their_stream() -> None:
    inspection = fxprune.inspect(torchvision.models.resnet18(), torch.randn(1, 3, 64, 64))
    rows = {row.layer: row for row in inspection.rows}
    assert rows["layer1.1.conv2"].gate == "relu, layer1.0.relu:2, layer1.1.relu:2"
    assert rows["layer2.0.downsample.0"].gate == "layer2.0.relu:2, layer2.1.relu:2"


def test_a_gated_layer_somebody_listens_to_is_shown_with_the_reason() -> None:
    gated = fxprune.instrument(LeNet(), torch.randn(2, 1, 28, 28))
    before = fxprune.inspect(gated).rows
    gated.get_submodule("conv2").register_forward_hook(lambda *given: None)
    rows = fxprune.inspect(gated).rows
    assert [row.gate for row in before[:2]] == ["relu1", "relu2"]
    assert [row.gate for row in rows] == ["relu1", "", *(row.gate for row in before[2:])]
    assert "the module has forward hooks" in rows[1].why_not


def test_layers_with_computed_weights_are_shown_as_what_they_will_be() -> None:
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(6, 8)), nn.ReLU(), nn.Linear(8, 2))
    gated = fxprune.instrument(model, torch.randn(2, 6))
    close_half(gated)
    first = fxprune.inspect(gated).rows[0]
    assert (first.kind, first.live, first.total, first.gate) == ("Linear", 4, 8, "1")


def test_names_are_shown_as_they_are_and_whole() -> None:
    name = "[red]" + "a_long_name_of_a_layer" * 8
    parts = nn.Sequential(OrderedDict({name: nn.Linear(3, 4), "act": nn.ReLU()}))
    parts.append(nn.Linear(4, 2))
    text = str(fxprune.inspect(parts, torch.randn(2, 3)))
    shown = "".join(line.split("│")[1].strip() for line in text.splitlines() if "│" in line)
    assert name in shown and "…" not in text


def test_the_graph_answers_graph_questions() -> None:
    graph = fxprune.inspect(torchvision.models.resnet18(), torch.randn(1, 3, 64, 64)).graph
    assert nx.is_directed_acyclic_graph(graph)
    assert nx.has_path(graph, "x", "fc")
    assert graph.edges["conv1", "bn1"]["channels"] == 64
    assert graph.nodes["layer1_0_conv1"]["kind"] == "Conv2d"


def test_architecture_and_freeze() -> None:
    gated = fxprune.instrument(LeNet(), IMAGE)
    gates: Any = gated.gates
    with torch.no_grad():
        gates.width[:30] = 0.3
    assert fxprune.architecture(gated)["relu1"] == {"live": 0, "total": 20, "linear": False}
    assert fxprune.architecture(gated)["relu2"]["live"] == 40
    fxprune.freeze(gated)
    assert set(gates.width.tolist()) == {0.0, 1.0} and not gates.width.requires_grad
    assert fxprune.architecture(gated)["relu2"]["live"] == 40
