"""Runs of layers that could be merged when a gated model is folded, and what they would become.

Layers are one where `folding.linear_layers` finds it exact and every linearity gate between them is
open. Which of the ways to cut a run is taken depends on the widths that are left.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import fx

from fxprune.folding.convolutions import Geometry, Inexact
from fxprune.folding.linear_layers import all_composed, composed, covers_map
from fxprune.folding.links import Links, find_links
from fxprune.folding.plans import LONGEST
from fxprune.folding.whole_maps import WholeMap
from fxprune.programs.observation import Observation
from fxprune.programs.program import Program


@dataclass(frozen=True)
class Merger:
    """Layers start … stop − 1 of a run as one, if the linearity gates `sites` are open."""

    start: int
    stop: int
    sites: tuple[int, ...]
    geometry: Geometry


@dataclass(frozen=True)
class Run:
    """Layers of which each could be merged with a neighbour, and all the ways they could be."""

    nodes: list[fx.Node]
    mergers: list[Merger]


def find_runs(
    program: Program, depth: Mapping[fx.Node, int], biased: Collection[fx.Node], seen: Observation
) -> list[Run]:
    """Return the runs of layers that could be merged in a program.

    depth: the nonlinearities that have a linearity gate. biased: layers that surely get a bias.
    """
    known = find_links(program, depth.keys(), seen, blocks=False)
    found: list[Run] = []
    for chain in known.chains():
        mergers = _mergers(chain, known, depth, biased)
        for start, stop in _joined(mergers):
            inside = [
                replace(one, start=one.start - start, stop=one.stop - start)
                for one in mergers
                if start <= one.start < stop
            ]
            found.append(Run(chain[start:stop], inside))
    return found


def _mergers(
    chain: Sequence[fx.Node],
    known: Links,
    depth: Mapping[fx.Node, int],
    biased: Collection[fx.Node],
) -> list[Merger]:
    layers = known.geometries(chain)
    layers = [replace(g, bias=g.bias or n in biased) for n, g in zip(chain, layers, strict=True)]
    last = [
        replace(layer, bias=known.layers[node].bias or node in biased)
        for node, layer in zip(chain, layers, strict=True)
    ]
    found: list[Merger] = []
    for start in range(len(chain) - 1):
        sites: tuple[int, ...] = ()
        before: Geometry | None = layers[start]
        for stop in range(start + 2, min(len(chain), start + LONGEST) + 1):
            sites += tuple(depth[node] for node in known.links[chain[stop - 2]].passed)
            run = [*layers[start : stop - 1], last[stop - 1]]
            try:
                merged = all_composed(run) if before is None else _composed(before, run)
            except Inexact:
                if not any(isinstance(layer, WholeMap) for layer in layers[stop:]):
                    break
                continue
            if _follows(layers[start:stop]):
                found.append(Merger(start, stop, sites, merged))
            before = _extended(before, layers[stop - 1])
    return found


def _composed(before: Geometry, run: Sequence[Geometry]) -> Geometry:
    """Return what a run becomes; before: what it does without its last layer."""
    return all_composed(run) if covers_map(run) else composed(before, run[-1])


def _extended(before: Geometry | None, layer: Geometry) -> Geometry | None:
    """Return what becomes of one layer more, None if it is not one layer."""
    if before is None:
        return None
    try:
        return composed(before, layer)
    except Inexact:
        return None


def _follows(layers: Sequence[Geometry]) -> bool:
    """Tell whether the groups of what layers become are known for all widths.

    Depthwise layers lose groups with their channels, other grouped ones keep all.
    """
    grouped = [layer for layer in layers if layer.groups > 1]
    return len({layer.groups == layer.inputs for layer in grouped}) < 2


def _joined(mergers: Sequence[Merger]) -> list[tuple[int, int]]:
    """Return start and stop of the longest runs that mergers join."""
    found: list[tuple[int, int]] = []
    for one in sorted(mergers, key=lambda one: one.start):
        if found and one.start < found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], one.stop))
        else:
            found.append((one.start, one.stop))
    return found
