"""What flattens a map, found by running it; and who reads a tensor."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from fxprune.dataflow.flattening import flattens, moves_data, only_reader
from fxprune.programs.observation import observe
from fxprune.programs.program import Program, capture


class Between(nn.Module):
    """A convolution, something, a linear layer."""

    def __init__(self, between: Callable[[Tensor], Tensor], size: int, features: int) -> None:
        super().__init__()
        self.conv, self.linear = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(features, 2)
        self.between, self.size = between, size

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.between(self.conv(x)))


def path(
    between: Callable[[Tensor], Tensor], size: int = 5, batch: int = 2
) -> tuple[Program, list[fx.Node]]:
    model = Between(between, size, 4 * size * size)
    inputs = ((torch.randn(batch, 3, size, size),), {})
    program = capture(model, inputs)
    seen = observe(program)
    linear = next(n for n in program.graph.nodes if n.target == "linear")
    found: list[fx.Node] = []
    node: Any = linear.all_input_nodes[0]
    while node.target != "conv":
        if not moves_data(program, node, seen):
            return program, []
        found.insert(0, node)
        node = node.args[0]
    return program, found


FLAT: dict[str, Callable[[Tensor], Tensor]] = {
    "flatten": lambda x: torch.flatten(x, 1),
    "method": lambda x: x.flatten(start_dim=1),
    "in two steps": lambda x: x.flatten(2).flatten(1),
    "view": lambda x: x.view(x.size(0), -1),
    "sizes": lambda x: x.reshape(x.shape[0], x.shape[1] * x.shape[2] * x.shape[3]),
    "literal": lambda x: x.reshape(2, 100),
    "batch by name": lambda x: x.view(-1, x.size(1) * x.size(2) * x.size(3)),
    "there and back": lambda x: x.flip(1).unflatten(1, (2, 2)).flatten(1, 2).flip(1).flatten(1),
}
OTHER: dict[str, Callable[[Tensor], Tensor]] = {
    "two rows of a larger map": lambda x: x.view(-1, 100),
    "channels last": lambda x: x.permute(0, 2, 3, 1).flatten(1),
    "transposed": lambda x: x.transpose(2, 3).flatten(1),
    "turned": lambda x: x.flip(3).flatten(1),
    "batch mixed in": lambda x: x.transpose(0, 1).reshape(2, -1),
    "computed": lambda x: x.relu().flatten(1),
}


@pytest.mark.parametrize("name", FLAT)
def test_what_makes_a_row_of_a_map_flattens_it(name: str) -> None:
    program, nodes = path(FLAT[name])
    assert nodes and flattens(program, nodes, observe(program))


@pytest.mark.parametrize("name", OTHER)
def test_what_does_anything_else_does_not(name: str) -> None:
    program, nodes = path(OTHER[name])
    assert not nodes or not flattens(program, nodes, observe(program))


def test_a_squeeze_also_drops_a_batch_of_one() -> None:
    program, nodes = path(lambda x: x.squeeze(), size=1)
    assert nodes and not flattens(program, nodes, observe(program))
    program, nodes = path(lambda x: x.squeeze(-1).squeeze(-1), size=1)
    assert flattens(program, nodes, observe(program))


def test_to_ask_for_a_size_is_no_reading() -> None:
    program, nodes = path(lambda x: x.view(x.size(0), -1))
    assert only_reader(nodes[0].all_input_nodes[0], observe(program)) is nodes[0]
    program, nodes = path(lambda x: x.flatten(1) * x.size(1))
    conv = next(n for n in program.graph.nodes if n.target == "conv")
    assert only_reader(conv, observe(program)) is None  # the size is wanted for something else
