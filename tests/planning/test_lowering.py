"""What runs instead of a gated graph: the same numbers, to the bit at open gates, for less."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.graph import CodeGen
from torch.nn.utils import parametrize

import fxprune
from fxprune.gating import deferral, gated_reads
from fxprune.gating.gates import width_gate
from fxprune.planning.lowering import lower_, raise_
from tests.conftest import randomise, reloaded


class ResNet(nn.Module):
    """A stem with a pool, a stream of two blocks, the second with groups, and a head."""

    def __init__(self, activation: Callable[[], nn.Module] = lambda: nn.ReLU(inplace=True)) -> None:
        super().__init__()
        self.stem, self.bn, self.pool = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.MaxPool2d(3, 2, 1)
        self.a, self.bn_a = nn.Conv2d(8, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.b, self.bn_b = nn.Conv2d(6, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.c, self.bn_c = (
            nn.Conv2d(8, 6, 3, padding=1, padding_mode="circular"),
            nn.BatchNorm2d(6),
        )
        self.d, self.bn_d = nn.Conv2d(6, 8, 3, padding=1, groups=2), nn.BatchNorm2d(8)
        self.act, self.average, self.head = activation(), nn.AdaptiveAvgPool2d(1), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.act(self.bn(self.stem(x))))
        x = self.act(x + self.bn_b(self.b(self.act(self.bn_a(self.a(x))))))
        x = self.act(self.bn_d(self.d(self.act(self.bn_c(self.c(x))))) + x)
        return self.head(self.average(x).flatten(1))


class Tokens(nn.Module):
    """Linear layers on the last of three axes, dropout, and a layer read by two."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 12), nn.Linear(12, 6)
        self.left, self.right = nn.Linear(6, 3), nn.Linear(6, 3)
        self.dropout = nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.second(self.dropout(F.gelu(self.first(x)))))
        return self.left(x).tanh() + self.right(x)


