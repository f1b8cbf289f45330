"""Which layer can compute an affine map of channels too: the one before it, or the one behind.

Before it any layer whose outputs nobody else reads; behind it one whose border is no row of zeros,
or any if the map shifts nothing. Between the map and the layer behind it average pooling without
padding, which keeps channels and constants, and flattening, which only repeats them, may stand.
"""

from typing import Any

import torch
from torch import fx, nn

from fxprune.folding.affine_maps import ANY_AXIS, AffineMap, channel_axis, takes_shift
from fxprune.folding.average_pools import averages
from fxprune.programs.observation import Observation, TensorSpec
from fxprune.programs.program import Program
from fxprune.runtime.kinds import DROPOUTS, LAYERS
from fxprune.user_models.modules import submodule


def layer_before(
    source: fx.Node, axis: int, sole: dict[fx.Node, nn.Module], seen: Observation
) -> Any:
    """Return the layer that can compute a map of its outputs along an axis; None if it is none.

    A norm of (N, L, C) works on another axis.
    """
    layer: Any = sole.get(source)
    if type(layer) not in LAYERS or len(source.users) != 1:
        return None
    return layer if axis in (ANY_AXIS, channel_axis(layer, seen.values[source])) else None


def layer_behind(
    program: Program,
    node: fx.Node,
    found: AffineMap,
    sole: dict[fx.Node, nn.Module],
    seen: Observation,
    *,
    shifts: bool,
) -> fx.Node | None:
    """Return the only reader of a map, if it is a layer that can compute the map too.

    shifts: whether the map shifts anything.
    """
    reader = _reader(program, node, seen)
    layer: Any = sole.get(reader) if reader is not None else None
    if reader is None or type(layer) not in LAYERS:
        return None
    axis = channel_axis(layer, seen.values[reader.all_input_nodes[0]])
    if axis is None or len(seen.values[node].shape) < 2:
        return None
    between = reader.all_input_nodes[0] is not node
    if found.axis not in (ANY_AXIS, axis) or (between and axis != 1):
        return None
    if shifts and not takes_shift(layer):
        return None
    # What is written into may not be the same any more where the layer would read it.
    return None if seen.written(found.source) else reader


def _reader(program: Program, node: fx.Node, seen: Observation) -> fx.Node | None:
    """Return the only reader, behind what keeps channels and constants as they are."""
    while len(node.users) == 1:
        reader = next(iter(node.users))
        if len(reader.all_input_nodes) != 1 or reader.op == "output" or reader in seen.mutated:
            return None
        if not _is_transparent(program, reader, seen):
            return reader if reader.op == "call_module" else None
        node = reader
    return None


def _is_transparent(program: Program, node: fx.Node, seen: Observation) -> bool:
    before, after = seen.values[node.all_input_nodes[0]], seen.values[node]
    if not isinstance(before, TensorSpec) or not isinstance(after, TensorSpec):
        return False
    if node.target in (torch.flatten, "flatten"):
        return node.args[1:] == (1,) and not node.kwargs
    module: Any = None
    if node.op == "call_module":
        module = submodule(program.module, str(node.target))
    if type(module) is nn.Flatten:
        return module.start_dim == 1 and module.end_dim == -1
    if type(module) in (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d):
        return after.shape[:2] == before.shape[:2]
    if type(module) in (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d):
        return averages(module) and after.shape[:2] == before.shape[:2]
    return type(module) in DROPOUTS
