"""What the runs of a case prove: a verdict, its reason, and the numbers it rests on.

A check that cannot fail is no check. Where the reference's outputs hardly vary over the inputs, or
rounding moves the reference itself as far as the candidate is off, the verdict is "inconclusive";
where the reference does not run, or the candidate refuses what it was not traced for, "skipped".
"""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Literal

import torch
from torch import Tensor

from fxprune.proof.comparison import FLIPS, Difference, differences
from fxprune.proof.precision import Run, Runs
from fxprune.tracing.assumptions import ASSUMES
from fxprune.user_models.inputs import Inputs, describe, leading_size

Verdict = Literal["equal", "different", "inconclusive", "skipped"]

# How many times more than their error outputs must vary, and at least than float32 rounds.
SPREAD_MARGIN = 1000.0
SPREAD_FLOOR = torch.finfo(torch.float32).eps
# How many times the reference's own rounding error a candidate's may be and still be rounding.
ROUNDING_MARGIN = 10.0
# How many ε of the dtype that a reference rounds to by itself float64 cannot resolve.
UNRESOLVED = 100.0
# How many times the move of the reference, when its weights move by an ε, a candidate may be off.
SENSITIVE = 100.0
# The same, where they move by as many ε of float32 as rounding may: ranks may be swapped.
SWAPPED = 2.0
# A reference whose outputs move by as many ε where its weights move by one is chaotic.
CHAOS = 1e3

# How large an error rounding alone may explain: up to there, what exceeds a tolerance is undecided.
_Allowance = Callable[[Difference], float]
# The runs of the reference, every weight and input off by about an ε.
_Nudge = Callable[[float], Sequence[Run]]


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


def judge_all(
    cases: Mapping[str, Inputs],
    double: tuple[Runs, float],
    single: tuple[Runs, float],
    nudge: Callable[[str, float], Sequence[Run]],
    rounded: float = 0.0,
) -> tuple[Check, ...]:
    """Judge every case in both dtypes, from its runs and the tolerance.

    nudge: runs the reference on a case in float64, every weight off by about an ε; it is asked only
    where reference and candidate are too far apart. rounded: the ε of the dtype that the weights of
    the candidate in float64 were rounded to, 0 if they were not.
    """
    checks: list[Check] = []
    spreads64, spreads32 = _spreads(cases, double[0]), _spreads(cases, single[0])
    for name, inputs in cases.items():
        runs64, runs32 = double[0][name], single[0][name]
        in64 = _Evidence(name, inputs, "float64", double[1], spreads64[name], runs64)
        in32 = _Evidence(name, inputs, "float32", single[1], spreads32[name], runs32)
        noise = _noise(runs32[0], runs64[0], partial(nudge, name))
        allowed = _resolution(runs64[0], partial(nudge, name), rounded)
        check = in64.judge(
            allowed, "the reference itself rounds to a shorter dtype, or is as sensitive"
        )
        checks.append(check)
        noise = noise if check.verdict in ("equal", "inconclusive") else _no_noise
        checks.append(in32.judge(noise, "rounding moves the reference itself as much"))
    return tuple(checks)


def judge_step(inputs: Inputs, runs: Sequence[Run], tolerance: float, nudge: _Nudge) -> Check:
    """Judge a step of training, in float64; nobody asks how much gradients vary over inputs."""
    evidence = _Evidence("a step of training", inputs, "float64", tolerance, math.nan, runs)
    return evidence.judge(_resolution(runs[0], nudge, 0.0), "the reference is as sensitive")


@dataclass(frozen=True)
class _Evidence:
    """Both runs of a case in one dtype, and the spread of the reference's outputs."""

    name: str
    inputs: Inputs
    dtype: str
    tolerance: float
    spread: float
    runs: Sequence[Run]

    def judge(self, allowed: _Allowance, because: str) -> Check:
        """Return the check; an error that is too large but `allowed` is undecided, `because`."""
        reference, candidate = self.runs
        if reference.failure:
            failed = Difference("", math.nan)
            return self._check("skipped", f"the reference fails: {reference.failure}", failed)
        if ASSUMES in candidate.failure:
            failed = Difference("", math.nan)
            return self._check("skipped", f"the candidate refuses: {candidate.failure}", failed)
        if candidate.failure:
            failed = Difference("output", math.inf)
            return self._check("different", f"the candidate fails: {candidate.failure}", failed)

        if candidate.overwritten - reference.overwritten:
            failed = Difference("output", math.inf)
            return self._check("different", "the candidate overwrites its inputs", failed)

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


def _resolution(reference: Run, nudge: _Nudge, rounded: float) -> _Allowance:
    """Allow what float64 cannot resolve, as the reference rounds to a shorter dtype or is chaotic.

    Deep networks that were never trained are chaotic on large inputs; there, weights that were
    rounded move outputs as far as any others that are off by as much.
    """
    moved = _moved(reference, nudge, torch.finfo(torch.float64).eps)
    moved_as_rounded = _moved(reference, nudge, rounded)

    def allowed(difference: Difference) -> float:
        move = moved(difference.output)
        if difference.exact:
            return FLIPS if reference.rounding or move else 0.0
        resolved = max(UNRESOLVED * reference.rounding, SENSITIVE * move)
        if not rounded or difference.error <= resolved:
            return resolved
        move = moved_as_rounded(difference.output)
        return max(resolved, SWAPPED * move) if move > CHAOS * rounded else resolved

    return allowed


def _noise(single: Run, double: Run, nudge: _Nudge) -> _Allowance:
    """Allow a multiple of what rounding to float32 does to the reference, or may do.

    Where ranks decide (the best of all anchors, experts), another rounding swaps two that are close
    and all that follows; the reference's own may not.
    """
    found = differences(double.outputs, single.outputs, same_dtype=False)
    errors = {difference.output: difference.error for difference in found}
    moved = _moved(double, nudge, ROUNDING_MARGIN * torch.finfo(torch.float32).eps)

    def allowed(difference: Difference) -> float:
        noise = ROUNDING_MARGIN * errors.get(difference.output, math.inf)
        if difference.error > noise:
            noise = SWAPPED * moved(difference.output)
        return max(noise, FLIPS) if difference.exact else noise

    return allowed


def _moved(reference: Run, nudge: _Nudge, epsilon: float) -> Callable[[str], float]:
    """Return how far an output of the reference moves when its weights do, once that is asked."""

    @cache
    def moves() -> dict[str, float]:
        found: dict[str, float] = {}
        for run in nudge(epsilon):
            for one in differences(reference.outputs, run.outputs):
                if math.isfinite(one.error):
                    found[one.output] = max(found.get(one.output, 0.0), one.error)
        return found

    return lambda output: moves().get(output, 0.0)


def _no_noise(difference: Difference) -> float:
    return 0.0


def _spreads(cases: Mapping[str, Inputs], runs: Runs) -> dict[str, float]:
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
