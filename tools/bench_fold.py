"""What folding is predicted to save beside what it does, in torch and in onnxruntime.

    python -m tools.bench_fold [--models] [--size 28] [--rounds 7] [--table out/bench_fold.md]

Every chain is folded, whether that pays or not: the ratio of its costs (parameters, MACs, latency
by the table of single layers) beside that of measured latencies, and how well the one ranks the
other (Spearman). `--models` adds RepVGG-A0 and a MobileNetV2 half of whose blocks are linear.
"""

import statistics
import tempfile
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Annotated, Any, cast
from unittest.mock import patch

import numpy as np
import onnxruntime
import torch
import typer
from rich.console import Console
from torch import Tensor, nn
from torchvision.models import mobilenet_v2

import fxprune
from fxprune.costs import count_costs, latency
from fxprune.folding.convolutions import Geometry, Sizes, geometry_of
from fxprune.folding.layer_costs import COSTS, output_places
from fxprune.gating.terms import LATENCY
from fxprune.programs.observation import observe
from fxprune.programs.program import capture

PREDICTIONS = ("parameters", "macs", "latency")
ENGINES = ("torch", "onnxruntime")


class Sum(nn.Module):
    """Branches over one input, added, and what follows."""

    def __init__(self, *branches: nn.Module, then: nn.Module | None = None) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)
        self.then = nn.Identity() if then is None else then

    def forward(self, x: Tensor) -> Tensor:
        first, *others = [branch(x) for branch in self.branches]
        for other in others:
            first = first + other
        return self.then(first)


def conv(
    inputs: int, outputs: int, kernel: int = 1, padding: int = 0, stride: int = 1, groups: int = 1
) -> nn.Module:
    return nn.Conv2d(inputs, outputs, kernel, stride, padding, groups=groups)


def repvgg(inputs: int, outputs: int, stride: int = 1, then: nn.Module | None = None) -> nn.Module:
    """Return a block of RepVGG (Ding et al. 2021): 3×3, 1×1 and perhaps the identity, normed."""
    branches: list[nn.Module] = [
        nn.Sequential(conv(inputs, outputs, 3, 1, stride), nn.BatchNorm2d(outputs)),
        nn.Sequential(conv(inputs, outputs, 1, 0, stride), nn.BatchNorm2d(outputs)),
    ]
    if inputs == outputs and stride == 1:
        branches.append(nn.BatchNorm2d(inputs))
    return Sum(*branches, then=then)


def inverted(width: int, inner: int) -> nn.Module:
    """Return an inverted residual without activations."""
    layers = [conv(width, inner), conv(inner, inner, 3, 1, groups=inner), conv(inner, width)]
    return Sum(nn.Sequential(*layers), nn.Identity())


# The input's channels and the layers; padding is where hoisting puts it.
CHAINS: dict[str, tuple[int, Callable[[], nn.Module]]] = {
    "1×1 ∘ 1×1, 64-192-64": (64, lambda: nn.Sequential(conv(64, 192), conv(192, 64))),
    "1×1 ∘ 1×1, 128-32-128": (128, lambda: nn.Sequential(conv(128, 32), conv(32, 128))),
    "1×1 ∘ 3×3, 32-64-32": (32, lambda: nn.Sequential(conv(32, 64, 3, 1), conv(64, 32))),
    "3×3 ∘ 1×1, 32-128-32": (32, lambda: nn.Sequential(conv(32, 128), conv(128, 32, 3, 1))),
    "1×1 ∘ 3×3 ∘ 1×1, 24-96-96-24": (
        24,
        lambda: nn.Sequential(conv(24, 96), conv(96, 96, 3, 1), conv(96, 24)),
    ),
    "3×3 ∘ 3×3, 32-32-32": (32, lambda: nn.Sequential(conv(32, 32, 3, 2), conv(32, 32, 3))),
    "3×3 ∘ 3×3, 24-72-24": (24, lambda: nn.Sequential(conv(24, 72, 3, 2), conv(72, 24, 3))),
    "3×3/2 ∘ 3×3, 32-32-32": (32, lambda: nn.Sequential(conv(32, 32, 3, 2), conv(32, 32, 3, 0, 2))),
    "pointwise ∘ depthwise, 64-64": (
        64,
        lambda: nn.Sequential(conv(64, 64, 3, 1, groups=64), conv(64, 64)),
    ),
    "depthwise ∘ depthwise, 96": (
        96,
        lambda: nn.Sequential(conv(96, 96, 3, 2, groups=96), conv(96, 96, 3, groups=96)),
    ),
    "bottleneck, 128-32-32-128": (
        128,
        lambda: nn.Sequential(conv(128, 32), conv(32, 32, 3, 1), conv(32, 128)),
    ),
    "inverted residual, 24-144-24": (24, lambda: inverted(24, 144)),
    "RepVGG block, 48": (48, lambda: repvgg(48, 48)),
}


