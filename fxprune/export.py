"""A model as an ONNX file that onnxruntime was seen to agree with.

The file is written, checked and run in a folder of its own beside its destination, and moved into
place last: whatever goes wrong before, a file that was there stays as it was and no other is left.
"""

import inspect
import io
import json
import logging
import os
import tempfile
import time
import warnings
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from math import isnan, nan
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxprune.errors import ExportError
from fxprune.program import Inputs, copy_model, describe, to_device
from fxprune.verify import (
    FLIPS,
    GROWTH,
    Difference,
    differences,
    full_precision,
    leading_size,
    normalised_inputs,
    one_line,
    random_inputs,
    spatial_dims,
    tensors_of,
)

# Protobuf cannot hold 2 GiB: what comes near it keeps its weights in a second file.
SINGLE_FILE_BYTES = 3 * 2**29
PROVIDERS = ("CPUExecutionProvider", "CUDAExecutionProvider")
FIX_SIZES = "pass dynamic_batch=False, dynamic_size=False"
# A dynamic batch is tried at 1, which torch.export treats apart, and at a size it did not see.
BATCHES = (1, 3)


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
    start = time.perf_counter()
    inputs = _example_inputs(model, example_inputs)
    flat = _flatten(model, inputs)
    sizes = _Sizes(inputs, dynamic_batch, dynamic_size)
    target = Path(path).resolve()
    with _folder_beside(target) as folder:
        draft = folder / target.name
        opset = _write(flat, sizes, draft, metadata or {})
        errors = _compare(flat, sizes, draft, tolerance)
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


