"""What a run costs that gets faster as it shrinks: ResNet-18 to half its MACs, beside plain.

    python -m tools.bench_compaction [--epochs 10] [--table FILE] [--plot FILE]

Both train on MNIST's images, enlarged, epoch by epoch in turns in one process; the gated one to a
budget, compacted after every epoch, which its seconds include. On the CPU seconds are processor
time of one thread. Whether it learns well is not asked here: `tools.experiments` does.
"""

import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from torch import Tensor, nn
from torchvision.models import resnet18

import fxprune
from models.mnist import load_images, load_mnist
from tools.plots import plot_compaction

PATIENCE = 1  # epochs for which a unit was dead before it goes, while gates may still open


class Plain:
    """The model as it is."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)

    def penalty(self) -> Tensor | float:
        return 0.0

    def stepped(self) -> None:
        pass

    def epoch_ended(self) -> float:
        return 1.0

    def epoch(self, batches: Iterator[tuple[Tensor, Tensor]]) -> float:
        """Train on batches and return the seconds this took."""
        started = time.process_time()
        self.model.train()
        for x, y in batches:
            loss = F.cross_entropy(self.model(x), y) + self.penalty()
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.stepped()
        return time.process_time() - started


class Shrinking(Plain):
    """The same, to a budget, and compacted after every epoch."""

    def __init__(self, model: nn.Module, x: Tensor, steps: int, macs: float) -> None:
        super().__init__(fxprune.instrument(model, x))
        groups = fxprune.parameter_groups(self.model, lr=0.02, gate_lr=0.1)
        self.optimizer = torch.optim.SGD(groups, momentum=0.9)
        # Ranked units keep to the target of every step; pulled ones may fall below it in a run as
        # short as this, and what is gone by then does not come back.
        self.budget = fxprune.Budget(self.model, macs=macs, steps=steps, estimator="taylor")

    def penalty(self) -> Tensor:
        return self.budget.penalty()

    def stepped(self) -> None:
        self.budget.step()

    def epoch_ended(self) -> float:
        """Drop what is dead, and return which part of the MACs is left."""
        patience = 0 if self.budget.frozen else PATIENCE
        self.model = fxprune.compact(self.model, self.optimizer, patience=patience)
        self.budget.follow(self.model)
        return self.budget.cost / self.budget.full


def bench(
    epochs: Annotated[int, typer.Option(min=2)] = 10,
    batches: Annotated[int, typer.Option(help="in an epoch")] = 40,
    batch: Annotated[int, typer.Option(help="images in one")] = 32,
    size: Annotated[int, typer.Option(help="their height and width")] = 64,
    macs: Annotated[float, typer.Option(help="the budget, a fraction")] = 0.5,
    table: Annotated[Path, typer.Option(help="Markdown")] = Path("out/bench_compaction.md"),
    plot: Annotated[Path, typer.Option(help="a picture")] = Path("out/bench_compaction.png"),
) -> None:
    """Train both, print the seconds of every epoch and the ratio of the runs."""
    torch.set_num_threads(1)
    console = Console()
    images, labels = load_images(load_mnist()[0])

    def data(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(epoch))
        for picked in order[: batches * batch].split(batch):
            x = F.interpolate(images[picked], size=(size, size), mode="bilinear")
            yield x.expand(-1, 3, -1, -1).contiguous(), labels[picked]

    x = next(data(0))[0][:2]
    torch.manual_seed(0)
    plain = Plain(resnet18(num_classes=10))
    torch.manual_seed(0)
    started = time.process_time()
    gated = Shrinking(resnet18(num_classes=10), x, epochs * batches, macs)
    prepared = time.process_time() - started
    seconds: dict[str, list[float]] = {"plain": [], "gated": [], "compacting": []}
    left: list[float] = []
    lines = [
        "# A run that gets faster as it shrinks",
        "",
        f"ResNet-18, {epochs} epochs of {batches} batches, {batch}×3×{size}×{size}, to "
        f"{macs:.0%} of its MACs; seconds of one CPU thread; {date.today()}, "
        f"torch {torch.__version__}.",
        "",
        "| epoch | plain | gated | compacting | MACs left |",
        "|---:|---:|---:|---:|---:|",
    ]
    for epoch in range(epochs):
        for name, run in (("plain", plain), ("gated", gated)):
            seconds[name].append(run.epoch(data(epoch)))
        started = time.process_time()
        left.append(gated.epoch_ended())
        seconds["compacting"].append(time.process_time() - started)
        parts = " | ".join(f"{taken[-1]:.2f}" for taken in seconds.values())
        lines.append(f"| {epoch + 1} | {parts} | {left[-1]:.1%} |")
        console.print(lines[-1], markup=False)
    whole = prepared + sum(seconds["gated"]) + sum(seconds["compacting"])
    ratio = whole / sum(seconds["plain"])
    text = (
        f"The whole run took {ratio:.2f} of the plain one, {prepared:.1f} s of instrumenting "
        "included."
    )
    lines += ["", text]
    console.print(text)
    plot_compaction(seconds, left, plot)
    table.parent.mkdir(parents=True, exist_ok=True)
    draft = table.with_name(table.name + ".part")
    draft.write_text("\n".join(lines) + "\n", encoding="utf-8")
    draft.replace(table)


if __name__ == "__main__":
    typer.run(bench)
