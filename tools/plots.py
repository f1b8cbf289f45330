"""Pictures of a training run."""

from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from tools.training import BudgetHistory, History


def plot_architecture(history: History, path: Path) -> None:
    """Draw live widths over training, a line a layer, with the loss below."""
    matplotlib.use("Agg")
    figure = Figure(figsize=(8, 5.5), layout="constrained")
    widths, losses = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    for name, live in history.widths.items():
        linear = history.linear.get(name, [])
        (line,) = widths.plot(history.steps, live, label=name)
        merged = [step for step, yes in zip(history.steps, linear, strict=False) if yes]
        if merged:
            label = f"{name} is linear"
            heights = [live[history.steps.index(step)] for step in merged]
            widths.plot(merged, heights, color=line.get_color(), lw=5, alpha=0.25, label=label)
    widths.set_yscale("log")
    widths.set_ylabel("live units")
    widths.set_title("Width of each layer while it is trained")
    widths.grid(alpha=0.3)
    widths.legend()
    losses.plot(history.steps, history.losses, color="grey", lw=0.8)
    losses.set_ylabel("loss")
    losses.set_yscale("log")
    losses.set_xlabel("step")
    losses.grid(alpha=0.3)
    _save(figure, path)


def plot_budget(history: BudgetHistory, path: Path) -> None:
    """Draw the cost on its way to the budget, with λ, if one moves, and the loss below."""
    matplotlib.use("Agg")
    figure = Figure(figsize=(8, 6.5), layout="constrained")
    pulled = any(history.strengths)
    cost, *strength, loss = figure.subplots(
        2 + pulled, 1, sharex=True, height_ratios=(3, 1, 1)[: 2 + pulled]
    )
    cost.plot(history.steps, history.costs, label=history.kind)
    cost.plot(history.steps, history.aims, ls="--", color="grey", label="target of the step")
    cost.axhline(history.target, color="black", lw=0.8, label=f"budget: {history.target:,.0f}")
    cost.set_ylabel(history.kind)
    cost.set_title("Cost of the model while it is trained to a budget")
    cost.legend()
    for axes in strength:
        axes.plot(history.steps, history.strengths)
        axes.set_ylabel("λ")
    loss.plot(history.steps, history.losses, color="grey", lw=0.8)
    loss.set_ylabel("loss")
    loss.set_xlabel("step")
    for axes in (cost, *strength, loss):
        axes.set_yscale("log")
        axes.grid(alpha=0.3)
    _save(figure, path)


def plot_compaction(seconds: dict[str, list[float]], left: list[float], path: Path) -> None:
    """Draw the seconds of every epoch of two runs, and which part of the MACs one has left."""
    matplotlib.use("Agg")
    figure = Figure(figsize=(8, 5.5), layout="constrained")
    taken, part = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    epochs = range(1, len(left) + 1)
    both = [a + b for a, b in zip(seconds["gated"], seconds["compacting"], strict=True)]
    taken.plot(epochs, seconds["plain"], marker="o", label="plain")
    taken.plot(epochs, seconds["gated"], marker="o", label="gated")
    taken.plot(epochs, both, ls="--", color="grey", label="gated, with its compaction")
    taken.set_ylim(bottom=0)
    taken.set_ylabel("seconds an epoch")
    taken.set_title("A run that is compacted while it shrinks")
    taken.legend()
    part.plot(epochs, [100 * value for value in left], marker="o", color="tab:orange")
    part.set_ylim(0, 105)
    part.set_ylabel("MACs left, %")
    part.set_xlabel("epoch")
    for axes in (taken, part):
        axes.grid(alpha=0.3)
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    """Write beside, then rename: an interrupted run leaves no half picture."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".part.png")
    figure.savefig(draft, dpi=120)
    draft.replace(path)
