"""One model of the zoo: instrument, close half the gates, finalise, compare; one line of JSON.

python -m tools.zoo_model resnet18
"""

import copy
import gc
import json
import math
import sys
import tempfile
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.models import get_model

import fxprune
from fxprune.errors import FxpruneError
from fxprune.gating.owners import gates_by_name
from fxprune.gating.remembered import memory_of
from fxprune.permutation import exchange_units
from fxprune.programs.program import Program, capture, widened
from fxprune.proof.comparison import differences
from fxprune.proof.precision import run_all, run_nudged
from fxprune.proof.verdicts import SENSITIVE
from fxprune.testing import close_half
from fxprune.user_models.inputs import model_inputs, same, tensors_of
from fxprune.user_models.modules import evaluating

SIZES = (64, 96, 128, 224, 299)
# Of the images that statistics are of: of fewer, most variances are near 0.
PIXELS = 32 * 64 * 64


def study(name: str) -> dict[str, Any]:
    """Return what happened to the model."""
    torch.manual_seed(0)
    result: dict[str, Any] = {"name": name, "verdict": "equal"}
    model = build(name)
    x = example(model, name)
    calibrate(model, x)
    result["permutation"] = permutation(model, x)
    gc.collect()  # copies of the model, in cycles
    started = time.perf_counter()
    try:
        gated = fxprune.instrument(model, x)
        gates = gates_by_name(gated).values()
        result["sites"] = sum(len(one.width_sites) for one in gates)
        result["traced"] = _traced(gated)
        result["units"] = sum(0 if one.width is None else one.width.numel() for one in gates)
        expected = _outputs(model, x)
        result["bit_exact"] = same(_outputs(gated.eval(), x), expected)
        if not all(map(torch.numel, tensors_of(expected))):
            return {**result, "verdict": "vacuous: the model finds nothing on its example"}
        result["closed"] = close_half(gated)
        take_statistics(gated, x)
        small = fxprune.finalize(gated)
    except FxpruneError as error:
        wrong = isinstance(error, fxprune.VerificationError)
        return {
            **result,
            "verdict": f"{'WRONG' if wrong else 'refused'}: {' '.join(str(error).split())}",
        }
    result["seconds"] = time.perf_counter() - started
    report = small.report
    assert report.before and report.after and report.verification
    proof = report.verification
    result["parameters"] = [report.before.parameters, report.after.parameters]
    result |= {dtype: proof.error[dtype] for dtype in ("float64", "float32")}
    spreads = [c.spread for c in proof.checks if c.dtype == "float64" and c.verdict == "equal"]
    result["spread"] = min(spreads, default=0.0)
    result["undecided"] = f"{len(proof.undecided)} of {len(proof.checks)}"
    result["verdict"] = proof.verdict if result["bit_exact"] else "WRONG: gates changed the model"
    result["refused"] = [str(change) for change in report.refused]
    result["onnx"] = onnx(model, small, x)
    return result


def build(name: str) -> nn.Module:
    """Return an untrained model; there is nothing to download."""
    if name.startswith("timm/"):
        return import_module("timm").create_model(name[5:], pretrained=False)
    try:
        model = get_model(name, weights=None, weights_backbone=None)
    except (TypeError, ValueError):
        model = get_model(name, weights=None)
    transform: Any = getattr(model, "transform", None)
    if transform is not None and transform.fixed_size is None:
        # Detectors enlarge what they are given; they do the same on small images.
        transform.min_size, transform.max_size = (128,), 192
    return model


