"""Whether operators lay a map out as one row per sample, channel after channel: as `flatten(1)`.

Found by running them, not by their names: on numbers that tell all elements apart they must give
the row; of a larger map, or of another batch, they may give anything but a row that is as long. So
`view(-1, 400)` is none: of a map twice as large it would make two rows.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from fxprune import ops as ops
from fxprune.dataflow.rules import execute, rule_for
from fxprune.dataflow.values import Barrier
from fxprune.ops.execution import is_settled, movement_flow
from fxprune.ops.transposition import SQUEEZE, UNSQUEEZE
from fxprune.programs.observation import Observation, TensorSpec
from fxprune.programs.program import Program
from fxprune.user_models.modules import submodule


def moves_data(program: Program, node: fx.Node, seen: Observation) -> bool:
    """Tell whether an operator moves the elements of one tensor, by sizes that no data decides."""
    if not node.op.startswith("call_") or node in seen.mutated:
        return False
    tensors = [one for one in node.all_input_nodes if _is_tensor(one, seen)]
    if len(tensors) != 1 or tensors[0] is not next(iter(node.args), None):
        return False
    if not all(is_settled(one) for one in node.all_input_nodes if one is not tensors[0]):
        return False
    try:
        rule = rule_for(node, _module(program, node))
    except Barrier:
        return False
    moves = rule.flow is movement_flow or rule in (UNSQUEEZE, SQUEEZE)
    return moves and _is_tensor(node, seen)


def flattens(program: Program, path: Sequence[fx.Node], seen: Observation) -> bool:
    """Tell whether operators that `moves_data` lets pass, in this order, flatten a map."""
    source: Any = path[0].args[0]
    batch, *sizes = seen.values[source].shape
    if len(sizes) < 2:
        return False
    larger = [*sizes[:-1], 2 * sizes[-1]]
    return (
        _is_row(program, path, seen, (batch, *sizes), math.prod(sizes)) is True
        and _is_row(program, path, seen, (batch, *larger), math.prod(sizes)) is None
        and _is_row(program, path, seen, (1 if batch > 1 else 2, *sizes), math.prod(sizes))
        is not False
    )


def only_reader(node: fx.Node, seen: Observation) -> fx.Node | None:
    """Return who alone reads a tensor; to ask for its size on behalf of the reader is no reading.

    None if there are others.
    """
    readers = [user for user in node.users if user.op == "output" or _is_tensor(user, seen)]
    if len(readers) != 1:
        return None
    pending = [user for user in node.users if user is not readers[0]]
    while pending:
        number = pending.pop()
        if number.op == "output" or not is_settled(number):
            return None
        pending += [user for user in number.users if user is not readers[0]]
    return readers[0]


def _is_row(
    program: Program, path: Sequence[fx.Node], seen: Observation, shape: Sequence[int], width: int
) -> bool | None:
    """Tell whether a map of some shape becomes its row; None if no row of that width comes out."""
    numbers = torch.arange(math.prod(shape), dtype=torch.float64).reshape(*shape)
    result = numbers
    try:
        for node in path:
            result = _run(program, node, result, seen)
    except (RuntimeError, IndexError, TypeError, ValueError):
        return None
    if result.dim() == 0 or result.shape[-1] != width:
        return None
    return torch.equal(result, numbers.reshape(shape[0], -1))


def _run(program: Program, node: fx.Node, tensor: Tensor, seen: Observation) -> Tensor:
    """Run an operator on another tensor; what it asks of that tensor's size is asked anew."""
    source = node.args[0]

    def value(argument: fx.Node) -> Any:
        if argument is source:
            return tensor
        if argument.op not in ("call_method", "call_function") or _is_tensor(argument, seen):
            return seen.values[argument]
        if not _depends(argument, source, seen):
            return seen.values[argument]
        args, kwargs = map_arg((argument.args, argument.kwargs), value)
        return execute(argument, None, args, kwargs)

    args, kwargs = map_arg((node.args, node.kwargs), value)
    return execute(node, _module(program, node), args, kwargs)


def _depends(number: fx.Node, source: Any, seen: Observation) -> bool:
    """Tell whether a number is computed from the size of a tensor."""
    return any(
        one is source if _is_tensor(one, seen) else _depends(one, source, seen)
        for one in number.all_input_nodes
    )


def _module(program: Program, node: fx.Node) -> Any:
    return submodule(program.module, str(node.target)) if node.op == "call_module" else None


def _is_tensor(node: fx.Node, seen: Observation) -> bool:
    return isinstance(seen.values[node], TensorSpec)
