"""Tracing: the same function in training and evaluation, source lines, and leaves where it must."""

import copy
import inspect
import operator
import pickle
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.fx.proxy import TraceError as FxTraceError

import fxprune
from fxprune.errors import ExampleInputError, ModelError, TraceError, where
from fxprune.testing import close_half, error
from fxprune.tracing.both_modes import trace
from fxprune.tracing.signatures import bound_arguments
from tests.conftest import randomise


class Model(nn.Module):
    """Calls a function that may use its layer and its training flag."""

    def __init__(self, function: Callable[["Model", Tensor], Any]) -> None:
        super().__init__()
        self.function = function
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


class Dropped(nn.Module):
    """A layer and functional dropout, which follows the module's flag."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(F.relu(self.layer(x)), 0.5, self.training)


class Branches(nn.Module):
    """Python that depends on data: no trace gets past it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x)
        if x.sum() > 0:
            return x
        return -x


class Outer(nn.Module):
    """Something traceable round something that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Linear(4, 4)
        self.branches = Branches()

    def forward(self, x: Tensor) -> Tensor:
        return self.branches(F.relu(self.before(x))) * 2


class Options(nn.Module):
    """Arguments of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(
        self,
        x: Tensor,
        flag: bool = False,
        scale: Tensor | None = None,
        *,
        sizes: tuple[int, int] = (2, 3),
        mode: str = "plain",
    ) -> Tensor:
        x = self.layer(x)
        if flag:
            x = -x
        if scale is not None:
            x = x * scale
        return x + sizes[0] if mode == "plain" else x


class Gathers(nn.Module):
    """Takes any arguments."""

    def forward(self, x: Tensor, *rest: Tensor, **named: Tensor) -> Tensor:
        for other in rest:
            x = x + other
        for name in sorted(named):
            x = x * named[name]
        return x


def traced(model: nn.Module, *names: str) -> fx.GraphModule:
    module = trace(model, dict.fromkeys(names or ("x",), torch.randn(2, 4)))
    module.recompile()
    return module


def targets(module: fx.GraphModule, op: str) -> list[str]:
    return [str(node.target) for node in module.graph.find_nodes(op=op)]


def calls(module: fx.GraphModule) -> list[Any]:
    return [n.target for n in module.graph.nodes if n.op.startswith("call_")]


def placeholders(module: fx.GraphModule) -> list[str]:
    return targets(module, "placeholder")


def is_random(module: nn.Module, x: Tensor) -> bool:
    return not torch.equal(module(x), module(x))


def line_of(function: Callable[..., Any], text: str) -> int:
    lines, start = inspect.getsourcelines(function)
    return start + next(place for place, line in enumerate(lines) if text in line)


# Source lines.


def test_every_operator_knows_the_users_line() -> None:
    module = traced(Outer())
    expected = f"{__file__}:{line_of(Outer.forward, 'self.branches')}"
    found = {n.name: n.meta["source"] for n in module.graph.nodes if n.op.startswith("call_")}
    assert found == dict.fromkeys(("before", "relu", "branches", "mul"), expected)


def test_lines_are_those_of_the_submodule_that_computes() -> None:
    module = traced(nn.Sequential(Dropped(), nn.Tanh()), "input")
    [relu] = module.graph.find_nodes(op="call_function", target=F.relu)
    assert relu.meta["source"] == f"{__file__}:{line_of(Dropped.forward, 'F.relu')}"


def test_inputs_and_outputs_are_where_the_forward_begins() -> None:
    module = traced(Outer())
    first = f"{__file__}:{inspect.getsourcelines(Outer.forward)[1]}"
    ends = [n for n in module.graph.nodes if n.op in ("placeholder", "output")]
    assert [node.meta["source"] for node in ends] == [first] * 2


