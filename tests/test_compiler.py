"""The two verbs on real models: exact, smaller, and clear about what they refuse."""

import copy
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import prune

import fxprune
from fxprune.errors import ModelError
from fxprune.testing import close_half, error, spread
from models.lenet import LeNet
from tests.conftest import randomise


def calibrated(model: nn.Module, *shape: int) -> nn.Module:
    """Randomise a model, with batch statistics that keep its signal alive to the output."""
    randomise(model)
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
    for norm in norms:
        norm.momentum = None
    model.train()
    with torch.no_grad():
        for _ in range(2):
            model(torch.randn(shape))
    for norm in norms:
        assert norm.running_mean is not None and norm.running_var is not None
        norm.running_mean += 0.1 * torch.randn_like(norm.running_mean)
        norm.running_var *= 0.8 + 0.4 * torch.rand_like(norm.running_var)
    return model.eval()


MODELS: dict[str, Callable[[], nn.Module]] = {
    "resnet18": torchvision.models.resnet18,
    "mobilenet_v2": torchvision.models.mobilenet_v2,
}


@pytest.mark.parametrize("name", MODELS)
def test_half_the_gates_of_every_site_go_exactly(name: str, tmp_path: Path) -> None:
    model = calibrated(MODELS[name](), 8, 3, 96, 96)
    x = torch.randn(2, 3, 96, 96)
    gated = fxprune.instrument(model, x)
    for mode in (True, False):
        torch.manual_seed(1)
        expected = model.train(mode)(x)
        torch.manual_seed(1)
        assert torch.equal(gated.train(mode)(x), expected), f"training={mode}"
    assert close_half(gated) > 1000
    small = fxprune.finalize(gated.eval())
    report = small.report
    assert report.before and report.after and report.verification
    assert report.after.parameters < 0.6 * report.before.parameters
    assert report.verification.verdict == "equal"
    assert report.verification.error["float64"] <= 1e-9
    checked = [check.name for check in report.verification.checks if check.verdict == "equal"]
    assert {"example", "batch 1", "batch 3", "size +32"} <= set(checked)
    assert min(c.spread for c in report.verification.checks if c.dtype == "float64") > 1e-3
    onnx = fxprune.export_onnx(small, tmp_path / "small.onnx", dynamic_size=True)
    assert max(onnx.errors.values()) <= 1e-4
    session = onnxruntime.InferenceSession(str(tmp_path / "small.onnx"))
    for shape in ((1, 3, 96, 96), (3, 3, 96, 96), (2, 3, 128, 128)):
        x = torch.randn(shape)
        with torch.no_grad():
            found = torch.from_numpy(
                session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
            )
            assert error(gated(x), found) <= 1e-4


def test_nothing_the_user_holds_is_modified() -> None:
    model = calibrated(torchvision.models.resnet18(), 4, 3, 64, 64).train()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    gated = fxprune.instrument(model, torch.randn(2, 3, 64, 64))
    close_half(gated)
    held = {name: tensor.clone() for name, tensor in gated.state_dict().items()}
    code = gated.code
    fxprune.finalize(gated, check=False)
    assert model.training and gated.training and gated.code == code
    for before, after in ((state, model.state_dict()), (held, gated.state_dict())):
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_masked_model_shrinks_without_gates() -> None:
    model = calibrated(torchvision.models.vgg11_bn(num_classes=10), 2, 3, 32, 32)
    features: Any = model.features
    for layer, norm in pairwise(features):
        if isinstance(layer, nn.Conv2d):
            prune.ln_structured(layer, "weight", amount=0.5, n=2, dim=0)
            # A masked filter leaves a constant behind the norm; ReLU makes it 0 if it is negative.
            mask: Any = layer.weight_mask
            norm.bias.data[mask[:, 0, 0, 0] == 0] = -10.0
    x = torch.randn(2, 3, 64, 64)
    small = fxprune.finalize(model, x)
    layers = [m for m in small.modules() if isinstance(m, nn.Conv2d)]
    assert [m.out_channels for m in layers] == [32, 64, 128, 128, 256, 256, 256, 256]
    with torch.no_grad():
        assert error(model(x), small(x)) < 1e-5
        assert spread(small(x)) > 1e-3


