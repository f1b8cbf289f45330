"""Train a gated classifier, show how it goes, and write down how its widths fall."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

import fxprune

Data = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Recipe:
    """How to train: batch size, epochs, learning rates (weights' falls as a cosine), the seed.

    settle: the part of the steps after which the gates are frozen and only weights train on.
    """

    epochs: int = 5
    batch: int = 100
    lr: float = 0.02
    gate_lr: float = 0.1
    momentum: float = 0.9
    settle: float = 0.7
    seed: int = 0


@dataclass
class History:
    """What was seen on the way, at each of `steps`: the loss, and the gates by site."""

    steps: list[int] = field(default_factory=list[int])
    losses: list[float] = field(default_factory=list[float])
    widths: dict[str, list[int]] = field(default_factory=dict[str, list[int]])
    linear: dict[str, list[bool]] = field(default_factory=dict[str, list[bool]])
    seconds: float = 0.0


@dataclass
class BudgetHistory:
    """What a budget did, at each of `steps`: the cost, where it should be, λ, and the loss."""

    kind: str
    target: float
    steps: list[int] = field(default_factory=list[int])
    costs: list[float] = field(default_factory=list[float])
    aims: list[float] = field(default_factory=list[float])
    strengths: list[float] = field(default_factory=list[float])
    losses: list[float] = field(default_factory=list[float])

    def note(self, budget: fxprune.Budget, loss: float) -> None:
        """Write down how the budget stands."""
        self.steps.append(budget.steps_done)
        self.costs.append(budget.cost)
        self.aims.append(budget.aim)
        self.strengths.append(budget.strength)
        self.losses.append(loss)


def train(gated: nn.Module, data: Data, recipe: Recipe, console: Console) -> History:
    """Train weights and gates together, in place, by stochastic gradient descent."""
    images, labels = data
    steps = recipe.epochs * (len(images) // recipe.batch)
    groups = fxprune.parameter_groups(gated, lr=recipe.lr, gate_lr=recipe.gate_lr)
    optimizer = torch.optim.SGD(groups, momentum=recipe.momentum)
    order = torch.Generator().manual_seed(recipe.seed)
    history, started, step, state = History(), time.perf_counter(), 0, ""
    gated.train()
    with _progress(console) as progress:
        task = progress.add_task("training", total=steps, state="")
        for epoch in range(recipe.epochs):
            for picked in torch.randperm(len(images), generator=order).split(recipe.batch):
                optimizer.param_groups[0]["lr"] = cosine(recipe.lr, step / steps)
                logits = gated(images[picked])
                loss = F.cross_entropy(logits, labels[picked])
                total = loss + fxprune.penalty(gated)
                optimizer.zero_grad()
                total.backward()
                optimizer.step()
                step += 1
                if step == round(recipe.settle * steps):
                    fxprune.freeze(gated)
                if step % 50 == 0:
                    right = float((logits.argmax(1) == labels[picked]).float().mean())
                    state = _note(gated, history, step, float(loss.detach()), right)
                    progress.update(task, completed=step, state=f"epoch {epoch + 1} {state}")
            if not console.is_terminal:
                console.print(f"epoch {epoch + 1}/{recipe.epochs} {state}")
    history.seconds = time.perf_counter() - started
    return history


def accuracy(model: Callable[[Tensor], Tensor], data: Data, batch: int = 500) -> Tensor:
    """Return which images a model gets right, bool (images,)."""
    images, labels = data
    parts = zip(images.split(batch), labels.split(batch), strict=True)
    with torch.no_grad():
        return torch.cat([model(x).argmax(1) == y for x, y in parts])


def _note(gated: nn.Module, history: History, step: int, loss: float, right: float) -> str:
    history.steps.append(step)
    history.losses.append(loss)
    live: list[str] = []
    for name, site in fxprune.architecture(gated).items():
        history.widths.setdefault(name, []).append(site["live"])
        history.linear.setdefault(name, []).append(site["linear"])
        live.append(f"{site['live']}{'l' if site['linear'] else ''}")
    return f"loss {loss:.3f} accuracy {right:.1%} widths {'-'.join(live)}"


def cosine(lr: float, part: float) -> float:
    """Return the rate after a part of the steps."""
    return lr * 0.5 * (1 + math.cos(math.pi * part))


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[state]}"),
        console=console,
        disable=not console.is_terminal,
    )