def test_packages_whose_name_begins_with_torch_are_the_users() -> None:
    file = f"{Path(torch.__file__).parent}vision/models.py"
    names: dict[str, Any] = {}
    exec(compile("def function(model, x):\n    return model.layer(x)", file, "exec"), names)
    [node] = traced(Model(names["function"])).graph.find_nodes(op="call_module", target="layer")
    assert node.meta["source"] == f"{file}:2"


def test_errors_name_the_users_line() -> None:
    module = traced(Outer())
    [relu] = module.graph.find_nodes(op="call_function", target=F.relu)
    line = line_of(Outer.forward, "F.relu")
    assert where(relu) == f"relu (call_function torch.nn.functional.relu) at {__file__}:{line}"


# Training and evaluation.


def test_functional_dropout_follows_the_flag_after_the_trace() -> None:
    module, x = traced(Dropped()), torch.randn(8, 64)
    assert is_random(module.train(), x)
    assert not is_random(module.eval(), x)
    assert is_random(module.train(), x)


def test_functional_dropout_follows_the_flag_of_its_own_submodule() -> None:
    model = nn.Sequential(nn.Sequential(Dropped()), nn.Linear(64, 64))
    module, x = traced(model, "input"), torch.randn(8, 64)
    assert is_random(module.train(), x)
    module.get_submodule("0.0").eval()
    assert not is_random(module, x)
    assert is_random(module.train(), x)
    assert not is_random(module.eval(), x)


def test_dropout_in_training_equals_the_models_own() -> None:
    model = nn.Sequential(Dropped(), Dropped(), nn.Dropout(0.3))
    module, x = traced(model, "input"), torch.randn(8, 64)
    for training in (True, False):
        torch.manual_seed(1)
        expected = model.train(training)(x)
        torch.manual_seed(1)
        assert torch.equal(module.train(training)(x), expected)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.booleans(), min_size=7, max_size=7))
def test_flags_are_those_the_model_had(flags: list[bool]) -> None:
    model = nn.Sequential(
        nn.Linear(64, 64), nn.Sequential(Dropped(), nn.BatchNorm1d(64)), nn.ReLU()
    )
    modules = dict(model.named_modules())
    for module, flag in zip(modules.values(), flags, strict=True):
        module.training = flag
    result = dict(traced(model, "input").named_modules())
    assert {name: result[name].training for name in modules} == dict(
        zip(modules, flags, strict=True)
    )
    assert [module.training for module in modules.values()] == flags


def test_flags_are_restored_when_the_trace_fails() -> None:
    model = Branches().train()
    model.layer.eval()
    with pytest.raises(TraceError):
        traced(model)
    assert (model.training, model.layer.training) == (True, False)


def test_a_model_that_is_the_same_in_both_modes_is_not_of_evaluation_only() -> None:
    assert traced(nn.Sequential(Dropped(), nn.Dropout()), "input").meta["evaluation_only"] is False


def test_constant_tensors_do_not_make_the_modes_differ() -> None:
    module = traced(Model(lambda m, x: m.layer(x) * torch.tensor([1.0, 2.0, 3.0, 4.0])))
    assert module.meta["evaluation_only"] is False


FOLLOW_THE_MODE: dict[str, Callable[[Model, Tensor], Any]] = {
    "a flag": lambda m, x: F.dropout(m.layer(x), 0.5, m.training),
    "a flag the other way round": lambda m, x: F.dropout(m.layer(x), 0.5, not m.training),
    "a rate": lambda m, x: F.dropout(m.layer(x), 0.5 if m.training else 0.0, training=True),
    "a rate that is the integer 0": lambda m, x: F.dropout(m.layer(x), 0.5 if m.training else 0),
    "a factor": lambda m, x: m.layer(x) * (2.0 if m.training else 1.0),
    "a flag in a list": lambda m, x: _scaled_by(m.layer(x), [2.0, m.training]),
    "nothing, beside a size": lambda m, x: F.dropout(x.view(torch.Size([4, 2])), 0.5, m.training),
}


