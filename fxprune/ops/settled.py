"""Arguments that inputs decide, where a rule takes them for what the example gave.

    h.split(k.tolist(), 1)        h.cumsum(k.dim() - 1)        F.group_norm(h, k.shape[1])

Sizes of views, slices and their like may follow the input: their rules look at how. An axis, or a
number of groups, may not, nor may a list, a slice or an array that is computed from data.
"""

import functools
import inspect
from collections.abc import Hashable, Iterator
from typing import Any

import torch
from torch import fx

from fxprune.dataflow.rules import Call
from fxprune.dataflow.values import Barrier, OfSizes, ShapeOf, State, Value, flatten
from fxprune.ops.execution import is_settled, node_values, ranks_asked

# What arguments are called that say which axis, or how channels are divided.
_DECISIVE = frozenset(
    {
        *("dim", "dims", "dim0", "dim1", "axis", "axes", "axis0", "axis1", "start_dim", "end_dim"),
        *("source", "destination", "num_groups", "groups", "upscale_factor", "downscale_factor"),
    }
)


def require_settled(call: Call) -> None:
    """Raise `Barrier` if an argument that decides what a rule says may be another at the next run.

    That an axis is counted from the rank of what it is an axis of, or comes from, is all right.
    """
    decisive: set[fx.Node] | None = None
    for node, found in node_values(call).items():
        leaves = [found] if isinstance(found, (int, float)) else flatten(found)
        if any(isinstance(leaf, (Value, State, ShapeOf)) for leaf in leaves):
            continue
        if isinstance(found, (int, float)):
            decisive = _decisive_nodes(call) if decisive is None else decisive
            if node in decisive and not _is_of_channels(found) and not _is_own_rank(node, call):
                raise Barrier("an axis, or a number of groups, is computed")
        elif not isinstance(found, (str, type(None), torch.dtype, torch.device)):
            if not is_settled(node):
                raise Barrier("an argument is computed from data")


def _is_of_channels(found: Any) -> bool:
    return isinstance(found, OfSizes) and found.is_of_channels


def _is_own_rank(number: fx.Node, call: Call) -> bool:
    """Tell whether a number is computed from ranks of tensors that the operator is given."""
    asked_of = ranks_asked(number)
    return asked_of is not None and set(asked_of) <= _sources(call, number)


def _sources(call: Call, number: fx.Node) -> set[fx.Node]:
    """Return the nodes that what an operator is given, but for a number, comes from."""
    pending = [node for node in call.node.all_input_nodes if node is not number]
    found = set(pending)
    while pending:
        new = set(pending.pop().all_input_nodes) - found
        found |= new
        pending += new
    return found


def _decisive_nodes(call: Call) -> set[fx.Node]:
    """Return the nodes among a call's arguments that stand where axes and groups are given."""
    node = call.node
    names = _names(node.target) if node.op != "call_module" else ()
    found: set[fx.Node] = set()
    for place, argument in enumerate(node.args):
        # What is beyond the last is one of its many: permute(0, 2, 1).
        if names and names[min(place, len(names) - 1)] & _DECISIVE:
            found |= set(_nodes_in(argument))
    for name, argument in node.kwargs.items():
        if name in _DECISIVE:
            found |= set(_nodes_in(argument))
    return found


def _nodes_in(argument: Any) -> Iterator[fx.Node]:
    return (leaf for leaf in flatten(argument) if isinstance(leaf, fx.Node))


@functools.lru_cache(maxsize=1024)
def _names(target: Hashable) -> tuple[frozenset[str], ...]:
    """Return what the arguments of an operator are called, by position, in any of its forms."""
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    packet = getattr(torch.ops.aten, str(name).rstrip("_"), None)
    forms: list[list[str]] = []
    if packet is not None and not inspect.isfunction(target):
        for overload in packet.overloads():
            arguments = getattr(packet, overload)._schema.arguments
            forms.append([argument.name for argument in arguments if not argument.kwarg_only])
    elif callable(target):
        try:
            forms.append(list(inspect.signature(target).parameters))
        except (TypeError, ValueError):
            return ()
    longest = max(map(len, forms), default=0)
    return tuple(
        frozenset(form[place] for form in forms if place < len(form)) for place in range(longest)
    )
