"""Write a shape that was put together as a tuple as the sizes it is made of.

    x.view(y.shape[:-1] + (8, 3))  →  x.view((y.shape[0], y.shape[1], 8, 3))
    x.view(*y.shape[:2], 24)       →  x.view(y.shape[0], y.shape[1], 24)

so that a size can follow when channels go, each by itself.
"""

import operator
from typing import Any

from torch import fx

from fxprune.observation import Observation, TensorSpec, observe
from fxprune.pipeline import Change, keeps_shapes
from fxprune.program import Program
from fxprune.rules import rule_name


@keeps_shapes
def unpack_sizes(program: Program) -> list[Change]:
    """Give views, reshapes and expansions a tuple of sizes in the place of a computed one."""
    seen = observe(program)
    changes: list[Change] = []
    for node in list(program.graph.nodes):
        if _ask_itself(node, seen):
            changes.append(Change(node.name, "is asked of the tensor itself"))
            continue
        place = _computed_shape(node)
        sizes = None if place is None else _sizes(node, place, seen)
        if sizes is None:
            continue
        node.args, node.kwargs = (node.args[0], sizes), {}
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


def _computed_shape(node: fx.Node) -> fx.Node | None:
    """Return the one node that gives an operator its sizes, if there is one."""
    if node.op not in ("call_function", "call_method") or rule_name(node, None) != "sizes":
        return None
    given = [*node.args[1:], *node.kwargs.values()]
    return given[0] if len(given) == 1 and isinstance(given[0], fx.Node) else None


def _sizes(node: fx.Node, shape: fx.Node, seen: Observation) -> tuple[Any, ...] | None:
    """Return what a shape is made of, each size of a tensor asked for where it is needed."""
    parts = _parts(shape, seen)
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
        return None if source is None or _is_computed(shape.args[1]) else source[shape.args[1]]
    return None


def _is_whole_shape(node: fx.Node, seen: Observation) -> bool:
    asked = node.target == "size" and len(node.args) == 1 and not node.kwargs
    named = node.target is getattr and node.args[1] == "shape"
    source: Any = node.args[0] if node.args else None
    of_tensor = isinstance(source, fx.Node) and isinstance(seen.values[source], TensorSpec)
    return (asked or named) and of_tensor


def _is_computed(index: slice) -> bool:
    return any(isinstance(end, fx.Node) for end in (index.start, index.stop, index.step))