@fx.wrap
def _scaled_by(x: Tensor, factors: list[float]) -> Tensor:
    for factor in factors:
        x = x * factor
    return x


@pytest.mark.parametrize("what", FOLLOW_THE_MODE)
def test_flags_and_rates_follow_the_mode(what: str) -> None:
    model, x = Model(FOLLOW_THE_MODE[what]), torch.randn(2, 4)
    module = traced(model)
    module.graph.lint()
    assert module.meta["evaluation_only"] is False
    for training in (True, False, True):
        torch.manual_seed(1)
        expected = model.train(training)(x)
        torch.manual_seed(1)
        assert torch.equal(module.train(training)(x), expected)


MODES_DIFFER: dict[str, Callable[[Model, Tensor], Any]] = {
    "an operator": lambda m, x: m.layer(x) if m.training else m.layer(x).neg(),
    "one more operator": lambda m, x: m.layer(x).neg().neg() if m.training else m.layer(x),
    "an auxiliary output": lambda m, x: (m.layer(x), x) if m.training else m.layer(x),
    "a main output alone": lambda m, x: m.layer(x) if m.training else (m.layer(x), x),
    "a number": lambda m, x: m.layer(x) * (2 if m.training else 1),
    "a longer list": lambda m, x: torch.cat([m.layer(x), x] if m.training else [m.layer(x)]),
    "a slice": lambda m, x: m.layer(x)[:, : 3 if m.training else 4],
    "an operand": lambda m, x: m.layer(x).neg() + (x if m.training else x.neg().neg()),
    "a number for an operand": lambda m, x: m.layer(x) * (2.0 if m.training else x),
    "an operand for a number": lambda m, x: m.layer(x) * (x if m.training else 2.0),
    "a key": lambda m, x: {("a" if m.training else "b"): m.layer(x)},
    "a constant tensor": lambda m, x: m.layer(x) * torch.tensor(2.0 if m.training else 1.0),
}


@pytest.mark.parametrize("what", MODES_DIFFER)
def test_a_model_whose_modes_differ_is_traced_as_in_evaluation(what: str) -> None:
    model, x = Model(MODES_DIFFER[what]), torch.randn(2, 4)
    module = traced(model)
    assert module.meta["evaluation_only"] is True
    torch.manual_seed(1)
    expected = model.eval()(x)
    torch.manual_seed(1)
    torch.testing.assert_close(module.eval()(x), expected, rtol=0, atol=0)


# What cannot be traced.


def test_a_submodule_that_cannot_be_traced_becomes_a_leaf_that_says_why() -> None:
    model, x = Outer(), torch.randn(2, 4)
    module = traced(model)
    assert calls(module)[:1] + calls(module)[2:3] == ["before", "branches"]
    [leaf] = module.graph.find_nodes(op="call_module", target="branches")
    assert leaf.meta["leaf_because"].startswith("TraceError: symbolically traced variables")
    assert torch.equal(module(x), model(x))


def test_the_leaf_is_as_small_as_possible_however_deep_it_stands() -> None:
    model, x = nn.Sequential(nn.Sequential(nn.Sequential(Outer()), nn.Tanh())), torch.randn(2, 4)
    module = traced(model, "input")
    leaves = [n.target for n in module.graph.nodes if "leaf_because" in n.meta]
    assert leaves == ["0.0.0.branches"]
    assert "0.0.0.before" in calls(module)
    assert torch.equal(module(x), model(x))


