"""Gated models in all that a training may do to a model."""

import copy
import io
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing.spawn import spawn
from torch.optim.swa_utils import AveragedModel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import fxprune
from fxprune.errors import GateError
from fxprune.gating.owners import gates_of
from fxprune.gating.unit_costs import KINDS
from tests.planning.test_accounts import Residual

SHAPE = (8, 3, 8, 8)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def gated_model(make: Callable[[], nn.Module] = Residual) -> Any:
    torch.manual_seed(0)
    gated = fxprune.instrument(make().double(), torch.randn(2, *SHAPE[1:]).double())
    gated = gated.double()  # the gates too
    width = gates_of(gated).width
    assert width is not None
    width.data[::3] = 0.3
    return gated


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(SHAPE, generator=generator, dtype=torch.float64)
    return x, torch.randint(4, (8,), generator=generator)


def loss_of(model: Any, x: Tensor, y: Tensor) -> Tensor:
    heads: list[Tensor] = tree_leaves(model(x))
    return torch.stack([F.cross_entropy(head, y) for head in heads]).sum()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def close(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys() and left
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=1e-9, atol=1e-12)


def test_checkpoints_before_and_after_hold_plain_tensors() -> None:
    x, y = batch()
    gated, other = gated_model(), gated_model()
    optimizer = torch.optim.SGD(fxprune.parameter_groups(gated, lr=0.1))
    (loss_of(gated, x, y) + fxprune.penalty(gated)).backward()
    optimizer.step()
    small = fxprune.finalize(gated.eval())
    for source, target in ((gated, other), (small, copy.deepcopy(small))):
        file = io.BytesIO()
        torch.save(source.state_dict(), file)
        file.seek(0)
        target.load_state_dict(torch.load(file, weights_only=True))
        assert torch.equal(source.eval()(x), target.eval()(x))
    assert torch.equal(fxprune.finalize(other)(x), small(x))


def test_gradients_of_parts_of_a_batch_add_up() -> None:
    x, y = batch()
    whole, parts = gated_model().eval(), gated_model().eval()  # the batch's statistics aside
    (loss_of(whole, x, y) + fxprune.penalty(whole)).backward()
    for some in range(0, 8, 2):
        loss = loss_of(parts, x[some : some + 2], y[some : some + 2]) + fxprune.penalty(parts)
        (loss / 4).backward()
    close(gradients(parts), gradients(whole))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_the_gates_compile_without_a_break(backend: str) -> None:
    x, y = batch()
    plain, gated = gated_model(), gated_model()
    compiled = torch.compile(gated, fullgraph=True, backend=backend)
    for model, run in ((plain, plain), (gated, compiled)):
        (loss_of(run, x, y) + fxprune.penalty(model)).backward()
    close(gradients(gated), gradients(plain))


def test_activations_can_be_computed_again() -> None:
    x, y = batch()
    plain, again = gated_model(), gated_model()
    loss_of(plain, x, y).backward()
    output: Any = checkpoint(again, x, use_reentrant=False)
    F.cross_entropy(output, y).backward()
    close(gradients(again), gradients(plain))


def test_averaged_models_are_finalised_like_others() -> None:
    x, y = batch()
    gated = gated_model()
    optimizer = torch.optim.SGD(fxprune.parameter_groups(gated, lr=0.05))
    averaged = AveragedModel(gated, avg_fn=lambda a, b, _: 0.9 * a + 0.1 * b, use_buffers=True)
    for _ in range(4):
        optimizer.zero_grad()
        (loss_of(gated, x, y) + fxprune.penalty(gated)).backward()
        optimizer.step()
        averaged.update_parameters(gated)
    small = fxprune.finalize(averaged.eval())
    assert torch.allclose(small(x), averaged(x), rtol=1e-9, atol=1e-12)
    assert small.report.verification and small.report.verification.verdict == "equal"


def test_gates_among_decayed_weights_are_refused() -> None:
    gated = gated_model()
    decaying = torch.optim.SGD(gated.parameters(), lr=0.1, weight_decay=0.1)
    with pytest.raises(GateError, match=r"fxprune\.parameter_groups"):
        fxprune.require_undecayed(gated, decaying)
    fxprune.require_undecayed(gated, torch.optim.SGD(gated.parameters(), lr=0.1))
    groups = fxprune.parameter_groups(gated, lr=0.1, weight_decay=0.1)
    fxprune.require_undecayed(gated, torch.optim.AdamW(groups))
    with pytest.raises(GateError, match="weight decay"):
        fxprune.Budget(gated, macs=0.5, steps=10, optimizer=decaying)


def mixed_precision_moves_gates_and_weights(
    gated: Any, x: Tensor, y: Tensor, dtype: torch.dtype, *, scaled: bool
) -> None:
    device = x.device.type
    optimizer = torch.optim.SGD(fxprune.parameter_groups(gated, lr=0.05, gate_lr=0.5))
    scaler = torch.amp.GradScaler(device, init_scale=2.0**10, enabled=scaled)
    before = {name: p.detach().clone() for name, p in gated.named_parameters()}
    losses: list[float] = []
    for _ in range(8):
        with torch.autocast(device, dtype):
            loss = loss_of(gated, x, y)
        optimizer.zero_grad()
        total: Tensor = scaler.scale(loss + fxprune.penalty(gated))
        total.backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert all(not torch.equal(before[name], p) for name, p in gated.named_parameters())
    assert gated.gates.width.dtype == torch.float32
    small = fxprune.finalize(gated.eval(), x[:2])
    assert small.report.verification and small.report.verification.verdict == "equal"


