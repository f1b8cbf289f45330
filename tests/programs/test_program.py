"""Programs: captured without a trace on the user's model, refused where nothing can be proved."""

import copy
import math
import operator
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.nn.utils import parametrizations, prune

import fxprune
from fxprune.errors import ExampleInputError, ModelError, TraceError
from fxprune.programs.out_of_place import make_out_of_place
from fxprune.programs.program import Program, capture
from fxprune.programs.sharing import sole_modules
from fxprune.testing import close_half, error
from fxprune.user_models.inputs import describe, model_inputs, same
from fxprune.user_models.modules import check_parameters, copy_model, device_of, evaluating
from fxprune.user_models.plain_weights import with_plain_weights
from tests.conftest import randomise


class Model(nn.Module):
    """Calls a function that may use its layers, parameter and buffer."""

    def __init__(self, function: Callable[["Model", Tensor], Any]) -> None:
        super().__init__()
        self.function = function
        self.layer, self.other = nn.Linear(4, 4), nn.Linear(4, 4)
        self.norm, self.twin = nn.BatchNorm1d(4), nn.BatchNorm1d(4, affine=False)
        self.relu = nn.ReLU(inplace=True)
        self.attention = nn.MultiheadAttention(4, 1, batch_first=True)
        self.scale = nn.Parameter(torch.randn(4))
        self.shift: Tensor
        self.register_buffer("shift", torch.randn(4))

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


@dataclass
class Pair:
    """An output no pytree knows."""

    left: Any
    right: Any


def convnet() -> nn.Sequential:
    """Return a model whose every number is its own, in training, one part of it frozen."""
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(64, 2)
    )
    randomise(model).train()
    model[1].eval()
    model.get_parameter("4.weight").requires_grad_(False)
    return model


def captured(model: nn.Module, *inputs: Any, **named: Any) -> Program:
    return capture(model, (inputs, named))


def batch(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*(shape or (3, 4)), dtype=dtype)


def attributes(model: nn.Module) -> dict[str, set[str]]:
    return {name: set(vars(module)) for name, module in model.named_modules()}


# Capturing.


def test_capture_leaves_the_users_model_as_it_was() -> None:
    model = convnet()
    state = copy.deepcopy(model.state_dict())
    flags = {name: module.training for name, module in model.named_modules()}
    names, tensors = attributes(model), {id(p) for p in model.parameters()}
    program = captured(model, batch(2, 3, 6, 6))
    with torch.no_grad():
        for parameter in program.module.parameters():
            parameter.add_(1)
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert {name: module.training for name, module in model.named_modules()} == flags
    assert attributes(model) == names
    assert {id(p) for p in model.parameters()} == tensors
    assert isinstance(model[2], nn.ReLU) and model[2].inplace


def test_capture_leaves_no_tensors_behind_in_a_model_with_constants() -> None:
    model = Model(lambda m, x: m.layer(x) * torch.tensor(2.0) + m.shift.exp())
    names = attributes(model)
    captured(model, batch())
    assert attributes(model) == names


def test_a_program_computes_what_the_model_computes_in_both_modes() -> None:
    model, x = convnet(), batch(2, 3, 6, 6)
    program = captured(model, x)
    assert torch.equal(program.module(x), model(x))
    with evaluating(model, program.module):
        assert torch.equal(program.run(), model(x))


def test_a_program_has_the_models_flags_and_frozen_weights() -> None:
    program = captured(convnet(), batch(2, 3, 6, 6))
    assert [m.training for _, m in program.module.named_modules()] == [True, True, False] + [
        True
    ] * 3
    assert not program.module.get_parameter("4.weight").requires_grad
    assert program.module.get_parameter("4.bias").requires_grad


def test_keyword_inputs_are_passed_by_keyword() -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor, scale: Tensor, bias: float = 1.0) -> Tensor:
            return x * scale + bias

    program = captured(Two(), scale=torch.tensor(2.0), x=torch.tensor(3.0))
    assert program.run() == 7.0


def test_the_inputs_of_a_program_are_never_overwritten() -> None:
    program = captured(Model(lambda _, x: x.neg_()), torch.ones(2, 4))
    first, second = program.run(), program.run()
    assert torch.equal(first, -torch.ones(2, 4))
    assert torch.equal(second, first)
    assert torch.equal(program.args[0], torch.ones(2, 4))