def test_flags_are_read_from_the_right_module_behind_a_leaf() -> None:
    class Behind(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.outer = Outer()

        def forward(self, x: Tensor) -> Tensor:
            return F.dropout(self.outer(x), 0.5, self.training)

    module = traced(Behind())
    assert targets(module, "get_attr") == ["training"]


def test_nothing_of_an_attempt_that_failed_stays_in_the_graph() -> None:
    class Shares(nn.Module):
        """Reads a parameter that its untraceable submodule has read as well."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 4))
            self.branches = Reads(self.weight)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(self.branches(x), self.weight)

    class Reads(nn.Module):
        def __init__(self, weight: nn.Parameter) -> None:
            super().__init__()
            self.weight = weight

        def forward(self, x: Tensor) -> Tensor:
            y = F.linear(x, self.weight)
            return y if y.sum() > 0 else -y

    model, x = Shares(), torch.randn(2, 4)
    module = traced(model)
    module.graph.lint()
    assert [str(n.target) for n in module.graph.nodes][:3] == ["x", "branches", "weight"]
    assert torch.equal(module(x), model(x))


class DropPath(nn.Module):
    """Stochastic depth, as timm and transformers have it."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        kept = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(0.5)
        return x * kept.div_(0.5)


class Deep(nn.Module):
    """A residual block that is left out at random while training."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.drop = nn.Linear(4, 16), nn.Linear(16, 4), DropPath()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(self.down(F.relu(self.up(x))))


def test_what_does_something_in_training_only_is_kept_whole() -> None:
    model, x = nn.Sequential(Deep(), Deep(), nn.Linear(4, 3)), torch.randn(8, 4)
    gated = fxprune.instrument(model.train(), x)
    for training in (True, False):
        torch.manual_seed(1)
        expected = model.train(training)(x)
        torch.manual_seed(1)
        assert torch.equal(gated.train(training)(x), expected)
    assert close_half(gated) == 16
    small: Any = fxprune.finalize(gated)
    assert small.report.verification.verdict == "equal"
    assert small.get_submodule("0.up").out_features == 8
    assert not any("drop" in name for name, _ in small.named_modules())


class Silent(nn.Module):
    """A layer that no gradient reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return self.layer(x)


def test_what_a_submodule_computes_without_gradients_is_detached() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(Silent()), nn.Linear(4, 2))
    module = traced(model, "input")
    assert calls(module) == ["0", "1.0.layer", "detach", "2"]
    module(torch.randn(3, 4)).sum().backward()
    trained = {name for name, p in module.named_parameters() if p.grad is not None}
    assert trained == {"2.weight", "2.bias"}


def test_a_model_that_switches_gradients_off_is_of_both_modes() -> None:
    model, x = Silent(), torch.randn(3, 4)
    module = traced(model)
    assert module.meta["evaluation_only"] is False
    assert torch.equal(module(x), model(x)) and not module(x).requires_grad


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_trace_is_the_same_where_gradients_are_off_anyway(mode: Any) -> None:
    model = nn.Sequential(Silent(), Dropped())
    with mode():
        module = traced(model, "input")
    assert module.meta["evaluation_only"] is False
    assert calls(module) == calls(traced(model, "input"))
    assert calls(module)[:2] == ["0.layer", "detach"]


class Memory:
    """What a language model keeps of the tokens before: an object, grown in place."""


class Attributes:
    """An object that takes any attribute for a key."""

    def __getattr__(self, name: str) -> Any:
        return vars(self)[name]


@pytest.mark.parametrize("kind", [Memory, Attributes])
def test_an_object_no_graph_holds_is_named_with_a_remedy(kind: type) -> None:
    with pytest.raises(TraceError, match=rf"a {kind.__name__}, .*use_cache = False"):
        traced(Model(lambda m, x: (m.layer(x), kind())))


def test_a_model_that_branches_at_its_top_is_refused_with_place_and_remedy() -> None:
    with pytest.raises(TraceError) as caught:
        traced(Branches())
    message = str(caught.value)
    assert message.startswith(
        "Branches cannot be traced: TraceError: symbolically traced variables"
    )
    assert f"{__file__}:{line_of(Branches.forward, 'if x.sum()')}" in message
    assert "into a submodule of its own" in message
    assert isinstance(caught.value.__cause__, FxTraceError)


# Arguments.


