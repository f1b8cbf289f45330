"""1×1 convolutions that an average pool behind them will be taken before.

    mean(W·x + b) = W·mean(x) + b

They then have fewer places to work at; see `fxprune.passes.early_pools`.
"""

from collections.abc import Collection

from torch import fx

from fxprune.folding.average_pools import Average, average_at
from fxprune.folding.convolutions import Geometry
from fxprune.programs.observation import Observation, TensorSpec
from fxprune.programs.program import Program


def shrinking_pool(
    program: Program, node: fx.Node, passed: Collection[fx.Node], seen: Observation
) -> tuple[fx.Node, Average] | None:
    """Return the average pool that alone reads a layer, if it makes fewer places.

    passed: what may stand between them, as it goes before pools are moved.
    """
    while len(node.users) == 1:
        node = next(iter(node.users))
        average = average_at(program, node)
        if average is not None:
            return (node, average) if makes_fewer_places(node, average, seen) else None
        if node not in passed:
            return None
    return None


def makes_fewer_places(node: fx.Node, average: Average, seen: Observation) -> bool:
    """Tell whether a pool makes fewer places of those of a batch of maps."""
    before, after = seen.values[node.all_input_nodes[0]], seen.values[node]
    if not isinstance(before, TensorSpec) or not isinstance(after, TensorSpec):
        return False
    if len(before.shape) != average.axes + 2 or node.all_input_nodes[0] is not node.args[0]:
        return False
    pairs = list(zip(after.shape[2:], before.shape[2:], strict=True))
    return all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)


def comes_after(layer: Geometry, average: Average) -> bool:
    """Tell whether a layer may work on averages as well as before them."""
    if len(layer.kernel) != average.axes:
        return False
    if max(layer.kernel) > 1 or max(layer.stride) > 1 or any(layer.padding):
        return False
    return average.keeps_constants or not layer.bias
