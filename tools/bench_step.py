"""How much gates add to a training step: time, its parts, and memory.

    python -m tools.bench_step [--models resnet18,resnet50] [--compile] [--table FILE]
    python -m tools.bench_step --device cuda --batch 128 --size 224 --compile

The plain and the instrumented model take the same step (loss, backward, SGD with momentum; the
instrumented one with its penalty) in turns, in one process; the ratio is of medians. On the CPU
that is processor time of one thread, which other load hardly moves. The parts are timed alone, on
the shapes of every gate, as shares of the plain step. Memory is what a forward pass saves for its
backward, on CUDA the peak of a step, with the model and what its optimizer keeps.
"""

import copy
import gc
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from torch import Tensor, fx, nn
from torchvision.models import get_model

import fxprune
from fxprune.compiler import GatedModel
from fxprune.gating.deferral import defer_gate, read_gated
from fxprune.gating.gated_reads import scaled_weights, scales_value
from fxprune.gating.gates import linear_gate, width_gate
from fxprune.planning.lowering import lowered

MODELS = "resnet18,resnet50"
QUEUED = 5  # steps that a GPU is given before it is waited for
PARTS = ("gates forward", "gates backward", "penalty", "clipping")


@dataclass(frozen=True)
class Variant:
    """A way to run a step."""

    name: str
    compiled: bool = False
    half: bool = False
    channels_last: bool = False

    def autocast(self, device: str) -> AbstractContextManager[Any]:
        return torch.autocast(device, torch.bfloat16) if self.half else nullcontext()

    def laid_out(self, thing: Any) -> Any:
        return thing.to(memory_format=torch.channels_last) if self.channels_last else thing


EAGER, COMPILED = Variant("eager"), Variant("compiled", compiled=True)
ON_CUDA = (
    Variant("eager, bf16", half=True),
    Variant("eager, bf16, channels last", half=True, channels_last=True),
)
COMPILED_ON_CUDA = Variant("compiled, bf16, channels last", True, True, True)
VARIANTS = (EAGER, *ON_CUDA, COMPILED, COMPILED_ON_CUDA)


class Step:
    """A training step of a model, in a variant."""

    def __init__(self, model: nn.Module, variant: Variant, x: Tensor, y: Tensor) -> None:
        self.model, self.variant = variant.laid_out(model).train(), variant
        self.x, self.y = variant.laid_out(x), y
        self.run = torch.compile(self.model) if variant.compiled else self.model
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-4, momentum=0.9)
        self.penalised = hasattr(model, "penalties")

    def forward(self) -> Tensor:
        with self.variant.autocast(self.x.device.type):
            loss = F.cross_entropy(self.run(self.x), self.y)
        return loss + fxprune.penalty(self.model) if self.penalised else loss

    def __call__(self) -> None:
        self.optimizer.zero_grad()
        self.forward().backward()
        self.optimizer.step()

    def held(self) -> int:
        """Return the bytes that are there between steps."""
        state = [value for kept in self.optimizer.state.values() for value in kept.values()]
        tensors = [*self.model.parameters(), *self.model.buffers(), *state]
        return sum(t.untyped_storage().nbytes() for t in tensors if isinstance(t, Tensor))


def seconds(work: Callable[[], object], device: str, queued: int = 1) -> float:
    """Return how long some work took: processor time on the CPU, elsewhere that of a queue of it.

    In training nobody waits for a GPU after every step.
    """
    if device == "cpu":
        started = time.process_time()
        work()
        return time.process_time() - started
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(queued):
        work()
    torch.cuda.synchronize()
    return (time.perf_counter() - started) / queued


def memory(step: Step) -> int:
    """Return the bytes saved for the backward, or on CUDA the peak of a step."""
    if step.x.device.type == "cuda":
        step.optimizer.zero_grad()
        others = torch.cuda.memory_allocated() - step.held()
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated() - others
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = step.forward()  # kept: what it frees could be counted again under its address
    del loss
    return sum(saved.values())


class Parts(fx.Interpreter):
    """The gates of a model alone, on the activations and weights one run multiplies them with."""

    def __init__(self, gated: GatedModel, variant: Variant, x: Tensor) -> None:
        super().__init__(fx.GraphModule(gated, lowered(gated, copy.deepcopy(gated.graph))))
        self.gated, self.device = gated, x.device.type
        self.calls: list[tuple[Callable[..., Tensor], list[Tensor]]] = []
        with variant.autocast(self.device), torch.no_grad():
            self.run(variant.laid_out(x))
        self.outputs: list[Tensor] = []
        self.forward()
        self.grads = [torch.randn_like(output) for output in self.outputs]

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = super().call_function(target, args, kwargs)
        if target in (width_gate, linear_gate):
            self._remember(target, *args)
        elif target is defer_gate and result[1] is None:
            self._remember(width_gate, result[0], args[1])
        elif target is read_gated and args[1][1] is not None:
            layer, (value, gate) = args
            if scales_value(layer, value):
                self._remember(width_gate, value, gate)
            else:
                scale = partial(scaled_weights, groups=getattr(layer, "groups", 1))
                self._remember(scale, layer.weight, gate)
        return result

    def _remember(self, gate: Callable[..., Tensor], *inputs: Tensor) -> None:
        self.calls.append((gate, [tensor.detach().clone().requires_grad_() for tensor in inputs]))

    def forward(self) -> None:
        self.outputs = [*self.gated.gates(), *(gate(*inputs) for gate, inputs in self.calls)]

    def backward(self) -> None:
        inputs = [tensor for _, tensors in self.calls for tensor in tensors]
        gates = list(self.gated.gates.parameters())
        torch.autograd.grad(self.outputs, [*gates, *inputs], self.grads)

    def penalty(self) -> None:
        fxprune.penalty(self.gated).backward()

    def medians(self, repeats: int) -> dict[str, float]:
        """Return the median seconds of each part; a backward needs the forward before it."""
        work = {
            "gates forward": self.forward,
            "gates backward": self.backward,
            "penalty": self.penalty,
            "clipping": self.gated.gates.clip_,
        }
        times = [
            {part: seconds(run, self.device) for part, run in work.items()} for _ in range(repeats)
        ]
        return {part: statistics.median(time[part] for time in times) for part in work}