def test_arguments_left_out_are_constants_and_leave_no_trace() -> None:
    model, x = Options(), torch.randn(2, 4)
    module = traced(model)
    assert placeholders(module) == ["x"]
    assert calls(module) == ["layer", operator.add]
    assert torch.equal(module(x), model(x))


def test_arguments_are_given_by_keyword_over_a_gap() -> None:
    model, x, scale = Options(), torch.randn(2, 4), torch.randn(4)
    module = traced(model, "x", "scale")
    assert placeholders(module) == ["x", "scale"]
    assert torch.equal(module(x, scale=scale), model(x, scale=scale))


def test_an_argument_that_was_left_out_cannot_be_given_later() -> None:
    with pytest.raises(TypeError):
        traced(Options())(torch.randn(2, 4), True)


@pytest.mark.parametrize("count", [0, 1, 3])
@pytest.mark.parametrize("names", [(), ("b",), ("b", "a")])
def test_gathered_arguments_become_inputs_one_by_one(count: int, names: tuple[str, ...]) -> None:
    model, x = Gathers(), torch.randn(2, 4)
    rest = tuple(torch.randn(4) for _ in range(count))
    named = {name: torch.randn(4) for name in names}
    module = trace(model, bound_arguments(model, (x, *rest), named))
    module.recompile()
    assert placeholders(module) == ["x", *(f"rest_{i}" for i in range(count)), *names]
    assert torch.equal(module(x, *rest, **named), model(x, *rest, **named))


def test_inputs_are_bound_to_the_names_of_forward() -> None:
    bound = bound_arguments(Options(), (1,), {"mode": "other", "scale": 2})
    assert bound == {"x": 1, "scale": 2, "mode": "other"}


@pytest.mark.parametrize(
    ("args", "kwargs"), [((), {}), ((1, 2, 3, 4), {}), ((1,), {"nonsense": 2}), ((1,), {"x": 2})]
)
def test_inputs_that_do_not_fit_forward_are_refused(
    args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> None:
    with pytest.raises(
        ExampleInputError, match=r"do not fit Options\.forward\(x: .*example_inputs"
    ):
        bound_arguments(Options(), args, kwargs)


@pytest.mark.filterwarnings("ignore:.*torch.jit:Warning")
def test_a_compiled_script_is_refused() -> None:
    script: Any = torch.jit.trace(nn.Linear(4, 4), torch.randn(2, 4))
    with pytest.raises(TraceError, match="forward is not Python"):
        bound_arguments(script, (torch.randn(2, 4),), {})


# The result.


def test_the_trace_shares_the_models_parameters() -> None:
    model = Outer()
    module = traced(model)
    assert {id(p) for p in module.parameters()} == {id(p) for p in model.parameters()}
    assert module.state_dict().keys() == model.state_dict().keys()


def test_arithmetic_on_buffers_follows_the_buffers() -> None:
    class Centred(nn.Module):
        """Keeps a running mean of its own, as many home-made normalisations do."""

        def __init__(self) -> None:
            super().__init__()
            self.mean: Tensor
            self.register_buffer("mean", torch.zeros(4))

        def forward(self, x: Tensor) -> Tensor:
            self.mean.copy_(0.9 * self.mean + 0.1 * x.mean(0))
            return x - self.mean * 1

    model = Centred()
    module, batches = traced(copy.deepcopy(model)), torch.randn(3, 8, 4)
    for batch in batches:
        assert torch.equal(module(batch), model(batch))
    assert torch.equal(module.get_buffer("mean"), model.mean)
    assert module.state_dict().keys() == model.state_dict().keys()


def test_a_trace_can_be_traced_again() -> None:
    model, x = nn.Sequential(Dropped(), nn.Linear(64, 2)), torch.randn(8, 64)
    once = traced(model, "input")
    twice = traced(once, "input")
    assert torch.equal(twice.eval()(x), model.eval()(x))
    assert is_random(twice.train(), x)


def test_a_trace_survives_pickling() -> None:
    model, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True)), torch.randn(2, 4)
    loaded = pickle.loads(pickle.dumps(traced(model, "input")))
    assert torch.equal(loaded(x), model(x))


