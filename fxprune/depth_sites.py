"""Where linearity gates could let layers be merged, and why not elsewhere.

A gate goes where the two layers around a nonlinearity would be exactly one, of no more parameters
(`fxprune.convolutions`), or where the cheapest plan for the whole chain merges across it, were all
its nonlinearities linear. Batch norms, which fold into the layer before them, and dropout may stand
between as well. Where only the zeros that a layer pads are in the way, the first of the layers may
pad them all instead.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from math import ceil

from torch import fx, nn

from fxprune.affine_maps import NORMS
from fxprune.chains import Piece, cheapest, parameters
from fxprune.convolutions import Geometry, Inexact, composed, geometry_of
from fxprune.observation import Observation
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


@dataclass
class _Links:
    """The layers of a program, what is behind each, and why a candidate has no gate so far."""

    layers: dict[fx.Node, Geometry]
    links: dict[fx.Node, _Link]
    reasons: dict[fx.Node, str]

    def chains(self) -> list[list[fx.Node]]:
        """Return the longest runs of linked layers that work along the same axes."""
        reached = {link.then for link in self.links.values()}
        found: list[list[fx.Node]] = []
        for node in self.links:
            if node not in reached:
                found += self._chain(node)
        return found

    def geometries(self, chain: Sequence[fx.Node]) -> list[Geometry]:
        """Return the layers of a chain as they are with the batch norms behind them folded."""
        biased = (self.layers[n].bias or self.links[n].norm for n in chain)
        return [replace(self.layers[n], bias=b) for n, b in zip(chain, biased, strict=True)]

    def _chain(self, node: fx.Node) -> list[list[fx.Node]]:
        found = [[node]]
        while (then := self.links[node].then) is not None:
            if len(self.layers[then].kernel) == len(self.layers[node].kernel):
                found[-1].append(then)
            else:
                found.append([then])
                reason = "the layers around it work along different axes"
                self.reasons |= dict.fromkeys(self.links[node].passed, reason)
            node = then
        return found


def find_depth_sites(
    program: Program, candidates: Sequence[Candidate], seen: Observation, *, ends: float = 1.0
) -> tuple[list[Candidate], list[Change]]:
    """Return the nonlinearities whose neighbours could be merged, and a reason for each other.

    ends: what part of the channels at the ends of merged layers to count, as if the others had gone
    by then; with few of them, and many in between, merging pays.
    """
    known = _find_links(program, candidates, seen)
    reasons = known.reasons
    for chain in known.chains():
        _judge(chain, known, ends)
    found = [candidate for candidate in candidates if not reasons[candidate.node]]
    refused = [
        Change(candidate.name, f"no linearity gate: {reasons[candidate.node]}")
        for candidate in candidates
        if reasons[candidate.node]
    ]
    return found, refused


def find_padded_segments(
    program: Program, candidates: Sequence[Candidate], seen: Observation, *, ends: float = 1.0
) -> list[tuple[list[fx.Node], list[Geometry]]]:
    """Return runs of layers that could pay as one, but for the zeros that are padded between them.

    ends: as in `find_depth_sites`.
    """
    known = _find_links(program, candidates, seen)
    found: list[tuple[list[fx.Node], list[Geometry]]] = []
    for chain in known.chains():
        layers = known.geometries(chain)
        paying = _paying(hoisted(layers), ends)
        for start, stop in _runs(paying):
            if not _are_one(layers[start:stop]):
                found.append((chain[start:stop], layers[start:stop]))
    return found


def hoisted(layers: Sequence[Geometry]) -> list[Geometry]:
    """Move the padding of a run of layers to its first: its outputs have the size they had.

    For every zero that a layer no longer pads, the one before makes one place more.
    """
    first, *others = layers
    padding = (0,) * len(first.kernel)
    for layer in reversed(layers):
        steps = zip(layer.padding, layer.stride, padding, strict=True)
        padding = tuple(own + stride * behind for own, stride, behind in steps)
    nothing = (0,) * len(padding)
    return [replace(first, padding=padding), *(replace(one, padding=nothing) for one in others)]


def _find_links(program: Program, candidates: Sequence[Candidate], seen: Observation) -> _Links:
    reasons = {c.node: "no layer of its own stands before it" for c in candidates}
    sole = sole_modules(program)
    layers = {node: g for node in program.graph.nodes if (g := geometry_of(sole.get(node)))}
    links = {node: _link(program, node, reasons, layers, sole, seen) for node in layers}
    for link in links.values():
        reasons |= dict.fromkeys(link.passed, link.reason)
    return _Links(layers, links, reasons)


def _link(
    program: Program,
    node: fx.Node,
    usable: Mapping[fx.Node, str],
    layers: dict[fx.Node, Geometry],
    sole: dict[fx.Node, nn.Module],
    seen: Observation,
) -> _Link:
    """Follow a layer's only reader to the next layer."""
    link, first = _Link([]), node
    while True:
        if len(node.users) != 1:
            link.reason = f"{node.name} has several readers"
            return link
        node = next(iter(node.users))
        if len(node.all_input_nodes) != 1 or node.op == "output":
            link.reason = f"{node.name} comes before another layer does"
            return link
        if node in layers:
            link.then = node
            return link
        if node in usable:
            link.passed.append(node)
        elif _folds(layers[first], sole.get(node), seen.values[node]):
            link.norm = True
        elif not _is_dropout(program, node):
            link.reason = f"{node.name} comes before another layer does"
            return link