def test_inputs_with_a_history_are_taken_without_it() -> None:
    x = torch.randn(3, 4, requires_grad=True) * 2
    assert not captured(nn.Linear(4, 2), x).args[0].requires_grad


def test_a_clone_shares_nothing_but_the_inputs() -> None:
    program = captured(convnet(), batch(2, 3, 6, 6))
    expected, text = program.run(), program.text()
    twin = program.clone()
    assert [m.training for m in twin.module.modules()] == [
        m.training for m in program.module.modules()
    ]
    with torch.no_grad():
        for parameter in twin.module.parameters():
            parameter.zero_()
    [linear] = twin.graph.find_nodes(op="call_module", target="4")
    linear.replace_all_uses_with(linear.args[0])
    twin.check()
    assert torch.equal(program.run(), expected)
    assert program.text() == text
    assert twin.run().shape == (2, 64)


def test_a_clone_keeps_what_nodes_know() -> None:
    program = captured(Model(lambda m, x: m.layer(x)), batch())
    sources = [node.meta.get("source") for node in program.graph.nodes]
    assert [node.meta.get("source") for node in program.clone().graph.nodes] == sources


def test_check_regenerates_the_code() -> None:
    program = captured(nn.Sequential(nn.Linear(4, 4), nn.Tanh()), x := batch())
    [tanh] = program.graph.find_nodes(op="call_module", target="1")
    tanh.replace_all_uses_with(tanh.args[0])
    program.graph.erase_node(tanh)
    program.check()
    assert torch.equal(program.run(), F.linear(x, *program.module.get_submodule("0").parameters()))


def test_check_refuses_a_graph_that_uses_a_value_before_it_is_there() -> None:
    program = captured(nn.Sequential(nn.Linear(4, 4), nn.Tanh()), batch())
    [linear] = program.graph.find_nodes(op="call_module", target="0")
    [tanh] = program.graph.find_nodes(op="call_module", target="1")
    linear.args = (tanh,)
    with pytest.raises(RuntimeError, match="used before"):
        program.check()


# Masks, and other tensors with a history.


def masked(*, run: bool) -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    prune.ln_structured(model[0], "weight", amount=0.5, n=2, dim=0)
    prune.random_unstructured(model[0], "weight", amount=0.2)
    prune.l1_unstructured(model[2], "bias", amount=1)
    if run:
        model(batch())
    return model


@pytest.mark.parametrize("run", [False, True])
def test_masks_are_baked_into_a_copy_alone(run: bool) -> None:
    model, x = masked(run=run), batch()
    names = set(model.state_dict())
    program = captured(with_plain_weights(model), x)
    assert torch.equal(program.run(), model(x))
    assert "0.weight_mask" in names and set(model.state_dict()) == names
    assert set(program.module.state_dict()) == {"0.weight", "0.bias", "2.weight", "2.bias"}
    weight = program.module.get_parameter("0.weight")
    assert int((weight == 0).all(1).sum()) >= 3
    assert weight.is_leaf and weight.requires_grad


@pytest.mark.parametrize("run", [False, True])
def test_masks_that_stay_go_on_masking(run: bool) -> None:
    program = captured(masked(run=run), x := batch())
    with torch.no_grad():
        program.module.get_parameter("0.weight_orig").add_(1)
    first = program.module.get_submodule("0")
    mask = program.module.get_buffer("0.weight_mask")
    assert torch.equal(first(x), F.linear(x, (first.weight_orig * mask), first.bias))  # type: ignore[arg-type]


def test_a_copy_of_a_masked_model_that_ran_is_independent() -> None:
    model, x = masked(run=True), batch()
    twin = copy_model(model)
    assert torch.equal(twin(x), model(x))
    with torch.no_grad():
        twin[0].weight_orig.zero_()
    assert not torch.equal(twin(x), model(x))


class Caching(nn.Module):
    """Keeps what it computed in evaluation, as LeViT keeps its attention biases."""

    def __init__(self) -> None:
        super().__init__()
        self.bias, self.place = nn.Parameter(torch.randn(3)), torch.tensor([2, 0, 1, 1])
        self.cache: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return (x + self.bias[self.place]).relu()
        if not self.cache:
            self.cache["bias"] = self.bias[self.place]
        return (x + self.cache["bias"]).relu()