def onnx_session(
    path: str | os.PathLike[str], provider: str = "CPUExecutionProvider"
) -> onnxruntime.InferenceSession:
    """Load an ONNX file into onnxruntime, at full precision and without its chatter."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    settings = {"use_tf32": 0} if provider == "CUDAExecutionProvider" else {}
    return onnxruntime.InferenceSession(os.fspath(path), options, [(provider, settings)])


class _Flat(nn.Module):
    """A model as ONNX knows one: tensors in, tensors out, all with names.

    What is no tensor is a constant among the inputs, and left out among the outputs.
    """

    def __init__(self, model: nn.Module, inputs: Inputs) -> None:
        super().__init__()
        self.model = model
        self.leaves, self.spec = pytree.tree_flatten(inputs)
        self.input_names = _input_names(model, inputs)
        self.output_names = _output_names(self.run_model(tensors_of(inputs)), self.input_names)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensors_of(self.run_model(tensors)))

    def run_model(self, tensors: Sequence[Tensor]) -> Any:
        given = iter(tensors)
        leaves = [next(given) if isinstance(leaf, Tensor) else leaf for leaf in self.leaves]
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        return self.model(*args, **kwargs)


@dataclass(frozen=True)
class _Sizes:
    """Which dims of the inputs stay open, and the inputs that prove it."""

    inputs: Inputs
    batch: bool
    size: bool

    def dims(self, names: Sequence[str]) -> tuple[dict[int, str], ...]:
        """Return the open dims of every tensor, by name; `names` are those of the tensors."""
        leading = leading_size(self.inputs)
        dims: list[dict[int, str]] = []
        for name, tensor in zip(names, tensors_of(self.inputs), strict=True):
            batched = self.batch and tensor.ndim > 0 and len(tensor) == leading
            spatial = spatial_dims(tensor) if self.size else range(0)
            opened = {0: "batch"} if batched else {}
            dims.append(opened | {dim: f"{name}_{dim}" for dim in spatial})
        return tuple(dims)

    def example(self) -> Inputs:
        """Return inputs to trace with: torch.export takes a batch of one for a constant."""
        if self.batch and leading_size(self.inputs) == 1:
            return random_inputs(self.inputs, seed=0, batch=2)
        return self.inputs

    def cases(self) -> dict[str, Inputs]:
        """Return inputs to compare torch and onnxruntime on."""
        batches = BATCHES if self.batch and leading_size(self.inputs) is not None else ()
        cases = {"example": self.inputs}
        cases |= {f"batch {n}": random_inputs(self.inputs, seed=n, batch=n) for n in batches}
        if self.size:
            cases[f"size +{GROWTH}"] = random_inputs(self.inputs, seed=0, growth=GROWTH)
        return cases


def _example_inputs(model: nn.Module, given: Any) -> Inputs:
    if given is None:
        given = getattr(model, "meta", {}).get("fxprune", {}).get("example_inputs")
    if given is None:
        raise ExportError(
            f"{type(model).__name__} remembers no inputs to export it with; pass example_inputs="
        )
    return to_device(normalised_inputs(given), torch.device("cpu"))


def _flatten(model: nn.Module, inputs: Inputs) -> _Flat:
    what = f"{type(model).__name__} does not run on {describe(inputs)} on the CPU"
    with _explained(what, "pass example_inputs= that it accepts"), torch.no_grad():
        return _Flat(copy_model(model).cpu().eval(), inputs).eval()


def _input_names(model: nn.Module, inputs: Inputs) -> tuple[str, ...]:
    """Name the tensors of `inputs` after the arguments of forward that they are, or are part of."""
    leaves, spec = pytree.tree_flatten(inputs)
    args, kwargs = pytree.tree_unflatten(range(len(leaves)), spec)
    signature = inspect.signature(model.forward)
    arguments = dict(signature.bind(*args, **kwargs).arguments)
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            arguments |= arguments.pop(parameter.name, {})
    names = {place: _name(path) for path, place in pytree.tree_flatten_with_path(arguments)[0]}
    return tuple(names[i] for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor))


def _output_names(outputs: Any, taken: Sequence[str]) -> tuple[str, ...]:
    names: list[str] = []
    for path, leaf in pytree.tree_flatten_with_path(outputs)[0]:
        if not isinstance(leaf, Tensor):
            continue
        named = path and not isinstance(path[0], pytree.SequenceKey)
        name = _name(path) if named else "_".join(("output", _name(path))).rstrip("_")
        while name in (*taken, *names):
            name += "_output"
        names.append(name)
    return tuple(names)


def _name(path: Sequence[Any]) -> str:
    """Join the keys, indices and fields of a path into a nested structure."""
    return "_".join(str(key).strip("[].'") for key in path)


@contextmanager
def _folder_beside(target: Path) -> Generator[Path]:
    """Give a folder on the file system of `target` that goes away whatever happens."""
    if target.is_dir():
        raise ExportError(f"{target} is a directory; pass the name of a file in it")
    try:
        with tempfile.TemporaryDirectory(prefix=".fxprune-", dir=target.parent) as folder:
            yield Path(folder)
    except OSError as error:
        raise ExportError(
            f"{target} cannot be written: {error.strerror or one_line(error)}; pass a path in a "
            "directory that exists, may be written to and has room"
        ) from error


def _write(flat: _Flat, sizes: _Sizes, draft: Path, metadata: Mapping[str, Any]) -> int:
    """Export to `draft`, let onnx check it, and return its opset."""
    program = _program(flat, sizes)
    _forget_sources(program.model)
    _drop_prefix(program.model)
    program.model.metadata_props["fxprune_version"] = _version()
    for key, value in metadata.items():
        text = value if isinstance(value, str) else json.dumps(value, default=str)
        program.model.metadata_props[str(key)] = text
    state = sum(tensor.numel() * tensor.element_size() for tensor in flat.state_dict().values())
    program.save(draft, external_data=state > SINGLE_FILE_BYTES)
    with _explained("torch.onnx wrote an invalid file", "upgrade torch and onnxscript"):
        onnx.checker.check_model(draft)
    return program.model.opset_imports[""]


def _program(flat: _Flat, sizes: _Sizes) -> Any:
    """Run torch's exporter and return its program, of which `model` is an onnx_ir model."""
    tensors = tuple(tensors_of(sizes.example()))
    remedy = "replace what the exporter does not support"
    if sizes.batch or sizes.size:
        remedy += f", or fix the sizes: {FIX_SIZES}"
    what = f"{type(flat.model).__name__} cannot be exported from {describe(tensors)}"
    with _explained(what, remedy), _silence():
        return torch.onnx.export(
            flat,
            tensors,
            dynamo=True,
            verbose=False,
            dynamic_shapes=(sizes.dims(flat.input_names),),
            input_names=flat.input_names,
            output_names=flat.output_names,
        )


@contextmanager
def _explained(what: str, remedy: str) -> Generator[None]:
    """Turn whatever fails inside into an `ExportError` of one line, with the first cause."""
    try:
        yield
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise ExportError(f"{what}: {one_line(cause)}; {remedy}") from error


