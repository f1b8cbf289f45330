"""ResNet-20 on Fashion-MNIST at half its multiply-accumulates, beside Torch-Pruning's methods.

    python -m tools.experiments.fashion_resnet --data FOLDER [--methods plain,fxprune] [--seeds 3]

FOLDER holds the four gzipped files of Fashion-MNIST (torchvision leaves them in FashionMNIST/raw).
Every method gets the same epochs, batches, rates and seeds, no pretraining and no
augmentation; what is pruned is fixed at half the steps. Accuracy is that of the last epoch on the
test images, in float32. Seconds are of one processor, on a GPU those of a clock, which other runs
beside it make longer. Runs are appended to a JSON-lines file; those in it are not repeated, and all
in it enter the table: give each protocol a file of its own.
"""

import json
import statistics
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from torch import Tensor, nn

from fxprune.costs import count_costs
from models.mnist import load_mnist
from models.resnet import ResNet20
from tools.experiments.classifier import Method, Recipe, train
from tools.experiments.gated import Gated
from tools.experiments.peers import PEERS, Peer
from tools.training import Data, accuracy

OURS = {"fxprune": "gates", "fxprune-taylor": "taylor"}
METHODS = ("plain", *OURS, *PEERS)


def experiment(
    data: Annotated[Path, typer.Option(help="a folder with the four gzipped files")],
    methods: Annotated[str, typer.Option(help="comma-separated")] = ",".join(METHODS),
    seeds: Annotated[int, typer.Option(min=1, help="how many runs of each")] = 3,
    epochs: Annotated[int, typer.Option(min=1)] = 10,
    macs: Annotated[float, typer.Option(help="the budget, a fraction")] = 0.5,
    batch: Annotated[int, typer.Option(min=1)] = 128,
    lr: Annotated[float, typer.Option(help="the highest rate")] = 0.1,
    shrunk: Annotated[int, typer.Option(min=1, help="sides of images are divided by this")] = 1,
    bfloat16: Annotated[bool, typer.Option(help="train under autocast")] = True,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    workers: Annotated[int, typer.Option(min=1, help="runs at a time, a process each")] = 1,
    runs: Annotated[Path, typer.Option(help="JSON lines")] = Path("out/fashion_resnet.jsonl"),
    table: Annotated[Path, typer.Option(help="Markdown")] = Path("out/fashion_resnet.md"),
) -> None:
    """Run every method with every seed."""
    console = Console(stderr=True)
    recipe = Recipe(epochs=epochs, batch=batch, lr=lr, bfloat16=bfloat16)
    done = {(row["method"], row["seed"], row["epochs"]) for row in _rows(runs)}
    wanted = [(name, seed, epochs) for seed in range(seeds) for name in methods.split(",")]
    runs.parent.mkdir(parents=True, exist_ok=True)
    # Spawned, not forked: a GPU that was used before the fork is of no use after it.
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        started = [
            pool.submit(_run, name, replace(recipe, seed=seed), macs, data, shrunk, device)
            for name, seed, _ in (run for run in wanted if run not in done)
        ]
        for finished in as_completed(started):
            if finished.exception():  # told when the others are done: they took long
                continue
            with runs.open("a", encoding="utf-8") as file:
                file.write(json.dumps(finished.result()) + "\n")
            table.write_text(show(_rows(runs)), encoding="utf-8")
    console.print(show(_rows(runs)), markup=False)
    for finished in started:
        finished.result()


def show(rows: list[dict[str, Any]]) -> str:
    """Return a Markdown table of all runs, the best mean accuracy first."""
    lines = [
        "| method | MACs | parameters | accuracy, mean | of each seed | seconds |",
        "|---|---:|---:|---:|---|---:|",
    ]
    found = {name: [row for row in rows if row["method"] == name] for name in METHODS}
    means = {n: statistics.mean(r["accuracy"] for r in mine) for n, mine in found.items() if mine}
    for name in sorted(means, key=lambda name: -means[name]):
        mine = found[name]
        each = ", ".join(f"{row['accuracy']:.2%}" for row in mine)
        part, parameters, seconds = (
            statistics.mean(row[key] for row in mine) for key in ("part", "parameters", "seconds")
        )
        lines.append(
            f"| {name} | {part:.1%} | {parameters:,.0f} | {means[name]:.2%} | {each} "
            f"| {seconds:,.0f} |"
        )
    return "\n".join(lines) + "\n"


def _run(
    name: str, recipe: Recipe, macs: float, data: Path, shrunk: int, device: str
) -> dict[str, Any]:
    """Train once, and return what came of it."""
    torch.set_num_threads(1)
    console = Console(stderr=True)
    console.print(f"{name}, seed {recipe.seed}")
    training, test = _images(data, shrunk, device)
    torch.manual_seed(recipe.seed)
    x = training[0][:2]
    model = ResNet20().to(x.device).to(memory_format=torch.channels_last)
    full = _macs(model, x)

    def start(steps: int) -> Method:
        if name == "plain":
            return Method(model, recipe, steps)
        if name in OURS:
            return Gated(model, recipe, steps, x, macs, OURS[name])
        return Peer(name, model, recipe, steps, x, macs)

    method, seconds = train(start, training, recipe, console)
    small = method.finished()
    return {
        "method": name,
        **asdict(recipe),
        "accuracy": float(accuracy(small, test).float().mean()),
        "part": _macs(small, x) / full,
        "parameters": sum(p.numel() for p in small.parameters()),
        "seconds": round(seconds),
    }


def _macs(model: nn.Module, x: Tensor) -> float:
    return count_costs(model.eval(), ((x,), {})).macs


def _rows(runs: Path) -> list[dict[str, Any]]:
    if not runs.exists():
        return []
    return [json.loads(line) for line in runs.read_text(encoding="utf-8").splitlines()]


def _images(folder: Path, shrunk: int, device: str) -> tuple[Data, Data]:
    """Return training and test set, averaged over squares, scaled as the training pixels ask."""
    training, test = load_mnist(folder)
    pixels = training.data.float()
    mean, std = pixels.mean(), pixels.std()

    def images(part: Any) -> Data:
        x = ((part.data.float() - mean) / std).unsqueeze(1)
        x = F.avg_pool2d(x, shrunk).to(device, memory_format=torch.channels_last)
        return x, part.targets.to(device)

    return images(training), images(test)


if __name__ == "__main__":
    typer.run(experiment)