def test_a_model_that_kept_what_a_run_computed_is_copied() -> None:
    model, x = Caching().eval(), batch()
    expected = model(x)
    twin = copy_model(model)
    assert torch.equal(twin(x), expected)
    assert twin.cache["bias"] is not model.cache["bias"]


def test_what_holds_itself_is_copied() -> None:
    model = nn.Linear(4, 4)
    notes: dict[str, Any] = {"last": [torch.ones(2)]}
    notes["again"] = notes
    model.notes = notes  # type: ignore[assignment]
    twin = copy_model(model)
    assert twin.notes["again"] is twin.notes and twin.notes is not notes


def test_copies_of_what_holds_its_own_hooks_are_copied_and_remove_them() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    model.hooks = [model[1].register_forward_hook(_add_one, always_call=True)]  # type: ignore[assignment]
    x, twin = batch(), copy_model(copy_model(model))
    assert torch.equal(twin(x), model(x))
    twin.hooks[0].remove()
    assert not twin[1]._forward_hooks and not twin[1]._forward_hooks_always_called
    assert torch.equal(twin(x) + 1, model(x))


def test_a_copy_keeps_tied_weights_tied() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    twin = copy_model(model)
    assert twin[0].weight is twin[1].weight
    assert twin[0].weight is not model[0].weight


def test_a_graph_that_stands_in_two_places_is_copied_once() -> None:
    part = fx.symbolic_trace(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
    model, x = nn.Sequential(part, nn.Sequential(part, nn.Linear(4, 4))), batch()
    twin = copy_model(model)
    assert twin[0] is twin[1][0] and twin[0] is not part
    assert torch.equal(twin(x), model(x))


def test_a_parametrised_model_is_captured() -> None:
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 4)), nn.ReLU())
    program = captured(model, x := batch())
    assert torch.equal(program.run(), model(x))


def test_a_model_that_cannot_be_copied_is_refused() -> None:
    model = nn.Linear(4, 4)
    model.held = (one for one in "generator")  # type: ignore[assignment]
    with pytest.raises(TraceError, match=r"^Linear cannot be copied: .*; detach or drop"):
        captured(model, batch())


# What is refused.


def with_weight(value: float) -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with torch.no_grad():
        model.get_parameter("1.weight")[2, 3] = value
    return model


def with_parameter(parameter: Tensor) -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].register_parameter("odd", nn.Parameter(parameter, requires_grad=False))
    return model


UNSOUND: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "NaN": (lambda: with_weight(math.nan), r"^1\.weight holds NaN or infinity; restore"),
    "infinity": (lambda: with_weight(math.inf), r"^1\.weight holds NaN or infinity"),
    "complex": (lambda: with_parameter(torch.ones(2) * 1j), r"^0\.odd is complex; .* real-valued"),
    "integers": (
        lambda: with_parameter(torch.ones(2).int()),
        r"^0\.odd is torch\.int32; .*quantise",
    ),
    "lazy": (lambda: nn.Sequential(nn.LazyLinear(4)), r"^0\.weight is not initialised .*run"),
    "lazy buffers": (lambda: nn.LazyBatchNorm1d(affine=False), r"^running_mean is not initialised"),
    "meta": (
        lambda: nn.Linear(4, 4, device="meta"),
        r"^weight holds no numbers .*load the weights",
    ),
}


@pytest.mark.parametrize("what", UNSOUND)
def test_weights_nothing_can_be_proved_on_are_refused_by_name(what: str) -> None:
    make, message = UNSOUND[what]
    with pytest.raises(ModelError, match=message):
        captured(make(), batch())


def test_masks_of_minus_infinity_and_integer_buffers_are_sound() -> None:
    model = nn.BatchNorm1d(4)
    model.register_buffer("mask", torch.full((4,), -math.inf))
    check_parameters(model)


def test_a_wrong_shape_is_refused_with_the_shapes() -> None:
    with pytest.raises(ExampleInputError) as caught:
        captured(convnet(), batch(2, 5, 6, 6))
    message = str(caught.value)
    assert "Sequential does not run on the example inputs (float32[2, 5, 6, 6])" in message
    assert "to have 3 channels" in message


def test_a_wrong_dtype_is_refused_with_the_dtype() -> None:
    with pytest.raises(ExampleInputError, match=r"\(float64\[3, 4\]\).*dtype"):
        captured(nn.Linear(4, 2), batch(dtype=torch.float64))


