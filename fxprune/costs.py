"""What a model costs: parameters, multiply-accumulates, bytes, seconds.

MACs are counted during one run, where operators mix channels (convolutions, matrix products,
attention), so they hold for any architecture; elementwise work is not counted. Gates are no part of
the model they stand in.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fxprune.errors import ExampleInputError, require_module
from fxprune.gating.gates import Gates
from fxprune.programs.macs import MacCounter
from fxprune.programs.observation import observe
from fxprune.programs.program import Program
from fxprune.user_models.cases import normalised_inputs
from fxprune.user_models.inputs import Inputs, copied, describe, leading_size, to_device
from fxprune.user_models.modules import device_of

WARM_UP = 3


@dataclass(frozen=True)
class Costs:
    """parameters: how many numbers. macs: multiply-accumulates a sample. bytes: of all state."""

    parameters: int
    macs: int
    bytes: int

    def to_dict(self) -> dict[str, int]:
        """Return the costs as JSON-able data."""
        return asdict(self)


def count_costs(module: nn.Module, example_inputs: Any) -> Costs:
    """Count what `module` costs in evaluation mode; shared parameters once, gates not at all.

    example_inputs: as in `fxprune.verify`; the MACs of their run are divided by their batch size,
    dim 0 of the first tensor that has one. Raises `ExampleInputError` if the module does not run on
    them.
    """
    require_module(module)
    return _costs(module, _macs(module, normalised_inputs(example_inputs)))


def costs_of(program: Program, module: nn.Module | None = None) -> Costs:
    """Return what `count_costs` would, from what is known of a program's last run.

    module: the one whose parameters and bytes count, if not the program's own.
    """
    macs = sum(observe(program).macs.values())
    batch = leading_size((program.args, program.kwargs)) or 1
    return _costs(program.module if module is None else module, macs // batch)


def _costs(module: nn.Module, macs: int) -> Costs:
    gates = {part for one in module.modules() if isinstance(one, Gates) for part in one.modules()}
    parts = [part for part in module.modules() if part not in gates]
    parameters = {p for part in parts for p in part.parameters(recurse=False)}
    buffers = {b for part in parts for b in part.buffers(recurse=False)}
    return Costs(
        parameters=sum(parameter.numel() for parameter in parameters),
        macs=macs,
        bytes=sum(tensor.numel() * tensor.element_size() for tensor in parameters | buffers),
    )


def latency(function: Callable[[], Any], *, seconds: float = 1.0, repeats: int = 10) -> float:
    """Measure the median seconds of a call, after warming up.

    function: runs torch (waited for on CUDA) or onnxruntime. It is called at least `repeats` times,
    and for `seconds` in all.
    """
    for _ in range(WARM_UP):
        _timed(function)
    times: list[float] = []
    while len(times) < repeats or sum(times) < seconds:
        times.append(_timed(function))
    return statistics.median(times)


def _macs(module: nn.Module, example_inputs: Inputs) -> int:
    flags = {part: part.training for part in module.modules()}
    args, kwargs = copied(to_device(example_inputs, device_of(module)))
    counter = MacCounter()
    try:
        for part in flags:
            part.training = False
        with torch.no_grad(), counter:
            module(*args, **kwargs)
    except Exception as error:
        raise ExampleInputError(
            f"{type(module).__name__} does not run on {describe(example_inputs)}: "
            f"{type(error).__name__}: {error}; pass inputs of the shapes it was made for"
        ) from error
    finally:
        for part, flag in flags.items():
            part.training = flag
    return counter.macs // (_samples(example_inputs) or 1)


def _samples(inputs: Inputs) -> int | None:
    """Return the batch size; detection takes a list of images, which need not be of one size."""
    first: Any = next(iter(inputs[0]), None)
    if isinstance(first, (list, tuple)) and all(
        isinstance(x, Tensor) and x.ndim == 3 for x in first
    ):
        return len(first)
    return leading_size(inputs)


def _timed(function: Callable[[], Any]) -> float:
    _wait()
    start = time.perf_counter()
    function()
    _wait()
    return time.perf_counter() - start


def _wait() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
