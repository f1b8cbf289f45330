"""Numerical proof that two modules are the same function.

Both run, as copies in evaluation mode, on inputs chosen to tell them apart: other batches, another
size, values that saturate. Float64 proves the algebra, float32 that the rewrite cost no precision.
A check that cannot fail is no check: where the reference's outputs hardly vary, or rounding
decides, the verdict is "inconclusive".
"""

import math
import time
from collections import defaultdict
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from fxprune.errors import ExampleInputError, VerificationError
from fxprune.program import Inputs, copy_model, describe, device_of, model_inputs

Verdict = Literal["equal", "different", "inconclusive", "skipped"]

DTYPES = ("float64", "float32")
# The float64 tolerance, and where a candidate's merged weights were rounded to float32.
EXACT, ROUNDED = 1e-9, 1e-5
# What the second spatial size adds: the usual total stride, so that most models accept it.
GROWTH = 32
# The factor that drives activations into saturation.
SATURATION = 10.0
# How many times more than their error outputs must vary, and at least than float32 rounds.
SPREAD_MARGIN = 1000.0
SPREAD_FLOOR = torch.finfo(torch.float32).eps
# How many times the reference's own rounding error a candidate's may be and still be rounding.
ROUNDING_MARGIN = 10.0
# How many ε of the dtype that a reference rounds to by itself float64 cannot resolve.
UNRESOLVED = 100.0
# The part of integer outputs (argmax, comparisons) that rounding alone may flip.
FLIPS = 1e-3


@dataclass(frozen=True)
class Check:
    """What one case showed in one dtype.

    name, inputs: the case, and the shapes and dtypes of its inputs. dtype: "float64" or "float32".
    error: the worst `Difference`, at `index` of `output`; NaN where nothing was compared. spread:
    the standard deviation of the reference's outputs over the inputs, relative to their largest
    magnitude. seconds: both runs.
    """

    name: str
    dtype: str
    verdict: Verdict
    reason: str
    error: float
    tolerance: float
    spread: float
    output: str
    index: tuple[int, ...] | None
    inputs: str
    seconds: float