def test_ln_structured_masks_halve_a_plain_net() -> None:
    model = nn.Sequential(
        *(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)),
    )
    randomise(model)
    for place in (0, 2):
        layer = model[place]
        assert isinstance(layer, nn.Conv2d)
        prune.ln_structured(layer, "weight", amount=0.5, n=2, dim=0)
        whole: Any = layer.weight_mask
        mask = whole[:, 0, 0, 0]
        assert layer.bias is not None
        layer.bias.data *= mask
    x = torch.randn(4, 3, 12, 12)
    model(x)
    small = fxprune.finalize(model, x)
    layers = dict(small.named_modules())
    assert layers["0"].weight.shape == (8, 3, 3, 3)
    assert layers["2"].weight.shape == (16, 8, 3, 3)
    assert layers["6"].weight.shape == (10, 16)
    assert error(model(x), small(x)) < 1e-6


@fx.wrap
def _mirror(x: Tensor) -> Tensor:
    """Do what no rule knows."""
    return torch.index_select(x, 1, torch.arange(x.shape[1] - 1, -1, -1))


class WithUnknown(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)
        self.c, self.d = nn.Conv2d(8, 8, 3), nn.Conv2d(8, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.b(F.relu(self.a(x))))
        return self.d(F.relu(self.c(_mirror(x))))


def test_an_unknown_operator_is_a_barrier_and_is_named() -> None:
    model = randomise(WithUnknown())
    gated = fxprune.instrument(model, torch.randn(2, 3, 14, 14))
    sites = fxprune.architecture(gated)
    assert len(sites) == 2
    assert any("_mirror" in str(change) for change in gated.report.passes["insert_gates"])
    close_half(gated)
    small = fxprune.finalize(gated)
    assert small.get_submodule("b").out_channels == 8
    assert small.get_submodule("c").in_channels == 8
    assert small.get_submodule("a").out_channels == 4
    assert small.get_submodule("c").out_channels == 4
    (refused,) = small.report.refused
    assert "_mirror" in str(refused) and "test_compiler.py" in str(refused)
    assert "_mirror" in str(small.report)


def test_a_linearised_mlp_becomes_shallower() -> None:
    model = randomise(
        nn.Sequential(nn.Linear(12, 64), nn.ReLU(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 5))
    )
    gated = fxprune.instrument(model, torch.randn(3, 12))
    gates: Any = gated.gates
    assert len(gates.depth_sites) == 2
    with torch.no_grad():
        gates.linear[0] = 1
        gates.width[:64:2] = 0
    small = fxprune.finalize(gated)
    layers = [m for m in small.modules() if isinstance(m, nn.Linear)]
    assert [tuple(layer.weight.shape) for layer in layers] == [(64, 12), (5, 64)]


def test_without_folding_what_training_needs_is_kept() -> None:
    model = nn.Sequential(
        *(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 4)),
    )
    gated = fxprune.instrument(randomise(model), torch.randn(3, 6))
    close_half(gated)
    small = fxprune.finalize(gated, fold=False)
    kinds = [type(module).__name__ for _, module in small.named_children()]
    assert kinds == ["Linear", "BatchNorm1d", "ReLU", "Dropout", "Linear"]
    assert not torch.equal(small.train()(torch.ones(3, 6)), small(torch.ones(3, 6)))
    folded = fxprune.finalize(gated)
    assert [type(m).__name__ for _, m in folded.named_children()] == ["Linear", "ReLU", "Linear"]


class OfNothing(nn.Module):
    """A layer that reads nothing but dead units, what training computes of it, and another path."""

    def __init__(self, middle: nn.Module) -> None:
        super().__init__()
        self.first, self.second, self.middle = nn.Linear(4, 6), nn.Linear(6, 8), middle
        self.third, self.beside, self.last = nn.Linear(8, 5), nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.middle(F.relu(self.second(F.relu(self.first(x)))))
        return self.last(F.relu(self.third(y) + self.beside(x)))


def silenced(middle: nn.Module) -> OfNothing:
    model = randomise(OfNothing(middle)).double()
    assert isinstance(model, OfNothing)
    with torch.no_grad():
        model.first.weight[:], model.first.bias[:] = 0, -1
        model.second.bias.abs_()  # of a dropout, 0 is a constant in both modes
    return model


MIDDLES = [nn.BatchNorm1d(8), nn.Dropout(0.5), nn.AlphaDropout(0.5)]


@pytest.mark.parametrize("middle", MIDDLES, ids=lambda middle: type(middle).__name__)
def test_without_folding_a_constant_is_one_in_training_too(middle: nn.Module) -> None:
    # In evaluation it was another than in training, which it was taken for.
    model, x = silenced(middle), torch.randn(16, 4).double()
    small = fxprune.finalize(model, x, fold=False)
    for training in (False, True):
        model.train(training)
        small.train(training)
        torch.manual_seed(1)
        expected = model(x)
        torch.manual_seed(1)
        assert error(expected, small(x)) < 1e-12
    assert not hasattr(fxprune.finalize(model, x), "third")


