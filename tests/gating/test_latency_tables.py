"""Latency in units: the sum over the layers of the finalised model, by the same measurements."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.errors import GateError
from fxprune.folding.convolutions import Geometry, Sizes, geometry_of
from fxprune.folding.latency import Latencies
from fxprune.folding.layer_costs import COSTS, output_places
from fxprune.folding.transposed_convolutions import transposed_geometry
from fxprune.gating.latency_tables import Axis, LatencyTable, Timing
from fxprune.gating.owners import gates_of
from fxprune.gating.penalties import cost_of
from fxprune.gating.terms import LATENCY, Row
from fxprune.programs.observation import TensorSpec
from tests.conftest import randomise
from tests.planning.test_accounts import NETS, decide
from tests.training.test_budget import Run, is_binary

LAYERS = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)


def plane(geometry: Geometry, inputs: Sizes, threads: int) -> int:
    """Take a time that is linear in either width."""
    return 1000 + 7 * geometry.outputs + geometry.weights * (3 + sum(inputs))


@pytest.fixture(autouse=True)
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Geometry]:
    """Note which layers are measured, by a clock."""
    found: list[Geometry] = []

    def clock(geometry: Geometry, inputs: Sizes, threads: int) -> int:
        found.append(geometry)
        return plane(geometry, inputs, threads)

    torch.set_num_threads(1)
    monkeypatch.setitem(COSTS, LATENCY, Latencies(tmp_path, clock))
    return found


def summed(small: nn.Module, x: Tensor) -> int:
    """Return the nanoseconds of the layers of a model, as they are called."""
    total = 0

    def hook(module: nn.Module, args: Any, output: Tensor) -> None:
        nonlocal total
        layer = geometry_of(module) or transposed_geometry(module, 1)
        assert layer is not None
        spec = TensorSpec(tuple(output.shape), output.dtype)
        total += COSTS[LATENCY](layer, output_places(layer, spec))

    for module in small.modules():
        if isinstance(module, LAYERS):
            module.register_forward_hook(hook)
    small(x)
    return total


@pytest.mark.parametrize("name", NETS)
def test_the_sum_is_that_of_the_finalised_layers(name: str) -> None:
    make, shape = NETS[name]
    x = torch.randn(shape)
    gated = fxprune.instrument(randomise(make()), x)
    gates = gates_of(gated)
    found: set[float] = set()
    for seed in range(3):
        decide(gated, seed)
        now = float(cost_of(gates, LATENCY).detach())
        small = fxprune.finalize(gated, check=False)
        assert now == pytest.approx(summed(small, x[:1]), rel=1e-9)
        found.add(now)
    assert gates.costs is not None
    assert len(found) > 1 and max(found) < gates.costs.full(LATENCY)


def test_between_what_is_measured_it_is_linear_along_either_axis() -> None:
    made, read = Row(0, (0,), (40,)), Row(0, (1,), (8,))
    asked: list[tuple[int, int]] = []

    def measure(outputs: int, inputs: int) -> int:
        asked.append((outputs, inputs))
        return 1000 * outputs**2 + 10 * inputs**3

    table = LatencyTable(
        [Timing(Axis(made, 40, 40), Axis(read, 8, 8), measure)], {made: 0, read: 1}
    )
    assert asked == [(o, i) for o in (1, 10, 20, 40) for i in (1, 2, 4, 8)]

    def at(outputs: float, inputs: float) -> Tensor:
        return table(torch.tensor([outputs, inputs], dtype=torch.float64))[0]

    for outputs, inputs in list(asked):
        assert float(at(outputs, inputs)) == measure(outputs, inputs)
    assert float(at(15, 6)) == (float(at(10, 6)) + float(at(20, 6))) / 2
    assert float(at(15, 6)) == (float(at(15, 4)) + float(at(15, 8))) / 2
    counts = torch.tensor([15.0, 6.0], dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(table(counts).sum(), counts)
    assert slope.tolist() == [30_000, 10 * (8**3 - 4**3) / 4]


def test_nothing_is_measured_before_latency_is_asked_for_and_nothing_twice(
    asked: list[Geometry],
) -> None:
    make, shape = NETS["deep"]
    gated = fxprune.instrument(make(), torch.randn(shape))
    fxprune.penalty(gated)
    cost_of(gates_of(gated), "macs")
    assert not asked
    gated.penalties["cost"] = fxprune.Cost(1e-9, LATENCY)
    fxprune.penalty(gated).backward()
    times = len(asked)
    assert times and len(set(asked)) == times
    twin = copy.deepcopy(gated)
    assert torch.equal(*(cost_of(gates_of(one), LATENCY) for one in (twin, gated)))
    assert len(asked) == times
    assert (
        twin.state_dict().keys()
        == fxprune.instrument(make(), torch.randn(shape)).state_dict().keys()
    )


def test_units_that_died_can_be_left_out(asked: list[Geometry]) -> None:
    make, shape = NETS["lenet"]
    gated = fxprune.instrument(make(), torch.randn(shape))
    decide(gated, 1)
    gates = gates_of(gated)
    assert gates.costs is not None
    rest = gates.costs.restricted(gates.live().nonzero().reshape(-1).tolist())
    linear = gates.linearised().double()
    everything = torch.ones(rest.units, dtype=torch.float64)
    now = float(cost_of(gates, LATENCY).detach())
    assert float(rest(LATENCY, everything, linear)) == pytest.approx(now)


@pytest.mark.parametrize("amount", [0.5, 9000.0])
def test_a_run_ends_at_its_budget(amount: float) -> None:
    run = Run(latency=amount).train(60)
    assert is_binary(run.gated) and run.budget.frozen
    assert 0.98 * run.budget.target <= run.budget.cost <= run.budget.target
    small = fxprune.finalize(run.gated)
    assert summed(small, torch.randn(1, 10)) == pytest.approx(run.budget.cost)


def test_a_layer_that_does_not_run_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(geometry: Geometry, inputs: Sizes, threads: int) -> int:
        raise RuntimeError("no kernel")

    monkeypatch.setitem(COSTS, LATENCY, Latencies(tmp_path, broken))
    make, shape = NETS["flattened"]
    gated = fxprune.instrument(make(), torch.randn(shape))
    with pytest.raises(GateError, match=r"onnxruntime cannot time .*no kernel; take another cost"):
        cost_of(gates_of(gated), LATENCY)