def example(model: nn.Module, name: str) -> Any:
    """Return the first input the model runs on."""
    model.eval()
    config: dict[str, Any] = getattr(model, "default_cfg", {})
    if "input_size" in config:
        return torch.randn(1, *config["input_size"])
    candidates: list[Any] = [torch.randn(1, 3, size, size) for size in SIZES]
    candidates += [torch.randn(1, 3, 16, 112, 112), torch.randn(1, 3, 16, 224, 224)]
    candidates += [(torch.randn(1, 3, 128, 128), torch.randn(1, 3, 128, 128))]
    candidates += [([torch.rand(3, 128, 160)],)]
    for candidate in candidates:
        try:
            _outputs(model, candidate)
            return candidate
        except Exception:  # not this one
            continue
    raise FxpruneError(f"no input was found for {name}")


def calibrate(model: nn.Module, x: Any) -> None:
    """Give statistics, biases and heads values of their own that keep the signal alive."""
    for module in model.modules():
        for key, parameter in module.named_parameters(recurse=False):
            if key == "bias":
                parameter.data.normal_(0, 0.1)
            elif isinstance(module, _BatchNorm):
                parameter.data.uniform_(0.5, 1.5)
            elif not bool((parameter != 0).any()):
                parameter.data.normal_(0, 0.1)
    for module in model.modules():  # an untrained detector is sure of nothing
        for name in ("score_thresh", "objectness_thresh"):
            if hasattr(module, name):
                setattr(module, name, 0.0)
    take_statistics(model, x)


def take_statistics(model: nn.Module, x: Any) -> None:
    """Let batch norms know what they see now; of others, depth multiplies every rounding error."""
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    if not norms:
        return
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    _outputs(model, _many(x) if isinstance(x, Tensor) else x)
    model.eval()


def _many(x: Tensor) -> Tensor:
    """Return random inputs of the shape of x, enough to take statistics of."""
    batch = max(4, PIXELS // math.prod(x.shape[2:]))
    return torch.randn(batch, *x.shape[1:])


def onnx(model: nn.Module, small: nn.Module, x: Any) -> Any:
    """Return onnxruntime's error on the result, or why the original cannot be exported either."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            return max(fxprune.export_onnx(small, Path(folder) / "small.onnx").errors.values())
        except FxpruneError as error:
            why = " ".join(str(error).split())[:120]
        try:
            fxprune.export_onnx(model, Path(folder) / "model.onnx", x)
        except FxpruneError:
            return f"nor the original: {why}"
        return f"FAILED: {why}"


def _outputs(model: nn.Module, x: Any) -> Any:
    args: Any = x if isinstance(x, tuple) else (x,)
    with torch.no_grad():
        return model(*copy.deepcopy(args))


def permutation(model: nn.Module, x: Any) -> str:
    """Let units change places in float64; say how many did, and by how much the outputs moved."""
    try:
        program = widened(capture(model, model_inputs(x)))
    except FxpruneError as error:
        return f"not traced: {type(error).__name__}"
    if program is None:
        return "does not run in float64"
    found = exchange_units(program)
    text = f"{found.moved} of {found.classes} moved: {found.error:.1e}"
    if found.error <= 1e-9:
        return text
    sensitivity = _sensitivity(program)
    verdict = "undecided" if found.error <= SENSITIVE * sensitivity else "WRONG"
    return f"{verdict}: {text}, weights off by an ε: {sensitivity:.1e}"


def _sensitivity(program: Program) -> float:
    """Return how far a float64 program's outputs move where its weights move by an ε."""
    case = (program.args, program.kwargs)
    with evaluating(program.module):
        ((reference,),) = run_all([program.module], {"": case}, [torch.float64]).values()
        moved = run_nudged(program.module, case, 0, torch.finfo(torch.float64).eps)
    return max(one.error for run in moved for one in differences(reference.outputs, run.outputs))


def _traced(gated: Any) -> str:
    regions = memory_of(gated)["regions"]
    if regions:
        return f"{len(regions)} regions"
    leaves = [node.target for node in gated.graph.nodes if node.meta.get("leaf_because")]
    return f"fx, {len(leaves)} leaves" if leaves else "fx"


if __name__ == "__main__":
    print(json.dumps(study(sys.argv[1])))
