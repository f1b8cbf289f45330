"""Write a shape that was put together as a tuple as the sizes it is made of.

    x.view(y.shape[:-1] + (8, 3))  →  x.view((y.shape[0], y.shape[1], 8, 3))
    x.view(*y.shape[:2], 24)       →  x.view(y.shape[0], y.shape[1], 24)

so that a size can follow when channels go, each by itself.
"""

import operator
from typing import Any

from torch import fx

from fxprune.dataflow.rules import FILLED, rule_name
from fxprune.ops.execution import ranks_asked
from fxprune.programs.observation import Observation, TensorSpec, observe
from fxprune.programs.pipeline import Change, keeps_shapes
from fxprune.programs.program import Program
from fxprune.tracing.assumptions import assume_rank


@keeps_shapes
def unpack_sizes(program: Program) -> list[Change]:
    """Give views, expansions and new tensors a tuple of sizes in the place of a computed one."""
    seen = observe(program)
    changes: list[Change] = []
    for node in list(program.graph.nodes):
        if _ask_itself(node, seen):
            changes.append(Change(node.name, "is asked of the tensor itself"))
            continue
        place = _place_of_sizes(node)
        sizes = None if place is None else _sizes(node, place, seen)
        if place is None or sizes is None:
            continue
        _fix_ranks(node, _given(node, place), seen)
        _put(node, place, sizes)
        changes.append(Change(node.name, "its sizes are taken one by one"))
    if changes:
        seen.drop_dead_code(program.graph)
    return changes


def _ask_itself(node: fx.Node, seen: Observation) -> bool:
    """Let what is asked of a part of a shape be asked of the shape; tell whether it was."""
    part: Any = node.args[0] if node.args else None
    if not isinstance(part, fx.Node) or part.target is not operator.getitem:
        return False
    if not isinstance(part.args[1], slice):
        return False
    sizes = _parts(part, seen)
    if sizes is None or not all(isinstance(one, tuple) for one in sizes):
        return False
    if node.target is operator.getitem and isinstance(node.args[1], int):
        node.args = sizes[node.args[1]]
        return True
    whole = sizes[0][0] if sizes else None
    return node.target is len and whole is not None and _compare_ranks(node, whole, seen)


def _compare_ranks(length: fx.Node, shape: fx.Node, seen: Observation) -> bool:
    """Compare a rank where the length of a part of the shape was; tell whether nothing else did."""
    if not all(user.target is operator.eq and user.args[0] is length for user in length.users):
        return False
    rank = len(seen.values[shape])
    for user in list(length.users):
        user.args = (length, rank)
    length.args, seen.values[length] = (shape,), rank
    return True


def _place_of_sizes(node: fx.Node) -> int | str | None:
    """Return which argument gives an operator its sizes, if it is one that is computed."""
    kind = rule_name(node, None) if node.op in ("call_function", "call_method") else None
    if kind in ("sizes", "expanded"):
        given: Any = {**dict(enumerate(node.args[1:], 1)), **node.kwargs}
        return next(iter(given)) if len(given) == 1 and _is_computed(*given.values()) else None
    if kind != FILLED:
        return None
    place = int(node.op == "call_method")
    if len(node.args) > place:
        return place if _is_computed(node.args[place]) else None
    return "size" if _is_computed(node.kwargs.get("size")) else None


def _given(node: fx.Node, place: int | str) -> Any:
    return node.args[place] if isinstance(place, int) else node.kwargs[place]


def _put(node: fx.Node, place: int | str, sizes: tuple[Any, ...]) -> None:
    """Give a node its sizes as a tuple: by position where views take theirs."""
    if rule_name(node, None) != FILLED:
        node.args, node.kwargs = (node.args[0], sizes), {}
    elif isinstance(place, int):
        node.update_arg(place, sizes)
    else:
        node.update_kwarg(place, sizes)


def _sizes(node: fx.Node, place: int | str, seen: Observation) -> tuple[Any, ...] | None:
    """Return what a shape is made of, each size of a tensor asked for where it is needed."""
    parts = _parts(_given(node, place), seen)
    if parts is None:
        return None
    sizes: list[Any] = []
    for part in parts:
        if isinstance(part, tuple):
            source, axis = part
            with node.graph.inserting_before(node):
                part = node.graph.call_function(operator.getitem, (source, axis))
            part.meta["source"] = node.meta.get("source")
            seen.values[part], seen.alias[part] = seen.values[source][axis], part
        sizes.append(part)
    return tuple(sizes)


def _parts(shape: Any, seen: Observation) -> list[Any] | None:
    """Return the entries of a shape: numbers, nodes, and (node, axis) for a size of a tensor."""
    if isinstance(shape, (tuple, list)):
        return list(shape)
    if not isinstance(shape, fx.Node):
        return None
    if _is_whole_shape(shape, seen):
        return [(shape, axis) for axis in range(len(seen.values[shape]))]
    if shape.target is operator.add:
        left, right = (_parts(part, seen) for part in shape.args)
        return None if left is None or right is None else left + right
    if shape.target is operator.getitem and isinstance(shape.args[1], slice):
        source = _parts(shape.args[0], seen)
        bounds = [_bound(one, seen) for one in _ends(shape.args[1])]
        known = source is not None and not _is_computed(*bounds)
        return source[slice(*bounds)] if source is not None and known else None
    return None


def _bound(end: Any, seen: Observation) -> Any:
    """Return one end of a slice as a number, if it is one or computed from ranks alone."""
    return seen.values[end] if isinstance(end, fx.Node) and ranks_asked(end) is not None else end


def _ends(cut: slice) -> tuple[Any, ...]:
    return cut.start, cut.stop, cut.step


def _fix_ranks(node: fx.Node, shape: Any, seen: Observation) -> None:
    """Assert in front of a node the ranks that the ends of slices of a shape were taken from."""
    pending, tensors = [shape], dict[fx.Node, None]()
    while pending:
        part = pending.pop()
        if not isinstance(part, fx.Node):
            continue
        if part.target is operator.add:
            pending += part.args
        elif part.target is operator.getitem and isinstance(part.args[1], slice):
            pending.append(part.args[0])
            for end in _ends(part.args[1]):
                found = ranks_asked(end) if isinstance(end, fx.Node) else None
                tensors |= dict.fromkeys(found or ())
    for tensor in tensors:
        assume_rank(node, tensor, len(seen.values[tensor].shape))


def _is_whole_shape(node: fx.Node, seen: Observation) -> bool:
    asked = node.target == "size" and len(node.args) == 1 and not node.kwargs
    named = node.target is getattr and node.args[1] == "shape"
    source: Any = node.args[0] if node.args else None
    of_tensor = isinstance(source, fx.Node) and isinstance(seen.values[source], TensorSpec)
    return (asked or named) and of_tensor


def _is_computed(*arguments: Any) -> bool:
    return any(isinstance(argument, fx.Node) for argument in arguments)
