"""Running a model in a precision, float64 above all, whatever its weights and casts are.

Float64 tells algebra from rounding: equal models agree there to many digits. A forward that casts
to float32 is read as one of float64; what still rounds to a shorter dtype is noted. Float32 is run
as such: hardware that multiplies in TF32 or bfloat16 is told not to.
"""

import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxprune.errors import one_line
from fxprune.gating.gates import gate_owners
from fxprune.programs.program import quiet
from fxprune.progress import stages
from fxprune.proof.comparison import output_leaves
from fxprune.runtime.dispatch import DispatchMode
from fxprune.runtime.randomness import drawing_alike
from fxprune.user_models.beside import forgetful
from fxprune.user_models.inputs import Inputs, tensors_of
from fxprune.user_models.modules import copy_model, device_of, empty_


@dataclass(frozen=True)
class Run:
    """Outputs as `output_leaves` flattens them, or why there are none.

    rounding: the largest ε of the dtypes that float64 values were rounded to, 0 if none were.
    overwritten: the places of the input tensors that hold other numbers since.
    """

    outputs: dict[str, Any]
    failure: str
    rounding: float
    seconds: float
    overwritten: frozenset[int] = frozenset()


# By case, the run of the reference and that of the candidate.
Runs = Mapping[str, Sequence[Run]]


def run_all(
    models: Sequence[nn.Module],
    cases: Mapping[str, Inputs],
    inputs_as: Sequence[torch.dtype | None],
    doing: str = "running it to compare",
) -> Runs:
    """Run every model on every case, its float inputs brought to a dtype of its own, if any.

    doing: what that is for, to be shown.
    """
    with forgetful(models):
        return {
            name: [_run(model, cases[name], d) for model, d in zip(models, inputs_as, strict=True)]
            for name in stages(doing, cases, len(cases))
        }


def run_nudged(model: nn.Module, inputs: Inputs, seed: int, epsilon: float) -> list[Run]:
    """Run copies of a float64 model on a case, every weight and input off by about `epsilon`.

    What that moves, the rounding on the way may move too.
    """
    runs: list[Run] = []
    for one in range(2):
        generator = torch.Generator().manual_seed(seed + one)

        def nudge(tensor: Tensor, source: torch.Generator = generator) -> Tensor:
            noise = torch.randn(tensor.shape, generator=source, dtype=torch.float64)
            return tensor.double() * (1 + epsilon * noise.to(tensor.device))

        moved = copy_model(model)
        for parameter in moved.parameters():
            parameter.data = nudge(parameter.data)
        beside: Any = pytree.tree_map_only(
            Tensor, lambda t: nudge(t) if t.is_floating_point() else t, inputs
        )
        with forgetful([moved]):
            runs.append(_run(moved, beside, torch.float64))
        empty_(moved)
    return runs


def lacks_float32(model: nn.Module) -> bool:
    """Tell whether a model is half or double throughout; one without numbers takes any dtype."""
    # Gates are float32 whatever the model; they are cast to what they multiply.
    gates = {tensor for owner in gate_owners(model) for tensor in owner.parameters()}
    dtypes = float_dtypes([*set(model.parameters()) - gates, *model.buffers()])
    return bool(dtypes) and torch.float32 not in dtypes


def cast_(model: nn.Module, dtype: torch.dtype) -> None:
    """Bring a model to float64 or float32, also the tensors it holds as plain attributes."""
    if device_of(model).type == "mps":  # which has no float64
        model.cpu()
    _ = model.double() if dtype == torch.float64 else model.float()
    for module in model.modules():
        for name, value in vars(module).items():
            if isinstance(value, Tensor) and value.is_floating_point():
                vars(module)[name] = value.to(dtype)


def float_dtypes(values: Any) -> set[torch.dtype]:
    """Return the floating-point dtypes among the tensors of a nested structure."""
    return {tensor.dtype for tensor in tensors_of(values) if tensor.is_floating_point()}


