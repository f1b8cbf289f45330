"""Pictures of a training run."""

from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from tools.training import History


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
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".part.png")
    figure.savefig(draft, dpi=120)
    draft.replace(path)
