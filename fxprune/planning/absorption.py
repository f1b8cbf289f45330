"""Where batch norms and constants per channel go when a gated model is folded.

Into the layer before them, where the nonlinearities in between are linear; else into the one behind
them, if it can take them. A layer that has no bias gets one from what shifts.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import fx, nn

from fxprune.folding.affine_maps import AffineMap, affine_map
from fxprune.folding.affine_neighbours import layer_before, layer_behind
from fxprune.programs.observation import Observation
from fxprune.programs.program import Program
from fxprune.runtime.kinds import DROPOUTS, NORMS
from fxprune.user_models.modules import submodule


@dataclass(frozen=True)
class Absorption:
    """What becomes of an affine map, and of the parameters only it has.

    before: the layer that takes it if the linearity gates `sites` are open. behind: that which
    takes it otherwise. shifts: whether the layer then has a bias.
    """

    before: fx.Node | None
    sites: tuple[int, ...]
    behind: fx.Node | None
    shifts: bool
    parameters: tuple[nn.Parameter, ...]


def find_absorptions(
    program: Program,
    depth: Mapping[fx.Node, int],
    sole: dict[fx.Node, nn.Module],
    seen: Observation,
) -> dict[fx.Node, Absorption]:
    """Return what becomes of every affine map that some layer takes in.

    depth: the linearity gates behind nonlinearities.
    """
    absorbed: dict[fx.Node, Absorption] = {}
    for node in program.graph.nodes:
        found = affine_map(program, node, sole.get(node), seen)
        if found is None:
            continue
        shifts = type(sole.get(node)) in NORMS or bool((found.shift != 0).any())
        before, sites = _before(program, found, absorbed, depth, sole, seen)
        behind = None
        if before is None or sites:
            behind = layer_behind(program, node, found, sole, seen, shifts=shifts)
        if before is not None or behind is not None:
            parameters = _parameters(program, node, sole.get(node))
            absorbed[node] = Absorption(before, sites, behind, shifts, parameters)
    return absorbed


def _before(
    program: Program,
    found: AffineMap,
    absorbed: Mapping[fx.Node, Absorption],
    depth: Mapping[fx.Node, int],
    sole: dict[fx.Node, nn.Module],
    seen: Observation,
) -> tuple[fx.Node | None, tuple[int, ...]]:
    """Return the layer that would take a map in, and the gates that have to be open for it."""
    source, sites = found.source, list[int]()
    while len(source.users) == 1 and len(source.all_input_nodes) == 1:
        known = absorbed.get(source)
        if known is not None and known.before is not None:
            sites += known.sites
            source = known.before
            break
        if source in depth:
            sites.append(depth[source])
        elif not _is_dropout(program, source):
            break
        source = source.all_input_nodes[0]
    layer = layer_before(source, found.axis, sole, seen)
    return (None, ()) if layer is None else (source, tuple(sites))


def _is_dropout(program: Program, node: fx.Node) -> bool:
    if node.op != "call_module":
        return False
    return type(submodule(program.module, str(node.target))) in DROPOUTS


def _parameters(
    program: Program, node: fx.Node, module: nn.Module | None
) -> tuple[nn.Parameter, ...]:
    """Return the parameters that go with an affine map."""
    if module is not None:
        return tuple(module.parameters())
    found: list[nn.Parameter] = []
    for operand in node.all_input_nodes:
        if operand.op != "get_attr" or len(operand.users) != 1:
            continue
        if len(node.graph.find_nodes(op="get_attr", target=operand.target)) != 1:
            continue
        owner, _, name = str(operand.target).rpartition(".")
        tensor: torch.Tensor = getattr(submodule(program.module, owner), name)
        found += [tensor] if isinstance(tensor, nn.Parameter) else []
    return tuple(found)
