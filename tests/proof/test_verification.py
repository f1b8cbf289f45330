"""Verify calls equal what is equal, different what is not, and touches neither."""

import copy
import json
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from fxprune.errors import ExampleInputError, VerificationError
from fxprune.proof.verification import verify
from tests.conftest import randomise
from tests.functions import EXACT, check_of, compare, verdicts


class ConvNet(nn.Module):
    """A batch norm with statistics of its own, and a head for any input size."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.norm: nn.Module = randomise(nn.BatchNorm2d(6))
        self.head = nn.Linear(6, 4)

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.norm(self.conv(image)).relu().mean((2, 3)))


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


def test_a_size_the_model_rejects_makes_no_noise(capsys: pytest.CaptureFixture[str]) -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.map = nn.Parameter(torch.randn(3, 8, 8))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.map + x.mean()

    model = torch.fx.symbolic_trace(Fixed())
    found = verify(model, model, torch.randn(2, 3, 8, 8))
    assert {c.verdict for c in found.checks if c.name.startswith("size")} == {"skipped"}
    assert capsys.readouterr().err == ""


def test_a_candidate_without_parameters_is_run_as_its_reference_is() -> None:
    class Idle(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return input.tanh()

    found = verify(Idle(4, 4).double(), nn.Tanh(), torch.randn(3, 4, dtype=torch.float64))
    assert found.verdict == "equal"


class WithScale(nn.Module):
    """Returns one of its own parameters too."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.scale = nn.Linear(3, 4), nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.layer(x) * self.scale, self.scale


def test_a_parameter_that_is_an_output_is_compared_once_its_model_is_let_go() -> None:
    model = WithScale()
    other = copy.deepcopy(model)
    other.layer.weight.data.mul_(0.5)
    other.layer.bias.data.mul_(0.5)
    other.scale.data.mul_(2.0)
    found = verify(model, other, torch.randn(2, 3))
    assert found.verdict == "different"
    assert {check.output for check in found.checks if check.verdict == "different"} == {"output[1]"}


class InsistsOnFloat64(nn.Module):
    """Adds numbers of its own in float64, which its layers take from a model in float64 only."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6).double(), nn.Linear(6, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu() + torch.linspace(0, 1, 6, dtype=torch.float64))


def test_a_model_that_takes_no_float32_is_compared_as_it_is() -> None:
    model, x = InsistsOnFloat64(), torch.randn(2, 4, dtype=torch.float64)
    found = verify(model, copy.deepcopy(model), x)
    assert found.verdict == "equal"
    assert check_of(found, "example", "float32").inputs == "(float64[2, 4])"
    other = copy.deepcopy(model)
    other.second.weight.data *= 1.01
    assert verify(model, other, x).verdict == "different"


def test_who_alone_overwrites_its_inputs_is_different() -> None:
    found = compare(lambda x: x.relu() + 1, lambda x: x.relu_() + 1)
    assert found.verdict == "different"
    assert "overwrites its inputs" in found.checks[0].reason
    assert compare(lambda x: x.relu_() + 1, lambda x: x.relu() + 1).verdict == "equal"
    assert compare(lambda x: x.relu_() + 1, lambda x: x.clamp_(min=0) + 1).verdict == "equal"
    assert compare(lambda x: x + 1, lambda x: x.mul_(1) + 1).verdict == "equal"
