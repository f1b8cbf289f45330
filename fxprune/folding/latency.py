"""How long a layer takes in onnxruntime on this machine: measured once, then looked up.

A layer of a geometry is a tiny ONNX model with random weights; what calling an empty model takes is
subtracted. Of many runs the fastest counts: what else the machine does only ever adds. The table is
kept in the user's cache, a file for every processor, version of onnxruntime and number of threads;
one that cannot be read is measured anew.
"""

import hashlib
import json
import os
import platform
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper

from fxprune.folding.average_pools import Pool
from fxprune.folding.convolutions import Geometry, Sizes
from fxprune.folding.transposed_convolutions import Transposed
from fxprune.folding.whole_maps import WholeMap

SECONDS, REPEATS = 0.03, 10
_OPSET, _IR = 17, 8

Measure = Callable[[Geometry, Sizes, int], int]


def measured(geometry: Geometry, inputs: Sizes, threads: int) -> int:
    """Return the nanoseconds of a layer on inputs of a size: the batch, and the sizes of axes."""
    layer = _fastest(_layer_model(geometry), (inputs[0], geometry.inputs, *inputs[1:]), threads)
    nothing = _fastest(_model([helper.make_node("Identity", ["x"], ["y"])], []), (1, 1), threads)
    return max(layer - nothing, 1)


class Latencies:
    """The nanoseconds of layers, as a cost; see `folding.layer_costs`.

    folder: where the tables are, `fxprune` in the user's cache if not given. measure: how a layer
    that is not in them is measured.
    """

    def __init__(self, folder: Path | None = None, measure: Measure = measured) -> None:
        """Read nothing yet."""
        self._folder, self._measure = folder, measure
        self._tables: dict[Path, dict[str, int]] = {}

    def __call__(self, geometry: Geometry, places: Sizes) -> int:
        """Return the nanoseconds of a layer that computes its outputs at these places."""
        if isinstance(geometry, WholeMap):
            inputs = geometry.inputs * prod(geometry.kernel)
            return self(Geometry(inputs, geometry.outputs, bias=geometry.bias), places[:1])
        threads = torch.get_num_threads()
        path = self._path(threads)
        if path not in self._tables:
            self._tables[path] = _read(path)
        table = self._tables[path]
        inputs = _input_sizes(geometry, places)
        key = _key(geometry, inputs)
        if key not in table:
            table[key] = self._measure(geometry, inputs, threads)
            with suppress(OSError):  # without a cache it is measured in every process
                _write(path, {**_read(path), **table})
        return table[key]

    def _path(self, threads: int) -> Path:
        cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        folder = Path(cache) / "fxprune" if self._folder is None else self._folder
        machine = f"{_processor()}, onnxruntime {onnxruntime.__version__}, {threads} threads"
        return folder / f"latency-{hashlib.sha256(machine.encode()).hexdigest()[:16]}.json"


def _input_sizes(geometry: Geometry, places: Sizes) -> Sizes:
    """Return the smallest inputs with so many outputs."""
    batch, *outputs = places
    if isinstance(geometry, Transposed):
        spread = zip(outputs, geometry.stride, geometry.surplus, geometry.beyond, strict=True)
        return (batch, *(max((o - 1 + cut - more) // s + 1, 1) for o, s, cut, more in spread))
    steps = zip(outputs, geometry.stride, geometry.reach, geometry.padding, strict=True)
    return (batch, *(max((o - 1) * s + r + 1 - 2 * p, 1) for o, s, r, p in steps))


def _key(geometry: Geometry, inputs: Sizes) -> str:
    known = vars(replace(geometry, size=()))
    return json.dumps([type(geometry).__name__, known, inputs])


def _processor() -> str:
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        if names:
            return names[0]
    return platform.processor() or platform.machine()


def _read(path: Path) -> dict[str, int]:
    """Return a table; what is not there, or damaged, is empty."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(found, dict):
        return {}
    entries: dict[Any, Any] = found
    return {str(key): ns for key, ns in entries.items() if type(ns) is int and ns > 0}


def _write(path: Path, table: dict[str, int]) -> None:
    """Write beside, then rename: another process reads the old table or the new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        draft.write_text(json.dumps(table, indent=0), encoding="utf-8")
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def _layer_model(geometry: Geometry) -> bytes:
    generator = np.random.default_rng(0)
    columns = (geometry.inputs + geometry.ones) // geometry.groups
    shape = (geometry.outputs, columns, *geometry.kernel)
    window: dict[str, Any] = {"strides": geometry.stride, "pads": geometry.padding * 2}
    if isinstance(geometry, Pool):
        pool = helper.make_node("AveragePool", ["x"], ["y"], kernel_shape=geometry.kernel, **window)
        return _model([pool], [])
    if isinstance(geometry, Transposed):
        shape = (geometry.inputs, geometry.outputs // geometry.groups, *geometry.kernel)
        window["output_padding"] = geometry.beyond
    numbers = {"w": generator.standard_normal(shape, np.float32) / (columns * 9) ** 0.5}
    if geometry.bias:
        numbers["b"] = generator.standard_normal(geometry.outputs, np.float32)
    nodes: list[Any] = []
    axes = len(geometry.kernel)
    if geometry.ones:
        numbers["ends"] = np.array([0] * (axes + 2) + [0, 1] + [0] * axes, np.int64)
        numbers["one"] = np.array(1, np.float32)
        nodes.append(helper.make_node("Pad", ["x", "ends", "one"], ["padded"]))
    given = ["padded" if geometry.ones else "x", "w", *(["b"] if geometry.bias else [])]
    if not axes:
        nodes.append(helper.make_node("Gemm", given, ["y"], transB=1))
        return _model(nodes, [numpy_helper.from_array(v, k) for k, v in numbers.items()])
    nodes.append(
        helper.make_node(
            *("ConvTranspose" if isinstance(geometry, Transposed) else "Conv", given, ["y"]),
            **window,
            dilations=geometry.dilation,
            group=geometry.groups,
        )
    )
    return _model(nodes, [numpy_helper.from_array(v, k) for k, v in numbers.items()])


def _model(nodes: list[Any], numbers: list[Any]) -> bytes:
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in "xy")
    graph = helper.make_graph(nodes, "layer", [x], [y], numbers)
    opset = [helper.make_opsetid("", _OPSET)]
    return helper.make_model(graph, opset_imports=opset, ir_version=_IR).SerializeToString()


def _fastest(model: bytes, shape: Sizes, threads: int) -> int:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    feed: Any = {"x": np.random.default_rng(1).standard_normal(shape, np.float32)}
    times: list[int] = []
    while len(times) < REPEATS + 2 or sum(times) < SECONDS * 1e9:
        start = time.perf_counter_ns()
        session.run(None, feed)
        times.append(time.perf_counter_ns() - start)
    return min(times[2:])  # the first ones still find memory