@pytest.mark.parametrize("inputs", [(), (1, 2)])
def test_a_wrong_number_of_inputs_is_refused(inputs: tuple[Any, ...]) -> None:
    with pytest.raises(ExampleInputError, match=r"do not fit Linear\.forward.*argument"):
        captured(nn.Linear(4, 2), *inputs)


UNFAITHFUL: dict[str, Callable[[Model, Tensor], Any]] = {
    "counts its calls": lambda m, x: m.layer(x) + m.shift.add_(1) + x.sum() * 0,
}


def _overwrite(x: Tensor) -> Tensor:
    y = x
    y += 1
    return x


@pytest.mark.parametrize("what", UNFAITHFUL)
def test_a_model_that_a_trace_cannot_follow_is_refused(what: str) -> None:
    with pytest.raises(TraceError, match=r"^Model computes something else when traced"):
        captured(Model(UNFAITHFUL[what]), batch())


def test_what_is_overwritten_under_another_name_is_refused() -> None:
    with pytest.raises(TraceError, match=r"read by another name .* later: output"):
        captured(Model(lambda _, x: _overwrite(x * 2)), batch())


def test_a_trace_that_does_not_run_is_refused() -> None:
    class Optional(nn.Module):
        """Takes the type of a proxy for that of what it stands for."""

        def forward(self, x: Tensor, box: Any = None) -> Tensor:
            return x * box.scale if type(box) is Box else x * box

    class Box:
        scale = 2.0

    with pytest.raises(TraceError, match=r"does not run when traced: TypeError: .*leave arguments"):
        captured(Optional(), batch(), Box())


def _add_one(_: nn.Module, __: Any, output: Any) -> Any:
    return output + 1


def test_hooks_of_the_model_that_change_its_output_are_not_lost_silently() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    model.register_forward_hook(_add_one)
    with pytest.raises(TraceError, match="it has hooks"):
        captured(model, batch())


def test_hooks_of_a_part_that_could_be_traced_go_on_working() -> None:
    called: list[str] = []
    part = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    part.register_forward_hook(lambda *_: called.append("forward"))
    part.register_full_backward_hook(lambda *_: called.append("backward"))
    model = nn.Sequential(part, nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    program = captured(model, x := batch())
    called.clear()
    program.module(x.clone().requires_grad_()).sum().backward()
    assert called == ["forward", "backward"] and torch.equal(program.run(), model(x))
    (leaf,) = [node for node in program.graph.nodes if node.meta.get("leaf_because")]
    assert leaf.target == "0" and "it has hooks" in leaf.meta["leaf_because"]


def test_hooks_of_its_layers_go_on_working() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    model[0].register_forward_hook(_add_one)
    program = captured(model, x := batch())
    assert torch.equal(program.run(), model(x))


# Inputs.


def test_example_inputs_are_a_tensor_a_tuple_or_a_mapping() -> None:
    x, y = torch.ones(2), torch.zeros(3)
    assert model_inputs(x) == ((x,), {})
    assert model_inputs((x, y)) == ((x, y), {})
    assert model_inputs([x, 3]) == ((x, 3), {})
    assert model_inputs(OrderedDict(b=x, a=y)) == ((), {"b": x, "a": y})


@pytest.mark.parametrize("odd", [3, "x", {1, 2}, None, (2, 3).__iter__()])
def test_other_example_inputs_are_refused_by_type(odd: Any) -> None:
    with pytest.raises(ExampleInputError, match=f"is {type(odd).__name__}; pass a tensor"):
        model_inputs(odd)


def test_inputs_are_described_by_dtype_and_shape() -> None:
    inputs = ((torch.ones(2, 3), [torch.ones(4).bool()]), {"k": 3, "m": torch.tensor(1)})
    assert describe(inputs) == "(float32[2, 3], bool[4], 3, int64[])"


def test_a_model_without_tensors_is_on_the_cpu() -> None:
    assert device_of(nn.ReLU()) == torch.device("cpu")
    assert device_of(nn.Linear(2, 2, device="meta")) == torch.device("meta")
    assert device_of(nn.BatchNorm1d(2, affine=False, device="meta")) == torch.device("meta")


def test_evaluating_restores_every_flag_even_after_an_error() -> None:
    model = convnet()
    flags = [module.training for module in model.modules()]
    with pytest.raises(ZeroDivisionError), evaluating(model):
        assert not any(module.training for module in model.modules())
        raise ZeroDivisionError
    assert [module.training for module in model.modules()] == flags


# Equality.

structures = st.recursive(
    st.one_of(st.integers(0, 2), st.sampled_from(["a", None])),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
    ),
    max_leaves=6,
)


