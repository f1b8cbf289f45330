"""Fold a batch norm, or a constant per channel, into the layer after it.

    W·(a·x + t) + b = (W·a)·x + (b + W·t)

exact for linear layers, and for convolutions whose border is no row of zeros (no padding, or one
that repeats the input); where zeros are padded, and in transposed convolutions, only for t = 0: at
the border fewer weights meet t. Average pooling without padding keeps channels and constants, and
flattening only repeats them, so that the map may stand before those too. Computed in float64.
"""

from torch import Tensor, fx, nn

from fxprune.folding.affine_maps import AffineMap, affine_map, channel_axis, scale_inputs_
from fxprune.folding.affine_neighbours import layer_behind
from fxprune.programs.observation import Observation, observe
from fxprune.programs.pipeline import Change, keeps_shapes
from fxprune.programs.program import Program
from fxprune.programs.sharing import sole_modules


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
    shifts = bool((found.shift != 0).any())
    reader = layer_behind(program, node, found, sole, seen, shifts=shifts)
    if reader is None:
        return None
    layer, given = sole[reader], seen.values[reader.all_input_nodes[0]]
    axis, channels = channel_axis(layer, given), seen.values[node].shape[1]
    assert axis is not None
    between = reader.all_input_nodes[0] is not node
    size = given.shape[axis]
    scale, shift = (_repeated(v, channels, size, between) for v in (found.scale, found.shift))
    scale_inputs_(layer, scale, shift)
    node.replace_all_uses_with(found.source)
    node.graph.erase_node(node)
    name = str(node.target) if node.op == "call_module" else node.name
    return Change(name, f"folded into {reader.target}")


def _repeated(values: Tensor, channels: int, size: int, between: bool) -> Tensor:
    """Give every input of the layer its own: flattened, a channel is a run of them."""
    if not between or len(values) == 1:
        return values.expand(size)
    return values.expand(channels).repeat_interleave(size // channels)
