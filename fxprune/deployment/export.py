"""A model as an ONNX file that onnxruntime was seen to agree with.

The file is written, checked and run in a folder of its own beside its destination, and moved into
place last: whatever goes wrong before, a file that was there stays as it was and no other is left.
"""

import os
import tempfile
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from math import isnan, nan
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxprune.deployment.onnx_program import FIX_SIZES, write_onnx
from fxprune.deployment.onnx_signature import Flat, Sizes
from fxprune.deployment.open_sizes import Answers
from fxprune.errors import ExportError, as_export_error, one_line, require_module
from fxprune.gating.remembered import remembered_inputs
from fxprune.programs.program import quiet
from fxprune.progress import shown, stages
from fxprune.proof.comparison import FLIPS, Difference, differences
from fxprune.proof.precision import full_precision
from fxprune.runtime.default_device import on_cpu
from fxprune.runtime.turns import in_turn
from fxprune.tracing.assumptions import ASSUMES
from fxprune.user_models.cases import normalised_inputs
from fxprune.user_models.inputs import Inputs, describe, tensors_of, to_device
from fxprune.user_models.modules import copy_model
from fxprune.user_models.size_memos import find_size_memos, forgotten, may_hold_memos

PROVIDERS = ("CPUExecutionProvider", "CUDAExecutionProvider")


@dataclass(frozen=True)
class OnnxCheck:
    """What was written, and how far onnxruntime is from torch.

    bytes: with the external data of large models. errors: by run, max|a − b| / max|a| of its worst
    output, NaN where a random input has no finite output. seconds: export and checks.
    """

    path: str
    bytes: int
    opset: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    errors: dict[str, float]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Return the result as JSON-able data."""
        errors = {run: None if isnan(error) else error for run, error in self.errors.items()}
        return {**asdict(self), "errors": errors}


@in_turn
@on_cpu
@shown("export")
def export_onnx(
    model: nn.Module,
    path: str | os.PathLike[str],
    example_inputs: Any = None,
    *,
    dynamic_batch: bool = True,
    dynamic_size: bool = False,
    tolerance: float = 1e-4,
    metadata: Mapping[str, Any] | None = None,
) -> OnnxCheck:
    """Write `model`, in evaluation mode, to `path`, once onnxruntime computes what torch does.

    example_inputs: as in `fxprune.verify`; models made by fxprune remember theirs. Inputs are named
    after the arguments of forward, outputs after dict keys, or `output`, or `output_0`, `output_1`…
    dynamic_batch: leaves open dim 0, as `batch`, of all inputs that share the example's.
    dynamic_size: leaves open the size of image-like inputs, as `name_2`, `name_3`. tolerance:
    relative to the largest entry of an output. metadata: goes into the file; values other than
    strings become JSON.

    The model is not modified. Raises `ExportError`, or `ExampleInputError` if `example_inputs` is
    no set of inputs, and then leaves `path` as it was.
    """
    require_module(model)
    start = time.perf_counter()
    inputs = _example_inputs(model, example_inputs)
    flat = _flatten(model, inputs)
    sizes = Sizes(inputs, dynamic_batch, dynamic_size)
    target = _target(path)
    with _folder_beside(target) as folder:
        draft = folder / target.name
        opset, answers = _write(flat, inputs, sizes, draft, metadata or {})
        errors = _compare(flat, answers, draft, tolerance)
        _require_open(flat, answers, draft, tolerance)
        size = _publish(draft, target.parent)
    return OnnxCheck(
        path=os.fspath(path),
        bytes=size,
        opset=opset,
        inputs=flat.input_names,
        outputs=flat.output_names,
        errors=errors,
        seconds=time.perf_counter() - start,
    )


def _write(
    flat: Flat, inputs: Inputs, sizes: Sizes, draft: Path, metadata: Mapping[str, Any]
) -> tuple[int, Answers]:
    """Write the file; where open sizes are in the way, without what the model made for its last."""
    try:
        return write_onnx(flat, sizes, draft, metadata)
    except ExportError as error:
        if not may_hold_memos(flat.model):
            raise
        memos = find_size_memos(flat.model, inputs)
        if not memos.attributes:
            raise
        with forgotten(flat.model, memos):
            try:
                return write_onnx(flat, sizes, draft, metadata)
            except ExportError:
                raise error from None


def onnx_session(
    path: str | os.PathLike[str], provider: str = "CPUExecutionProvider"
) -> onnxruntime.InferenceSession:
    """Load an ONNX file into onnxruntime, at full precision and without its chatter."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # its errors are exceptions, too
    settings = {"use_tf32": 0} if provider == "CUDAExecutionProvider" else {}
    return onnxruntime.InferenceSession(os.fspath(path), options, [(provider, settings)])


def _example_inputs(model: nn.Module, given: Any) -> Inputs:
    if given is None:
        given = remembered_inputs(model)
    if given is None:
        raise ExportError(
            f"{type(model).__name__} remembers no inputs to export it with; pass example_inputs="
        )
    return to_device(normalised_inputs(given), torch.device("cpu"))


def _flatten(model: nn.Module, inputs: Inputs) -> Flat:
    if len(tensors_of(inputs)) != sum(isinstance(x, Tensor) for x in pytree.tree_leaves(inputs)):
        raise ExportError(
            f"{type(model).__name__} takes a dataclass, whose tensors would be constants in the "
            "file; wrap it in a module that takes them as arguments"
        )
    what = f"{type(model).__name__} does not run on {describe(inputs)} on the CPU"
    with as_export_error(what, "pass example_inputs= that it accepts"), torch.no_grad():
        flat = Flat(copy_model(model).cpu().eval(), inputs).eval()
    if not flat.output_names:
        raise ExportError(f"{type(model).__name__} returns no tensor, of which a file could be")
    return flat


