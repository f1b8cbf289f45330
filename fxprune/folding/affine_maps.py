"""Operators that scale and shift every channel by itself: a·x + t.

A batch norm in evaluation is one, with a = γ/√(σ² + ε) and t = β − a·μ; so is a sum, difference,
product or quotient with a number, or with a buffer or parameter that varies along channels only.
The layer before or after can compute it too: its weights are scaled, its bias shifted, in float64.
"""

import operator
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxprune.folding.functional_layers import TENSORS, arguments_of
from fxprune.programs.observation import Observation, TensorSpec
from fxprune.programs.program import Program
from fxprune.runtime.kinds import NORMS
from fxprune.user_models.modules import submodule


@dataclass(frozen=True)
class AffineMap:
    """What a node makes of its source: a·x + t along an axis; float64 (channels,)."""

    source: fx.Node
    axis: int
    scale: Tensor
    shift: Tensor


def affine_map(
    program: Program, node: fx.Node, module: nn.Module | None, seen: Observation
) -> AffineMap | None:
    """Read a node as an affine map of its channels, if it is one.

    module: what it calls, if nobody else uses its tensors.
    """
    if type(module) in NORMS and len(node.all_input_nodes) == 1:
        return _of_batch_norm(node.all_input_nodes[0], module)
    if node.target is F.batch_norm:
        return _of_norm_function(program, node, seen)
    combine = _ARITHMETIC.get(node.target)
    if combine is None or node.kwargs or len(node.args) != 2:
        return None
    first, second = node.args
    return _of_arithmetic(program, node, combine, first, second, seen)


def channel_axis(layer: Any, spec: Any) -> int | None:
    """Return the axis of a layer's channels in its input or output; None if it has no batch."""
    if not isinstance(spec, TensorSpec):
        return None
    if isinstance(layer, nn.Linear):
        return len(spec.shape) - 1
    return 1 if len(spec.shape) == len(layer.kernel_size) + 2 else None


def scale_outputs_(layer: Any, scale: Tensor, shift: Tensor) -> None:
    """Let a layer compute a·(its outputs) + t: exact in any geometry, a is the outputs' own."""
    weight = layer.weight.detach().double()
    scale, shift = scale.to(weight), shift.to(weight)
    if layer.bias is not None or bool((shift != 0).any()):
        bias = shift if layer.bias is None else shift + scale * layer.bias.detach().double()
        layer.bias = _like(layer.bias, layer.weight, bias)
    layer.weight = _like(layer.weight, layer.weight, _scaled_outputs(layer, weight, scale))


def scale_inputs_(layer: Any, scale: Tensor, shift: Tensor) -> None:
    """Let a layer take x where it took a·x + t; the caller knows that `takes_shift`, or t = 0."""
    weight = layer.weight.detach().double()
    scale, shift = scale.to(weight), shift.to(weight)
    if bool((shift != 0).any()):
        matrix = weight.flatten(2).sum(-1) if weight.dim() > 2 else weight
        groups = getattr(layer, "groups", 1)
        added = torch.einsum(
            "goi,gi->go", matrix.unflatten(0, (groups, -1)), shift.view(groups, -1)
        ).flatten()
        bias = added if layer.bias is None else added + layer.bias.detach().double()
        layer.bias = _like(layer.bias, layer.weight, bias)
    layer.weight = _like(layer.weight, layer.weight, _scaled_inputs(layer, weight, scale))


def takes_shift(layer: Any) -> bool:
    """Tell whether a constant in a layer's input is one in its outputs, at the border too."""
    if isinstance(layer, nn.Linear):
        return True
    if layer.transposed:
        return False  # near the border fewer of the taps meet it
    padding = layer.padding
    return layer.padding_mode != "zeros" or padding == "valid" or not any(padding)