def with_tensors(structure: Any) -> Any:
    """Put a tensor where there is a number, and forget how lists differ from tuples."""
    if isinstance(structure, int):
        return torch.tensor([structure, 1.5])
    if isinstance(structure, list | tuple):
        return [with_tensors(part) for part in structure]
    if isinstance(structure, dict):
        return {key: with_tensors(part) for key, part in structure.items()}
    return structure


def without_empties(structure: Any) -> Any:
    """Drop what holds nothing to compare, which no one can tell apart."""
    if isinstance(structure, list | tuple):
        parts = {str(i): without_empties(part) for i, part in enumerate(structure)}
    elif isinstance(structure, dict):
        parts = {f"'{key}'": without_empties(part) for key, part in structure.items()}
    else:
        return structure
    return {key: part for key, part in parts.items() if part != {}}


@settings(deadline=None)
@given(structures, structures)
def test_structures_are_the_same_exactly_if_they_hold_the_same_in_the_same_places(
    left: Any, right: Any
) -> None:
    expected = without_empties(left) == without_empties(right)
    assert same(with_tensors(left), with_tensors(right)) == expected
    assert same(with_tensors(left), with_tensors(copy.deepcopy(left)))


@pytest.mark.parametrize(
    ("left", "right"),
    [
        (torch.ones(2), torch.ones(3)),
        (torch.ones(2), torch.ones(2, 1)),
        (torch.ones(2), torch.ones(2).double()),
        (torch.ones(2), torch.tensor([1.0, 1 + 2**-23])),
        (torch.tensor([math.nan]), torch.tensor([math.nan])),
        (torch.ones(1), 1.0),
        (1.0, torch.ones(3)),
        (Pair(torch.ones(2), 1), Pair(torch.zeros(2), 1)),
        (Pair(torch.ones(2), 1), (torch.ones(2), 1)),
    ],
)
def test_what_differs_in_any_bit_shape_or_dtype_is_not_the_same(left: Any, right: Any) -> None:
    assert not same(left, right)
    assert not same([right], [left])


def test_outputs_of_any_class_are_compared() -> None:
    assert same(Pair(torch.ones(2), [torch.zeros(1)]), Pair(torch.ones(2), [torch.zeros(1)]))
    program = captured(Model(lambda m, x: Pair(m.layer(x), x)), batch())
    assert isinstance(program.run(), Pair)


def test_a_dict_may_stand_for_an_ordered_one() -> None:
    assert same(OrderedDict(a=torch.ones(2), b=1), {"a": torch.ones(2), "b": 1})


# Modules that may be edited.


def sole(function: Callable[[Model, Tensor], Any], prepare: Any = None) -> set[str]:
    model = Model(function)
    if prepare is not None:
        prepare(model)
    return {str(node.target) for node in sole_modules(captured(model, batch()))}


def _tie(model: Model) -> None:
    model.other.weight = model.layer.weight


def _share_statistics(model: Model) -> None:
    model.twin.running_mean = model.norm.running_mean


def _hook(model: Model) -> None:
    model.layer.register_forward_hook(lambda _, __, output: output)


def _pre_hook(model: Model) -> None:
    model.layer.register_forward_pre_hook(lambda _, args: args)


def _wrap(model: Model) -> None:
    """Put a layer into a leaf as well: an attention that projects with the model's own layer."""
    model.attention.out_proj.weight = model.layer.weight