def test_a_trace_needs_nothing_of_ours_to_be_unpickled() -> None:
    dumped = pickle.dumps(traced(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), "input"))
    assert b"fxprune" not in dumped


def test_long_chains_are_traced_without_recursion() -> None:
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Identity() for _ in range(1500)))
    assert len(calls(traced(model, "input"))) == 1500


class NormInFloat32(nn.Module):
    """A norm that leaves autocast, as norms and position codes of many models do."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return self.norm(x.float() * 3.0)


def test_a_part_that_leaves_autocast_is_kept_whole() -> None:
    model = nn.Sequential(
        *(nn.Conv2d(3, 8, 1), NormInFloat32(8), nn.ReLU(), nn.Conv2d(8, 6, 1), nn.ReLU()),
        nn.Conv2d(6, 2, 1),
    )
    x = torch.randn(2, 3, 4, 4)
    gated = fxprune.instrument(model, x)
    assert [str(n.target) for n in gated.graph.nodes if n.meta.get("leaf_because")] == ["1"]
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            assert torch.equal(gated(x), model(x))


def test_a_model_that_switches_autocast_itself_is_refused() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 1)

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return self.conv(x).relu().mean((2, 3))

    with pytest.raises(TraceError, match="switches autocast"):
        fxprune.instrument(Mixed(), torch.randn(2, 3, 4, 4))


class Encoded(nn.Module):
    """A stack of torch's transformer layers, which looks at its masks and packs what they leave."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.first, self.second, self.third = nn.Linear(3, 8), nn.Linear(8, 6), nn.Linear(6, 2)
        self.stack = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        x = self.stack(self.first(x), src_key_padding_mask=padding)
        return self.third(self.second(x).relu())


@pytest.mark.parametrize("masked", [False, True])
def test_a_stack_of_layers_is_gated_whatever_its_masks(masked: bool) -> None:
    x, padding = torch.randn(2, 5, 3), torch.zeros(2, 5, dtype=torch.bool)
    padding[0, 3:] = True
    gated: Any = fxprune.instrument(Encoded(), (x, padding) if masked else x)
    assert len(fxprune.architecture(gated)) == 3
    close_half(gated)
    small: Any = fxprune.finalize(gated)
    assert small.report.verification.verdict == "equal"


class Translating(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(20, 8), nn.Linear(8, 20)
        self.both = nn.Transformer(8, 2, 1, 1, 16, batch_first=True)

    def forward(self, source: Tensor, target: Tensor, causal: bool = False) -> Tensor:
        mask = None
        if causal:
            mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1])
        return self.head(self.both(self.words(source), self.words(target), tgt_mask=mask))


@pytest.mark.parametrize("causal", [False, True])
def test_torchs_transformer_is_gated_whatever_its_masks(causal: bool) -> None:
    inputs = (torch.randint(0, 20, (2, 5)), torch.randint(0, 20, (2, 4)), causal)
    gated: Any = fxprune.instrument(Translating(), inputs)
    assert len(fxprune.architecture(gated)) == 2
    close_half(gated)
    small: Any = fxprune.finalize(gated)
    assert small.report.verification.verdict == "equal"
    assert small.report.after.parameters < small.report.before.parameters


class Rounding(nn.Module):
    """Computes something a little else where torch may fuse layers, as a fused one does."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        scale = 1 + 1e-15 if torch.backends.mha.get_fastpath_enabled() else 1.0
        return self.second(self.first(x).relu()) * scale


def test_a_trace_is_held_against_layers_that_are_not_fused() -> None:
    model, x = Rounding().double().eval(), torch.randn(4, 3, dtype=torch.float64)
    assert torch.backends.mha.get_fastpath_enabled()
    gated: Any = fxprune.instrument(model, x)
    assert torch.backends.mha.get_fastpath_enabled()
    assert error(gated(x), model(x)) < 1e-12


class Making(nn.Module):
    """Modules made in a forward: of torch's layers without weights, and of its own parts."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)])

    def forward(self, x: Tensor) -> Tensor:
        x = nn.Sequential(*self.layers[:2])(x)
        return self.layers[2](nn.Sigmoid()(nn.ReLU()(x - 0.1)))