def bench(
    models: Annotated[bool, typer.Option(help="whole networks too")] = False,
    size: Annotated[int, typer.Option(help="of the chains' maps")] = 28,
    rounds: Annotated[int, typer.Option(help="of timing, before and after in turns")] = 7,
    table: Annotated[Path, typer.Option(help="the Markdown table")] = Path("out/bench_fold.md"),
) -> None:
    """Fold, time and compare, on one thread."""
    torch.set_num_threads(1)
    console = Console(width=160)
    rows: dict[str, dict[str, float]] = {}
    for name, (channels, build) in CHAINS.items():
        torch.manual_seed(0)
        model, x = build().eval(), torch.randn(1, channels, size, size)
        rows[name] = compare(model, as_one(model, x), x, rounds)
        console.print(_row(name, rows[name]), markup=False, highlight=False)
    text = [
        "# Folding: predicted and measured",
        "",
        f"Cost of the folded chain / of the chain as it is, batch 1, {size}×{size}, one thread; "
        f"medians of {rounds} rounds in turns; {date.today()}, torch {torch.__version__}, "
        f"onnxruntime {onnxruntime.__version__}.",
        "",
        *_header("chain"),
        *(_row(name, row) for name, row in rows.items()),
        "",
        *_rankings(list(rows.values())),
    ]
    if models:
        text += ["", *_header("network")]
        for name, measure in {"RepVGG-A0": repvgg_net, "MobileNetV2": mobilenet}.items():
            text.append(_row(name, measure(console, rounds)))
    console.print("\n".join(text), markup=False, highlight=False)
    table.parent.mkdir(parents=True, exist_ok=True)
    draft = table.with_name(table.name + ".part")
    draft.write_text("\n".join(text) + "\n", encoding="utf-8")
    draft.replace(table)


def as_one(model: nn.Module, x: Tensor) -> nn.Module:
    """Fold a chain as far as it goes, whatever that costs."""

    def layer(geometry: Geometry, places: Sizes) -> int:
        return 1

    with patch.dict(COSTS, layers=layer):
        small = fxprune.finalize(model, x, cost=cast(Any, "layers"))
    left = sum(isinstance(part, nn.Conv2d) for part in small.modules())
    if left != 1:
        raise RuntimeError(f"{left} layers are left of what should be one")
    return small


def compare(before: nn.Module, after: nn.Module, x: Tensor, rounds: int) -> dict[str, float]:
    """Return after / before, predicted and measured."""
    costs = [count_costs(model, ((x,), {})) for model in (before, after)]
    times = [predicted_latency(model, x) for model in (before, after)]
    runs = {"torch": [in_torch(m, x) for m in (before, after)]}
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / "before.onnx", Path(folder) / "after.onnx"]
        runs["onnxruntime"] = [
            in_onnx(m, x, f) for m, f in zip((before, after), files, strict=True)
        ]
        measured = {name: ratio(pair[0], pair[1], rounds) for name, pair in runs.items()}
    return {
        "parameters": costs[1].parameters / costs[0].parameters,
        "macs": costs[1].macs / costs[0].macs,
        "latency": times[1] / times[0],
        **measured,
    }


