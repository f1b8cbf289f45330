"""How long fxprune takes to instrument and finalise, beside Torch-Pruning's build and step.

    python -m tools.bench_compile [--models resnet50,densenet201] [--repeats 5] [--table FILE]

Both work on the same untrained model and input in turns, in one process; the ratio is of medians.
Proofs are left out (`check=False`): Torch-Pruning has none. Half of the gates of every site are
closed, half of the channels of every layer pruned. "torch.fx alone" is what copying, tracing and
running the model take, without any pruning. Then chains and residual networks of growing
length, for the growth.
"""

import copy
import gc
import math
import statistics
import sys
import time
from collections.abc import Callable
from datetime import date
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch import Tensor, nn
from torch.fx.passes.shape_prop import ShapeProp
from torchvision.models import get_model

import fxprune
from fxprune.testing import close_half

MODELS = (
    "resnet18,resnet50,resnet152,mobilenet_v2,mobilenet_v3_large,densenet121,densenet201,"
    "regnet_x_400mf,vgg16_bn,efficientnet_b0,convnext_tiny"
)
CHAINS, BLOCKS = (500, 1000, 2500, 5000), (25, 50, 100, 200)


class Residual(nn.Module):
    """Blocks of two convolutions, each added to a stream."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                *(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
                *(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)),
            )
            for _ in range(blocks)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = (x + block(x)).relu()
        return x.mean((2, 3))


def chain(nodes: int) -> nn.Module:
    """Return layers and activations in a row, `nodes` in all."""
    layers = (part for _ in range(nodes // 2) for part in (nn.Linear(8, 8), nn.ReLU()))
    return nn.Sequential(*layers, nn.Linear(8, 4))


def ours(model: nn.Module, x: Tensor) -> dict[str, float]:
    """Return the seconds of the two verbs."""
    started = time.perf_counter()
    gated = fxprune.instrument(model, x, check=False)
    instrumented = time.perf_counter()
    close_half(gated)
    closed = time.perf_counter()
    fxprune.finalize(gated, check=False)
    return {"instrument": instrumented - started, "finalize": time.perf_counter() - closed}


def floor(model: nn.Module, x: Tensor) -> dict[str, float]:
    """Return the seconds of what torch alone takes for what any two such verbs have to do.

    Copy the model, trace it, run it for its shapes, write its code; then copy and write it again.
    """
    started = time.perf_counter()
    traced = torch.fx.symbolic_trace(copy.deepcopy(model))
    with torch.no_grad():
        ShapeProp(traced).propagate(x)
    copy.deepcopy(traced)
    return {"floor": time.perf_counter() - started}


def theirs(model: nn.Module, x: Tensor) -> dict[str, float]:
    """Return the seconds of Torch-Pruning's pruner and step; it edits the model it is given."""
    torch_pruning = import_module("torch_pruning")  # an extra: most who check the types have it not
    heads: list[nn.Module] = [
        m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == 1000
    ]
    started = time.perf_counter()
    pruner = torch_pruning.pruner.MagnitudePruner(
        model,
        x,
        importance=torch_pruning.importance.MagnitudeImportance(),
        pruning_ratio=0.5,
        ignored_layers=heads,
    )
    built = time.perf_counter()
    pruner.step()
    return {"build": built - started, "step": time.perf_counter() - built}


def bench(
    models: Annotated[str, typer.Option(help="torchvision models, comma-separated")] = MODELS,
    repeats: Annotated[int, typer.Option(help="runs of each, in turns")] = 5,
    growth: Annotated[bool, typer.Option(help="time growing networks too")] = True,
    table: Annotated[Path, typer.Option(help="the Markdown table")] = Path("out/bench_compile.md"),
) -> None:
    """Time both compilers and print the ratios."""
    console = Console()
    if find_spec("torch_pruning") is None:
        console.print("Torch-Pruning is not installed: pip install -e '.[experiments]'")
        sys.exit(2)
    rows = [_compare(console, name, repeats) for name in models.split(",") if name]
    mean = math.exp(statistics.mean(math.log(row["ratio"]) for row in rows)) if rows else math.nan
    text = [
        "# Compile time",
        "",
        f"Median seconds of {repeats} runs in turns, {torch.get_num_threads()} threads of a CPU, "
        f"input 1×3×224×224, proofs apart; {date.today()}, torch {torch.__version__}, "
        f"Torch-Pruning {version('torch-pruning')}.",
        "",
        "| model | instrument | finalize | torch.fx alone | Torch-Pruning build | step | ratio |",
        "|---|---:|---:|---:|---:|---:|---:|",
        *(
            f"| {row['name']} | {row['instrument']:.2f} | {row['finalize']:.2f} "
            f"| {row['floor']:.2f} | {row['build']:.2f} | {row['step']:.2f} | {row['ratio']:.2f} |"
            for row in rows
        ),
        "",
        f"Geometric mean of the ratios: {mean:.2f}.",
    ]
    console.print(f"geometric mean {mean:.2f}")
    if growth:
        text += ["", "| network | nodes | seconds | milliseconds a node |", "|---|---:|---:|---:|"]
        text += _growth(console, "chain", CHAINS, chain, torch.randn(2, 8))
        text += _growth(console, "residual blocks", BLOCKS, Residual, torch.randn(1, 3, 8, 8))
    table.parent.mkdir(parents=True, exist_ok=True)
    draft = table.with_name(table.name + ".part")
    draft.write_text("\n".join(text) + "\n", encoding="utf-8")
    draft.replace(table)


def _compare(console: Console, name: str, repeats: int) -> dict[str, Any]:
    torch.manual_seed(0)
    model = get_model(name, weights=None).eval()
    x = torch.randn(1, 3, 224, 224)
    runs: list[dict[str, float]] = []
    # What is imported on the way is not counted.
    ours(model, x)
    theirs(copy.deepcopy(model), x)
    for _ in range(repeats):
        spent = copy.deepcopy(model)
        gc.collect()
        runs.append(ours(model, x) | floor(model, x) | theirs(spent, x))
    row: dict[str, Any] = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
    total = statistics.median(run["instrument"] + run["finalize"] for run in runs)
    row["ratio"] = total / statistics.median(run["build"] + run["step"] for run in runs)
    shown = "  ".join(f"{key} {value:.3f}" for key, value in row.items())
    console.print(f"{name:20} {shown}", highlight=False)
    return {"name": name, **row}


def _growth(
    console: Console, what: str, sizes: tuple[int, ...], make: Callable[[int], nn.Module], x: Tensor
) -> list[str]:
    lines: list[str] = []
    for size in sizes:
        torch.manual_seed(0)
        model = make(size).eval()
        nodes = len(list(torch.fx.symbolic_trace(model).graph.nodes))
        seconds = sum(ours(model, x).values())
        line = f"| {what}, {size:,} | {nodes:,} | {seconds:.2f} | {seconds / nodes * 1000:.2f} |"
        console.print(line, markup=False)
        lines.append(line)
    return lines


if __name__ == "__main__":
    typer.run(bench)