class MakingWeights(nn.Module):
    """Draws a layer anew in every call."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return nn.Linear(4, 4)(F.relu(self.layer(x)))


def test_modules_that_a_forward_makes_are_traced_into() -> None:
    model: Any = Making()
    x = torch.randn(3, 4)
    module = trace(model, {"x": x})
    module.recompile()
    assert torch.equal(module(x), model(x))
    gated = fxprune.instrument(model, x)
    assert close_half(gated) == 3
    small: Any = fxprune.finalize(gated)
    assert small.get_submodule("layers.0").out_features == 3


def test_weights_that_a_forward_makes_are_no_part_of_the_model() -> None:
    with pytest.raises(TraceError, match="makes a Linear with weights of its own"):
        trace(MakingWeights(), {"x": torch.randn(3, 4)})


def test_functions_that_a_model_compiled_are_traced_as_the_python_they_are() -> None:
    @torch.compile(backend="eager")
    def gated_sum(x: Tensor, y: Tensor) -> Tensor:
        return F.relu(x) * y.sigmoid()

    class Compiling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Linear(4, 6), nn.Linear(4, 6)
            self.last = nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(gated_sum(self.left(x), self.right(x)))

    model, x = Compiling(), torch.randn(3, 4)
    gated: Any = fxprune.instrument(model, x)
    assert torch.allclose(gated(x), model(x))
    assert close_half(gated) == 3
    small: Any = fxprune.finalize(gated)
    assert small.report.verification.verdict == "equal"
    assert small.left.out_features == small.right.out_features == 3


class Pair(NamedTuple):
    """What a part gives."""

    first: Tensor
    second: Tensor


GATHERED: ContextVar[list[Tensor] | None] = ContextVar("gathered", default=None)


class Frozen(nn.Module):
    """Writes without gradients into what has some, and stays whole; others may gather its pair."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor, beside: Tensor | None = None) -> Pair:
        x = x if beside is None else x + beside
        x = self.layer(x)
        with torch.no_grad():
            x.clamp_(max=1e9)
        gathered = GATHERED.get()
        if gathered is not None:
            gathered.append(x)
        return Pair(x, -x)


