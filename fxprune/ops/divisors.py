"""Numbers that are never 0, so that 0 divided by them is 0: counts of at least one, say.

Means over the neighbours of a node are sums / counts.clamp(min=1).view(-1, 1).expand_as(sums).
"""

from typing import Any

import torch
from torch import fx

_CLAMPS = {torch.clamp, torch.clip, torch.clamp_min, "clamp", "clip", "clamp_min"}
# What gives the elements of its first argument other places, or another type.
_MOVING = {
    *("view", "reshape", "expand", "expand_as", "unsqueeze", "squeeze", "view_as", "index_select"),
    *("contiguous", "clone", "detach", "float", "double", "to", "type_as"),
    *(torch.unsqueeze, torch.reshape, torch.clone, torch.detach, torch.index_select),
}
_ROOTS = {torch.sqrt, "sqrt"}


def is_never_zero(argument: Any) -> bool:
    """Tell whether a divisor, a number or a node, is known to be of numbers other than 0."""
    while isinstance(argument, fx.Node):
        if argument.target in _CLAMPS:
            return _is_clamped_above_zero(argument)
        if argument.target not in _MOVING | _ROOTS:
            return False
        argument = argument.args[0] if argument.args else None
    return isinstance(argument, (int, float)) and argument != 0


def _is_clamped_above_zero(node: fx.Node) -> bool:
    """Tell whether a clamp's limits are positive; a node without one has none."""
    given = [*node.args[1:], *node.kwargs.values()]
    least: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("min")
    return least is not None and all(
        isinstance(limit, (int, float)) and limit > 0 for limit in given if limit is not None
    )
