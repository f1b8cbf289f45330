"""Verify calls equal what is equal, different what is not, and says what it cannot tell."""

import copy
import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from fxprune.errors import ExampleInputError, VerificationError
from fxprune.verify import Check, Verification, random_inputs, verify
from tests.conftest import randomise

EXACT = 1e-9


class Function(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


class ConvNet(nn.Module):
    """A batch norm with statistics of its own, and a head for any input size."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.norm: nn.Module = randomise(nn.BatchNorm2d(6))
        self.head = nn.Linear(6, 4)

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.norm(self.conv(image)).relu().mean((2, 3)))


def compare(
    left: Callable[[Tensor], Any], right: Callable[[Tensor], Any], *shape: int, **options: Any
) -> Verification:
    inputs = torch.randn(*(shape or (2, 4)))
    return verify(Function(left), Function(right), inputs, **options)


def verdicts(found: Verification, dtype: str) -> dict[str, str]:
    return {check.name: check.verdict for check in found.checks if check.dtype == dtype}


def check_of(found: Verification, name: str, dtype: str) -> Check:
    return next(c for c in found.checks if (c.name, c.dtype) == (name, dtype))


def test_a_copy_is_equal_in_every_case() -> None:
    model = ConvNet()
    found = verify(model, copy.deepcopy(model), torch.randn(1, 3, 8, 8))
    everywhere = dict.fromkeys(("example", "batch 1", "batch 3", "×10", "size +32"), "equal")
    assert verdicts(found, "float64") == verdicts(found, "float32") == everywhere
    assert found.verdict == "equal"
    assert found.error == {"float64": 0.0, "float32": 0.0}
    assert check_of(found, "size +32", "float32").inputs == "(float32[3, 3, 40, 40])"
    found.require()


def test_a_folded_batch_norm_is_equal_but_for_rounding() -> None:
    model = ConvNet().eval().double()
    folded = copy.deepcopy(model)
    assert isinstance(folded.norm, nn.BatchNorm2d)
    folded.conv = fuse_conv_bn_eval(folded.conv, folded.norm)
    folded.norm = nn.Identity()
    found = verify(model, folded, torch.randn(1, 3, 8, 8, dtype=torch.float64))
    assert found.verdict == "equal"
    assert 0 < found.error["float64"] < 1e-14
    assert 0 < found.error["float32"] < 1e-5


def test_a_millionth_of_one_weight_is_a_difference() -> None:
    model, other = (ConvNet() for _ in range(2))
    other.load_state_dict(model.state_dict())
    other.head.weight.data[2, 3] *= 1 + 1e-6
    found = verify(model, other, torch.randn(1, 3, 8, 8), float64_tolerance=EXACT)
    assert found.verdict == "different"
    assert set(verdicts(found, "float64").values()) == {"different"}
    assert set(verdicts(found, "float32").values()) == {"equal"}
    index = check_of(found, "example", "float64").index
    assert index is not None and index[1] == 2


def test_weights_rounded_to_float32_are_told_from_the_exact_ones() -> None:
    exact = nn.Linear(4, 4, dtype=torch.float64)
    rounded = copy.deepcopy(exact).float()
    found = verify(exact, rounded, torch.randn(2, 4))
    assert (found.verdict, found.checks[0].tolerance) == ("equal", 1e-5)
    assert verify(exact, rounded, torch.randn(2, 4), exact=exact).error["float64"] == 0
    strict = verify(exact, rounded, torch.randn(2, 4), float64_tolerance=EXACT)
    assert strict.verdict == "different"


RIGHT_AT_BATCH_ONE: dict[str, Callable[[Tensor], Tensor]] = {
    "mixes the batch": lambda x: x - x.mean(0) + x.mean(0)[:1],
    "repeats its first sample": lambda x: x[:1].expand_as(x),
    "has its batch size written in": lambda x: x.view(1, 4),
    "drops samples": lambda x: x[:1],
}


@pytest.mark.parametrize("wrong", RIGHT_AT_BATCH_ONE.values(), ids=RIGHT_AT_BATCH_ONE)
def test_what_is_right_only_at_batch_one_is_caught(wrong: Callable[[Tensor], Tensor]) -> None:
    found = compare(lambda x: x.clone(), wrong, 1, 4)
    assert verdicts(found, "float64")["batch 3"] == "different"
    assert found.verdict == "different"


def test_what_differs_in_saturation_is_caught() -> None:
    found = compare(lambda x: x, lambda x: x.clamp(-6, 6))
    assert verdicts(found, "float64")["example"] == "equal"
    assert verdicts(found, "float64")["×10"] == "different"


def test_what_is_right_at_one_size_only_is_caught() -> None:
    found = compare(lambda x: x.mean((2, 3)), lambda x: x.sum((2, 3)) / 64, 1, 3, 8, 8)
    assert verdicts(found, "float64")["size +32"] == "different"


def test_a_size_the_reference_rejects_is_skipped() -> None:
    found = compare(lambda x: x.view(-1, 192), lambda x: x.flatten(1), 1, 3, 8, 8)
    assert verdicts(found, "float64")["size +32"] == "different"
    rejecting = nn.Sequential(nn.Flatten(), nn.Linear(192, 2))
    found = verify(rejecting, copy.deepcopy(rejecting), torch.randn(1, 3, 8, 8))
    check = check_of(found, "size +32", "float64")
    assert (check.verdict, found.verdict) == ("skipped", "equal")
    assert "shapes cannot be multiplied" in check.reason


def test_extra_inputs_are_tried() -> None:
    extra = torch.full((2, 4), 1000.0)
    found = compare(lambda x: x, lambda x: x.clamp(max=999), extra_inputs=[extra])
    assert verdicts(found, "float64")["extra 0"] == "different"
    assert verdicts(found, "float64")["×10"] == "equal"


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


def test_nested_outputs_are_compared_by_path() -> None:
    def nested(x: Tensor, shift: float = 0.0) -> Any:
        return {"logits": x, "features": (x + 1, [x * 2 + shift]), "scale": 3, "none": None}

    assert compare(nested, nested).verdict == "equal"
    check = compare(nested, lambda x: nested(x, 1e-3)).checks[0]
    assert (check.verdict, check.output) == ("different", "output['features'][1][0]")
    assert check.index is not None and len(check.index) == 2


OTHER_STRUCTURES: dict[str, Callable[[Tensor], Any]] = {
    "is made of output['a'] instead of output['b']": lambda x: {"a": x},
    "is made of": lambda x: {"b": x, "c": x},
    "is (float32[2, 3])": lambda x: {"b": x[:, :3]},
    "is (float16[2, 4])": lambda x: {"b": x.half()},
    "is 3 instead": lambda x: {"b": 3},
    "ZeroDivisionError": lambda x: 1 / 0,
}


@pytest.mark.parametrize(("reason", "other"), OTHER_STRUCTURES.items(), ids=OTHER_STRUCTURES)
def test_another_structure_is_different(reason: str, other: Callable[[Tensor], Any]) -> None:
    found = compare(lambda x: {"b": x}, other)
    assert set(verdicts(found, "float32").values()) == {"different"}
    assert reason in found.checks[1].reason
    with pytest.raises(VerificationError):
        found.require()


def test_integer_inputs_are_drawn_from_the_example() -> None:
    embedding = nn.Embedding(1000, 4)
    ids = torch.tensor([[3, 999, 5], [7, 3, 3]])
    found = verify(embedding, copy.deepcopy(embedding), ids)
    assert found.verdict == "equal"
    (drawn,), _ = random_inputs(((ids,), {}), seed=0, batch=50)
    assert drawn.shape == (50, 3)
    assert set(drawn.flatten().tolist()) == {3, 5, 7, 999}
    other = copy.deepcopy(embedding)
    other.weight.data[999] *= 1.001
    assert verify(embedding, other, ids).verdict == "different"


def test_keyword_inputs_and_plain_values_are_passed_on() -> None:
    class Scaled(nn.Module):
        def forward(self, x: Tensor, *, factor: float, mask: Tensor) -> Tensor:
            return torch.where(mask, x * factor, x)

    inputs = {"x": torch.randn(2, 4), "factor": 2.5, "mask": torch.rand(2, 4) > 0.5}
    assert verify(Scaled(), Scaled(), inputs).verdict == "equal"
    inputs = ((torch.randn(2, 4),), {"factor": 2.5, "mask": torch.rand(2, 4) > 0.5})
    assert verify(Scaled(), Scaled(), inputs).verdict == "equal"


def test_nothing_of_the_users_is_modified() -> None:
    class Counting(ConvNet):
        calls = 0

        def forward(self, image: Tensor) -> Tensor:
            self.calls += 1
            return super().forward(image.mul_(2))

    model, other = Counting().train(), Counting().eval()
    model.norm.eval()
    before = copy.deepcopy(model.state_dict())
    image = torch.ones(1, 3, 8, 8)
    verify(model, other, image)
    assert model.training and not model.norm.training and model.conv.training
    assert not other.training
    assert model.calls == 0 and bool((image == 1).all())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) and tensor.dtype == before[name].dtype


def test_precision_settings_are_restored() -> None:
    before = torch.backends.cuda.matmul.fp32_precision
    seen: list[object] = []

    def spy(x: Tensor) -> Tensor:
        seen.append(torch.backends.cuda.matmul.fp32_precision)
        return x

    compare(spy, spy)
    assert set(seen) == {"ieee"}
    assert torch.backends.cuda.matmul.fp32_precision == before


def test_nan_must_be_in_the_same_places() -> None:
    found = compare(lambda x: x.sqrt(), lambda x: x.sqrt(), 4, 5)
    assert found.verdict == "equal"
    found = compare(lambda x: x.sqrt(), lambda x: x.abs().sqrt(), 4, 5)
    assert found.verdict == "different"
    assert found.error["float64"] == math.inf
    found = compare(lambda x: 1 / (x * 0), lambda x: -1 / (x * 0))
    assert found.verdict == "different"


def test_outputs_that_are_all_nan_prove_nothing() -> None:
    found = compare(lambda x: x * math.nan, lambda x: x * math.nan)
    assert found.verdict == "inconclusive"
    assert "no finite entry" in found.checks[0].reason
    assert math.isnan(found.error["float64"])


def test_a_cast_to_float32_does_not_blind_float64() -> None:
    def cast(x: Tensor) -> Tensor:
        return (x.float() * 3).softmax(1, dtype=torch.float32).type_as(x)

    assert compare(cast, cast).verdict == "equal"
    found = compare(cast, lambda x: cast(x) * (1 + 1e-8), float64_tolerance=EXACT)
    assert set(verdicts(found, "float64").values()) == {"different"}
    assert compare(cast, lambda x: x.mul(3).softmax(1)).verdict == "equal"


def test_a_reference_that_rounds_by_itself_is_not_resolved() -> None:
    def rounded(x: Tensor) -> Tensor:
        return x.half().to(x.dtype)

    found = compare(rounded, lambda x: rounded(x) * (1 + 1e-6), float64_tolerance=EXACT)
    assert set(verdicts(found, "float64").values()) == {"inconclusive"}
    assert "rounds to a shorter dtype" in found.checks[0].reason
    assert compare(rounded, lambda x: rounded(x) * 1.2).verdict == "different"
    # A candidate that starts to round is different, whatever the reference does.
    assert compare(lambda x: x, rounded).verdict == "different"


def test_a_model_without_float64_is_not_called_equal() -> None:
    def stubborn(x: Tensor) -> Tensor:
        return x @ torch.ones(4, 3)

    found = compare(stubborn, stubborn)
    assert set(verdicts(found, "float64").values()) == {"skipped"}
    assert set(verdicts(found, "float32").values()) == {"equal"}
    assert found.verdict == "inconclusive"


def test_integer_outputs_must_be_equal() -> None:
    assert compare(lambda x: x.argmax(1), lambda x: x.argmax(1)).verdict == "equal"
    found = compare(lambda x: x.argmax(1), lambda x: x.argmax(1).clamp(max=2), 40, 4)
    check = check_of(found, "example", "float64")
    assert check.verdict == "different"
    assert 0 < check.error < 1
    assert "of 40 entries" in check.reason


def test_what_rounding_decides_in_float32_is_left_open() -> None:
    found = compare(lambda x: (1e5 * x).sin(), lambda x: (1e2 * (1e3 * x)).sin(), 20, 4)
    assert set(verdicts(found, "float64").values()) == {"equal"}
    assert set(verdicts(found, "float32").values()) == {"inconclusive"}
    assert found.verdict == "inconclusive"


def test_precision_lost_in_float32_is_different() -> None:
    found = compare(lambda x: x, lambda x: x + 1e6 - 1e6)
    assert verdicts(found, "float64")["example"] == "equal"
    assert found.verdict == "different"
    with pytest.raises(VerificationError, match="float32_tolerance"):
        found.require()


def test_half_models_are_compared_in_float32() -> None:
    model = nn.Linear(4, 4).half()
    found = verify(model, copy.deepcopy(model), torch.randn(2, 4).half())
    assert found.verdict == "equal"
    other = copy.deepcopy(model)
    other.weight.data *= 1.01
    assert verify(model, other, torch.randn(2, 4).half()).verdict == "different"


def test_the_error_names_case_error_output_and_remedy() -> None:
    with pytest.raises(VerificationError) as raised:
        compare(lambda x: {"logits": x}, lambda x: {"logits": x * 1.01}).require()
    message = str(raised.value)
    for part in ("8 of 8 checks", "example", "float32[2, 4]", "float64", "do not use"):
        assert part in message
    assert "output['logits'] is off by" in message


def test_an_example_the_reference_rejects_is_an_error() -> None:
    model = nn.Linear(3, 3)
    with pytest.raises(ExampleInputError, match=r"example input \(float32\[2, 4\]\)"):
        verify(model, model, torch.randn(2, 4))
    with pytest.raises(ExampleInputError, match="extra 0"):
        verify(model, model, torch.randn(2, 3), extra_inputs=[torch.randn(2, 4)])


def test_results_are_json_and_a_table() -> None:
    found = compare(lambda x: x * math.nan, lambda x: x * math.nan)
    data = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert data["verdict"] == "inconclusive" and data["error"]["float64"] is None
    assert data["checks"][0]["name"] == "example"
    lines = str(found).splitlines()
    assert lines[0].startswith("inconclusive")
    assert len(lines) == 1 + len(found.checks)


def test_one_seed_gives_one_result() -> None:
    model, other = nn.Linear(4, 4), nn.Linear(4, 4)
    example = torch.randn(2, 4)
    first, second, third = (verify(model, other, example, seed=seed).error for seed in (1, 1, 2))
    assert first == second != third


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_is_held_to_full_precision() -> None:
    model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 8, 3))
    found = verify(model, copy.deepcopy(model).cuda(), torch.randn(1, 3, 16, 16))
    assert found.verdict == "equal"
    assert found.error["float32"] < 1e-5
