"""Fold a batch norm with stored statistics into the layer before it.

    BN(W·x + b) = a·(W·x + b) + t,   a = γ/√(σ² + ε),   t = β − a·μ
               = (a·W)·x + (a·b + t)

exact for linear layers, convolutions and transposed convolutions of any geometry, since a scales
output channels only (Jacob et al. 2018, section 3.2). Computed in float64.
"""

from typing import Any

import torch
from torch import Tensor, fx, nn

from fxprune.observation import TensorSpec, observe
from fxprune.pipeline import Change, keeps_shapes
from fxprune.program import Program
from fxprune.sharing import sole_modules

LAYERS = (
    *(nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@keeps_shapes
def fold_batch_norm(program: Program) -> list[Change]:
    """Fold every batch norm whose input is a layer nobody else reads or shares."""
    sole = sole_modules(program)
    pairs = [pair for node in program.graph.nodes if (pair := _pair(sole, node))]
    if any(isinstance(layer, nn.Linear) for _, layer, _ in pairs):
        seen = observe(program).values
        pairs = [pair for pair in pairs if _same_channels(pair, seen)]
    return [_fold(node, layer, norm) for node, layer, norm in pairs]


def _pair(sole: dict[fx.Node, nn.Module], node: fx.Node) -> tuple[fx.Node, Any, Any] | None:
    norm: Any = sole.get(node)
    if type(norm) not in NORMS or len(node.all_input_nodes) != 1:
        return None
    before = node.all_input_nodes[0]
    layer: Any = sole.get(before)
    if type(layer) not in LAYERS or len(before.users) != 1:
        return None
    if norm.running_mean is None or norm.running_var is None:
        return None
    return node, layer, norm


def _same_channels(pair: tuple[fx.Node, Any, Any], seen: dict[fx.Node, Any]) -> bool:
    """Exclude linear layers on (N, L, C): their batch norm normalises axis 1, not their outputs."""
    node, layer, _ = pair
    spec = seen[node]
    return not isinstance(layer, nn.Linear) or (
        isinstance(spec, TensorSpec) and len(spec.shape) == 2
    )


def _fold(node: fx.Node, layer: Any, norm: Any) -> Change:
    scale, shift = affine(norm)
    weight = layer.weight.detach().double()
    bias = shift if layer.bias is None else shift + scale * layer.bias.detach().double()
    layer.weight = _like(layer.weight, _scale_outputs(layer, weight, scale))
    layer.bias = _like(layer.weight, bias)
    before = node.all_input_nodes[0]
    node.replace_all_uses_with(before)
    node.graph.erase_node(node)
    return Change(str(node.target), f"folded into {before.target}")


def affine(norm: Any) -> tuple[Tensor, Tensor]:
    """Return scale a and shift t of a batch norm in evaluation, float64 (channels,)."""
    scale = torch.rsqrt(norm.running_var.double() + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight.detach().double()
    shift = -norm.running_mean.double() * scale
    return scale, shift if norm.bias is None else shift + norm.bias.detach().double()


def _scale_outputs(layer: Any, weight: Tensor, scale: Tensor) -> Tensor:
    """Multiply each output channel's weights; a transposed weight is (in, out / groups, …)."""
    if not getattr(layer, "transposed", False):
        return weight * scale.reshape(-1, *(1,) * (weight.dim() - 1))
    grouped = weight.unflatten(0, (layer.groups, -1))
    factor = scale.reshape(layer.groups, 1, -1, *(1,) * (weight.dim() - 2))
    return (grouped * factor).flatten(0, 1)


def _like(parameter: nn.Parameter, value: Tensor) -> nn.Parameter:
    return nn.Parameter(value.to(parameter.dtype), requires_grad=parameter.requires_grad)