@dataclass(frozen=True)
class Verification:
    """The checks of a comparison, and what they amount to."""

    checks: tuple[Check, ...]

    @property
    def verdict(self) -> Verdict:
        """Return "different" if any check is, "equal" if both dtypes have evidence for it."""
        if any(check.verdict == "different" for check in self.checks):
            return "different"
        proved = {check.dtype for check in self.checks if check.verdict == "equal"}
        return "equal" if proved == set(DTYPES) else "inconclusive"

    @property
    def error(self) -> dict[str, float]:
        """Return the largest error by dtype; NaN where nothing could be compared."""
        errors = [(check.dtype, check.error) for check in self.checks]
        return {
            wanted: max((e for dtype, e in errors if dtype == wanted and e == e), default=math.nan)
            for wanted in DTYPES
        }

    @property
    def seconds(self) -> float:
        """Return the time all runs took."""
        return sum(check.seconds for check in self.checks)

    def require(self) -> None:
        """Raise `VerificationError` if the modules are different."""
        wrong = [check for check in self.checks if check.verdict == "different"]
        if not wrong:
            return
        check = max(wrong, key=lambda check: check.error / check.tolerance)
        remedy = "do not use the rewritten model"
        if all(check.dtype == "float32" for check in wrong):
            remedy = "look for weights of extreme size, or pass a larger float32_tolerance"
        raise VerificationError(
            f"not the same function, {len(wrong)} of {len(self.checks)} checks differ; the worst, "
            f"{check.name} {check.inputs} in {check.dtype}: {check.reason} "
            f"(error {check.error:.2g}, tolerance {check.tolerance:.0e}); {remedy}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the result as JSON-able data; numbers that JSON lacks become None."""
        return {
            "verdict": self.verdict,
            "error": _jsonable(self.error),
            "seconds": self.seconds,
            "checks": [_jsonable(asdict(check)) for check in self.checks],
        }

    def __str__(self) -> str:
        allowed = {check.dtype: check.tolerance for check in self.checks}
        errors = ", ".join(
            f"{error:.1e} of {allowed.get(dtype, math.nan):.0e} in {dtype}"
            for dtype, error in self.error.items()
        )
        width = max((len(check.name) for check in self.checks), default=0)
        rows = [
            f"  {check.name:<{width}}  {check.dtype}  {check.verdict:<12}  "
            f"error {check.error:<7.1e}  spread {check.spread:<7.1e}  {check.reason}".rstrip()
            for check in self.checks
        ]
        return "\n".join([f"{self.verdict}: error {errors}; {self.seconds:.2f} s", *rows])


def verify(
    reference: nn.Module,
    candidate: nn.Module,
    example_inputs: Any,
    *,
    exact: nn.Module | None = None,
    batches: Sequence[int] = (1, 3),
    extra_inputs: Sequence[Any] = (),
    float64_tolerance: float | None = None,
    float32_tolerance: float = 1e-4,
    seed: int = 0,
) -> Verification:
    """Compare two modules that are deterministic in evaluation mode; neither is modified.

    example_inputs, and each of extra_inputs: what `model_inputs` accepts, or (args, kwargs).
    Checked are the example, the extra inputs, and random inputs (see `random_inputs`) at each batch
    size, ×10, and of a second size where inputs are image-like; those that the reference rejects
    are skipped. "float64" reads every float32 of the model as float64, also a cast in its forward;
    "float32" runs the model as it is, brought to float32 first if its weights are half or double.

    exact: the candidate as it was before its weights were rounded to their dtype; it stands for it
    in float64. float64_tolerance: 1e-9 if not given, or 1e-5 where a candidate of shorter weights
    has no such stand-in, as merged weights were rounded once.

    Raises `ExampleInputError` if the reference does not run on the example or an extra input.
    """
    if float64_tolerance is None:
        unrounded = exact is not None or _float_dtypes([*candidate.parameters()]) <= {torch.float64}
        float64_tolerance = EXACT if unrounded else ROUNDED
    given = {"example": normalised_inputs(example_inputs)}
    given |= {f"extra {i}": normalised_inputs(extra) for i, extra in enumerate(extra_inputs)}
    cases = given | _random_cases(given["example"], batches, seed)
    models = [copy_model(model).eval() for model in (reference, candidate)]
    inputs_as = [_to_float32_(model) for model in models]
    single = _run_all(models, cases, inputs_as)
    _require_runs(reference, given, single)
    # Other copies: the weights of a float64 model did not survive the float32 run.
    widest = candidate if exact is None else exact
    models = [copy_model(model).eval() for model in (reference, widest)]
    for model in models:
        _cast_(model, torch.float64)
    double = _run_all(models, cases, [torch.float64, torch.float64])
    return _judge_all(cases, (double, float64_tolerance), (single, float32_tolerance))


# The inputs to try.


def normalised_inputs(example_inputs: Any) -> Inputs:
    """Return (args, kwargs) as they are, anything else as `model_inputs` reads it."""
    if isinstance(example_inputs, tuple) and len(example_inputs) == 2:
        args, kwargs = example_inputs
        if isinstance(args, tuple) and isinstance(kwargs, dict):
            return args, kwargs
    return model_inputs(example_inputs)


def leading_size(inputs: Any) -> int | None:
    """Return the batch size of inputs: dim 0 of their first tensor that has one."""
    return next((len(tensor) for tensor in tensors_of(inputs) if tensor.ndim), None)


def spatial_dims(tensor: Tensor) -> range:
    """Return the last dims, two at most, of an image-like input (float, 3-D or more)."""
    if not tensor.is_floating_point() or tensor.ndim < 3:
        return range(0)
    return range(max(2, tensor.ndim - 2), tensor.ndim)


def random_inputs(
    inputs: Inputs, seed: int, *, batch: int | None = None, growth: int = 0, scale: float = 1.0
) -> Inputs:
    """Draw inputs like `inputs`: floats from scale·N(0, 1), others from the example's own values.

    batch: dim 0 of all tensors that share the example's leading size. growth: what the spatial dims
    gain. One seed gives the same numbers on every device.
    """
    generator = torch.Generator().manual_seed(seed)
    leading = leading_size(inputs)

    def draw(example: Tensor) -> Tensor:
        shape = list(example.shape)
        if batch is not None and shape and shape[0] == leading:
            shape[0] = batch
        for dim in spatial_dims(example):
            shape[dim] += growth
        if example.is_floating_point():
            return (torch.randn(shape, generator=generator) * scale).to(example)
        values = example.detach().flatten()
        count = math.prod(shape) if len(values) else 0
        chosen = torch.randint(max(len(values), 1), (count,), generator=generator)
        return values[chosen.to(values.device)].reshape(shape)

    return pytree.tree_map_only(Tensor, draw, inputs)


def _random_cases(example: Inputs, batches: Sequence[int], seed: int) -> dict[str, Inputs]:
    tensors = tensors_of(example)
    cases: dict[str, Inputs] = {}
    if leading_size(example) is not None:
        for batch in batches:
            cases[f"batch {batch}"] = random_inputs(example, seed + len(cases), batch=batch)
    if any(tensor.is_floating_point() for tensor in tensors):
        cases[f"×{SATURATION:.0f}"] = random_inputs(example, seed + len(cases), scale=SATURATION)
    if any(spatial_dims(tensor) for tensor in tensors):
        # The largest batch: there may be no other outputs of this shape to see variation in.
        batch = max(batches, default=None)
        larger = random_inputs(example, seed + len(cases), batch=batch, growth=GROWTH)
        cases[f"size +{GROWTH}"] = larger
    return cases


def tensors_of(values: Any) -> list[Tensor]:
    """Return the tensors of a nested structure, in its order."""
    return [leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, Tensor)]


