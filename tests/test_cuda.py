"""Gated models on a GPU: the values of the CPU, no waiting, CUDA graphs, half precision."""

import copy
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import get_model

import fxprune
from tests.planning.test_accounts import Residual
from tests.test_training import (
    batch,
    close,
    gated_model,
    gradients,
    loss_of,
    mixed_precision_moves_gates_and_weights,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DEVICE = "cuda"
LAYOUTS = [torch.contiguous_format, torch.channels_last]


def on_gpu(layout: torch.memory_format = torch.contiguous_format) -> tuple[Any, Tensor, Tensor]:
    """Return a gated model with closed and open gates in float64, and a batch."""
    x, y = batch()
    gated = gated_model().to(DEVICE, memory_format=layout)
    return gated, x.to(DEVICE, memory_format=layout), y.to(DEVICE)


def optimizer_of(gated: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(fxprune.parameter_groups(gated, lr=0.05), momentum=0.9)


@contextmanager
def no_waiting() -> Generator[None]:
    """Make it an error to wait for the GPU."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_values_and_gradients_are_those_of_the_cpu(layout: torch.memory_format) -> None:
    here, (x, y) = gated_model(), batch()
    there, *there_batch = on_gpu(layout)
    losses = [
        loss_of(here, x, y) + fxprune.penalty(here),
        loss_of(there, *there_batch) + fxprune.penalty(there),
    ]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(losses[1].cpu(), losses[0], rtol=1e-12, atol=0)
    close({name: grad.cpu() for name, grad in gradients(there).items()}, gradients(here))
    closed = here.gates.width < 0.5
    assert closed.any() and here.gates.width.grad[closed].abs().min() > 0


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_models_are_instrumented_finalised_and_exported_where_they_are(
    name: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = get_model(name, weights=None).to(DEVICE).eval()
    x = torch.randn(2, 3, 64, 64)  # on the CPU: example inputs follow the model
    gated = fxprune.instrument(model, x)
    assert torch.equal(gated(x.to(DEVICE)), model(x.to(DEVICE)))
    width: Any = gated.gates.width
    width.data[torch.rand(len(width), generator=torch.Generator().manual_seed(1)) < 0.3] = 0
    small = fxprune.finalize(gated)
    proof = small.report.verification
    assert proof and proof.verdict == "equal" and proof.error["float64"] < 1e-9
    assert {p.device.type for p in small.parameters()} == {"cuda"}
    before, after = small.report.before, small.report.after
    assert before and after and after.parameters < 0.8 * before.parameters
    check = fxprune.export_onnx(small, tmp_path / "small.onnx")
    assert max(check.errors.values()) < 1e-4


@pytest.mark.parametrize("kind", ["parameters", "macs", "neurons"])
def test_a_step_does_not_wait_for_the_gpu(kind: str) -> None:
    gated, x, y = on_gpu()
    gated.penalties["cost"] = fxprune.Cost(1e-3, of=kind)
    half: dict[str, Any] = {kind: 0.5}
    optimizer = optimizer_of(gated)
    budget = fxprune.Budget(gated, steps=40, **half)
    for step in range(8):
        optimizer.zero_grad()
        if step == 0:  # libraries are loaded
            (loss_of(gated, x, y) + fxprune.penalty(gated)).backward()
            continue
        with no_waiting():
            loss = loss_of(gated, x, y) + fxprune.penalty(gated) + budget.penalty()
            loss.backward()
            optimizer.step()
            budget.step(loss)
    with pytest.raises(RuntimeError, match="synchron"), no_waiting():
        gated.gates.width.sum().item()


def test_a_whole_step_is_a_cuda_graph() -> None:
    eager, x, y = on_gpu()
    captured = copy.deepcopy(eager)

    def step(gated: Any, optimizer: torch.optim.Optimizer) -> None:
        (loss_of(gated, x, y) + fxprune.penalty(gated)).backward()
        optimizer.step()

    optimizer = optimizer_of(eager)
    for _ in range(9):
        optimizer.zero_grad()
        step(eager, optimizer)
    optimizer, graph = optimizer_of(captured), torch.cuda.CUDAGraph()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            optimizer.zero_grad()
            step(captured, optimizer)
    torch.cuda.current_stream().wait_stream(stream)
    optimizer.zero_grad()
    with torch.cuda.graph(graph):
        step(captured, optimizer)
    for _ in range(6):
        graph.replay()
    close(captured.state_dict(), eager.state_dict())
    assert (captured.gates.width != on_gpu()[0].gates.width).all()  # they moved


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision_moves_gates_and_weights(
    dtype: torch.dtype, layout: torch.memory_format
) -> None:
    gated, x, y = on_gpu(layout)
    scaled = dtype == torch.float16
    mixed_precision_moves_gates_and_weights(gated.float(), x.float(), y, dtype, scaled=scaled)


def test_channels_last_stays() -> None:
    layers = [nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64), nn.ReLU(), nn.Conv2d(64, 32, 3), nn.ReLU()]
    model = nn.Sequential(*layers).to(DEVICE).to(memory_format=torch.channels_last)
    x = torch.randn(4, 3, 16, 16).to(DEVICE, memory_format=torch.channels_last)
    gated = fxprune.instrument(model, x)
    y = gated(x)
    assert y.is_contiguous(memory_format=torch.channels_last)
    y.sum().backward()
    small = fxprune.finalize(gated)
    assert all(
        p.is_contiguous(memory_format=torch.channels_last)
        for each in (gated, small)
        for p in each.parameters()
        if p.dim() == 4
    )


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_steps_are_those_of_eager_ones(mode: str) -> None:
    torch._dynamo.reset()
    eager, x, y = on_gpu()
    gated = copy.deepcopy(eager)
    compiled = torch.compile(gated, fullgraph=True, mode=mode)
    for model, run in ((eager, eager), (gated, compiled)):
        optimizer = optimizer_of(model)
        for _ in range(5):
            optimizer.zero_grad()
            (loss_of(run, x, y) + fxprune.penalty(model)).backward()
            optimizer.step()
    close(gated.state_dict(), eager.state_dict())


@pytest.mark.parametrize("estimator", ["gates", "taylor"])
def test_a_budget_is_met_and_compaction_changes_no_loss(estimator: str) -> None:
    gated, x, y = on_gpu()
    gated.gates.width.data.fill_(1)
    optimizer = torch.optim.AdamW(fxprune.parameter_groups(gated, lr=0.01), fused=True)
    budget = fxprune.Budget(gated, macs=0.5, steps=120, strength=0.05, estimator=estimator)
    for step in range(120):
        loss = loss_of(gated.train(), x, y)
        optimizer.zero_grad()
        (loss + budget.penalty()).backward()
        optimizer.step()
        budget.step(loss)
        if step in (60, 90):
            before = loss_of(gated, x, y)
            gated = fxprune.compact(gated, optimizer)
            budget.follow(gated)
            torch.testing.assert_close(loss_of(gated, x, y), before, rtol=1e-9, atol=0)
    assert budget.frozen and 0.8 * budget.target < budget.cost <= budget.target
    small = fxprune.finalize(gated.eval())
    assert small.report.after and small.report.after.macs <= budget.target
    assert small.report.verification and small.report.verification.verdict == "equal"


def test_a_budget_goes_on_on_the_cpu() -> None:
    gated, x, y = on_gpu()
    budget = fxprune.Budget(gated, macs=0.5, steps=40, strength=0.05)
    optimizer = optimizer_of(gated)
    for _ in range(20):
        optimizer.zero_grad()
        (loss_of(gated, x, y) + budget.penalty()).backward()
        optimizer.step()
        budget.step()
    here = copy.deepcopy(gated).cpu()
    other = fxprune.Budget(here, macs=0.5, steps=40)
    other.load_state_dict(budget.state_dict())
    assert other.strength == budget.strength and other.cost == budget.cost
    assert other.penalty().item() == pytest.approx(budget.penalty().item(), rel=1e-12)


def test_a_residual_net_in_half_precision_is_proved() -> None:
    torch.manual_seed(0)
    model = Residual().to(DEVICE).half().eval()
    x = torch.randn(2, 3, 8, 8, device=DEVICE).half()
    gated: Any = fxprune.instrument(model, x)
    gated.gates.width.data[::3] = 0
    small = fxprune.finalize(gated)
    assert small.report.verification and small.report.verification.verdict == "equal"
    assert F.mse_loss(small(x), gated(x)) < 1e-4


def test_the_gpu_may_be_the_default_device() -> None:
    torch.set_default_device(DEVICE)
    try:
        torch.manual_seed(0)
        model, x = Residual().double().eval(), torch.randn(2, 3, 8, 8).double()
        gated: Any = fxprune.instrument(model, x)
        gated.gates.width.data[::3] = 0
        small = fxprune.finalize(gated)
    finally:
        torch.set_default_device(None)
    assert x.device.type == next(small.parameters()).device.type == "cuda"
    assert small.report.verification and small.report.verification.verdict == "equal"


@pytest.mark.parametrize("activation", [nn.Hardsigmoid, nn.Hardswish, nn.GELU])
def test_constants_are_rounded_as_the_gpu_rounds_them(activation: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), activation(), nn.Conv2d(8, 4, 1)).to(DEVICE).double()
    layer: Any = model[0]
    layer.weight.data[::2] = 0
    small = fxprune.finalize(model, torch.randn(2, 3, 6, 6).double())
    proof = small.report.verification
    assert proof and proof.verdict == "equal" and proof.error["float64"] < 1e-12
    assert small.report.after and small.report.after.parameters < 40


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_are_counted_as_on_the_cpu(kind: Any) -> None:
    layer, x = kind(9, 6, 2, bidirectional=True), torch.randn(4, 4, 9)
    expected = fxprune.count_costs(layer, ((x,), {}))
    assert expected.macs > 0
    assert fxprune.count_costs(layer.to(DEVICE), ((x,), {})) == expected