@contextmanager
def full_precision() -> Generator[None]:
    """Switch off the shorter dtypes (TF32, bfloat16) that float32 may be multiplied in."""
    cuda, cudnn, mkldnn = (getattr(torch.backends, name) for name in ("cuda", "cudnn", "mkldnn"))
    units: list[Any] = [cuda.matmul, cudnn.conv, cudnn.rnn, mkldnn.matmul, mkldnn.conv, mkldnn.rnn]
    before = [unit.fp32_precision for unit in units]
    try:
        for unit in units:
            unit.fp32_precision = "ieee"
        yield
    finally:
        for unit, precision in zip(units, before, strict=True):
            unit.fp32_precision = precision


def _run(model: nn.Module, inputs: Inputs, dtype: torch.dtype | None) -> Run:
    """Run `model` with float inputs brought to `dtype`, None for as they are."""
    device = device_of(model)

    def fresh(tensor: Tensor) -> Tensor:
        wanted = dtype if dtype and tensor.is_floating_point() else tensor.dtype
        return tensor.detach().to(device, wanted, copy=True)

    args, kwargs = given = pytree.tree_map_only(Tensor, fresh, inputs)
    held = tensors_of(given)  # before the model puts others beside them
    float64 = _Float64()
    mode = float64 if dtype == torch.float64 else nullcontext()
    start = time.perf_counter()
    try:
        with torch.no_grad(), full_precision(), quiet(), drawing_alike(device), mode:
            outputs = output_leaves(model(*args, **kwargs))
    except Exception as error:
        return Run({}, one_line(error), 0.0, time.perf_counter() - start)
    seconds = time.perf_counter() - start
    return Run(outputs, "", float64.rounding, seconds, _overwritten(held, tensors_of(inputs)))


def _overwritten(given: Sequence[Tensor], before: Sequence[Tensor]) -> frozenset[int]:
    """Return the places of the tensors that a run has overwritten with other numbers."""
    pairs = zip(given, before, strict=True)
    return frozenset(
        place
        for place, (now, was) in enumerate(pairs)
        # Most were never written to, which their version tells.
        if now._version and not _same_numbers(now, was)
    )


def _same_numbers(now: Tensor, before: Tensor) -> bool:
    before = before.detach().to(now.device, now.dtype)
    return now.shape == before.shape and bool(now.isclose(before, 0, 0, equal_nan=True).all())


def reading_float64() -> AbstractContextManager[Any]:
    """Read, for a while, casts to float32 of what is float64 as casts to float64."""
    return _Float64()


class _Float64(DispatchMode):
    """Reads a float32 model as one of float64, also where its forward casts to float32.

    Or makes float32 of nothing (`torch.zeros`), or of integers (steps of a diffusion, bytes / 255).
    """

    rounding = 0.0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        given = float_dtypes((args, kwargs))
        if not given:
            if _makes_float32(func, args, kwargs):
                return func(*args, **{**kwargs, "dtype": torch.float64})
            return pytree.tree_map_only(Tensor, _widened, func(*args, **kwargs))
        if torch.float64 not in given:
            return func(*args, **kwargs)
        if kwargs.get("dtype") is torch.float32:
            kwargs["dtype"] = torch.float64
        result = func(*args, **kwargs)
        for dtype in float_dtypes(result) - {torch.float64}:
            self.rounding = max(self.rounding, torch.finfo(dtype).eps)
        return result


def _widened(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.dtype is torch.float32 else tensor


def _makes_float32(func: Any, args: Any, kwargs: dict[str, Any]) -> bool:
    """Tell whether an operator that takes no floats would give float32, and could give float64."""
    schema = getattr(func, "_schema", None)  # operators of higher order have none
    if schema is None or all(argument.name != "dtype" for argument in schema.arguments):
        return False
    if kwargs.get("dtype") is not None or tensors_of((args, kwargs)):
        return kwargs.get("dtype") is torch.float32
    numbers = [one for one in args if isinstance(one, (int, float))]  # of arange, full, linspace
    return torch.get_default_dtype() is torch.float32 and _is_of_floats(func, numbers)


# What gives integers if it is given integers.
_AS_GIVEN = ("arange", "full", "scalar_tensor")


def _is_of_floats(func: Any, numbers: Sequence[float]) -> bool:
    name = func._schema.name.removeprefix("aten::")
    if name in ("randint", "randperm", "tril_indices", "triu_indices"):
        return False
    return name not in _AS_GIVEN or any(isinstance(number, float) for number in numbers)