# Running a model in a precision.


@dataclass(frozen=True)
class _Run:
    """Outputs as `output_leaves` flattens them, or why there are none.

    rounding: the largest ε of the dtypes that float64 values were rounded to, 0 if none were.
    """

    outputs: dict[str, Any]
    failure: str
    rounding: float
    seconds: float


# By case, the run of the reference and that of the candidate.
_Runs = Mapping[str, Sequence[_Run]]


class _Float64(TorchDispatchMode):
    """Reads a float32 model as one of float64, also where its forward casts to float32."""

    supports_higher_order_operators = True
    rounding = 0.0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # to skip it, torch would import it, which takes seconds

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if torch.float64 not in _float_dtypes((args, kwargs)):
            return func(*args, **kwargs)
        if kwargs.get("dtype") is torch.float32:
            kwargs["dtype"] = torch.float64
        result = func(*args, **kwargs)
        for dtype in _float_dtypes(result) - {torch.float64}:
            self.rounding = max(self.rounding, torch.finfo(dtype).eps)
        return result


def _run_all(
    models: Sequence[nn.Module],
    cases: Mapping[str, Inputs],
    inputs_as: Sequence[torch.dtype | None],
) -> _Runs:
    return {
        name: [_run(model, inputs, d) for model, d in zip(models, inputs_as, strict=True)]
        for name, inputs in cases.items()
    }


def _run(model: nn.Module, inputs: Inputs, dtype: torch.dtype | None) -> _Run:
    """Run `model` with float inputs brought to `dtype`, None for as they are."""
    device = device_of(model)

    def fresh(tensor: Tensor) -> Tensor:
        wanted = dtype if dtype and tensor.is_floating_point() else tensor.dtype
        return tensor.detach().to(device, wanted, copy=True)

    args, kwargs = pytree.tree_map_only(Tensor, fresh, inputs)
    float64 = _Float64()
    mode = float64 if dtype == torch.float64 else nullcontext()
    start = time.perf_counter()
    try:
        with torch.no_grad(), full_precision(), mode:
            outputs = output_leaves(model(*args, **kwargs))
    except Exception as error:
        return _Run({}, one_line(error), 0.0, time.perf_counter() - start)
    return _Run(outputs, "", float64.rounding, time.perf_counter() - start)


def _to_float32_(model: nn.Module) -> torch.dtype | None:
    """Bring a half or double model to float32; return the dtype its inputs need, None for any."""
    dtypes = _float_dtypes([*model.parameters(), *model.buffers()])
    if not dtypes or torch.float32 in dtypes:
        return None
    _cast_(model, torch.float32)
    return torch.float32


def _cast_(model: nn.Module, dtype: torch.dtype) -> None:
    if device_of(model).type == "mps":  # which has no float64
        model.cpu()
    _ = model.double() if dtype == torch.float64 else model.float()
    for module in model.modules():
        for name, value in vars(module).items():
            if isinstance(value, Tensor) and value.is_floating_point():
                vars(module)[name] = value.to(dtype)


def _require_runs(reference: nn.Module, given: Mapping[str, Inputs], runs: _Runs) -> None:
    for name, inputs in given.items():
        if failure := runs[name][0].failure:
            raise ExampleInputError(
                f"{type(reference).__name__} does not run on the {name} input {describe(inputs)}: "
                f"{failure}; pass inputs of the shapes it was made for"
            )


def _float_dtypes(values: Any) -> set[torch.dtype]:
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