def predicted_latency(model: nn.Module, x: Tensor) -> int:
    """Add up what the table says of a model's layers."""
    program = capture(model, ((x,), {}), check=False)
    seen, total = observe(program), 0
    for node in program.graph.nodes:
        if node.op != "call_module":
            continue
        geometry = geometry_of(program.module.get_submodule(str(node.target)))
        if geometry is not None:
            total += COSTS[LATENCY](geometry, output_places(geometry, seen.values[node]))
    return total


def in_torch(model: nn.Module, x: Tensor) -> Callable[[], Any]:
    def run() -> Any:
        with torch.inference_mode():
            return model(x)

    return run


def in_onnx(model: nn.Module, x: Tensor, path: Path) -> Callable[[], Any]:
    fxprune.export_onnx(model, path, x)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    feed: Any = {session.get_inputs()[0].name: x.numpy()}
    return lambda: session.run(None, feed)


def ratio(before: Callable[[], Any], after: Callable[[], Any], rounds: int) -> float:
    """Return the median of latency ratios, each of two that were measured one after the other."""
    found: list[float] = []
    for _ in range(rounds):
        first, second = (latency(run, seconds=0.05, repeats=5) for run in (before, after))
        found.append(second / first)
    return statistics.median(found)


def spearman(left: list[float], right: list[float]) -> float:
    """Return how well one list ranks as the other does, 1 at best; ties by place."""
    ranks = [np.argsort(np.argsort(np.array(values))) for values in (left, right)]
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def repvgg_net(console: Console, rounds: int) -> dict[str, float]:
    """Compare RepVGG-A0 as it is trained with what finalize makes of it."""
    blocks = [nn.Sequential(repvgg(3, 48, 2), nn.ReLU())]
    inputs = 48
    for outputs, count in ((48, 2), (96, 4), (192, 14), (1280, 1)):
        for place in range(count):
            stride = 1 if place else 2
            blocks.append(nn.Sequential(repvgg(inputs, outputs, stride), nn.ReLU()))
            inputs = outputs
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1280, 1000)]
    model, x = nn.Sequential(*blocks, *head).eval(), torch.randn(1, 3, 224, 224)
    return compare(model, fxprune.finalize(model, x), x, rounds)


def mobilenet(console: Console, rounds: int) -> dict[str, float]:
    """Compare MobileNetV2 with what is left when every other block has no activation."""
    x = torch.randn(1, 3, 224, 224)
    model = mobilenet_v2(weights=None).eval()
    gated = fxprune.instrument(model, x, hoist_padding=True)
    linear = gated.gates.linear
    assert linear is not None
    with torch.no_grad():
        for site in gated.gates.depth_sites:
            block = int(site.name.split(".")[1])
            linear[site.index] = float(1 < block < 18 and block % 2 == 0)
    small = fxprune.finalize(gated, cost="latency")
    for plan in small.report.plans:
        console.print(str(plan), markup=False, highlight=False)
    return compare(model, small, x, rounds)


def _header(what: str) -> list[str]:
    columns = (*(f"{name}, predicted" for name in PREDICTIONS), *ENGINES)
    return [f"| {what} | {' | '.join(columns)} |", f"|---|{'---:|' * len(columns)}"]


def _row(name: str, row: dict[str, float]) -> str:
    return f"| {name} | {' | '.join(f'{row[key]:.2f}' for key in (*PREDICTIONS, *ENGINES))} |"


def _rankings(rows: list[dict[str, float]]) -> list[str]:
    lines = ["| Spearman's rank correlation | torch | onnxruntime |", "|---|---:|---:|"]
    for prediction in PREDICTIONS:
        predicted = [row[prediction] for row in rows]
        found = [spearman(predicted, [row[engine] for row in rows]) for engine in ENGINES]
        lines.append(f"| {prediction} | {' | '.join(f'{value:.2f}' for value in found)} |")
    return lines


if __name__ == "__main__":
    typer.run(bench)
