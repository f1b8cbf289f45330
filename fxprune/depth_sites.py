"""Where linearity gates could let layers be merged, and why not elsewhere.

A gate goes where the two layers around a nonlinearity would be exactly one, of no more parameters
(`fxprune.linear_layers`), or where the cheapest plan for the whole chain merges across it, were all
its nonlinearities linear. Batch norms, which fold into the layer before them, and dropout may stand
between as well, and what flattens a map for a linear layer.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import fx, nn

from fxprune.affine_maps import NORMS
from fxprune.chains import cheapest, in_order, parameters
from fxprune.convolutions import Geometry, Inexact, geometry_of
from fxprune.flattening import flattens, moves_data, only_reader
from fxprune.linear_layers import composed
from fxprune.observation import Observation
from fxprune.out_of_place import overwrites
from fxprune.pipeline import Change
from fxprune.program import Program
from fxprune.sharing import sole_modules
from fxprune.sites import Candidate

_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.Identity)


@dataclass
class _Link:
    """What stands behind a layer, up to the next: nonlinearities, and whether a batch norm does."""

    passed: list[fx.Node]
    norm: bool = False
    then: fx.Node | None = None
    reason: str = ""


def find_depth_sites(
    program: Program, candidates: Sequence[Candidate], seen: Observation
) -> tuple[list[Candidate], list[Change]]:
    """Return the nonlinearities whose neighbours could be merged, and a reason for each other."""
    reasons = {c.node: "no layer of its own stands before it" for c in candidates}
    calls = Counter(node.target for node in program.graph.nodes if node.op == "call_module")
    for node in reasons:
        if calls[node.target] > 1 and overwrites(node, program.module):
            reasons[node] = "its module works in place and is called elsewhere too"
    usable = {node for node, reason in reasons.items() if "elsewhere" not in reason}
    sole = sole_modules(program)
    layers = {node: g for node in program.graph.nodes if (g := geometry_of(sole.get(node)))}
    links = {node: _link(program, node, usable, layers, sole, seen) for node in layers}
    for link in links.values():
        reasons |= dict.fromkeys(link.passed, link.reason)
    for chain in _chains(links):
        biased = {n: replace(layers[n], bias=layers[n].bias or links[n].norm) for n in chain}
        _judge(chain, in_order(chain, biased, seen), links, reasons)
    found = [candidate for candidate in candidates if not reasons[candidate.node]]
    refused = [
        Change(candidate.name, f"no linearity gate: {reasons[candidate.node]}")
        for candidate in candidates
        if reasons[candidate.node]
    ]
    return found, refused


def _link(
    program: Program,
    node: fx.Node,
    usable: set[fx.Node],
    layers: dict[fx.Node, Geometry],
    sole: dict[fx.Node, nn.Module],
    seen: Observation,
) -> _Link:
    """Follow a layer's only reader to the next layer."""
    link, first, moves = _Link([]), node, list[fx.Node]()
    while True:
        reader = only_reader(node, seen)
        if reader is None:
            link.reason = f"{node.name} has several readers"
            return link
        node = reader
        if node in layers:
            link.reason = _misfit(program, first, moves, node, layers, seen)
            link.then = None if link.reason else node
            return link
        if moves_data(program, node, seen):
            moves.append(node)
        elif node in usable:
            link.passed.append(node)
        elif not moves and _folds(layers[first], sole.get(node), seen.values[node]):
            link.norm = True
        elif not _is_dropout(program, node):
            link.reason = f"{node.name} comes before another layer does"
            return link


def _misfit(
    program: Program,
    first: fx.Node,
    moves: list[fx.Node],
    then: fx.Node,
    layers: dict[fx.Node, Geometry],
    seen: Observation,
) -> str:
    """Say why two layers are not neighbours, with these operators between; nothing if they are."""
    if not moves:
        alike = len(layers[first].kernel) == len(layers[then].kernel)
        return "" if alike else "the layers around it work along different axes"
    batched = len(seen.values[first].shape) == len(layers[first].kernel) + 2
    flat = layers[first].kernel and not layers[then].kernel and batched
    return "" if flat and flattens(program, moves, seen) else f"{moves[0].name} moves what it reads"


def _folds(layer: Geometry, module: nn.Module | None, spec: object) -> bool:
    """Tell whether a module is a batch norm of the layer's outputs, with stored statistics."""
    if type(module) not in NORMS or getattr(module, "running_mean", None) is None:
        return False
    return bool(layer.kernel) or len(getattr(spec, "shape", ())) == 2


def _is_dropout(program: Program, node: fx.Node) -> bool:
    if node.op != "call_module":
        return False
    return type(program.module.get_submodule(str(node.target))) in _DROPOUTS


def _chains(links: dict[fx.Node, _Link]) -> list[list[fx.Node]]:
    """Return the longest runs of linked layers."""
    found: list[list[fx.Node]] = []
    reached = {link.then for link in links.values()}
    for node in links:
        if node in reached:
            continue
        chain = [node]
        while (then := links[chain[-1]].then) is not None:
            chain.append(then)
        found.append(chain)
    return found


def _judge(
    chain: list[fx.Node],
    layers: list[Geometry],
    links: dict[fx.Node, _Link],
    reasons: dict[fx.Node, str],
) -> None:
    """Note for the nonlinearities of a chain why none of its pieces pays; nothing if one does."""
    places = [1] * len(chain)
    merged = {
        place
        for piece in cheapest(layers, places, parameters)
        for place in range(piece.start, piece.stop - 1)
    }
    for place, node in enumerate(chain[:-1]):
        pair = cheapest(layers[place : place + 2], [1, 1], parameters)
        pays = place in merged or len(pair) == 1
        reason = "" if pays else _reason(layers[place], layers[place + 1])
        reasons |= dict.fromkeys(links[node].passed, reason)


def _reason(first: Geometry, second: Geometry) -> str:
    try:
        merged = composed(first, second)
    except Inexact as reason:
        return f"the layers around it are not one: {reason}"
    apart = first.parameters + second.parameters
    return f"merged, {merged.parameters} parameters; apart, {apart}"