def one_line(error: BaseException) -> str:
    """Return the type of an error and the first line of its message that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    message = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    return f"{type(error).__name__}: {message}"


# Comparing outputs.


@dataclass(frozen=True)
class Difference:
    """How far one output is from its reference.

    error: max|a − b| / max|a| of a float tensor; the part of unequal entries where values must be
    `exact` (integers, bools); infinite for another shape, dtype, Python value, or place of NaN and
    infinity; NaN where nothing can be compared. index: where in the tensor the error is.
    """

    output: str
    error: float
    exact: bool = True
    index: tuple[int, ...] | None = None
    message: str = ""


def output_leaves(output: Any) -> dict[str, Any]:
    """Flatten an output: its values by path (`output`, `output['logits']`), tensors on the CPU."""
    return {
        f"output{pytree.keystr(path)}": leaf.detach().cpu() if isinstance(leaf, Tensor) else leaf
        for path, leaf in pytree.tree_flatten_with_path(output)[0]
    }


def differences(
    reference: Mapping[str, Any], candidate: Mapping[str, Any], *, same_dtype: bool = True
) -> list[Difference]:
    """Compare outputs flattened by `output_leaves`, in the order of the reference.

    Containers are compared by keys and positions: a dict may stand for an OrderedDict.
    """
    if list(reference) != list(candidate):
        message = f"is made of {', '.join(candidate)} instead of {', '.join(reference)}"
        return [Difference("output", math.inf, message=message)]
    return [_difference(path, reference[path], candidate[path], same_dtype) for path in reference]


def _difference(path: str, a: Any, b: Any, same_dtype: bool) -> Difference:
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return _value_difference(path, a, b)
    if a.shape != b.shape or (same_dtype and a.dtype != b.dtype):
        message = f"is {describe(b)} instead of {describe(a)}"
        return Difference(path, math.inf, message=message)
    if a.numel() == 0:
        return Difference(path, 0.0)
    if a.is_floating_point():
        return _float_difference(path, a.double(), b.double())
    unequal = a != b
    message = f"is unequal in {int(unequal.sum())} of {a.numel()} entries"
    return Difference(path, unequal.double().mean().item(), True, _peak(unequal), message)


def _value_difference(path: str, a: Any, b: Any) -> Difference:
    if isinstance(a, float) and isinstance(b, float):
        return _float_difference(path, *torch.tensor([a, b], dtype=torch.float64))
    if isinstance(a, bool | int | str | None) or type(a) is not type(b):
        same = type(a) is type(b) and a == b
        message = f"is {b!r:.40} instead of {a!r:.40}"
        return Difference(path, 0.0 if same else math.inf, message=message)
    message = f"is a {type(a).__name__}, which cannot be compared"
    return Difference(path, math.nan, message=message)


def _float_difference(path: str, a: Tensor, b: Tensor) -> Difference:
    misplaced = (a.isnan() != b.isnan()) | ((a.isinf() | b.isinf()) & (a != b))
    if misplaced.any():
        message = f"has NaN or infinity in other places, {int(misplaced.sum())} of {a.numel()}"
        return Difference(path, math.inf, False, _peak(misplaced), message)
    finite = a.isfinite()
    if not finite.any():
        return Difference(path, math.nan, False, message="has no finite entry")
    gap = torch.where(finite, (a - b).abs(), 0.0)
    largest, size = gap.max().item(), a[finite].abs().max().item()
    error = largest / size if size else (math.inf if largest else 0.0)
    message = f"is off by {largest:.2g} where the reference reaches {size:.2g}"
    return Difference(path, error, False, _peak(gap), message)


def _peak(values: Tensor) -> tuple[int, ...]:
    # torch has this too, and imports sympy for it, which takes seconds.
    place = np.unravel_index(int(values.double().argmax()), tuple(values.shape))
    return tuple(int(i) for i in place)


# The verdicts.

# How large an error rounding alone may explain: up to there, what exceeds a tolerance is undecided.
_Allowance = Callable[[Difference], float]


@dataclass(frozen=True)
class _Evidence:
    """Both runs of a case in one dtype, and the spread of the reference's outputs."""

    name: str
    inputs: Inputs
    dtype: str
    tolerance: float
    spread: float
    runs: Sequence[_Run]

    def judge(self, allowed: _Allowance, because: str) -> Check:
        """Return the check; an error that is too large but `allowed` is undecided, `because`."""
        reference, candidate = self.runs
        if reference.failure:
            failed = Difference("", math.nan)
            return self._check("skipped", f"the reference fails: {reference.failure}", failed)
        if candidate.failure:
            failed = Difference("output", math.inf)
            return self._check("different", f"the candidate fails: {candidate.failure}", failed)

        def severity(difference: Difference) -> tuple[bool, bool, bool, float]:
            error = difference.error
            exceeds = error > (0.0 if difference.exact else self.tolerance)
            return exceeds and error > allowed(difference), exceeds, error != error, error

        nothing = Difference("output", math.nan, message="holds nothing")
        found = differences(reference.outputs, candidate.outputs)
        worst = max(found, key=severity, default=nothing)
        wrong, exceeds, unknown, error = severity(worst)
        place = f"{worst.output} {worst.message}"
        if wrong:
            return self._check("different", place, worst)
        if exceeds or unknown:
            return self._check("inconclusive", f"{place}; {because}" if exceeds else place, worst)
        # float32's tolerance is so wide that few models vary 1000 times more; its error is not.
        needed = SPREAD_MARGIN * min(self.tolerance, max(error, SPREAD_FLOOR))
        if self.spread < needed:
            reason = f"outputs vary too little over the inputs, {needed:.1e} would do"
            return self._check("inconclusive", reason, worst)
        return self._check("equal", "", worst)

    def _check(self, verdict: Verdict, reason: str, worst: Difference) -> Check:
        return Check(
            name=self.name,
            dtype=self.dtype,
            verdict=verdict,
            reason=reason,
            error=worst.error,
            tolerance=self.tolerance,
            spread=self.spread,
            output=worst.output,
            index=worst.index,
            inputs=describe(self.inputs),
            seconds=sum(run.seconds for run in self.runs),
        )