def test_training_in_bfloat16_with_a_scaler_moves_gates_and_weights() -> None:
    x, y = batch()
    gated = gated_model().float()
    mixed_precision_moves_gates_and_weights(gated, x.float(), y, torch.bfloat16, scaled=True)


class NoWaiting(TorchDispatchMode):
    """Refuses to read a number off the device, which on a GPU would wait for it."""

    WAITS = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "unique")

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        assert func.overloadpacket.__name__ not in self.WAITS, f"{func} waits for the device"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_never_waits_for_the_device(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # On another device than the CPU numbers are looked at every 50 steps only.
    monkeypatch.setattr(fxprune.Budget, "_require_numbers", lambda *_: None)
    x, y = batch()
    gated = gated_model()
    gated.penalties["cost"] = fxprune.Cost(1e-3, of=kind)
    half: dict[str, Any] = {kind: 0.5}
    budget = fxprune.Budget(gated, steps=10, **half)
    budget.steps_done = 3
    with pytest.raises(AssertionError, match="waits for the device"), NoWaiting():
        gated.gates.width.sum().item()
    with NoWaiting():
        (loss_of(gated, x, y) + fxprune.penalty(gated) + budget.penalty()).backward()
        budget.step()
    assert gated.gates.width.grad is not None


def train(model: Any, x: Tensor, y: Tensor, after_step: Callable[[], None] = lambda: None) -> None:
    """Train with a budget that freezes the gates half way."""
    optimizer = torch.optim.SGD(fxprune.parameter_groups(model, lr=0.05), momentum=0.9)
    budget = fxprune.Budget(model, parameters=0.6, steps=10, strength=0.05)
    model.train()
    for _ in range(10):
        optimizer.zero_grad()
        for half in (slice(None, None, 2), slice(1, None, 2)):  # gradients are accumulated
            loss = loss_of(model, x[half], y[half]) + budget.penalty()
            (loss / 2).backward()
        optimizer.step()
        budget.step()
        after_step()


class Plain(nn.Module):
    """Without batch norms, whose statistics are those of each process."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 3)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.second(F.relu(self.first(x))))
        return self.head(x.mean((2, 3)))


class TwoHeads(Plain):
    """A head beside, and another scale, in training; a layer that only evaluation runs."""

    def __init__(self) -> None:
        super().__init__()
        self.beside, self.only = nn.Linear(8, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Any:
        x = F.relu(self.first(x))
        features = F.relu(self.second(x * 1.5 if self.training else x)).mean((2, 3))
        if not self.training:
            return self.only(self.head(features))
        return self.head(features), self.beside(x.mean((2, 3)))


def replicated(gated: Any) -> nn.Module:
    return nn.parallel.DistributedDataParallel(gated, find_unused_parameters=True)


def sharded(gated: Any) -> nn.Module:
    mesh = init_device_mesh("cpu", (2,))
    with pytest.raises(GateError, match=r"ignored_params=fxprune\.replicate_gates"):
        fxprune.parameter_groups(fully_shard(gated_model(Plain), mesh=mesh), lr=0.1)
    return fully_shard(gated, mesh=mesh, ignored_params=fxprune.replicate_gates(gated))


def whole_state(model: nn.Module) -> dict[str, Any]:
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))


def worker(
    rank: int, kind: type[Plain], spread: Callable[[Any], nn.Module], port: int, path: str
) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    gated = gated_model(kind)
    model = spread(gated)
    widths: list[Tensor] = []

    def compare_ranks() -> None:
        mine = gated.gates.width.detach().clone()
        both = [torch.empty_like(mine) for _ in range(2)]
        dist.all_gather(both, mine)
        assert torch.equal(*both)
        widths.append(mine)

    x, y = batch()
    train(model, x[rank::2], y[rank::2], compare_ranks)
    assert len({tuple(width.tolist()) for width in widths}) > 5  # they moved
    if spread is sharded:
        with pytest.raises(GateError, match="get_model_state_dict"):
            fxprune.finalize(model)
    torch.save(whole_state(model), f"{path}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="gloo over sockets")
@pytest.mark.parametrize("spread", [replicated, sharded])
@pytest.mark.parametrize("kind", [Plain, TwoHeads])
def test_two_processes_train_as_one(
    kind: type[Plain], spread: Callable[[Any], nn.Module], tmp_path: Path
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    spawn(worker, (kind, spread, port, str(tmp_path)), nprocs=2)
    alone = gated_model(kind)
    x, y = batch()
    train(alone, x, y)
    assert not gates_of(alone).live().all() and not alone.gates.width.requires_grad
    state = torch.load(tmp_path / "0.pt", weights_only=True)
    close(state, alone.state_dict())
    gathered = gated_model(kind)
    gathered.load_state_dict(state)
    proof = fxprune.finalize(gathered).report.verification
    assert proof and proof.verdict == "equal"


def test_verbs_leave_inference_mode() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    with torch.inference_mode():
        x = torch.randn(3, 4)
        gated = fxprune.instrument(model, x)
        with torch.no_grad():
            next(iter(gated.gates.parameters()))[::2] = 0
        small = fxprune.compact(gated)
        plain = fxprune.finalize(small, fold=False)
    for one in (gated, small, plain):
        one(torch.randn(3, 4)).sum().backward()
        assert all(p.grad is not None for n, p in one.named_parameters() if "gates" not in n)


def test_a_compacted_model_can_be_saved_whole(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    gated = fxprune.instrument(model, torch.randn(3, 4))
    with torch.no_grad():
        next(iter(gated.gates.parameters()))[::2] = 0
    small = fxprune.compact(gated)
    torch.save(small, tmp_path / "small.pt")
    loaded = torch.load(tmp_path / "small.pt", weights_only=False)
    assert fxprune.finalize(loaded).report.after == fxprune.finalize(small).report.after
