"""A flat model as an ONNX program, by torch's exporter, and the program as a file.

What the exporter adds is taken out again: its prefix to the names of weights, and its notes, which
quote source files by their path.
"""

import io
import json
import logging
import math
import warnings
from collections.abc import Generator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import onnx
import torch

from fxprune.deployment.onnx_signature import Flat, Sizes
from fxprune.deployment.open_sizes import Answers, noted
from fxprune.errors import as_export_error
from fxprune.user_models.inputs import copied, describe, tensors_of

# Protobuf cannot hold 2 GiB: what comes near it keeps its weights in a second file.
SINGLE_FILE_BYTES = 3 * 2**29
# Numbers of a file are those of a pattern if they are so close: as float32 rounds them, no more.
CLOSE = 1e-7
FIX_SIZES = "pass dynamic_batch=False, dynamic_size=False"


def write_onnx(
    flat: Flat, sizes: Sizes, draft: Path, metadata: Mapping[str, Any]
) -> tuple[int, Answers]:
    """Export to `draft`, let onnx check it, and return its opset and what it depends on."""
    with noted(flat, sizes) as answers:
        program = _program(flat, sizes)
    _forget_sources(program.model)
    _drop_prefix(program.model)
    program.model.metadata_props["fxprune_version"] = _version()
    for key, value in metadata.items():
        text = value if isinstance(value, str) else json.dumps(value, default=str)
        program.model.metadata_props[str(key)] = text
    state = sum(tensor.numel() * tensor.element_size() for tensor in flat.state_dict().values())
    program.save(draft, external_data=state > SINGLE_FILE_BYTES)
    with as_export_error("torch.onnx wrote an invalid file", "upgrade torch and onnxscript"):
        onnx.checker.check_model(draft)
    return program.model.opset_imports[""], answers


def _program(flat: Flat, sizes: Sizes) -> Any:
    """Run torch's exporter and return its program, of which `model` is an onnx_ir model."""
    tensors = tuple(tensors_of(copied(sizes.example())))
    remedy = "replace what the exporter does not support"
    if sizes.batch or sizes.size:
        remedy += f", or fix the sizes: {FIX_SIZES}"
    what = f"{type(flat.model).__name__} cannot be exported from {describe(tensors)}"
    with as_export_error(what, remedy), _silence(), _numbers_told_apart() as told:
        return torch.onnx.export(
            flat,
            tensors,
            dynamo=True,
            verbose=False,
            optimize=told,
            dynamic_shapes=(sizes.dims(flat.input_names),),
            input_names=flat.input_names,
            output_names=flat.output_names,
        )


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


@contextmanager
def _numbers_told_apart() -> Generator[bool]:
    """Keep onnxscript from taking `x + 1e-9` for `x`; say whether it lets itself be kept.

    Its rewriting takes what is within 1e-8 of a number for that number: an epsilon was gone.
    """
    matcher = _matcher_of_patterns()
    if matcher is None:
        yield False
        return

    def is_close(number: Any, expected: Any, **_: float) -> bool:
        return math.isclose(number, expected, rel_tol=CLOSE)

    matcher.math = SimpleNamespace(**{**vars(math), "isclose": is_close})
    try:
        yield True
    finally:
        matcher.math = math


def _matcher_of_patterns() -> Any:
    """Return the module in which onnxscript compares numbers, None if that is another by now."""
    try:
        from onnxscript.rewriter import _matcher  # takes long; the exporter imports it, too
    except ImportError:
        return None
    found: ModuleType = _matcher
    return found if vars(found).get("math") is math else None


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


def _version() -> str:
    try:
        return version("fxprune")
    except PackageNotFoundError:  # a bare checkout on the path
        return "unknown"