class Passing(nn.Module):
    """Passes on what is first read inside of a part that cannot be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = Frozen(), Frozen()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        pair = self.one(self.last(F.relu(self.first(x))))
        assert isinstance(pair, Pair)
        return self.other(x, beside=pair.second).first


def test_what_was_first_read_inside_of_a_leaf_is_read_again() -> None:
    model, x = randomise(Passing()), torch.randn(3, 4)
    gated: Any = fxprune.instrument(model, x)
    assert torch.equal(gated.eval()(x), model.eval()(x))
    assert close_half(gated) == 3
    small: Any = fxprune.finalize(gated)
    assert small.report.verification.verdict == "equal"


def test_asking_what_a_part_gives_leaves_nothing_where_models_gather() -> None:
    gathered: list[Tensor] = []
    token = GATHERED.set(gathered)
    try:
        gated: Any = fxprune.instrument(randomise(Passing()), torch.randn(3, 4))
    finally:
        GATHERED.reset(token)
    assert gathered and {type(tensor) for tensor in gathered} == {Tensor}
    assert close_half(gated) == 3


def test_a_copy_of_a_traced_tensor_is_a_tensor_of_its_own(recwarn: pytest.WarningsRecorder) -> None:
    class Copies(nn.Module):
        """It also keeps what it computed, as detectors keep the sizes of their maps."""

        def __init__(self) -> None:
            super().__init__()
            self.conv, self.kept = nn.Conv2d(3, 4, 3), [torch.zeros(1)]
            self.head = nn.Conv2d(4, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x)
            self.kept[0] = x
            other = copy.deepcopy(x.detach()).relu_()
            return self.head(x.tanh() + other) if x.shape[1] == 4 else other

    model, x = Copies(), torch.randn(2, 3, 6, 6)
    gated = fxprune.instrument(model, x)
    assert torch.equal(gated(x), model(x))
    assert not recwarn.list


def test_what_hooks_left_from_the_last_call_is_no_part_of_a_model() -> None:
    found: dict[str, Tensor] = {}

    class Hooked(nn.Module):
        """Reads maps that a hook keeps, as depth models do with their backbones'."""

        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
            self.body[1].register_forward_hook(lambda *call: found.update(map=call[2]))
            self.head = nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 3))

        def forward(self, x: Tensor) -> Tensor:
            self.body(x)
            return self.head(found["map"])

    torch.manual_seed(0)
    model, x = Hooked(), torch.randn(2, 3, 9, 9)
    model(x)  # which leaves something
    gated: Any = fxprune.instrument(model, x)
    assert gated.report.passes["insert_gates"]
    for inputs in (x, torch.randn(2, 3, 9, 9)):
        assert torch.equal(gated(inputs), model(inputs))


def test_a_model_whose_copy_is_another_model_is_refused() -> None:
    class Backbone(nn.Sequential):
        found: dict[str, Tensor]

    class Depth(nn.Module):
        """Reads maps in a dict of its backbone's that hooks of the first one fill."""

        def __init__(self) -> None:
            super().__init__()
            self.body = Backbone(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
            found: dict[str, Tensor] = {}
            self.body.found = found
            self.body[1].register_forward_hook(lambda *call: found.update(map=call[2]))
            self.register_buffer("calls", torch.zeros(1))
            self.head = nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 3))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            self.body(x)
            return self.head(self.body.found["map"])

    model, x = Depth().eval(), torch.randn(2, 3, 9, 9)
    with torch.no_grad():
        model(x)  # which leaves something
    with pytest.raises(ModelError, match="a copy of Depth computes something else"):
        fxprune.instrument(model, x)
    with pytest.raises(ModelError, match="a copy of Depth computes something else"):
        fxprune.finalize(model, x)
    assert model.calls == 1


def test_what_a_module_keeps_from_one_call_to_the_next_is_not_the_examples() -> None:
    class Reversible(nn.Module):
        """Takes a mean away, and adds it again (RevIN, Kim et al. 2022)."""

        def forward(self, x: Tensor, mode: str) -> Tensor:
            if mode == "norm":
                self.mean = x.mean(1, keepdim=True)
                return x - self.mean
            return x + self.mean

    class Forecast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = Reversible()
            self.up, self.down = nn.Linear(6, 16), nn.Linear(16, 6)

        def forward(self, x: Tensor) -> Tensor:
            x = self.norm(x, "norm")
            return self.norm(self.down(torch.relu(self.up(x))), "denorm")

    torch.manual_seed(0)
    model, x = Forecast().eval(), torch.randn(2, 5, 6)
    model(x)
    gated: Any = fxprune.instrument(model, x)
    for inputs in (torch.randn(2, 5, 6), torch.randn(3, 7, 6) + 4):
        assert torch.equal(gated(inputs), model(inputs))
    close_half(gated)
    small: Any = fxprune.finalize(gated)
    for inputs in (torch.randn(2, 5, 6), torch.randn(3, 7, 6) + 4):
        for name, parameter in model.named_parameters():
            assert torch.equal(gated.get_parameter(name), parameter)
        assert (gated(inputs) - small(inputs)).abs().max() < 1e-5
        assert (gated(inputs).mean() - inputs.mean()).abs() < 1