def _of_batch_norm(source: fx.Node, norm: Any) -> AffineMap | None:
    if norm.running_mean is None or norm.running_var is None:
        return None
    scale = torch.rsqrt(norm.running_var.double() + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight.detach().double()
    shift = -norm.running_mean.double() * scale
    if norm.bias is not None:
        shift = shift + norm.bias.detach().double()
    return AffineMap(source, 1, scale, shift)


def _of_norm_function(program: Program, node: fx.Node, seen: Observation) -> AffineMap | None:
    """Read a norm that is a function, and told to take its statistics, not the batch's."""
    given = arguments_of(node) or {}
    tensors = {name: _constant(program, given.get(name), seen) for name in TENSORS}
    known = all(tensors[name] is not None or given.get(name) is None for name in tensors)
    source, eps = given["input"], given.get("eps", 1e-5)
    if given.get("training", False) is not False or not known or not isinstance(eps, float):
        return None
    if not isinstance(source, fx.Node) or source.op == "get_attr":
        return None
    return _of_batch_norm(source, SimpleNamespace(**tensors, eps=eps))


def _of_arithmetic(
    program: Program,
    node: fx.Node,
    combine: Callable[[Tensor, bool], tuple[Tensor, Tensor]],
    first: Any,
    second: Any,
    seen: Observation,
) -> AffineMap | None:
    constant = _constant(program, second, seen)
    source, reverse = (first, False) if constant is not None else (second, True)
    constant = _constant(program, first, seen) if constant is None else constant
    if constant is None or not isinstance(source, fx.Node) or source.op == "get_attr":
        return None
    spec = seen.values[node]
    if spec != seen.values[source] or not isinstance(spec, TensorSpec):
        return None
    if not spec.dtype.is_floating_point or len(spec.shape) < 2:
        return None
    found = _along_one_axis(constant, spec.shape)
    if found is None or (reverse and node.target in _QUOTIENTS):
        return None
    axis, values = found
    scale, shift = combine(values, reverse)
    if not bool((torch.isfinite(scale) & torch.isfinite(shift)).all()):
        return None  # what an infinity makes of 0 depends on where it is
    return AffineMap(source, axis, scale, shift)


def _constant(program: Program, operand: Any, seen: Observation) -> Tensor | None:
    """Return a number, buffer or parameter as float64; None for what is computed or written to.

    Nor are complex numbers of any use here.
    """
    if isinstance(operand, (int, float)) and not isinstance(operand, bool):
        return torch.tensor(float(operand), dtype=torch.float64)
    if not isinstance(operand, fx.Node) or operand.op != "get_attr":
        return None
    if seen.written(operand):
        return None
    owner, _, name = str(operand.target).rpartition(".")
    tensor = getattr(submodule(program.module, owner), name)
    if not isinstance(tensor, Tensor) or tensor.is_complex():
        return None
    return tensor.detach().double()


def _along_one_axis(constant: Tensor, shape: tuple[int, ...]) -> tuple[int, Tensor] | None:
    """Return the only axis along which a constant varies, -1 if none, and its values there."""
    if constant.dim() > len(shape):
        return None
    aligned = constant.reshape((1,) * (len(shape) - constant.dim()) + constant.shape)
    long = [axis for axis, size in enumerate(aligned.shape) if size > 1]
    if len(long) > 1:
        return None
    return (long[0] if long else ANY_AXIS), aligned.reshape(-1)


ANY_AXIS = -1


def _sum(values: Tensor, reverse: bool) -> tuple[Tensor, Tensor]:
    return torch.ones_like(values), values


def _difference(values: Tensor, reverse: bool) -> tuple[Tensor, Tensor]:
    ones = torch.ones_like(values)
    return (-ones, values) if reverse else (ones, -values)


def _product(values: Tensor, reverse: bool) -> tuple[Tensor, Tensor]:
    return values, torch.zeros_like(values)


def _quotient(values: Tensor, reverse: bool) -> tuple[Tensor, Tensor]:
    return 1 / values, torch.zeros_like(values)


_QUOTIENTS = (operator.truediv, torch.div, "div")
_ARITHMETIC: dict[Any, Callable[[Tensor, bool], tuple[Tensor, Tensor]]] = {
    **dict.fromkeys((operator.add, torch.add, "add"), _sum),
    **dict.fromkeys((operator.sub, torch.sub, "sub"), _difference),
    **dict.fromkeys((operator.mul, torch.mul, "mul"), _product),
    **dict.fromkeys(_QUOTIENTS, _quotient),
}


def _scaled_outputs(layer: Any, weight: Tensor, scale: Tensor) -> Tensor:
    """Multiply each output channel's weights; a transposed weight is (in, out / groups, …)."""
    if not getattr(layer, "transposed", False):
        return weight * scale.reshape(-1, *(1,) * (weight.dim() - 1))
    grouped = weight.unflatten(0, (layer.groups, -1))
    factor = scale.reshape(layer.groups, 1, -1, *(1,) * (weight.dim() - 2))
    return (grouped * factor).flatten(0, 1)


def _scaled_inputs(layer: Any, weight: Tensor, scale: Tensor) -> Tensor:
    """Multiply each input channel's weights; a transposed weight is (in, out / groups, …)."""
    if getattr(layer, "transposed", False):
        return weight * scale.reshape(-1, *(1,) * (weight.dim() - 1))
    groups = getattr(layer, "groups", 1)
    grouped = weight.unflatten(0, (groups, -1))
    factor = scale.reshape(groups, 1, -1, *(1,) * (weight.dim() - 2))
    return (grouped * factor).flatten(0, 1)


def _like(old: nn.Parameter | None, weight: nn.Parameter, value: Tensor) -> nn.Parameter:
    """Make a parameter of float64 numbers, in the layer's dtype."""
    trained = weight.requires_grad if old is None else old.requires_grad
    return nn.Parameter(value.to(weight.dtype), requires_grad=trained)
