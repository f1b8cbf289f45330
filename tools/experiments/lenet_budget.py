"""LeNet (20-50-500) trained to budgets of parameters, on MNIST: what accuracy is left.

    python -m tools.experiments.lenet_budget [--budgets 2000,8000] [--seeds 3] [--epochs 16]

One run each, no pretraining, no augmentation; the accuracy is that of the finalised model after the
last epoch. The model shrinks early and is compacted on the way, so that most epochs are cheap ones
at the final size; the weights decay, since even a net of 2,000 parameters overfits. `--validate`
judges on a sixth of the training images and does not train on them: on those, rate and decay were
chosen, for nets trained without gates. One JSON line a run goes to the standard output, the table
and what is on the way to the standard error; with `--plots DIR` also a picture of every run.
"""

import json
import math
import os
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.table import Table

import fxprune
from models.lenet import LeNet
from models.mnist import load_images, load_mnist
from tools.plots import plot_budget
from tools.training import BudgetHistory, Data, Recipe, accuracy, cosine

NOTE_EVERY = 50  # steps
COMPACT_EVERY = 150  # steps
PATIENCE = 1  # compactions at which a unit was dead before it goes


def experiment(
    budgets: Annotated[str, typer.Option(help="parameters, comma-separated")] = "2000,8000",
    seeds: Annotated[int, typer.Option(min=1, help="how many runs of each")] = 3,
    epochs: Annotated[int, typer.Option(min=1)] = 16,
    data: Annotated[
        Path | None, typer.Option(help="a torchvision root with MNIST, else FXPRUNE_DATA")
    ] = None,
    batch: Annotated[int, typer.Option(min=1)] = 100,
    lr: Annotated[float, typer.Option(help="the weights', falling as a cosine")] = 0.05,
    decay: Annotated[float, typer.Option(min=0, help="the weights'")] = 1e-3,
    gate_lr: Annotated[float, typer.Option(help="the gates'")] = 0.1,
    estimator: Annotated[str, typer.Option(help="gates or taylor")] = "taylor",
    depth: Annotated[bool, typer.Option(help="train linearity gates too")] = True,
    pull: Annotated[float, typer.Option(min=0, help="λ4: towards linear layers")] = 0.0,
    shrink: Annotated[float, typer.Option(help="where the target ends, a part of the run")] = 0.18,
    settle: Annotated[float, typer.Option(help="where gates freeze, a part of the run")] = 0.22,
    validate: Annotated[bool, typer.Option(help="leave the test images alone")] = False,
    plots: Annotated[Path | None, typer.Option(help="where pictures go")] = None,
) -> None:
    """Run every budget with every seed."""
    torch.set_num_threads(1)
    console = Console(stderr=True)
    root = data or (Path(os.environ["FXPRUNE_DATA"]) if "FXPRUNE_DATA" in os.environ else None)
    training, test = (load_images(part) for part in load_mnist(root))
    if validate:
        training, test = _divided(training)
    how = How(estimator, depth, pull, decay, fxprune.Phases(shrink=shrink, settle=settle))
    rows: list[dict[str, Any]] = []
    for target in map(float, budgets.split(",")):
        for seed in range(seeds):
            recipe = Recipe(epochs=epochs, batch=batch, lr=lr, gate_lr=gate_lr, seed=seed)
            row, history = run(training, test, target, recipe, how, console)
            print(json.dumps(row), flush=True)
            rows.append(row)
            if plots is not None:
                plot_budget(history, plots / f"lenet-{target:.0f}-{seed}.png")
    console.print(show(rows))


@dataclass(frozen=True)
class How:
    """How units are told apart; may layers become linear, what pulls them; decay; phases."""

    estimator: str
    depth: bool
    pull: float
    decay: float
    phases: fxprune.Phases


