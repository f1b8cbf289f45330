"""Loops that are not ours: callbacks in Lightning and transformers do what a plain loop does."""

from collections.abc import Sized
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fxprune
from fxprune.errors import BudgetError, FxpruneError, GateError
from fxprune.gating.owners import gates_of
from fxprune.training.loops import add_penalty_gradients_, library, unscale_
from tests.test_training import close

BATCHES, PARTS = 12, 2  # batches an epoch, and how many make a step


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


class WithLoss(nn.Module):
    """A model as transformers has them: it takes labels, and gives its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 16), nn.Linear(16, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.head(self.second(self.first(x).relu()).relu())
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


class LossInTraining(WithLoss):
    """The same with a head beside; the loss is there in training only, of both."""

    def __init__(self) -> None:
        super().__init__()
        self.beside = nn.Linear(16, 3)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        x = self.first(x).relu()
        logits = self.head(self.second(x).relu())
        if not self.training:
            return {"logits": logits}
        beside = F.cross_entropy(self.beside(x), labels)
        return {"loss": F.cross_entropy(logits, labels) + 0.3 * beside, "logits": logits}


KINDS = [WithLoss, LossInTraining]


def data() -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(8 * BATCHES, 6, generator=generator, dtype=torch.float64)
    return TensorDataset(x, (x[:, 0] * x[:, 1] > 0).long() + (x[:, 2] > 1).long())


def gated_model(kind: type[WithLoss] = WithLoss) -> Any:
    torch.manual_seed(0)
    x, labels = data()[:2]
    gated = fxprune.instrument(kind().double(), {"x": x, "labels": labels}).double()
    width = gates_of(gated).width
    assert width is not None
    width.data += torch.linspace(-0.2, 0.2, len(width))
    gated.penalties = fxprune.paper_penalties(0.01, 0.01, 0.02, 0.01)
    return gated


def optimizer_of(gated: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(fxprune.parameter_groups(gated, lr=0.05, gate_lr=0.3), momentum=0.9)


def budget_of(gated: nn.Module, wanted: bool) -> fxprune.Budget | None:
    steps = 2 * BATCHES // PARTS
    return fxprune.Budget(gated, parameters=0.4, steps=steps, strength=0.05) if wanted else None


def plain_loop(with_budget: bool, kind: type[WithLoss] = WithLoss) -> Any:
    """Train two epochs, with gradients of two batches a step."""
    gated = gated_model(kind)
    optimizer, budget = optimizer_of(gated), budget_of(gated, with_budget)
    for _ in range(2):
        for place, (x, labels) in enumerate(DataLoader(data(), batch_size=8), 1):
            loss = gated(x, labels)["loss"]
            loss = loss + (budget.penalty() if budget else fxprune.penalty(gated))
            (loss / PARTS).backward()
            if place % PARTS == 0:
                optimizer.step()
                gated.gates.clip_()
                if budget:
                    budget.step()  # with the gradients still there, which decide between equals
                optimizer.zero_grad()
    return gated


def test_gradients_added_afterwards_are_those_of_the_sum() -> None:
    x, labels = data()[:8]
    whole, after = gated_model(), gated_model()
    (whole(x, labels)["loss"] + fxprune.penalty(whole)).backward()
    after(x, labels)["loss"].backward()
    add_penalty_gradients_(after)
    mine, theirs = ({n: p.grad for n, p in m.named_parameters()} for m in (after, whole))
    torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
    alone = gated_model()
    add_penalty_gradients_(alone)  # nothing has a gradient yet
    assert alone.gates.width.grad.any() and alone.first.weight.grad is None


@pytest.mark.parametrize("clipped", [False, True])
def test_scaled_gradients_are_unscaled_first(clipped: bool) -> None:
    x, labels = data()[:8]
    whole, after = gated_model(), gated_model()
    (whole(x, labels)["loss"] + fxprune.penalty(whole)).backward()
    optimizer, scaler = optimizer_of(after), torch.amp.GradScaler("cpu")
    scaled: Tensor = scaler.scale(after(x, labels)["loss"])
    scaled.backward()
    if clipped:
        scaler.unscale_(optimizer)
    unscale_(scaler, optimizer)
    add_penalty_gradients_(after)
    mine, theirs = ({n: p.grad for n, p in m.named_parameters()} for m in (after, whole))
    torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)
    scaler.step(optimizer)
    optimizer_of(whole).step()
    close(dict(after.named_parameters()), dict(whole.named_parameters()))


def test_frozen_gates_get_no_gradients() -> None:
    gated = gated_model()
    fxprune.freeze(gated)
    add_penalty_gradients_(gated)
    assert gated.gates.width.grad is None


def test_a_missing_library_is_named_with_the_command_that_brings_it() -> None:
    with pytest.raises(FxpruneError, match=r"pip install 'fxprune\[lightning\]'"):
        library("no_such_library.pytorch", "lightning")


# Lightning.


def lightning_fit(path: Path, callback: Any, model: nn.Module, **options: Any) -> Any:
    pytorch: Any = pytest.importorskip("lightning.pytorch")

    class Module(pytorch.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.gated = model

        def training_step(self, batch: Any, _: int) -> Tensor:
            return self.gated(*batch)["loss"]

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return options.get("optimizer") or optimizer_of(self)

    trainer = pytorch.Trainer(
        default_root_dir=path,
        accelerator="cpu",
        max_epochs=options.get("epochs", 2),
        accumulate_grad_batches=PARTS,
        callbacks=[callback, *options.get("others", ())],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.fit(Module(), DataLoader(data(), batch_size=8), ckpt_path=options.get("resume"))
    return trainer


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("with_budget", [False, True])
def test_lightning_trains_as_a_plain_loop(
    with_budget: bool, kind: type[WithLoss], tmp_path: Path
) -> None:
    pytest.importorskip("lightning.pytorch")
    from fxprune.lightning import GateCallback

    gated = gated_model(kind)
    lightning_fit(tmp_path, GateCallback(budget_of(gated, with_budget)), gated)
    close(gated.state_dict(), plain_loop(with_budget, kind).state_dict())
    assert not gates_of(gated).live().all()


@pytest.mark.slow
def test_lightning_averages_weights_and_keeps_to_the_budget(tmp_path: Path) -> None:
    callbacks: Any = pytest.importorskip("lightning.pytorch.callbacks")
    from fxprune.lightning import GateCallback

    gated = gated_model()
    budget = budget_of(gated, True)
    assert budget is not None
    averaging = callbacks.StochasticWeightAveraging(0.01, swa_epoch_start=1)
    fitting = {"epochs": 4, "others": [averaging]}
    lightning_fit(tmp_path, GateCallback(budget), gated, **fitting)
    assert budget.frozen and budget.cost <= budget.target
    assert set(gated.gates.width.tolist()) <= {0.0, 1.0}


@pytest.mark.slow
def test_lightning_takes_up_a_budget_again(tmp_path: Path) -> None:
    pytest.importorskip("lightning.pytorch")
    from fxprune.lightning import GateCallback

    file, first, second = tmp_path / "half.ckpt", gated_model(), gated_model()
    trainer = lightning_fit(tmp_path, GateCallback(budget_of(first, True)), first, epochs=1)
    trainer.save_checkpoint(file)
    budget = budget_of(second, True)
    lightning_fit(tmp_path, GateCallback(budget), second, resume=file)
    close(second.state_dict(), plain_loop(True).state_dict())
    assert budget and budget.frozen and budget.cost <= budget.target


@pytest.mark.slow
def test_lightning_refuses_to_decay_gates(tmp_path: Path) -> None:
    pytest.importorskip("lightning.pytorch")
    from fxprune.lightning import GateCallback

    gated = gated_model()
    optimizer = torch.optim.AdamW(gated.parameters(), weight_decay=0.1)
    with pytest.raises(GateError, match="weight decay"):
        lightning_fit(tmp_path, GateCallback(), gated, optimizer=optimizer)


# transformers.


def transformers_train(path: Path, callback: Any, model: nn.Module, **options: Any) -> Any:
    transformers: Any = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")

    class InOrder(transformers.Trainer):
        def _get_train_sampler(self, train_dataset: Sized | None = None) -> Any:
            return torch.utils.data.SequentialSampler(train_dataset or self.train_dataset)

    steps = options.get("stop", 2 * BATCHES // PARTS)
    arguments = transformers.TrainingArguments(
        output_dir=str(path),
        max_steps=steps,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=PARTS,
        max_grad_norm=0.0,
        lr_scheduler_type="constant",
        save_steps=BATCHES // PARTS,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        logging_strategy="no",
    )
    trainer = InOrder(
        model,
        arguments,
        train_dataset=[{"x": x, "labels": y} for x, y in data()],
        optimizers=(options.get("optimizer") or optimizer_of(model), None),
        callbacks=[callback],
    )
    trainer.train(resume_from_checkpoint=options.get("resume"))
    return trainer


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("with_budget", [False, True])
def test_transformers_train_as_a_plain_loop(
    with_budget: bool, kind: type[WithLoss], tmp_path: Path
) -> None:
    pytest.importorskip("transformers")
    from fxprune.huggingface import GateCallback

    gated = gated_model(kind)
    transformers_train(tmp_path, GateCallback(budget_of(gated, with_budget)), gated)
    close(gated.state_dict(), plain_loop(with_budget, kind).state_dict())


@pytest.mark.slow
def test_transformers_take_up_a_budget_again(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from fxprune.huggingface import GateCallback

    first, second = gated_model(), gated_model()
    half = BATCHES // PARTS
    transformers_train(tmp_path, GateCallback(budget_of(first, True)), first, stop=half)
    budget, folder = budget_of(second, True), str(tmp_path / f"checkpoint-{half}")
    transformers_train(tmp_path, GateCallback(budget), second, resume=folder)
    close(second.state_dict(), plain_loop(True).state_dict())
    assert budget and budget.frozen and budget.cost <= budget.target


@pytest.mark.slow
def test_transformers_refuse_to_decay_gates(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from fxprune.huggingface import GateCallback

    gated = gated_model()
    optimizer = torch.optim.AdamW(gated.parameters(), weight_decay=0.1)
    with pytest.raises(GateError, match="weight decay"):
        transformers_train(tmp_path, GateCallback(), gated, optimizer=optimizer)


@pytest.mark.slow
def test_lightning_refuses_a_checkpoint_without_a_budget() -> None:
    pytest.importorskip("lightning.pytorch")
    from fxprune.lightning import GateCallback

    with pytest.raises(BudgetError, match="no state of a budget"):
        GateCallback(budget_of(gated_model(), True)).load_state_dict({})


@pytest.mark.slow
def test_transformers_refuse_a_budget_cut_short(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from fxprune.huggingface import GateCallback

    gated = gated_model()
    callback, state = GateCallback(budget_of(gated, True)), SimpleNamespace(global_step=3)
    file = tmp_path / "checkpoint-3" / "fxprune_budget.pt"
    file.parent.mkdir()
    file.write_bytes(b"PK")
    args, optimizer = SimpleNamespace(output_dir=str(tmp_path)), optimizer_of(gated)
    with pytest.raises(BudgetError, match=r"fxprune_budget\.pt cannot be read: "):
        callback.on_train_begin(args, state, None, model=gated, optimizer=optimizer)
