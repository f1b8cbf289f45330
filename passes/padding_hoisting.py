"""Let the first of some layers pad the zeros that all of them do, so that they can become one.

    conv(p₂) ∘ conv(p₁)  becomes  conv(0) ∘ conv(p₁ + s₁p₂)

No output changes its size: for every zero the second no longer pads, the first computes a place
more. But where those zeros were read there are now numbers, so that near the border the function is
another one: this runs before training, which gets used to it (Kim et al. 2023). Identities beside
the layers stay as they are. Only layers that could pay as one, and are not one yet, are touched.
"""

from typing import Any

from torch import fx

from fxprune.folding.convolutions import Geometry
from fxprune.planning.depth_sites import find_padded_segments, hoisted
from fxprune.planning.sites import find_candidates, plan_sites
from fxprune.programs.observation import observe
from fxprune.programs.pipeline import Change
from fxprune.programs.program import Program

BORDERS = "borders"  # what a graph module knows of layers whose outputs are others near the border


def hoist_padding(program: Program, *, ends: float = 1.0) -> list[Change]:
    """Move the padding of foldable layers to the first of them; the changes say where it is felt.

    ends: as in `find_depth_sites`.
    """
    seen = observe(program)
    candidates, _ = find_candidates(program, seen)
    understood = plan_sites(program, candidates, seen).candidates
    segments = find_padded_segments(program, understood, seen, ends=ends)
    return [_hoist(program, nodes, layers) for nodes, layers in segments]


def _hoist(program: Program, nodes: list[fx.Node], layers: list[Geometry]) -> Change:
    after = hoisted(layers)
    for node, layer in zip(nodes, after, strict=True):
        module: Any = program.module.get_submodule(str(node.target))
        module.padding = layer.padding
        module._reversed_padding_repeated_twice = [p for p in layer.padding[::-1] for _ in "lr"]
    first, last, border = str(nodes[0].target), str(nodes[-1].target), _border(layers)
    program.module.meta.setdefault(BORDERS, {})[last] = max(border)
    names = ", ".join(str(node.target) for node in nodes[1:])
    return Change(
        last,
        f"the padding of {names} moved to {first}: outputs within {max(border)} of the border "
        "change",
        (("to", first), ("padding", after[0].padding), ("border", border)),
    )


def _border(layers: list[Geometry]) -> tuple[int, ...]:
    """Return how far from the border outputs read what was a zero, along every axis."""
    border = (0,) * len(layers[0].kernel)
    for layer in layers[1:]:
        steps = zip(border, layer.padding, layer.stride, strict=True)
        border = tuple(-(-(before + padding) // stride) for before, padding, stride in steps)
    return border