def _judge_all(
    cases: Mapping[str, Inputs], double: tuple[_Runs, float], single: tuple[_Runs, float]
) -> Verification:
    """Judge every case in both dtypes, from its runs and the tolerance."""
    checks: list[Check] = []
    spreads64, spreads32 = _spreads(cases, double[0]), _spreads(cases, single[0])
    for name, inputs in cases.items():
        runs64, runs32 = double[0][name], single[0][name]
        in64 = _Evidence(name, inputs, "float64", double[1], spreads64[name], runs64)
        in32 = _Evidence(name, inputs, "float32", single[1], spreads32[name], runs32)
        check = in64.judge(_rounding(runs64[0]), "the reference itself rounds to a shorter dtype")
        checks.append(check)
        proved = check.verdict in ("equal", "inconclusive")
        noise = _noise(runs32[0], runs64[0]) if proved else _no_noise
        checks.append(in32.judge(noise, "rounding moves the reference itself as much"))
    return Verification(tuple(checks))


def _rounding(reference: _Run) -> _Allowance:
    """Allow what float64 cannot resolve in a reference that rounds to a shorter dtype."""
    flips = FLIPS if reference.rounding else 0.0
    return lambda difference: flips if difference.exact else UNRESOLVED * reference.rounding


def _noise(single: _Run, double: _Run) -> _Allowance:
    """Allow a multiple of what rounding to float32 does to the reference."""
    found = differences(double.outputs, single.outputs, same_dtype=False)
    errors = {difference.output: difference.error for difference in found}

    def allowed(difference: Difference) -> float:
        noise = ROUNDING_MARGIN * errors.get(difference.output, math.inf)
        return max(noise, FLIPS) if difference.exact else noise

    return allowed


def _no_noise(difference: Difference) -> float:
    return 0.0


def _spreads(cases: Mapping[str, Inputs], runs: _Runs) -> dict[str, float]:
    """Return by case how much its least varying output varies, over all cases of its shape."""
    samples: defaultdict[tuple[str, torch.Size], list[Tensor]] = defaultdict(list)
    keys: dict[str, list[tuple[str, torch.Size]]] = {name: [] for name in cases}
    for name, inputs in cases.items():
        for path, tensor in _varying(runs[name][0].outputs).items():
            batched = tensor.ndim > 0 and len(tensor) == leading_size(inputs)
            values = (tensor if batched else tensor[None]).double()
            keys[name].append((path, values.shape[1:]))
            # Some 65,000 entries tell as much as all of a large map.
            some = values.reshape(len(values), -1)[:, :: 1 + values[0].numel() // 2**16]
            samples[path, values.shape[1:]].append(some)
    spreads = {key: _spread(torch.cat(values)) for key, values in samples.items()}
    return {name: min((spreads[key] for key in keys[name]), default=0.0) for name in cases}


def _varying(outputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the float tensors; if there are none the integers, which may well be constant."""
    tensors = {p: leaf for p, leaf in outputs.items() if isinstance(leaf, Tensor) and leaf.numel()}
    floats = {path: tensor for path, tensor in tensors.items() if tensor.is_floating_point()}
    return floats or tensors


def _spread(samples: Tensor) -> float:
    """Return the standard deviation over (samples, entries), relative to the largest magnitude."""
    finite = samples.where(samples.isfinite(), math.nan)
    size = finite.abs().nan_to_num().max().item()
    deviation = (finite - finite.nanmean(0)).square().nanmean().sqrt().item()
    return deviation / size if size else 0.0


def _jsonable(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in values.items()
    }