def _target(path: Any) -> Path:
    try:
        return Path(path).resolve()
    except (TypeError, ValueError, OSError) as error:
        raise ExportError(f"{path!r} is no path: {one_line(error)}") from error


@contextmanager
def _folder_beside(target: Path) -> Generator[Path]:
    """Give a folder on the file system of `target` that goes away whatever happens."""
    try:
        if target.is_dir():
            raise ExportError(f"{target} is a directory; pass the name of a file in it")
        if target.exists() and not target.is_file():  # what is moved there would replace it
            raise ExportError(f"{target} is a device or a pipe; pass the name of a file")
        with tempfile.TemporaryDirectory(prefix=".fxprune-", dir=target.parent) as folder:
            yield Path(folder)
    except OSError as error:
        raise ExportError(
            f"{target} cannot be written: {error.strerror or one_line(error)}; pass a path in a "
            "directory that exists, may be written to and has room"
        ) from error


def _publish(draft: Path, directory: Path) -> int:
    """Move what was written into `directory`, and return its bytes."""
    files = list(draft.parent.iterdir())
    size = sum(file.stat().st_size for file in files)
    # The weights of a large model first: it must never stand without them.
    for file in sorted(files, key=lambda file: file == draft):
        os.replace(file, directory / file.name)
    return size


def _compare(flat: Flat, answers: Answers, draft: Path, tolerance: float) -> dict[str, float]:
    """Run `draft` in onnxruntime; return its errors by run, or raise where it is not the model."""
    available = onnxruntime.get_available_providers()
    sessions = {name: _load(draft, name) for name in PROVIDERS if name in available}
    errors: dict[str, float] = {}
    cases = answers.sizes.cases()
    for case, inputs in stages("running it in onnxruntime", cases.items(), len(cases)):
        expected = _torch_outputs(flat, inputs)
        for provider, session in sessions.items():
            run = f"{case} on {provider.removesuffix('ExecutionProvider')}"
            found = differences(expected, _onnx_outputs(flat, session, inputs, run))
            if not answers.hold_at(inputs):
                _require_same(flat, found, inputs, tolerance)
            _require(found, tolerance, run)
            known = (difference.error for difference in found if not isnan(difference.error))
            errors[run] = max(known, default=nan)
    if all(isnan(error) for error in errors.values()):
        raise ExportError(
            f"the outputs of {type(flat.model).__name__} are not finite, so nothing can be "
            "compared; pass example_inputs= on which they are"
        )
    return errors


def _require_open(flat: Flat, answers: Answers, draft: Path, tolerance: float) -> None:
    """Raise where the file computes something else than the model, at sizes that it leaves open.

    What only one of them runs on is no such thing: whoever tries is told. But what a trace assumed
    of its example is in no file, which would compute what the original model does not.
    """
    others = answers.others()
    if not others:
        return
    session = _load(draft, PROVIDERS[0])
    for chosen in others:
        inputs = answers.sizes.inputs_at(flat.input_names, chosen)
        try:
            found = _onnx_outputs(flat, session, inputs, "open sizes")
        except ExportError:
            continue
        try:
            expected = _torch_outputs(flat, inputs)
        except ExportError as error:
            if ASSUMES in str(error):
                raise
            continue
        _require_same(flat, differences(expected, found), inputs, tolerance)


def _require_same(
    flat: Flat, found: Sequence[Difference], inputs: Inputs, tolerance: float
) -> None:
    worst = [one for one in found if _exceeds(one, tolerance)]
    if worst:
        raise ExportError(
            f"{type(flat.model).__name__} computes something else on {describe(inputs)}, of "
            f"sizes the file leaves open: output {worst[0].output} {worst[0].message}; "
            f"{FIX_SIZES}"
        )


def _load(draft: Path, provider: str) -> onnxruntime.InferenceSession:
    remedy = "export the model in float32, or replace the operator"
    with as_export_error(f"onnxruntime ({provider}) cannot load the file", remedy):
        return onnx_session(draft, provider)


def _torch_outputs(flat: Flat, inputs: Inputs) -> dict[str, Tensor]:
    name = type(flat.model).__name__
    what = f"{name} itself does not run on {describe(inputs)}, as a file of open sizes should"
    with as_export_error(what, FIX_SIZES), torch.no_grad(), full_precision(), quiet():
        outputs = flat(*(tensor.clone() for tensor in tensors_of(inputs)))
        return dict(zip(flat.output_names, outputs, strict=True))


def _onnx_outputs(
    flat: Flat, session: onnxruntime.InferenceSession, inputs: Inputs, run: str
) -> dict[str, Tensor]:
    with as_export_error(
        f"onnxruntime does not run the file on {describe(inputs)} ({run})", FIX_SIZES
    ):
        arrays = [tensor.numpy() for tensor in tensors_of(inputs)]
        outputs = session.run(None, dict(zip(flat.input_names, arrays, strict=True)))
    return dict(zip(flat.output_names, map(torch.from_numpy, outputs), strict=True))


def _require(found: Sequence[Difference], tolerance: float, run: str) -> None:
    for difference in found:
        if _exceeds(difference, tolerance):
            raise ExportError(
                f"onnxruntime disagrees with torch on {run}: output {difference.output} "
                f"{difference.message} (error {difference.error:.2g}, tolerance {tolerance:.0e}); "
                "pass a larger tolerance if the model is that sensitive to rounding"
            )


def _exceeds(difference: Difference, tolerance: float) -> bool:
    return difference.error > (FLIPS if difference.exact else tolerance)
