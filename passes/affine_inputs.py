"""Fold a batch norm, or a constant per channel, into the layer after it.

    W·(a·x + t) + b = (W·a)·x + (b + W·t)

exact for linear layers, and for convolutions whose border is no row of zeros (no padding, or one
that repeats the input); where zeros are padded, and in transposed convolutions, only for t = 0: at
the border fewer weights meet t. Average pooling without padding keeps channels and constants, and
flattening only repeats them, so that the map may stand before those too. Computed in float64.
"""

from typing import Any

import torch
from torch import Tensor, fx, nn

from fxprune.affine_maps import (
    ANY_AXIS,
    AffineMap,
    affine_map,
    channel_axis,
    scale_inputs_,
    takes_shift,
)
from fxprune.average_pools import averages
from fxprune.kinds import LAYERS
from fxprune.modules import submodule
from fxprune.observation import Observation, TensorSpec, observe
from fxprune.pipeline import Change, keeps_shapes
from fxprune.program import Program
from fxprune.sharing import sole_modules


@keeps_shapes
def fold_affine_inputs(program: Program) -> list[Change]:
    """Fold affine maps of channels whose only reader is a layer that can compute them too."""
    sole = sole_modules(program)
    seen = observe(program)
    changes: list[Change] = []
    for node in reversed(list(program.graph.nodes)):
        found = affine_map(program, node, sole.get(node), seen)
        change = None if found is None else _consider(program, node, found, sole, seen)
        if change is not None:
            changes.append(change)
    if changes:
        seen.drop_dead_code(program.graph)
    return changes


def _consider(
    program: Program,
    node: fx.Node,
    found: AffineMap,
    sole: dict[fx.Node, nn.Module],
    seen: Observation,
) -> Change | None:
    reader = _reader(program, node, seen)
    layer: Any = sole.get(reader) if reader is not None else None
    if reader is None or type(layer) not in LAYERS:
        return None
    given = seen.values[reader.all_input_nodes[0]]
    axis, channels = channel_axis(layer, given), seen.values[node].shape[1]
    if axis is None or len(seen.values[node].shape) < 2:
        return None
    between = reader.all_input_nodes[0] is not node
    if found.axis not in (ANY_AXIS, axis) or (between and axis != 1):
        return None
    if bool((found.shift != 0).any()) and not takes_shift(layer):
        return None
    if seen.written(found.source):
        return None  # it may not be the same any more where the layer would read it
    size = given.shape[axis]
    scale, shift = (_repeated(v, channels, size, between) for v in (found.scale, found.shift))
    scale_inputs_(layer, scale, shift)
    node.replace_all_uses_with(found.source)
    node.graph.erase_node(node)
    name = str(node.target) if node.op == "call_module" else node.name
    return Change(name, f"folded into {reader.target}")


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
    return False


def _repeated(values: Tensor, channels: int, size: int, between: bool) -> Tensor:
    """Give every input of the layer its own: flattened, a channel is a run of them."""
    if not between or len(values) == 1:
        return values.expand(size)
    return values.expand(channels).repeat_interleave(size // channels)