SOLE: dict[str, tuple[Callable[[Model, Tensor], Any], Any, set[str]]] = {
    "each called once": (
        lambda m, x: m.other(m.norm(m.layer(x))),
        None,
        {"layer", "norm", "other"},
    ),
    "called twice": (lambda m, x: m.other(m.layer(m.layer(x))), None, {"other"}),
    "tied weights": (lambda m, x: m.norm(m.other(m.layer(x))), _tie, {"norm"}),
    "tied to one nobody calls": (lambda m, x: m.norm(m.layer(x)), _tie, {"layer", "norm"}),
    "a shared buffer": (lambda m, x: m.twin(m.norm(m.layer(x))), _share_statistics, {"layer"}),
    "a weight also read": (lambda m, x: m.other(m.layer(x)) @ m.layer.weight, None, {"other"}),
    "a buffer also read": (lambda m, x: m.norm(m.layer(x)) + m.norm.running_mean, None, {"layer"}),
    "other tensors read": (lambda m, x: m.layer(x) * m.scale + m.shift, None, {"layer"}),
    "a hook": (lambda m, x: m.other(m.layer(x)), _hook, {"other"}),
    "a hook before it": (lambda m, x: m.other(m.layer(x)), _pre_hook, {"other"}),
    "a weight inside a leaf": (
        lambda m, x: m.other(m.attention(m.layer(x), x, x)[0]),
        _wrap,
        {"other"},
    ),
}


@pytest.mark.parametrize("case", SOLE)
def test_a_module_may_be_edited_if_no_one_else_uses_its_tensors(case: str) -> None:
    function, prepare, expected = SOLE[case]
    assert sole(function, prepare) == expected


def test_a_masked_module_may_be_edited_once_its_masks_are_baked() -> None:
    def editable(model: nn.Module) -> set[str]:
        return {str(node.target) for node in sole_modules(captured(model, batch()))}

    assert editable(masked(run=True)) == {"1"}
    assert editable(with_plain_weights(masked(run=True))) == {"0", "1", "2"}


# In place and out of place.


def out_of_place(program: Program) -> tuple[Any, Tensor]:
    """Put the operator behind the layer out of place; return its target and its output."""
    [layer] = program.graph.find_nodes(op="call_module", target="layer")
    [node] = layer.users
    make_out_of_place(node, program.module)
    program.graph.output_node().args = ((node, layer),)
    program.check()
    expected = F.linear(program.args[0], *program.module.get_submodule("layer").parameters())
    _, before = program.run()
    assert torch.equal(before, expected)
    return node.target, program.run()[0]


IN_PLACE: dict[str, tuple[Callable[[Model, Tensor], Any], Any]] = {
    "a module": (lambda m, x: m.relu(m.layer(x)), "relu"),
    "a flag": (lambda m, x: F.leaky_relu(m.layer(x), 0.1, inplace=True), F.leaky_relu),
    "a flag by position": (lambda m, x: F.relu6(m.layer(x), True), F.relu6),
    "a function of torch": (lambda m, x: torch.relu_(m.layer(x)), torch.relu),
    "a function of torch.nn": (lambda m, x: F.elu_(m.layer(x)), F.elu),
    "a method": (lambda m, x: m.layer(x).tanh_(), "tanh"),
    "a method with an operand": (lambda m, x: m.layer(x).mul_(x), "mul"),
    "nothing in place": (lambda m, x: m.layer(x).sigmoid(), "sigmoid"),
}


@pytest.mark.parametrize("form", IN_PLACE)
def test_an_operator_put_out_of_place_leaves_its_input_alone(form: str) -> None:
    function, target = IN_PLACE[form]
    program = captured(Model(function), batch())
    expected = program.run()
    found, after = out_of_place(program)
    assert found == target
    assert torch.equal(after, expected)


@pytest.mark.parametrize("name", ["add", "sub", "mul", "truediv", "floordiv", "mod", "pow"])
def test_augmented_arithmetic_put_out_of_place_leaves_its_input_alone(name: str) -> None:
    plain, augmented = getattr(operator, name), getattr(operator, f"i{name}")
    program = captured(Model(lambda m, x: plain(m.layer(x), 2.0)), batch())
    expected = program.run()
    [node] = program.graph.find_nodes(op="call_function", target=plain)
    node.target = augmented
    found, after = out_of_place(program)
    assert found is plain
    torch.testing.assert_close(after, expected, equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("augmented", "plain"), [("iand", "and_"), ("ior", "or_"), ("ixor", "xor")]
)
def test_augmented_logic_put_out_of_place_is_its_plain_form(augmented: str, plain: str) -> None:
    graph = fx.Graph()
    node = graph.call_function(getattr(operator, augmented), (graph.placeholder("x"), True))
    make_out_of_place(node, fx.GraphModule(nn.Module(), graph))
    assert node.target is getattr(operator, plain)