def test_without_folding_a_constant_that_statistics_have_settled_at_goes() -> None:
    norm = nn.BatchNorm1d(8, momentum=1.0)
    model, x = silenced(norm), torch.randn(16, 4).double()
    model.train()(x)  # the mean is the constant now
    small = fxprune.finalize(model, x, fold=False)
    assert not hasattr(small, "third")
    assert error(model.train()(x), small.train()(x)) < 1e-9


class Learnt(nn.Module):
    """Scales and shifts that a forward brings into shape, some where they begin."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)
        self.scale, self.shift = nn.Parameter(torch.rand(8) + 0.5), nn.Parameter(torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x) * self.scale[:, None, None] + self.shift.view(-1, 1, 1)
        return self.last(F.relu(x)).mean((2, 3))


def test_without_folding_parameters_are_no_constants() -> None:
    x = torch.randn(3, 3, 5, 5).double()
    gated = fxprune.instrument(randomise(Learnt()).double(), x)
    close_half(gated)
    small: Any = fxprune.finalize(gated, fold=False)
    assert small.scale.shape == small.shift.shape == (4,)
    for model in (gated, small):
        optimizer = torch.optim.SGD([p for n, p in model.named_parameters() if n[0] == "s"], lr=1.0)
        model(x).square().sum().backward()
        optimizer.step()
    torch.testing.assert_close(small(x), gated.eval()(x), rtol=1e-9, atol=1e-10)
    folded = fxprune.finalize(small)
    assert [name for name, _ in folded.named_children()] == ["first", "last"]
    assert not hasattr(folded, "scale")


class Wrapper(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


@pytest.mark.parametrize("wrap", [Wrapper, torch.compile], ids=["a wrapper", "torch.compile"])
def test_a_wrapped_model_is_finalised(wrap: Callable[[nn.Module], nn.Module]) -> None:
    gated = fxprune.instrument(randomise(LeNet()), torch.randn(2, 1, 28, 28))
    close_half(gated)
    small = fxprune.finalize(wrap(gated))
    assert small.get_submodule("conv1").out_channels == 10
    assert fxprune.inspect(wrap(gated)).rows[0].live == 10


def test_a_net_dead_end_to_end_stays_a_net() -> None:
    gated = fxprune.instrument(randomise(LeNet()), torch.randn(2, 1, 28, 28))
    gates: Any = gated.gates
    with torch.no_grad():
        gates.width.zero_()
    small = fxprune.finalize(gated)
    x = torch.randn(4, 1, 28, 28)
    assert error(gated.eval()(x), small(x)) < 1e-6
    assert small.report.verification is not None
    assert small.report.verification.verdict == "inconclusive"


def test_the_result_needs_no_fxprune(without_fxprune: Callable[[nn.Module, str], str]) -> None:
    gated = fxprune.instrument(randomise(LeNet()), torch.randn(2, 1, 28, 28))
    close_half(gated)
    small = fxprune.finalize(gated)
    assert without_fxprune(small, "tuple(m(torch.randn(3, 1, 28, 28)).shape)") == "(3, 10)"


class Untraceable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) if x.sum() > 0 else x


def nan_model() -> nn.Module:
    model = LeNet()
    model.conv2.weight.data[3, 1, 2, 2] = float("nan")
    return model


IMAGE = torch.randn(2, 1, 28, 28)


def compiled() -> Any:
    return torch.compile(LeNet(), backend="eager")


def scripted() -> Any:
    return torch.jit.trace(LeNet(), IMAGE)


def keyword_named() -> nn.Module:
    part = nn.Sequential()
    part.add_module("in", nn.Linear(4, 4))
    return nn.Sequential(part, nn.ReLU(), nn.Linear(4, 2))


MISTAKES: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "untraceable": (
        lambda: fxprune.instrument(Untraceable(), torch.randn(2, 4)),
        fxprune.TraceError,
        "Untraceable cannot be traced",
    ),
    "wrong shape": (
        lambda: fxprune.instrument(LeNet(), torch.randn(2, 3, 28, 28)),
        fxprune.ExampleInputError,
        r"float32\[2, 3, 28, 28\]",
    ),
    "too many inputs": (
        lambda: fxprune.instrument(LeNet(), (IMAGE, IMAGE)),
        fxprune.ExampleInputError,
        "do not fit LeNet.forward",
    ),
    "NaN": (lambda: fxprune.finalize(nan_model(), IMAGE), fxprune.ModelError, "conv2.weight"),
    "a compiled model": (
        lambda: fxprune.instrument(compiled(), IMAGE),
        fxprune.ModelError,
        "the model is compiled; pass what it was made from",
    ),
    "a script": (
        lambda: fxprune.instrument(scripted(), IMAGE),
        fxprune.TraceError,
        "pass the model that",
    ),
    "empty inputs": (
        lambda: fxprune.instrument(LeNet(), IMAGE[:0]),
        fxprune.ExampleInputError,
        "are empty",
    ),
    "a keyword as a name": (
        lambda: fxprune.instrument(keyword_named(), torch.ones(2, 4)),
        fxprune.TraceError,
        "named 'in', a keyword",
    ),
    "nothing to gate": (
        lambda: fxprune.instrument(nn.Sequential(nn.Linear(4, 4), nn.Softmax(1)), torch.ones(2, 4)),
        fxprune.NothingToDoError,
        "no gate could be inserted",
    ),
    "nothing to gate but in what cannot be traced": (
        lambda: fxprune.instrument(nn.Sequential(nn.Linear(4, 4), Untraceable()), torch.ones(2, 4)),
        fxprune.NothingToDoError,
        "1: it could not be traced into: .*gt is a tensor",
    ),
    "instrumented twice": (
        lambda: fxprune.instrument(fxprune.instrument(LeNet(), IMAGE), IMAGE),
        fxprune.GateError,
        "instrumented already",
    ),
    "no inputs to guess": (
        lambda: fxprune.instrument(nn.Bilinear(3, 4, 5)),
        fxprune.ExampleInputError,
        "pass example_inputs",
    ),
    "penalty of a plain model": (
        lambda: fxprune.penalty(LeNet()),
        fxprune.GateError,
        "has no gates",
    ),
    "unwritable file": (
        lambda: fxprune.export_onnx(LeNet(), "/nowhere/at/all/x.onnx", IMAGE),
        fxprune.ExportError,
        "nowhere",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_gives_one_clear_error(name: str) -> None:
    action, kind, message = MISTAKES[name]
    with pytest.raises(kind, match=message) as caught:
        action()
    assert len(str(caught.value)) < 600


def test_weights_merged_in_a_short_dtype_may_be_off_by_its_rounding() -> None:
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten()]
    for dtype in (torch.float16, torch.bfloat16):
        model = randomise(nn.Sequential(*layers, nn.Linear(512, 5)).eval()).to(dtype)
        small: Any = fxprune.finalize(model, torch.randn(2, 3, 8, 8, dtype=dtype))
        assert small.report.verification.verdict != "different"
        assert small.report.passes["fold_batch_norm"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_model_of_another_dtype_is_proved_too(dtype: torch.dtype) -> None:
    model = randomise(nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 3))).to(dtype)
    gated = fxprune.instrument(model, torch.randn(2, 3, dtype=dtype))
    assert close_half(gated) == 4
    small: Any = fxprune.finalize(gated)
    assert small.report.verification.verdict == "equal"
    assert all(parameter.dtype == dtype for parameter in small.parameters())


class Frozen(nn.Module):
    """A network that overwrites what has gradients without telling them, in training only."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.head = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Any:
        hidden = F.relu(self.hidden(x))
        if self.training:
            with torch.no_grad():
                hidden.clamp_(max=2)
        return self.head(hidden)