def _folds(layer: Geometry, module: nn.Module | None, spec: object) -> bool:
    """Tell whether a module is a batch norm of the layer's outputs, with stored statistics."""
    if type(module) not in NORMS or getattr(module, "running_mean", None) is None:
        return False
    return bool(layer.kernel) or len(getattr(spec, "shape", ())) == 2


def _is_dropout(program: Program, node: fx.Node) -> bool:
    if node.op != "call_module":
        return False
    return type(program.module.get_submodule(str(node.target))) in _DROPOUTS


def _judge(chain: list[fx.Node], known: _Links, ends: float) -> None:
    """Note for the nonlinearities of a chain why none of its pieces pays; nothing if one does."""
    layers = known.geometries(chain)
    paying = _paying(layers, ends)
    for place, node in enumerate(chain[:-1]):
        reason = "" if place in paying else _reason(layers[place], layers[place + 1])
        known.reasons |= dict.fromkeys(known.links[node].passed, reason)


def _paying(layers: Sequence[Geometry], ends: float) -> set[int]:
    """Return behind which layers of a chain the next two are one that costs no more."""
    merged = {
        place for piece in _cheapest(layers, ends) for place in range(piece.start, piece.stop - 1)
    }
    pairs = range(len(layers) - 1)
    return merged | {i for i in pairs if len(_cheapest(layers[i : i + 2], ends)) == 1}


def _cheapest(layers: Sequence[Geometry], ends: float) -> list[Piece]:
    """Cut a chain, of whose first inputs and last outputs only a part is left."""
    left = list(layers)
    if left[0].groups == 1:
        left[0] = replace(left[0], inputs=ceil(left[0].inputs * ends))
    if left[-1].groups == 1:
        left[-1] = replace(left[-1], outputs=ceil(left[-1].outputs * ends))
    return cheapest(left, [(1,)] * len(left), parameters).pieces


def _runs(places: set[int]) -> list[tuple[int, int]]:
    """Return start and stop of every run of layers between which all places are given."""
    found: list[tuple[int, int]] = []
    for place in sorted(places):
        if found and found[-1][1] == place + 1:
            found[-1] = (found[-1][0], place + 2)
        else:
            found.append((place, place + 2))
    return found


def _are_one(layers: Sequence[Geometry]) -> bool:
    try:
        reduce(composed, layers)
    except Inexact:
        return False
    return True


def _reason(first: Geometry, second: Geometry) -> str:
    try:
        merged = composed(first, second)
    except Inexact as reason:
        return f"the layers around it are not one: {reason}"
    apart = first.parameters + second.parameters
    return f"merged, {merged.parameters} parameters; apart, {apart}"
