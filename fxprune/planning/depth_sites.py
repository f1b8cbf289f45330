"""Where linearity gates could let layers be merged, and why not elsewhere.

A gate goes where the two layers around a nonlinearity would be exactly one, of no more parameters
(`folding.linear_layers`), or where the cheapest plan for the whole chain merges across it, were all
its nonlinearities linear. Where only the zeros that a layer pads are in the way, the first of the
layers may pad them all instead.
"""

from collections.abc import Sequence
from dataclasses import replace
from math import ceil

from torch import fx

from fxprune.folding.convolutions import Geometry, Inexact
from fxprune.folding.layer_costs import parameters
from fxprune.folding.linear_layers import all_composed, composed
from fxprune.folding.links import Links, find_links
from fxprune.folding.plans import Piece, cheapest
from fxprune.planning.sites import Candidate
from fxprune.programs.observation import Observation
from fxprune.programs.pipeline import Change
from fxprune.programs.program import Program


def find_depth_sites(
    program: Program, candidates: Sequence[Candidate], seen: Observation, *, ends: float = 1.0
) -> tuple[list[Candidate], list[Change]]:
    """Return the nonlinearities whose neighbours could be merged, and a reason for each other.

    ends: what part of the channels at the ends of merged layers to count, as if the others had gone
    by then; with few of them, and many in between, merging pays.
    """
    reasons = {c.node: "no layer of its own stands before it" for c in candidates}
    known = find_links(program, reasons.keys(), seen)
    for link in known.links.values():
        reasons |= dict.fromkeys(link.passed, link.reason)
    for chain in known.chains():
        reasons |= _judge(chain, known, ends)
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
    known = find_links(program, {c.node for c in candidates}, seen, blocks=False)
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


def _judge(chain: list[fx.Node], known: Links, ends: float) -> dict[fx.Node, str]:
    """Say for the nonlinearities of a chain why none of its pieces pays; nothing if one does."""
    layers = known.geometries(chain)
    paying = _paying(layers, ends)
    found: dict[fx.Node, str] = {}
    for place, node in enumerate(chain[:-1]):
        reason = "" if place in paying else _reason(layers[place], layers[place + 1])
        found |= dict.fromkeys(known.links[node].passed, reason)
    return found


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
        all_composed(layers)
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
