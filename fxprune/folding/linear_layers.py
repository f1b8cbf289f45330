"""Every kind of linear layer that can be one with its neighbours: read, merged, installed.

Linear layers and convolutions (`folding.convolutions`), average pools, linear layers of flattened
maps and transposed convolutions each have a module that says what they are; here is who is asked.
"""

from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch
from torch import nn

from fxprune.folding import convolutions
from fxprune.folding.average_pools import Pool, pool_layer
from fxprune.folding.convolutions import Geometry, Inexact, Layer
from fxprune.folding.transposed_convolutions import (
    Transposed,
    compose_transposed,
    composed_transposed,
    install_transposed_,
    transposed_layer,
)
from fxprune.folding.whole_maps import WholeMap, compose_whole, composed_whole
from fxprune.runtime.kinds import CONVS, TRANSPOSED


def composed(first: Geometry, second: Geometry) -> Geometry:
    """Return the one layer that two are; raise `Inexact` with the reason if they are not one."""
    if isinstance(first, Pool) and isinstance(second, Pool):
        raise Inexact("both are pools")
    kinds = type(first), type(second)
    if Transposed in kinds and (WholeMap in kinds or Pool in kinds):
        raise Inexact("one is transposed, the other of a flattened map or a pool")
    if Transposed in kinds:
        return composed_transposed(first, second)
    if WholeMap in kinds:
        return composed_whole(first, second)
    return convolutions.composed(first, second)


def compose(first: Layer, second: Layer) -> Layer:
    """Return the one layer that two are; `composed` says whether they are."""
    kinds = type(first.geometry), type(second.geometry)
    if Transposed in kinds:
        return compose_transposed(first, second)
    if WholeMap in kinds:
        return compose_whole(first, second)
    return convolutions.compose(first, second)


def covers_map(layers: Sequence[Geometry]) -> bool:
    """Tell whether a run of layers ends in one of a flattened map that the first is not given."""
    return any(isinstance(layer, WholeMap) for layer in layers[1:])


def all_composed(layers: Sequence[Geometry]) -> Geometry:
    """Return the one layer that a run of layers is; raise `Inexact` if they are not one."""
    if covers_map(layers):
        return reduce(lambda second, first: composed(first, second), reversed(layers))
    return reduce(composed, layers)


def compose_all(layers: Sequence[Layer]) -> Layer:
    """Return the one layer that a run of layers is; `all_composed` says whether they are."""
    if covers_map([layer.geometry for layer in layers]):
        return reduce(lambda second, first: compose(first, second), reversed(layers))
    return reduce(compose, layers)


def layer_of(module: Any, geometry: Geometry, device: torch.device) -> Layer:
    """Return the numbers of a layer in float64."""
    if isinstance(geometry, Pool):
        return pool_layer(geometry, device)
    if isinstance(geometry, Transposed):
        return transposed_layer(module, geometry)
    return convolutions.layer_of(module, geometry)


def can_be(module: nn.Module | None, geometry: Geometry) -> bool:
    """Tell whether a module is of the kind that can compute what a layer does."""
    if isinstance(geometry, Transposed):
        return type(module) in TRANSPOSED
    if isinstance(geometry, WholeMap):
        return type(module) is nn.Linear
    return type(module) is nn.Linear or type(module) in CONVS


def install_(module: Any, layer: Layer) -> None:
    """Let a module of its kind compute what a layer does, in the module's dtype."""
    if isinstance(layer.geometry, Transposed):
        install_transposed_(module, layer)
    else:
        convolutions.install_(module, layer)