NO_TWIN: dict[str, Callable[[Model, Tensor], Any]] = {
    "copy_": lambda m, x: m.layer(x).copy_(x),
    "zero_": lambda m, x: m.layer(x).zero_(),
    "requires_grad_": lambda m, x: m.layer(x).requires_grad_(False),
}


@pytest.mark.parametrize("name", NO_TWIN)
def test_a_method_without_a_twin_stays_in_place(name: str) -> None:
    program = captured(Model(NO_TWIN[name]), batch())
    expected = program.run()
    [node] = program.graph.find_nodes(op="call_method")
    make_out_of_place(node, program.module)
    program.check()
    assert node.target == name
    assert torch.equal(program.run(), expected)


@pytest.mark.parametrize(
    "function", [operator.index, operator.invert, operator.is_not, operator.getitem, torch.relu]
)
def test_functions_that_only_look_like_it_are_left_alone(function: Any) -> None:
    graph = fx.Graph()
    node = graph.call_function(function, (graph.placeholder("x"), 0))
    make_out_of_place(node, fx.GraphModule(nn.Module(), graph))
    assert node.target is function


class Rotated(nn.Module):
    """Turns features by complex numbers it holds, as Llama does."""

    def __init__(self, *, buffer: bool) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(4, 6), nn.Linear(6, 8), nn.Linear(8, 2)
        turns = torch.polar(torch.ones(3), torch.rand(3))
        self.turns: Tensor
        if buffer:
            self.register_buffer("turns", turns)
        else:
            self.turns = turns

    def forward(self, x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(self.first(x).unflatten(-1, (3, 2)))
        x = torch.view_as_real(pairs * self.turns).flatten(-2)
        return self.third(self.second(x).relu())


@pytest.mark.parametrize("buffer", [False, True])
def test_complex_constants_are_kept_as_they_are(buffer: bool) -> None:
    gated: Any = fxprune.instrument(Rotated(buffer=buffer), torch.randn(3, 4))
    assert close_half(gated) == 4
    small: Any = fxprune.finalize(gated)
    assert small.report.verification.verdict == "equal"
    assert small.third.in_features == 4


def test_nan_is_the_same_only_if_asked_for() -> None:
    left, right = torch.tensor([1.0, math.nan]), torch.tensor([1.0, math.nan])
    assert same([left], [right], nan=True) and not same([left], [right])
    for other in (torch.tensor([math.nan, 1.0]), torch.tensor([1.0, 2.0]), right.double()):
        assert not same(left, other, nan=True)
    assert same(torch.tensor([True]), torch.tensor([True]), nan=True)


def test_a_model_that_is_nan_elsewhere_is_traced() -> None:
    model = Model(lambda m, x: (m.layer(x) * 0 + x - 0.9).log())
    assert captured(model, batch().abs() + 1).run().isfinite().all()


def test_a_model_that_is_nan_on_the_example_says_so() -> None:
    model = Model(lambda m, x: (m.layer(x) * 0 + x - 0.9).log())
    with pytest.raises(ExampleInputError, match="returns NaN on the example inputs"):
        captured(model, -batch().abs())


def test_arrays_of_numpy_are_compared_by_their_numbers() -> None:
    left, right = {"boxes": np.zeros((2, 3))}, {"boxes": np.zeros((2, 3))}
    assert same(left, right)
    right["boxes"][1, 2] = 1
    assert not same(left, right)
    assert not same(left, {"boxes": torch.zeros(2, 3)})
    assert not same(left, {"boxes": 0.0})


def test_layers_cut_by_hand_have_the_channels_of_their_weights() -> None:
    layers = (nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3, groups=16), nn.ReLU())
    model: Any = nn.Sequential(*layers, nn.Flatten(), nn.Linear(64, 3))
    for layer in (model[0], model[2]):
        layer.weight = nn.Parameter(layer.weight[:8].detach())
        layer.bias = nn.Parameter(layer.bias[:8].detach())
    model[2].groups = 8
    model[5].weight = nn.Parameter(model[5].weight[:, :32].detach())
    x = torch.randn(4, 3, 6, 6, dtype=torch.float64)
    gated: Any = fxprune.instrument(model.double(), x)
    close_half(gated)
    small: Any = fxprune.finalize(gated)
    assert error(small(x), gated(x)) < 1e-12
    cut = small.get_submodule("2")
    assert cut.groups == cut.in_channels == cut.out_channels == len(cut.weight) == 4
    assert model[0].out_channels == 16  # it is not ours
