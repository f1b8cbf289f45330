"""What a run shows: shapes, values that are no tensors, writes and aliases."""

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxprune.errors import ExampleInputError
from fxprune.programs.observation import Observation, TensorSpec, observe
from fxprune.programs.program import Program, capture

Function = Callable[["Model", Tensor], Any]


class Model(nn.Module):
    """Calls a function that may use its layer, its buffer and its parameter."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function
        self.layer = nn.Linear(4, 4)
        self.buffer: Tensor
        self.register_buffer("buffer", torch.ones(4))
        self.constant = torch.ones(4)

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


class Returns(nn.Module):
    """A leaf that hands its inputs on in another order, or writes into one."""

    def __init__(self, *, writes: bool = False) -> None:
        super().__init__()
        self.writes = writes

    def forward(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        if bool(left.sum() > 1e30):  # no symbolic trace gets past this
            return left, right
        if self.writes:
            right.zero_()
        return right, left


def seen(model: nn.Module, *shape: int) -> tuple[Program, Observation]:
    inputs = ((torch.randn(*(shape or (2, 4))),), {})
    program = capture(model, inputs)
    return program, observe(program)


def mutations(observation: Observation) -> dict[str, list[str]]:
    return {
        writer.name: [node.name for node in written]
        for writer, written in observation.mutated.items()
    }


def groups(observation: Observation) -> set[frozenset[str]]:
    """Return the names of nodes that share memory, where more than one does."""
    found: dict[fx.Node, set[str]] = {}
    for node, representative in observation.alias.items():
        found.setdefault(representative, set()).add(node.name)
    return {frozenset(names) for names in found.values() if len(names) > 1}


def test_every_node_has_its_shape_and_dtype() -> None:
    _, found = seen(nn.Sequential(nn.Conv2d(3, 5, 3), nn.Flatten()), 2, 3, 6, 6)
    assert list(found.values.values()) == [
        TensorSpec((2, 3, 6, 6), torch.float32),
        TensorSpec((2, 5, 4, 4), torch.float32),
        TensorSpec((2, 80), torch.float32),
        TensorSpec((2, 80), torch.float32),
    ]


def test_dtypes_are_those_the_program_computed_in() -> None:
    _, found = seen(Model(lambda _, x: (x.double(), x > 0, x.argmax(1))))
    dtypes = [spec.dtype for spec in list(found.values.values())[1:4]]
    assert dtypes == [torch.float64, torch.bool, torch.int64]


def test_values_that_are_no_tensors_stay_as_they_were() -> None:
    program, found = seen(Model(lambda _, x: x.reshape(x.shape[0] * 2, -1)))
    by_name = {node.name: found.values[node] for node in program.graph.nodes}
    assert by_name["getattr_1"] == torch.Size([2, 4])
    assert by_name["getitem"] == 2
    assert by_name["mul"] == 4


def test_a_tuple_of_tensors_is_a_tuple_of_specs() -> None:
    program, found = seen(Model(lambda _, x: x[:, :3].chunk(2, 1)[1]))
    [chunk] = program.graph.find_nodes(op="call_method", target="chunk")
    assert found.values[chunk] == (
        TensorSpec((2, 2), torch.float32),
        TensorSpec((2, 1), torch.float32),
    )


def test_a_dict_of_outputs_keeps_its_keys() -> None:
    program, found = seen(Model(lambda _, x: {"a": x + 1, "b": (x.sum(), 3)}))
    spec = found.values[program.graph.output_node()]
    assert spec == {
        "a": TensorSpec((2, 4), torch.float32),
        "b": (TensorSpec((), torch.float32), 3),
    }


WRITERS: dict[str, tuple[Function, dict[str, list[str]]]] = {
    "a method": (lambda m, x: m.layer(x).relu_(), {"relu_": ["layer"]}),
    "a function": (lambda m, x: torch.relu_(m.layer(x)), {"relu_": ["layer"]}),
    "a flag": (lambda m, x: F.relu(m.layer(x), inplace=True), {"relu": ["layer"]}),
    "an out argument": (lambda m, x: _add_out(m.layer(x), x), {"add": ["layer"]}),
    "a write to a slice": (lambda m, x: _copy_into_slice(m.layer(x), x), {"copy_": ["getitem"]}),
    "a write to a view": (lambda m, x: m.layer(x).view(-1).neg_(), {"neg_": ["view"]}),
    "a write to a buffer": (lambda m, x: m.buffer.mul_(x.mean() * 0 + 1) + x, {"mul_": ["buffer"]}),
    "nobody": (lambda m, x: F.relu(m.layer(x)).add(x) * 2, {}),
}


def _add_out(left: Tensor, right: Tensor) -> Tensor:
    return torch.add(left, right, out=left)


def _copy_into_slice(x: Tensor, source: Tensor) -> Tensor:
    x[:, :2].copy_(source[:, 2:])
    return x


@pytest.mark.parametrize("writer", WRITERS)
def test_who_writes_is_observed(writer: str) -> None:
    function, expected = WRITERS[writer]
    _, found = seen(Model(function))
    assert mutations(found) == expected


def test_an_in_place_module_is_seen_to_write() -> None:
    _, found = seen(nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True)))
    assert mutations(found) == {"_1": ["_0"]}


def test_an_augmented_assignment_is_seen_to_write() -> None:
    program, _ = seen(Model(lambda m, x: m.layer(x) + x))
    [add] = program.graph.find_nodes(op="call_function", target=operator.add)
    add.target = operator.iadd
    program.seen = None
    assert mutations(observe(program)) == {"add": ["layer"]}


def test_a_write_to_a_view_of_what_another_view_shows_writes_to_both() -> None:
    def overlap(model: Model, x: Tensor) -> Tensor:
        y = model.layer(x)
        return y[:, :3].copy_(y[:, 1:])

    _, found = seen(Model(overlap))
    assert mutations(found) == {"copy_": ["getitem", "getitem_1"]}


def test_dropout_writes_nothing_in_evaluation_even_in_place() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5, inplace=True)).train()
    program, found = seen(model)
    assert mutations(found) == {}
    assert program.module.training


def test_a_leaf_that_writes_into_an_argument_is_seen() -> None:
    model = Model(lambda m, x: m.returns(m.layer(x), x * 2))  # type: ignore[operator]
    model.returns = Returns(writes=True)
    _, found = seen(model)
    assert mutations(found) == {"returns": ["mul"]}


ALIASES: dict[str, tuple[Function, set[frozenset[str]]]] = {
    "views of views": (
        lambda _, x: (x * 2).view(-1).view(4, 2).t(),
        {frozenset({"mul", "view", "view_1", "t"})},
    ),
    "parts": (
        lambda _, x: (x * 2).chunk(2, 1)[1],
        {frozenset({"mul", "chunk", "getitem"})},
    ),
    "an expanded operand": (
        lambda _, x: x[:1].expand(4, 4) + 1,
        {frozenset({"x", "getitem", "expand"})},
    ),
    "what an in-place operator returns": (
        lambda m, x: m.layer(x).relu_(),
        {frozenset({"layer", "relu_"})},
    ),
    "two reads of a buffer": (
        lambda m, x: m.buffer.view(1, 4) * x + m.buffer.exp(),
        {frozenset({"buffer", "view"})},
    ),
    "two reads of a tensor that is no buffer": (
        lambda m, x: m.constant * x + m.constant,
        {frozenset({"constant", "constant_1"})},
    ),
    "all but a reshape that copies": (
        lambda _, x: (x * 2).t().reshape(-1) + 1,
        {frozenset({"mul", "t"})},
    ),
    "nobody, though two tensors are returned": (lambda _, x: (x + 1, x + 2), set()),
}


@pytest.mark.parametrize("case", ALIASES)
def test_who_shares_memory_is_observed(case: str) -> None:
    function, expected = ALIASES[case]
    _, found = seen(Model(function))
    assert groups(found) == expected


def test_memory_joined_by_a_leaf_is_one_group() -> None:
    model = Model(lambda m, x: m.returns(x + 1, x + 2)[0].view(-1))  # type: ignore[operator]
    model.returns = Returns()
    _, found = seen(model)
    assert groups(found) == {frozenset({"add", "add_1", "returns", "getitem", "view"})}


def test_a_write_through_a_view_belongs_to_the_group_of_its_base() -> None:
    program, found = seen(Model(lambda m, x: _copy_into_slice(m.layer(x), x)))
    [[written]] = found.mutated.values()
    [layer] = program.graph.find_nodes(op="call_module", target="layer")
    assert found.alias[written] is found.alias[layer]


def test_observing_writes_neither_to_the_example_nor_to_its_flags() -> None:
    program, _ = seen(Model(lambda _, x: x.neg_()))
    before = program.args[0].clone()
    program.module.train()
    observe(program)
    assert torch.equal(program.args[0], before)
    assert program.module.training


def test_observing_keeps_batch_statistics() -> None:
    program, _ = seen(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).train())
    before = {name: tensor.clone() for name, tensor in program.module.state_dict().items()}
    observe(program)
    assert all(torch.equal(before[n], t) for n, t in program.module.state_dict().items())


def test_keyword_inputs_reach_their_placeholders_by_name() -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor, *more: Tensor, scale: Tensor, **others: Tensor) -> Tensor:
            return x * scale + more[0].sum() + others["shift"].sum()

    inputs = {"shift": torch.ones(7), "scale": torch.ones(2, 1)}
    args = (torch.ones(2, 4), torch.ones(5))
    program = capture(Two(), (args, inputs))
    found = observe(program)
    shapes = {n.target: found.values[n].shape for n in program.graph.find_nodes(op="placeholder")}
    assert shapes == {"x": (2, 4), "more_0": (5,), "scale": (2, 1), "shift": (7,)}


def test_sparse_inputs_are_observed() -> None:
    class Graph(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 2)

        def forward(self, adjacency: Tensor, x: Tensor) -> Tensor:
            return torch.sparse.mm(adjacency, self.layer(x))

    inputs = ((torch.eye(3).to_sparse(), torch.randn(3, 4)), {})
    found = observe(capture(Graph(), inputs))
    assert list(found.values.values())[-1] == TensorSpec((3, 2), torch.float32)


def test_a_node_that_fails_is_named_with_its_line() -> None:
    program, _ = seen(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
    program.args, program.seen = (torch.randn(2, 5),), None
    with pytest.raises(ExampleInputError, match=r"^_0 \(call_module 0\) .* fails .* shapes"):
        observe(program)


def test_what_was_seen_is_kept_and_follows_removals() -> None:
    program, found = seen(nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 2)))
    assert observe(program) is found
    relu = next(node for node in program.graph.nodes if node.target == "1")
    relu.replace_all_uses_with(relu.all_input_nodes[0])
    program.graph.erase_node(relu)
    fewer = observe(program)
    assert relu not in fewer.values and not fewer.mutated
    assert sum(fewer.macs.values()) == sum(found.macs.values()) == 2 * (4 * 4 + 4 * 2)


@torch.fx.wrap
def _halved(x: Tensor, sizes: list[int]) -> Tensor:
    sizes[0] //= 2
    return x[:, : sizes[0]]


def test_a_function_may_write_to_the_list_it_is_given() -> None:
    _, found = seen(Model(lambda m, x: _halved(m.layer(x), [4])))
    assert TensorSpec((2, 2), torch.float32) in found.values.values()
