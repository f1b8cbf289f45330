"""Train a gated LeNet on MNIST, finalise it, prove and deploy it, and show what it became.

python -m tools.train_demo [--data ROOT] [--epochs 5] [--strength 1e-3] [--out out]
"""

import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import fxprune
from fxprune.compiler import GatedModel, PlainModel
from fxprune.costs import latency
from fxprune.deployment.export import OnnxCheck, onnx_session
from models.lenet import LeNet
from models.mnist import load_images, load_mnist
from tools.plots import plot_architecture
from tools.training import Data, History, Recipe, accuracy, train

LAYERS = {"conv1": "relu1", "conv2": "relu2", "fc1": "relu3"}


def demo(
    data: Annotated[Path | None, typer.Option(help="a torchvision root with MNIST")] = None,
    epochs: Annotated[int, typer.Option(min=1)] = 5,
    strength: Annotated[float, typer.Option(help="λ of all penalties but λ4 = 0")] = 1e-3,
    seed: Annotated[int, typer.Option()] = 0,
    out: Annotated[Path, typer.Option(help="where results go")] = Path("out"),
) -> None:
    """Run the whole job once."""
    console = Console()
    torch.manual_seed(seed)
    training, test = (load_images(part) for part in load_mnist(data))
    console.print(f"MNIST: {len(training[0]):,} images to train on, {len(test[0]):,} to test on")
    model = LeNet()
    penalties = fxprune.paper_penalties(strength, strength, strength, 0.0)
    gated = fxprune.instrument(model, training[0][:2], penalties=penalties)
    console.print(str(gated.report))
    recipe = Recipe(epochs=epochs, seed=seed)
    history = train(gated, training, recipe, console)
    gated.eval()

    console.print("finalising: cut, fold, verify")
    small = fxprune.finalize(gated)
    console.print(str(small.report))
    out.mkdir(parents=True, exist_ok=True)
    console.print("exporting: ONNX, checked in onnxruntime")
    files = {
        "before": fxprune.export_onnx(model, out / "lenet-before.onnx", training[0][:2]),
        "after": fxprune.export_onnx(small, out / "lenet.onnx"),
    }
    result = measure(model, gated, small, files, test, history)
    write(out, result, history)
    console.print(show(result))
    console.print(f"written: {out}/lenet.onnx, {out}/report.json, {out}/architecture.png")


def measure(
    model: nn.Module,
    gated: GatedModel,
    small: PlainModel,
    files: dict[str, OnnxCheck],
    test: Data,
    history: History,
) -> dict[str, Any]:
    """Gather every number the table shows."""
    model.eval()
    right = {"gated": accuracy(gated, test), "finalised": accuracy(small, test)}
    image = test[0][:1]
    report = small.report
    assert report.before and report.after and report.verification
    return {
        "widths": widths(gated, small),
        "parameters": [report.before.parameters, report.after.parameters],
        "macs": [report.before.macs, report.after.macs],
        "correct": {name: int(answers.sum()) for name, answers in right.items()},
        "images": len(test[0]),
        "images_that_differ": int((right["gated"] != right["finalised"]).sum()),
        "latency_ms": {
            "torch": [1e3 * torch_latency(m, image) for m in (model, small)],
            "onnxruntime": [1e3 * onnx_latency(files[k], image) for k in ("before", "after")],
        },
        "bytes": [files[name].bytes for name in ("before", "after")],
        "errors": report.verification.error,
        "onnx": files["after"].to_dict(),
        "training_seconds": history.seconds,
        "report": report.to_dict(),
    }


def widths(gated: nn.Module, small: nn.Module) -> dict[str, list[Any]]:
    """Return every layer's width before and after; a merged layer has none of its own."""
    sites = fxprune.architecture(gated)
    found: dict[str, list[Any]] = {}
    names = dict(small.named_modules())
    for layer, site in LAYERS.items():
        after = sites[site]["live"] if layer in names else "merged"
        found[layer] = [sites[site]["total"], after]
    return {**found, "fc2": [10, 10]}


def torch_latency(model: nn.Module, image: Tensor) -> float:
    """Return the median seconds of one image in torch."""
    with torch.no_grad():
        return latency(lambda: model(image))


def onnx_latency(file: OnnxCheck, image: Tensor) -> float:
    """Return the median seconds of one image in onnxruntime on the CPU."""
    session = onnx_session(file.path)
    feed: Any = {session.get_inputs()[0].name: image.numpy()}

    def run() -> Any:
        return session.run(None, feed)

    return latency(run)


def write(out: Path, result: dict[str, Any], history: History) -> None:
    """Write the report, beside and then renamed, and the picture."""
    draft = out / "report.json.part"
    draft.write_text(json.dumps(result, indent=2, default=str), encoding="utf-8")
    draft.replace(out / "report.json")
    plot_architecture(history, out / "architecture.png")


def show(result: dict[str, Any]) -> Table:
    """Return the table of the run."""
    table = Table(title="LeNet on MNIST")
    for name in ("", "before", "after"):
        table.add_column(name, justify="left" if not name else "right")
    for layer, (before, after) in result["widths"].items():
        table.add_row(f"width of {layer}", str(before), str(after))
    table.add_section()
    for name in ("parameters", "macs"):
        before, after = result[name]
        label = "multiply-accumulates" if name == "macs" else name
        table.add_row(label, f"{before:,}", f"{after:,} ({after / before:.1%})")
    images = result["images"]
    gated, final = (result["correct"][name] / images for name in ("gated", "finalised"))
    table.add_row("accuracy, gated → finalised", f"{gated:.2%}", f"{final:.2%}")
    table.add_row("images they judge differently", "", str(result["images_that_differ"]))
    for engine, (before, after) in result["latency_ms"].items():
        table.add_row(f"latency of one image, {engine}", f"{before:.3f} ms", f"{after:.3f} ms")
    before, after = result["bytes"]
    table.add_row("ONNX file", f"{before / 1024:,.0f} KiB", f"{after / 1024:,.0f} KiB")
    table.add_section()
    for dtype, error in result["errors"].items():
        table.add_row(f"largest relative error, {dtype}", "", f"{error:.1e}")
    errors = result["onnx"]["errors"]
    table.add_row("largest error, onnxruntime", "", f"{max(errors.values()):.1e}")
    return table


if __name__ == "__main__":
    typer.run(demo)
