"""What a check cannot tell, it does not call equal."""

import math

import torch
from torch import Tensor, nn

from fxprune.proof.verification import verify
from tests.functions import EXACT, compare, verdicts


def _chaotic(x: Tensor) -> Tensor:
    x = x.sigmoid()
    for _ in range(40):  # a logistic map doubles an error at every turn
        x = 3.99 * x * (1 - x)
    return x


def test_outputs_that_do_not_vary_prove_nothing() -> None:
    found = compare(lambda x: 0 * x + 1, lambda x: 0 * x + 1)
    assert found.verdict == "inconclusive"
    assert found.error == {"float64": 0.0, "float32": 0.0}
    assert "vary too little" in found.checks[0].reason
    found.require()
    barely = compare(lambda x: x * 1e-8 + 1, lambda x: x * 1e-8 + 1)
    assert set(verdicts(barely, "float64").values()) == {"inconclusive"}


def test_every_float_output_must_vary() -> None:
    found = compare(lambda x: (x, 0 * x + 1), lambda x: (x, 0 * x + 1))
    assert found.verdict == "inconclusive"
    found = compare(lambda x: (x, x.argmin(1) * 0), lambda x: (x, x.argmin(1) * 0))
    assert found.verdict == "equal"


def test_outputs_that_are_all_nan_prove_nothing() -> None:
    found = compare(lambda x: x * math.nan, lambda x: x * math.nan)
    assert found.verdict == "inconclusive"
    assert "no finite entry" in found.checks[0].reason
    assert math.isnan(found.error["float64"])


def test_a_reference_that_rounds_by_itself_is_not_resolved() -> None:
    def rounded(x: Tensor) -> Tensor:
        return x.half().to(x.dtype)

    found = compare(rounded, lambda x: rounded(x) * (1 + 1e-6), float64_tolerance=EXACT)
    assert set(verdicts(found, "float64").values()) == {"inconclusive"}
    assert "rounds to a shorter dtype" in found.checks[0].reason
    assert compare(rounded, lambda x: rounded(x) * 1.2).verdict == "different"
    # A candidate that starts to round is different, whatever the reference does.
    assert compare(lambda x: x, rounded).verdict == "different"


def test_chaos_is_left_open_and_no_excuse() -> None:
    def slightly_off(x: Tensor) -> Tensor:
        return _chaotic(x * (1 + 1e-15))

    found = compare(_chaotic, slightly_off)
    assert set(verdicts(found, "float64").values()) == {"inconclusive"}
    assert "as sensitive" in found.checks[0].reason
    found = compare(_chaotic, lambda x: _chaotic(x) * 0.9)
    assert found.verdict == "different"
    # What is not sensitive has no allowance.
    found = compare(lambda x: x.sin(), lambda x: x.sin() * (1 + 1e-8))
    assert set(verdicts(found, "float64").values()) == {"different"}


def test_the_error_is_of_the_checks_that_decided() -> None:
    def function(x: Tensor) -> Tensor:
        return torch.where(x.abs() > 8, _chaotic(x), x)

    found = compare(function, lambda x: function(x * (1 + 1e-15)))
    assert found.verdict == "equal" and found.error["float64"] < 1e-14
    assert {check.name for check in found.undecided} == {"×10"}
    assert "; 1 undecided; " in str(found)


def test_what_rounding_decides_in_float32_is_left_open() -> None:
    found = compare(lambda x: (1e5 * x).sin(), lambda x: (1e2 * (1e3 * x)).sin(), 20, 4)
    assert set(verdicts(found, "float64").values()) == {"equal"}
    assert set(verdicts(found, "float32").values()) == {"inconclusive"}
    assert found.verdict == "inconclusive"


class _Best(nn.Module):
    """Return what belongs to the better of two scores that hardly differ."""

    def __init__(self, part: float, detour: float = 0.0, wrong: float = 1.0) -> None:
        super().__init__()
        weight = torch.rand(1, 4) + 0.5
        self.scores = nn.Parameter(torch.cat([weight, weight * (1 + part)]))
        self.detour, self.wrong = detour, wrong

    def forward(self, x: Tensor) -> Tensor:
        scores = x.abs() @ self.scores.T + self.detour
        scores = scores - self.detour  # which rounds, in float32 as far as the scores differ
        return torch.where((scores.argmax(1) == 1)[:, None], x, -x) * self.wrong


def test_ranks_that_another_rounding_swaps_in_float32_are_left_open() -> None:
    inputs = torch.randn(2, 4)

    def found(part: float, detour: float, wrong: float = 1.0) -> dict[str, dict[str, str]]:
        torch.manual_seed(0)
        reference = _Best(part)
        candidate = _Best(part, detour, wrong)
        candidate.load_state_dict(reference.state_dict())
        proof = verify(reference, candidate, inputs)
        return {dtype: verdicts(proof, dtype) for dtype in ("float64", "float32")}

    close = found(1e-6, 100.0)
    assert set(close["float64"].values()) == {"equal"}
    assert "inconclusive" in close["float32"].values()
    assert "different" not in close["float32"].values()
    # Where scores lie apart another rank is a mistake, also in float32; and so is another output.
    assert "different" in found(1e-2, 1e6)["float32"].values()
    assert set(found(1e-6, 0.0, 1.01)["float32"].values()) == {"different"}


class _Scaled(nn.Module):
    """A chaotic function of a weight."""

    def __init__(self, weight: float, wrong: float = 1.0) -> None:
        super().__init__()
        self.weight, self.wrong = nn.Parameter(torch.tensor([weight])), wrong

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(x.abs() > 8, (1e5 * self.weight * x).sin(), x * self.weight) * self.wrong


def test_weights_rounded_to_float32_may_move_a_chaotic_model_as_far_as_others_would() -> None:
    inputs = torch.randn(4, 5)
    reference, rounded = _Scaled(1.7), _Scaled(1.7 * (1 + 2e-7))
    found = verify(reference, rounded, inputs)
    assert verdicts(found, "float64") == {
        name: "inconclusive" if name == "×10" else "equal" for name in verdicts(found, "float64")
    }
    assert found.verdict != "different"
    assert verify(reference, _Scaled(1.7, 0.9), inputs).verdict == "different"
    # Weights that were not rounded have no such allowance.
    assert verify(reference, rounded, inputs, exact=rounded).verdict == "different"