def test_what_training_does_otherwise_is_reported() -> None:
    with pytest.raises(fxprune.TraceError, match="relu while gradients are off"):
        fxprune.instrument(Frozen().train(), torch.randn(2, 6))
    gated = fxprune.instrument(Frozen().eval(), torch.randn(2, 6))
    assert any(change.where == "training" for change in gated.report.refused)
    plain = fxprune.instrument(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval())
    assert not plain.report.refused


class ShiftedNorm(nn.Module):
    """The norm of Gemma: its weight is cast, and counted from 1."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(6) / 3)
        self.hidden, self.head = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        x = (wide * (1.0 + self.weight.float())).type_as(x)
        return self.head(F.relu(self.hidden(x)))


def test_constants_computed_in_float32_are_proved_in_float64() -> None:
    gated = fxprune.instrument(randomise(ShiftedNorm()), torch.randn(3, 6))
    assert close_half(gated) > 0
    proof = fxprune.finalize(gated).report.verification
    assert proof is not None and proof.verdict == "equal" and proof.error["float64"] < 1e-12


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning")
def test_parts_made_by_a_script_are_kept_whole() -> None:
    script = torch.jit.script(nn.Sequential(nn.Linear(8, 8), nn.Tanh()))
    model = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 8), script, nn.Linear(8, 3))
    gated = fxprune.instrument(model.eval(), torch.randn(4, 6))
    assert close_half(gated) == 6
    small: Any = fxprune.finalize(gated)
    assert small.report.verification.verdict == "equal"


class Counting(nn.Module):
    """It counts its runs, and adds an identity that somebody lets require gradients (PointNet)."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 9)
        self.runs: Tensor
        self.register_buffer("runs", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.runs.add_(1)
        eye = torch.eye(3, requires_grad=True).repeat(x.shape[0], 1, 1)
        return self.down(F.relu(self.up(x))).view(-1, 3, 3) + eye


def test_runs_that_instrument_needs_are_not_counted() -> None:
    model, x = Counting().eval(), torch.randn(2, 6)
    model(x)
    gated: Any = fxprune.instrument(model, x)
    assert (int(model.runs), int(gated.runs)) == (1, 1)


def test_constants_that_require_gradients_are_copied() -> None:
    gated = fxprune.instrument(Counting().eval(), torch.randn(2, 6))
    assert close_half(gated) == 4
    small: Any = fxprune.finalize(gated)
    assert small.report.verification.verdict == "equal"


class Deciding(nn.Module):
    """Python decides here by numbers, so that its parts are gated."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = small_net(), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return self.second(y) if y.sum() > -1e9 else y


def small_net() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 7), nn.ReLU(), nn.Linear(7, 5))


@pytest.mark.parametrize("kind", [small_net, Deciding])
def test_example_inputs_follow_a_model_to_another_dtype(
    kind: Callable[[], nn.Module], tmp_path: Path
) -> None:
    gated: Any = fxprune.instrument(randomise(kind()), torch.randn(4, 6)).double()
    close_half(gated)
    if kind is small_net:
        gated = fxprune.compact(gated)
    x = torch.randn(3, 6, dtype=torch.float64)
    small = fxprune.finalize(gated)
    assert error(gated.eval()(x), small(x)) < 1e-12
    if kind is small_net:
        fxprune.export_onnx(small.float(), tmp_path / "small.onnx")
    budget = fxprune.Budget(gated, parameters=0.9, steps=1)
    budget.finish()
    assert budget.frozen


def set_default(default: Any) -> None:
    if isinstance(default, torch.dtype):
        torch.set_default_dtype(default)
    else:
        torch.set_default_device(default)


@pytest.mark.parametrize("default", ["meta", torch.float64, torch.bfloat16])
def test_another_default_than_the_models_is_no_matter(default: Any, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1))
    x, y = torch.randn(2, 3, 8, 8), torch.randn(2, 4, 6, 6)
    randomise(model)
    try:
        set_default(default)
        gated: Any = fxprune.instrument(model, x)
        assert all(gate.dtype == torch.float32 for gate in gated.gates.parameters())
        budget = fxprune.Budget(gated, macs=0.7, steps=4, estimator="taylor")
        pulling: Any = fxprune.Budget(gated, macs=0.7, steps=4).state_dict()
        assert pulling["log_strength"].dtype == torch.float32
        optimizer = torch.optim.SGD(fxprune.parameter_groups(gated, lr=0.01))
        for _ in range(4):
            optimizer.zero_grad()
            (F.mse_loss(gated(x), y) + fxprune.penalty(gated) + budget.penalty()).backward()
            optimizer.step()
            budget.step()
        fxprune.inspect(gated)
        gated = fxprune.compact(gated, optimizer)
        small = fxprune.finalize(gated.eval())
        fxprune.export_onnx(small, tmp_path / "small.onnx")
        cost = fxprune.count_costs(small, ((x,), {}))
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    assert small.report.after and small.report.after.macs == cost.macs <= budget.target
    assert small.report.verification and small.report.verification.verdict == "equal"


def test_gradient_hooks_are_not_lost() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    next(model.parameters()).register_hook(lambda gradient: gradient * 0)
    with pytest.raises(ModelError, match=r"0\.weight has gradient hooks, .* instrument returns"):
        fxprune.instrument(model, torch.randn(2, 4))


def test_batch_norms_may_be_synchronised() -> None:
    x = torch.randn(3, 3, 8, 8)
    layers = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3)
    plain = randomise(nn.Sequential(*layers))
    convert: Any = nn.SyncBatchNorm.convert_sync_batchnorm
    before = fxprune.instrument(convert(copy.deepcopy(plain)), x)
    after = convert(fxprune.instrument(plain, x))
    for gated in (before, after):
        close_half(gated)
        small = fxprune.finalize(gated)
        assert not any(isinstance(module, nn.SyncBatchNorm) for module in small.modules())
        assert small.get_submodule("0").out_channels == 4
        assert torch.allclose(small(x), gated.eval()(x), atol=1e-5)
        kept = fxprune.finalize(gated, fold=False)
        assert kept.get_submodule("1").num_features == 4
