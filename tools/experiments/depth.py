"""Let training decide how deep a network is: λ4 > 0, then count the layers that are left.

    python -m tools.experiments.depth [--net mlp|plain] [--depth 2e-3] [--epochs 2] [--seed 0]

On MNIST: a perceptron of 20 layers, or 12 padded 3×3 convolutions, wide and narrow in turns, whose
padding is hoisted so that they can be merged. A layer whose gate ends linear is folded into the
next; the accuracy must stay what it was, image by image, in torch and in onnxruntime.
`--depth 0` is the control: what ends linear there, the loss alone has made so.
"""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import fxprune
from fxprune.deployment.export import onnx_session
from models.mnist import load_images, load_mnist
from tools.training import Recipe, accuracy, train


def perceptron(layers: int = 20, width: int = 64) -> nn.Module:
    """Return a deep perceptron, with batch norms: gates that flip upset one without too much."""
    sizes = [784, *(width,) * (layers - 1), 10]
    linear = [nn.Linear(i, o) for i, o in pairwise(sizes)]
    hidden = (part for layer in linear[:-1] for part in (layer, nn.BatchNorm1d(width), nn.ReLU()))
    return nn.Sequential(nn.Flatten(), *hidden, linear[-1])


def plain() -> nn.Module:
    """Return 12 convolutions in a row, in three stages, each with its batch norm and ReLU."""
    parts: list[nn.Module] = []
    inputs = 1
    for narrow in (8, 12, 16):
        for place, outputs in enumerate((3 * narrow, narrow) * 2):
            stride = 1 if place else 2
            parts.append(nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False))
            parts += [nn.BatchNorm2d(outputs), nn.ReLU()]
            inputs = outputs
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 10))


NETS: dict[str, Callable[[], nn.Module]] = {"mlp": perceptron, "plain": plain}


def experiment(
    net: Annotated[str, typer.Option(help="mlp or plain")] = "mlp",
    depth: Annotated[float, typer.Option(help="λ4")] = 2e-3,
    epochs: Annotated[int, typer.Option(min=1)] = 2,
    lr: Annotated[float, typer.Option(help="the weights' learning rate")] = 0.02,
    images: Annotated[int, typer.Option(help="how many to train on")] = 60_000,
    seed: Annotated[int, typer.Option()] = 0,
    out: Annotated[Path, typer.Option(help="where the ONNX file goes")] = Path("out"),
) -> None:
    """Train one network once, fold it, and print what is left."""
    console = Console()
    torch.manual_seed(seed)
    training, test = (load_images(part) for part in load_mnist())
    training = (training[0][:images], training[1][:images])
    model = NETS[net]()
    gated = fxprune.instrument(
        model,
        training[0][:2],
        penalties=fxprune.paper_penalties(0.0, 1e-3, 0.0, depth),
        hoist_padding=net == "plain",
    )
    if gated.gates.width is not None:
        gated.gates.width.requires_grad_(False)  # depth alone is asked for
    history = train(gated, training, Recipe(epochs=epochs, lr=lr, seed=seed), console)
    gated.eval()
    small = fxprune.finalize(gated)
    out.mkdir(parents=True, exist_ok=True)
    check = fxprune.export_onnx(small, out / f"depth-{net}.onnx")
    right = {
        "gated": accuracy(gated, test),
        "folded": accuracy(small, test),
        "onnxruntime": accuracy(session(Path(check.path)), test),
    }
    linear = [site["linear"] for site in fxprune.architecture(gated).values()]
    table = Table(
        "", net, title=f"λ4 = {depth:g}, seed {seed}, {history.seconds:.0f} s of training"
    )
    table.add_row("layers, before → after", f"{layers(model)} → {layers(small)}")
    table.add_row("gates that ended linear", f"{sum(linear)} of {len(linear)}")
    for name, answers in right.items():
        same = int((answers != right["gated"]).sum())
        table.add_row(f"accuracy, {name}", f"{answers.float().mean():.2%} ({same} differ)")
    report = small.report
    assert report.before and report.after and report.verification
    table.add_row("parameters", f"{report.before.parameters:,} → {report.after.parameters:,}")
    table.add_row("MACs", f"{report.before.macs:,} → {report.after.macs:,}")
    table.add_row("error in float64", f"{report.verification.error['float64']:.1e}")
    console.print(table)


def layers(model: nn.Module) -> int:
    """Count the linear layers and convolutions of a model."""
    return sum(isinstance(part, (nn.Linear, nn.Conv2d)) for part in model.modules())


def session(path: Path) -> Callable[[Tensor], Tensor]:
    """Return an ONNX file as a function."""
    runner: Any = onnx_session(path)
    name = runner.get_inputs()[0].name

    def run(x: Tensor) -> Tensor:
        return torch.from_numpy(np.asarray(runner.run(None, {name: x.numpy()})[0]))

    return run


if __name__ == "__main__":
    typer.run(experiment)
