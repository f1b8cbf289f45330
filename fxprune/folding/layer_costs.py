"""What a layer costs: its parameters, its multiply-accumulates, or its measured latency."""

from collections.abc import Callable
from dataclasses import replace
from math import prod
from typing import Any

from fxprune.errors import GateError
from fxprune.folding.convolutions import Geometry, Sizes
from fxprune.folding.latency import Latencies
from fxprune.gating.terms import LATENCY
from fxprune.programs.observation import TensorSpec

Cost = Callable[[Geometry, Sizes], int]
"""What a layer costs at the places of its output: the batch, and the sizes of its axes."""


def parameters(geometry: Geometry, places: Sizes) -> int:
    """Return how many numbers a layer has."""
    return geometry.parameters


def macs(geometry: Geometry, places: Sizes) -> int:
    """Return how many multiply-accumulates a layer takes."""
    return geometry.macs(prod(places))


def nanoseconds(geometry: Geometry, places: Sizes, outputs: int, inputs: int) -> int:
    """Return the latency of a layer if it made and read so many channels.

    Raises `GateError` if onnxruntime cannot run it.
    """
    groups = geometry.groups
    if 1 < groups == geometry.inputs:  # depthwise: it reads what it makes
        inputs = groups = outputs * geometry.inputs // geometry.outputs
    narrow = replace(geometry, outputs=outputs, inputs=inputs, groups=groups)
    try:
        return COSTS[LATENCY](narrow, places)
    except Exception as error:
        raise GateError(
            f"onnxruntime cannot time {narrow} at {places}: {error}; take another cost, such as "
            "macs"
        ) from error


def output_places(geometry: Geometry, spec: Any) -> Sizes:
    """Return at which places a layer's outputs are computed: the batch, and the sizes of axes."""
    if not isinstance(spec, TensorSpec):
        return (1,) * (1 + len(geometry.kernel))
    axes = len(geometry.kernel)
    sizes = spec.shape[len(spec.shape) - axes :]
    if geometry.size and len(spec.shape) == 2:
        sizes = (1,) * axes  # behind a flattening
    return (prod(spec.shape) // geometry.outputs // prod(sizes), *sizes)


def unit_of(cost: str) -> str:
    """Return what a cost is counted in."""
    return "ns" if cost == LATENCY else cost


COSTS: dict[str, Cost] = {"parameters": parameters, "macs": macs, LATENCY: Latencies()}
