"""Numerical proof that two modules are the same function.

Both run, as copies in evaluation mode, on inputs chosen to tell them apart. Float64 proves the
algebra, float32 that the rewrite cost no precision; both must have evidence for "equal".
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import torch
from torch import nn

from fxprune.errors import ExampleInputError, VerificationError, require_module
from fxprune.progress import shown
from fxprune.proof.precision import (
    Run,
    Runs,
    cast_,
    float_dtypes,
    lacks_float32,
    run_all,
    run_nudged,
)
from fxprune.proof.verdicts import Check, Verdict, judge_all
from fxprune.runtime.default_device import on_cpu
from fxprune.runtime.eager import uncompiled
from fxprune.runtime.turns import in_turn
from fxprune.user_models.cases import normalised_inputs, random_cases
from fxprune.user_models.inputs import Inputs, describe
from fxprune.user_models.modules import copy_model, empty_

DTYPES = ("float64", "float32")
# The float64 tolerance, and where a candidate's merged weights were rounded to float32.
EXACT, ROUNDED = 1e-9, 1e-5
# Of a dtype's ε: what weights that were merged, and rounded to it once, may differ by.
MERGED = 2


@dataclass(frozen=True)
class Verification:
    """The checks of a comparison, and what they amount to.

    parts: where a model was proved in parts, the proofs of these; all must have evidence.
    """

    checks: tuple[Check, ...]
    parts: tuple["Verification", ...] = ()

    @property
    def verdict(self) -> Verdict:
        """Return "different" if any check is, "equal" if both dtypes have evidence for it."""
        if any(check.verdict == "different" for check in self.checks):
            return "different"
        if any(part.verdict != "equal" for part in self.parts):
            return "inconclusive"
        proved = {check.dtype for check in self.checks if check.verdict == "equal"}
        return "equal" if proved == set(DTYPES) else "inconclusive"

    @property
    def error(self) -> dict[str, float]:
        """Return the largest error by dtype, of the checks that decided something.

        Where none did, it is the largest of all, or NaN where nothing could be compared: what
        an undecided check is off by tells of the reference, which rounding moves as far.
        """
        return {
            dtype: _largest([check for check in self.checks if check.dtype == dtype])
            for dtype in DTYPES
        }

    @property
    def undecided(self) -> tuple[Check, ...]:
        """Return the checks that ran and prove nothing; each has its reason."""
        return tuple(check for check in self.checks if check.verdict == "inconclusive")

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
        open_ = f"; {len(self.undecided)} undecided" if self.undecided else ""
        first = f"{self.verdict}: error {errors}{open_}; {self.seconds:.2f} s"
        return "\n".join([first, *rows])


@in_turn
@uncompiled
@on_cpu
@shown("verify")
def verify(
    reference: nn.Module,
    candidate: nn.Module,
    example_inputs: Any,
    *,
    exact: nn.Module | None = None,
    traced: nn.Module | None = None,
    batches: Sequence[int] = (1, 3),
    extra_inputs: Sequence[Any] = (),
    float64_tolerance: float | None = None,
    float32_tolerance: float = 1e-4,
    seed: int = 0,
) -> Verification:
    """Compare two modules that are deterministic in evaluation mode; neither is modified.

    example_inputs, and each of extra_inputs: what `model_inputs` accepts, or (args, kwargs).
    Checked are the example, the extra inputs, and random inputs (see `random_inputs`) at each batch
    size, ×10, of a second size where inputs are image-like, and longer where they are sequences;
    those that the reference rejects are skipped. "float64" reads every float32 of the model as
    float64, also a cast in its forward; "float32" runs the model as it is, brought to float32 first
    if its weights are half or double and its forward takes that.

    exact: the candidate as it was before its weights were rounded to their dtype; it stands for it
    in float64. traced: the same for the reference, where a trace holds constants in float32 that
    its forward would compute in float64 there. float64_tolerance: 1e-9 if not given, or 1e-5 where
    a candidate of shorter weights has no such stand-in, as merged weights were rounded once; with
    weights in float16 or bfloat16 both tolerances are at least two of their ε.

    Raises `ExampleInputError` if the reference does not run on the example or an extra input.
    """
    for module in (reference, candidate):
        require_module(module)
    dtypes = float_dtypes([*candidate.parameters()])
    rounding = MERGED * max((torch.finfo(d).eps for d in dtypes), default=0.0)
    float32_tolerance = max(float32_tolerance, rounding)
    unrounded = exact is not None or dtypes <= {torch.float64}
    if float64_tolerance is None:
        float64_tolerance = EXACT if unrounded else max(ROUNDED, rounding)
    given = {"example": normalised_inputs(example_inputs)}
    given |= {f"extra {i}": normalised_inputs(extra) for i, extra in enumerate(extra_inputs)}
    cases = given | random_cases(given["example"], batches, seed)
    models = (reference, candidate)
    single = _runs(models, cases, torch.float32 if any(map(lacks_float32, models)) else None)
    if single["example"][0].failure:  # its forward insists on the dtype it has
        single = _runs(models, cases, None)
    _require_runs(reference, given, single)
    in64 = reference if traced is None else traced
    double = _runs((in64, candidate if exact is None else exact), cases, torch.float64)

    @cache
    def wide() -> nn.Module:
        return _copy_in(torch.float64, in64)

    def nudge(name: str, epsilon: float) -> list[Run]:
        return run_nudged(wide(), cases[name], seed, epsilon)

    return Verification(
        judge_all(
            cases,
            (double, float64_tolerance),
            (single, float32_tolerance),
            nudge,
            0.0 if unrounded else rounding / MERGED,
        )
    )


def _runs(
    models: Sequence[nn.Module], cases: Mapping[str, Inputs], dtype: torch.dtype | None
) -> Runs:
    """Run copies of models on every case, one model after the other: two may be too large."""
    found: list[Runs] = []
    for model, which in zip(models, ("the reference", "the result"), strict=True):
        twin = _copy_in(dtype, model)
        doing = f"proof in {'float64' if dtype is torch.float64 else 'float32'}, {which}"
        found.append(run_all([twin], cases, [dtype], doing))
        empty_(twin)
    return {name: [runs[name][0] for runs in found] for name in cases}


def _copy_in(dtype: torch.dtype | None, model: nn.Module) -> nn.Module:
    """Return a copy of a model in evaluation mode, brought to a dtype unless that is None."""
    twin = copy_model(model).eval()
    if dtype is not None:
        cast_(twin, dtype)
    return twin


def _require_runs(reference: nn.Module, given: Mapping[str, Inputs], runs: Runs) -> None:
    for name, inputs in given.items():
        if failure := runs[name][0].failure:
            raise ExampleInputError(
                f"{type(reference).__name__} does not run on the {name} input {describe(inputs)}: "
                f"{failure}; pass inputs of the shapes it was made for"
            )


def _largest(checks: Sequence[Check]) -> float:
    decided = [check.error for check in checks if check.verdict in ("equal", "different")]
    errors = decided or [check.error for check in checks]
    return max((error for error in errors if not math.isnan(error)), default=math.nan)


def _jsonable(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in values.items()
    }