class Depthwise(nn.Module):
    """A chain in which every unit has one gate: convolutions, whole and depthwise, and a pool."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv1d(3, 8, 3), nn.Conv1d(8, 16, 3, groups=8)
        self.c, self.pool, self.d = nn.Conv1d(16, 6, 1), nn.AvgPool1d(2), nn.Conv1d(6, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(F.hardswish(self.a(x)))
        return self.d(self.pool(F.leaky_relu(self.c(x))))


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "resnet": (ResNet, (8, 3, 24, 24)),
    "resnet with PReLU": (lambda: ResNet(lambda: nn.PReLU()), (8, 3, 24, 24)),
    "tokens": (Tokens, (8, 7, 5)),
    "depthwise": (Depthwise, (8, 3, 40)),
}


def gated_model(name: str, *, closed: bool = True) -> tuple[Any, Tensor]:
    """Return a gated model in float64, a third of its gates closed, and a batch for it."""
    make, shape = CASES[name]
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    gated: Any = fxprune.instrument(randomise(make().double()), x[:2]).double()
    if closed:
        gated.gates.width.data[::3] = 0.3
    return gated, x


def as_written(gated: Any) -> Any:
    """Return a copy that runs what its graph says."""
    twin = copy.deepcopy(gated)
    raise_(twin)
    twin.recompile()
    return twin


def gradients(model: Any, x: Tensor) -> dict[str, Tensor]:
    """Return outputs, and gradients of inputs and parameters, for a loss that weighs outputs."""
    torch.manual_seed(2)  # of dropout
    x = x.clone().requires_grad_()
    output = model(x)
    weights = torch.linspace(-1, 2, output.numel(), dtype=output.dtype).view_as(output)
    parameters = dict(model.named_parameters())
    found = torch.autograd.grad((output * weights).sum(), [x, *parameters.values()])
    return {"output": output, "x": found[0], **dict(zip(parameters, found[1:], strict=True))}


def close(left: dict[str, Tensor], right: dict[str, Tensor], *, but: str = "") -> None:
    assert left["output"].std(0).min() > 1e-3
    for name in left.keys() - {but}:
        assert left[name].any(), name
        torch.testing.assert_close(left[name], right[name], rtol=1e-9, atol=1e-9)


def products(model: Any, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> int:
    """Count the activations that are multiplied in a run."""
    sizes: list[int] = []

    def count(value: Tensor, gate: Tensor) -> Tensor:
        sizes.append(value.numel())
        return width_gate(value, gate)

    with monkeypatch.context() as patch:
        for module in (deferral, gated_reads):
            patch.setattr(module, "width_gate", count)
        model(x)
    written = sum(f"_{width_gate.__name__}(" in line for line in model.code.splitlines())
    return len(sizes) + written


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_are_those_of_the_graph(
    name: str, training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    gated, x = gated_model(name)
    gated.train(training)
    written = as_written(gated)
    # A unit of a stream has several gates there; a closed gate before a pool would read its first.
    but = "gates.width" if name.startswith("resnet") else ""
    close(gradients(gated, x), gradients(written, x), but=but)
    for buffer, expected in zip(gated.buffers(), written.buffers(), strict=True):
        torch.testing.assert_close(buffer, expected)
    # What the last pool leaves of a map is less than the head's weights would be.
    assert products(gated, x, monkeypatch) == name.startswith("resnet")
    assert products(written, x, monkeypatch) == len(gated.gates.width_sites)


def test_a_stream_counts_each_of_its_readers_once() -> None:
    gated, x = gated_model("resnet")
    gated.eval()
    model, gates = gated, gated.gates
    sites = {site.name: site for site in gates.width_sites}
    stream = sites["act"].units
    assert stream == sites["act:3"].units == sites["act:5"].units
    hard = (gates.width.detach() >= 0.5).double()
    width = hard.clone().requires_grad_()

    def gate(name: str) -> Tensor:
        return width[list(sites[name].units)].view(1, -1, 1, 1)

    y = model.pool(F.relu(model.bn(model.stem(x))))
    y = F.relu(
        y + model.bn_b(model.b(gate("act:2") * F.relu(model.bn_a(model.a(y * gate("act"))))))
    )
    z = gate("act:4") * F.relu(model.bn_c(model.c(y * gate("act:3"))))
    y = gate("act:5") * F.relu(model.bn_d(model.d(z)) + y)
    output = model.head(model.average(y).flatten(1))
    weights = torch.linspace(-1, 2, output.numel(), dtype=output.dtype).view_as(output)
    (expected,) = torch.autograd.grad((output * weights).sum(), width)
    found = gradients(gated, x)
    torch.testing.assert_close(found["output"], output)
    assert expected[hard == 0].abs().min() > 1e-5
    torch.testing.assert_close(found["gates.width"], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_open_gates_change_no_bit(name: str, dtype: torch.dtype) -> None:
    make, shape = CASES[name]
    model = randomise(make().to(dtype))
    x = torch.randn(shape, dtype=dtype)
    gated = fxprune.instrument(model, x[:2], check=False).to(dtype)
    for mode in (False, True):
        outputs: list[Tensor] = []
        for one in (gated, model):
            torch.manual_seed(2)
            outputs.append(one.train(mode)(x))
        assert torch.equal(*outputs)


def test_open_gates_change_no_bit_under_autocast() -> None:
    gated, x = gated_model("resnet", closed=False)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(gated.float()(x.float()), as_written(gated)(x.float()))


def test_few_positions_are_cheaper_than_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    gated, x = gated_model("tokens")
    assert products(gated, x, monkeypatch) == 0
    few = x[4:6, :1]
    assert products(gated, few, monkeypatch) == 3  # one for every layer that reads a gated value
    close(gradients(gated, few), gradients(as_written(gated), few))


def test_exported_it_takes_batches_of_any_size() -> None:
    gated, x = gated_model("tokens")
    few = (x[:2, :1],)
    exported = torch.export.export(gated.eval(), few, dynamic_shapes=({0: torch.export.Dim("n")},))
    torch.testing.assert_close(exported.module()(x[:, :1]), gated(x[:, :1]))


# Copies of it.


@pytest.mark.parametrize(
    "again", [copy.deepcopy, reloaded, lambda model: reloaded(reloaded(model))]
)
def test_copies_have_the_graph_and_run_its_lowered_form(again: Callable[[Any], Any]) -> None:
    gated, x = gated_model("resnet")
    twin = again(gated)
    assert "defer_gate" in gated.code and twin.code == gated.code
    assert str(twin.graph) == str(gated.graph) and "defer_gate" not in str(gated.graph)
    assert torch.equal(twin(x), gated(x))
    assert torch.equal(fx.Interpreter(gated.eval()).run(x), as_written(gated)(x))


def test_an_edited_graph_is_lowered_anew() -> None:
    gated, x = gated_model("resnet")
    conv = next(node for node in gated.graph.nodes if node.target == "a")
    gate = conv.args[0].args[0]  # behind the pool
    with gated.graph.inserting_after(gate):
        extra = gated.graph.call_function(torch.neg, (gate,))
    gate.replace_all_uses_with(extra, delete_user_cb=lambda user: user is not extra)
    gated.recompile()
    close(gradients(gated, x), gradients(as_written(gated), x), but="gates.width")


def test_the_finalised_model_is_lowered_no_more() -> None:
    gated, x = gated_model("resnet")
    small = fxprune.finalize(reloaded(gated), x[:2])
    assert type(small.graph._codegen) is CodeGen and small._tracer_cls is None
    torch.testing.assert_close(small(x), gated.eval()(x))


def test_a_compacted_model_leaves_gates_to_the_weights_that_remain(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gated, x = gated_model("resnet")
    small = fxprune.compact(gated)
    assert "read_gated" in small.code
    assert products(gated, x, monkeypatch) == products(small, x, monkeypatch) == 1
    torch.testing.assert_close(small.eval()(x), gated.eval()(x))


def test_it_is_compiled_without_a_break() -> None:
    gated, x = gated_model("resnet")
    compiled = torch.compile(gated, fullgraph=True, backend="eager")
    found, expected = compiled(x), as_written(gated)(x)
    torch.testing.assert_close(found, expected)


# Who else may be there.


def test_who_listens_to_a_layer_hears_what_it_is_given() -> None:
    gated, x = gated_model("depthwise")
    heard: list[Tensor] = []
    gated.b.register_forward_pre_hook(lambda _, args: heard.append(args[0]))
    close(gradients(gated, x), gradients(as_written(gated), x))
    assert not heard[0][:, 0].any() and heard[0][:, 1].any()


def test_a_layer_may_be_another_by_the_time_it_runs() -> None:
    class Doubled(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    class Twice(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input + 1)

    gated, x = gated_model("tokens")
    parametrize.register_parametrization(gated.left, "weight", Doubled())
    gated.second = Twice(12, 6).double()
    close(gradients(gated, x), gradients(as_written(gated), x))


def test_a_pool_may_be_another_by_the_time_it_runs() -> None:
    class Whole(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x[..., ::2] + x.flip(1)[..., ::2]

    gated, x = gated_model("depthwise")
    gated.pool = Whole()
    close(gradients(gated, x), gradients(as_written(gated), x))


class Normed(nn.Module):
    """A sum that a batch norm reads before it is gated again."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)
        self.bn, self.c = nn.BatchNorm2d(4), nn.Conv2d(4, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        return self.c(F.relu(self.bn(x + self.b(x))))


def test_a_batch_norm_sees_what_is_gated() -> None:
    x = torch.randn(8, 3, 6, 6, dtype=torch.float64)
    gated: Any = fxprune.instrument(randomise(Normed().double()), x[:2]).double()
    gated.gates.width.data[::2] = 0.3
    written = as_written(gated)
    close(gradients(gated, x), gradients(written, x))
    torch.testing.assert_close(gated.bn.running_var, written.bn.running_var)


@pytest.mark.parametrize("where", ["bn", "act", "act_2", "width_gate_2"])
def test_an_activation_that_is_overwritten_is_multiplied_before(where: str) -> None:
    gated, x = gated_model("resnet")
    node = next(node for node in gated.graph.nodes if node.name == where)
    last = next(node for node in gated.graph.nodes if node.target == "c")
    before = gated.code.count("defer_gate(")
    with gated.graph.inserting_before(last):
        gated.graph.call_method("mul_", (node, 2))
    gated.recompile()
    assert gated.code.count("defer_gate(") == before - 1
    with torch.no_grad():
        torch.testing.assert_close(gated(x), as_written(gated)(x))


def test_a_graph_without_gates_runs_as_it_is() -> None:
    module = fx.symbolic_trace(ResNet())
    code = module.code
    lower_(module)
    assert module.code == code


class InPlace(nn.Module):
    """Three blocks whose sums are made in place, into what a layer or an activation made."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.mixed = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1)
        self.a, self.bn_a = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.b, self.bn_b = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.head = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu_(input=self.stem(x))
        branch = self.mixed(x)
        branch += x
        x = F.relu(branch)
        branch = self.bn_a(self.a(x))
        branch += x
        x = F.relu(branch)
        branch = F.relu(self.bn_b(self.b(x)))
        branch += x
        return self.head(F.relu(branch))


def test_sums_in_place_stay_so_where_a_layer_made_what_is_overwritten() -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4, 3, 9, 9, generator=generator, dtype=torch.float64)
    model = randomise(InPlace().double())
    gated: Any = fxprune.instrument(model, x).double()
    loaded = reloaded(gated)
    for one in (gated, loaded):
        assert one.code.count("add_to(") == 2  # the third is of an activation, which a gate reads
        sums = [node.target for node in one.graph.nodes if node.name.startswith("add")]
        assert len(sums) == 3 and deferral.add_to not in sums
        one.gates.width.data[::3] = 0.3
        close(gradients(one, x), gradients(as_written(one), x), but="gates.width")
        proof = fxprune.finalize(one, x).report.verification
        assert proof and proof.verdict == "equal"