def run(
    training: Data, test: Data, target: float, recipe: Recipe, how: How, console: Console
) -> tuple[dict[str, Any], BudgetHistory]:
    """Train once, finalise, and return what came of it."""
    torch.manual_seed(recipe.seed)
    images, labels = training
    steps = recipe.epochs * math.ceil(len(images) / recipe.batch)
    model = LeNet().to(memory_format=torch.channels_last)  # twice as fast where layers are narrow
    gated = fxprune.instrument(model, images[:2], linear_init=0.25 if how.depth else 0.0)
    if gated.gates.linear is not None:
        gated.gates.linear.requires_grad_(how.depth)
    groups = fxprune.parameter_groups(
        gated, lr=recipe.lr, gate_lr=recipe.gate_lr, weight_decay=how.decay
    )
    optimizer = torch.optim.SGD(groups, momentum=recipe.momentum)
    budget = fxprune.Budget(
        gated,
        parameters=target,
        steps=steps,
        phases=how.phases,
        estimator=how.estimator,
        depth=how.pull,
        optimizer=optimizer,
    )
    history = BudgetHistory(budget.kind, budget.target)
    order = torch.Generator().manual_seed(recipe.seed)
    started = time.process_time()
    for epoch in range(recipe.epochs):
        gated.train()
        for picked in torch.randperm(len(images), generator=order).split(recipe.batch):
            optimizer.param_groups[0]["lr"] = cosine(recipe.lr, budget.steps_done / steps)
            loss = F.cross_entropy(gated(images[picked]), labels[picked])
            optimizer.zero_grad()
            (loss + budget.penalty()).backward()
            optimizer.step()
            budget.step(loss)
            if budget.steps_done % NOTE_EVERY == 0:
                history.note(budget, float(loss.detach()))
            if budget.steps_done % COMPACT_EVERY == 0 and (
                budget.frozen or how.estimator == "taylor"
            ):
                gated = fxprune.compact(gated, optimizer, patience=0 if budget.frozen else PATIENCE)
                budget.follow(gated)
        console.print(f"epoch {epoch + 1} {budget.status} {_widths(gated)}", highlight=False)
    seconds = time.process_time() - started
    gated.eval()
    small = fxprune.finalize(gated)
    assert small.report.after and small.report.verification
    row = {
        "budget": target,
        "seed": recipe.seed,
        "estimator": how.estimator,
        "depth": how.depth,
        "epochs": recipe.epochs,
        "batch": recipe.batch,
        "widths": _widths(gated),
        "parameters": small.report.after.parameters,
        "macs": small.report.after.macs,
        "accuracy": float(accuracy(small, test).float().mean()),
        "verdict": small.report.verification.verdict,
        "cpu_seconds": round(seconds),
    }
    return row, history


def show(rows: list[dict[str, Any]]) -> Table:
    """Return the table of all runs, with the means of each budget."""
    table = Table(title="LeNet on MNIST, to a budget of parameters")
    for name in ("budget", "runs", "widths", "parameters", "accuracy"):
        table.add_column(name, justify="right")
    for target in dict.fromkeys(row["budget"] for row in rows):
        mine = [row for row in rows if row["budget"] == target]
        parameters = [f"{row['parameters']:,}" for row in mine]
        mean = statistics.mean(row["accuracy"] for row in mine)
        each = ", ".join(f"{row['accuracy']:.2%}" for row in mine)
        widths = ", ".join(row["widths"] for row in mine)
        table.add_row(
            f"{target:,.0f}", str(len(mine)), widths, ", ".join(parameters), f"{mean:.2%} ({each})"
        )
    return table


def _divided(training: Data) -> tuple[Data, Data]:
    """Return five sixths of the training images, and the rest."""
    order = torch.randperm(len(training[0]), generator=torch.Generator().manual_seed(123))
    held, kept = order[: len(order) // 6], order[len(order) // 6 :]
    images, labels = training
    return (images[kept], labels[kept]), (images[held], labels[held])


def _widths(gated: torch.nn.Module) -> str:
    sites = fxprune.architecture(gated).values()
    return "-".join(f"{site['live']}{'l' if site['linear'] else ''}" for site in sites)


if __name__ == "__main__":
    typer.run(experiment)