def compare(name: str, variant: Variant, x: Tensor, repeats: int) -> dict[str, Any]:
    """Return the medians of both steps, their ratio, the parts' shares, and the memory's ratio."""
    torch.manual_seed(0)
    model = get_model(name, weights=None).to(x.device)
    y = torch.randint(1000, (len(x),), device=x.device)
    gated = fxprune.instrument(model, x[:2], check=False)
    steps = {"plain": Step(model, variant, x, y), "gated": Step(gated, variant, x, y)}
    times: dict[str, list[float]] = {which: [] for which in steps}
    for step in steps.values():
        step()
        step()
    for repeat in range(repeats):
        for which in sorted(steps, reverse=bool(repeat % 2)):
            gc.collect()
            times[which].append(seconds(steps[which], x.device.type, QUEUED))
    row: dict[str, Any] = {which: statistics.median(taken) for which, taken in times.items()}
    ratios = [gated / plain for gated, plain in zip(times["gated"], times["plain"], strict=True)]
    row["ratio"] = row["gated"] / row["plain"]
    row["least"] = min(times["gated"]) / min(times["plain"])
    row["low"], _, row["high"] = statistics.quantiles(ratios, n=4)
    if not variant.compiled:
        found = Parts(gated, variant, x).medians(repeats)
        row["parts"] = {part: taken / row["plain"] for part, taken in found.items()}
    if not variant.compiled or x.device.type == "cuda":
        row["memory"] = memory(steps["gated"]) / memory(steps["plain"])
    return {"model": name, "variant": variant.name, **row}


def bench(
    models: Annotated[str, typer.Option(help="torchvision models, comma-separated")] = MODELS,
    batch: Annotated[int, typer.Option(help="images in a step")] = 16,
    size: Annotated[int, typer.Option(help="their height and width")] = 96,
    repeats: Annotated[int, typer.Option(min=2, help="steps of each, in turns")] = 15,
    compiled: Annotated[bool, typer.Option("--compile", help="under torch.compile too")] = False,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    only: Annotated[str, typer.Option(help="of the ways to run it, semicolon-separated")] = "",
    table: Annotated[Path, typer.Option(help="the Markdown table")] = Path("out/bench_step.md"),
) -> None:
    """Time both steps and print the ratios."""
    console = Console()
    torch.set_num_threads(1)
    x = torch.randn(batch, 3, size, size, device=device)
    chosen = only.split(";") if only else [variant.name for variant in VARIANTS]
    variants = [
        variant
        for variant in VARIANTS
        if variant.name in chosen
        and (compiled or not variant.compiled)
        and (device == "cuda" or not variant.half)
    ]
    lines = [
        "# Training step",
        "",
        f"Median milliseconds of {repeats} steps in turns, batch {batch}×3×{size}×{size}, "
        f"{_name(device)}; in brackets the quartiles of the ratio, beside it that of the least "
        "steps, which other work on the machine disturbs least; "
        f"{date.today()}, torch {torch.__version__}.",
        "",
        f"| model | how | plain | gated | ratio | of the least | {' | '.join(PARTS)} | memory |",
        f"|---|---|{'---:|' * (len(PARTS) + 5)}",
    ]
    for name in filter(None, models.split(",")):
        for variant in variants:
            lines.append(_line(compare(name, variant, x, repeats)))
            console.print(lines[-1], markup=False, soft_wrap=True)
    table.parent.mkdir(parents=True, exist_ok=True)
    draft = table.with_name(table.name + ".part")
    draft.write_text("\n".join(lines) + "\n", encoding="utf-8")
    draft.replace(table)


def _name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else device


def _line(row: dict[str, Any]) -> str:
    shares = [f"{row['parts'][part]:.1%}" if "parts" in row else "" for part in PARTS]
    memory = f"{row['memory']:.2f}" if "memory" in row else ""
    plain, gated = (f"{1e3 * row[which]:.1f}" for which in ("plain", "gated"))
    return (
        f"| {row['model']} | {row['variant']} | {plain} | {gated} "
        f"| {row['ratio']:.3f} ({row['low']:.3f}-{row['high']:.3f}) | {row['least']:.3f} "
        f"| {' | '.join(shares)} | {memory} |"
    )


if __name__ == "__main__":
    typer.run(bench)