@contextmanager
def _silence() -> Generator[None]:
    """Keep the exporter from filling the user's screen; what matters is in its exceptions."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    screen = io.StringIO()
    try:
        with warnings.catch_warnings(), redirect_stdout(screen), redirect_stderr(screen):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _forget_sources(model: Any) -> None:
    """Remove the exporter's notes from an onnx_ir model: they quote source files by their path."""
    for part in (model.graph, *model.functions.values()):
        for node in part.all_nodes():
            node.metadata_props.clear()
            node.doc_string = None
            for value in node.outputs:
                value.metadata_props.clear()


def _drop_prefix(model: Any) -> None:
    """Name the weights as the model's own state_dict does, where that name is free."""
    computed = [value for node in model.graph.all_nodes() for value in node.outputs]
    taken = {value.name for value in (*model.graph.inputs, *computed)}
    for name, value in list(model.graph.initializers.items()):
        own_name = name.removeprefix("model.")
        if own_name not in taken:
            value.name = own_name


def _publish(draft: Path, directory: Path) -> int:
    """Move what was written into `directory`, and return its bytes."""
    files = list(draft.parent.iterdir())
    size = sum(file.stat().st_size for file in files)
    # The weights of a large model first: it must never stand without them.
    for file in sorted(files, key=lambda file: file == draft):
        os.replace(file, directory / file.name)
    return size


def _version() -> str:
    try:
        return version("fxprune")
    except PackageNotFoundError:  # a bare checkout on the path
        return "unknown"


def _compare(flat: _Flat, sizes: _Sizes, draft: Path, tolerance: float) -> dict[str, float]:
    """Run `draft` in onnxruntime; return its errors by run, or raise where it is not the model."""
    available = onnxruntime.get_available_providers()
    sessions = {name: _load(draft, name) for name in PROVIDERS if name in available}
    errors: dict[str, float] = {}
    for case, inputs in sizes.cases().items():
        expected = _torch_outputs(flat, inputs)
        for provider, session in sessions.items():
            run = f"{case} on {provider.removesuffix('ExecutionProvider')}"
            found = differences(expected, _onnx_outputs(flat, session, inputs, run))
            _require(found, tolerance, run)
            known = (difference.error for difference in found if not isnan(difference.error))
            errors[run] = max(known, default=nan)
    if all(isnan(error) for error in errors.values()):
        raise ExportError(
            f"the outputs of {type(flat.model).__name__} are not finite, so nothing can be "
            "compared; pass example_inputs= on which they are"
        )
    return errors


def _load(draft: Path, provider: str) -> onnxruntime.InferenceSession:
    remedy = "export the model in float32, or replace the operator"
    with _explained(f"onnxruntime ({provider}) cannot load the file", remedy):
        return onnx_session(draft, provider)


def _torch_outputs(flat: _Flat, inputs: Inputs) -> dict[str, Tensor]:
    name = type(flat.model).__name__
    what = f"{name} itself does not run on {describe(inputs)}, as a file of open sizes should"
    with _explained(what, FIX_SIZES), torch.no_grad(), full_precision():
        outputs = flat(*(tensor.clone() for tensor in tensors_of(inputs)))
        return dict(zip(flat.output_names, outputs, strict=True))


def _onnx_outputs(
    flat: _Flat, session: onnxruntime.InferenceSession, inputs: Inputs, run: str
) -> dict[str, Tensor]:
    with _explained(f"onnxruntime does not run the file on {describe(inputs)} ({run})", FIX_SIZES):
        arrays = [tensor.numpy() for tensor in tensors_of(inputs)]
        outputs = session.run(None, dict(zip(flat.input_names, arrays, strict=True)))
    return dict(zip(flat.output_names, map(torch.from_numpy, outputs), strict=True))


def _require(found: Sequence[Difference], tolerance: float, run: str) -> None:
    for difference in found:
        if difference.error > (FLIPS if difference.exact else tolerance):
            raise ExportError(
                f"onnxruntime disagrees with torch on {run}: output {difference.output} "
                f"{difference.message} (error {difference.error:.2g}, tolerance {tolerance:.0e}); "
                "pass a larger tolerance if the model is that sensitive to rounding"
            )
