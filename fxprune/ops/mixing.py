"""One reading of all forms of linear layer.

Linear layers and convolutions, transposed or in groups, as modules or as functions, are all a
`Mixing`: an input whose channels lie along one axis, a weight, perhaps a bias, and whether a border
of zeros is counted in.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from fxprune.dataflow.rules import Call
from fxprune.dataflow.tags import FIXED
from fxprune.dataflow.values import Barrier, State, Value, fixed
from fxprune.programs.observation import TensorSpec

GROUPS = 6  # the position of `groups` in torch's functional convolutions, transposed or not
CONV_FUNCTIONS = (F.conv1d, F.conv2d, F.conv3d)
TRANSPOSED_FUNCTIONS = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
LINEAR_FUNCTIONS = (F.linear,)


@dataclass(frozen=True)
class Mixing:
    """One reading of all forms of linear layer: weight (O, I, kernel…), or (I, O, kernel…).

    kept: tags of tokens that were told apart, but are no channels; the value says nothing of them.
    """

    value: Value
    axis: int
    weight: State
    bias: State | None
    groups: int
    border: bool
    out_axis: int
    kept: Tensor | None = None

    @property
    def in_axis(self) -> int:
        """The axis of the weight along which its input channels lie."""
        return 1 - self.out_axis

    @property
    def depthwise(self) -> bool:
        """Whether every group has one input channel."""
        return self.groups > 1 and self.groups == self.value.shape[self.axis]

    @property
    def beside(self) -> bool:
        """Whether channels lie along other axes only, which the layer leaves as they are."""
        tags = self.value.tags
        pointwise = not self.border and all(n == 1 for n in self.weight.tensor.shape[2:])
        return pointwise and tags.shape[self.axis] == 1 and tags.numel() > 1

    def matrix(self, tensor: Tensor) -> Tensor:
        """Return weights as (groups, O / groups, I / groups, kernel size)."""
        flat = tensor.reshape(*tensor.shape[:2], -1)
        grouped = flat.unflatten(0, (self.groups, -1))
        return grouped if self.out_axis == 0 else grouped.transpose(1, 2)


def read_call(call: Call) -> Mixing:
    """Read a module or function call as `Mixing`; `Barrier` where its weight is computed.

    A class token in front of others makes tokens differ, but no channels of them that a layer
    could let pass.
    """
    mixing = _read(call)
    tags = mixing.value.tags
    if mixing.beside and 2 * int((tags.unique() != FIXED).sum()) < tags.numel():
        spec = TensorSpec(mixing.value.shape, mixing.value.dtype)
        return replace(mixing, value=fixed(spec), kept=tags)
    return mixing


def _read(call: Call) -> Mixing:
    value = call.value()
    weight, bias = weight_and_bias(call, 1)
    if isinstance(call.module, nn.Linear) or call.node.target in LINEAR_FUNCTIONS:
        return Mixing(value, len(value.shape) - 1, weight, bias, 1, False, 0)
    if call.module is not None:
        return _read_conv_module(call.module, value, weight, bias)
    return _read_conv_function(call, value, weight, bias)


def weight_and_bias(call: Call, position: int) -> tuple[State, State | None]:
    """Return what a layer multiplies and adds, of a function its arguments from `position` on."""
    if call.module is not None:
        weight, bias = call.state("weight"), call.state("bias")
    else:
        weight, bias = call.argument(position, "weight"), call.argument(position + 1, "bias")
    if not isinstance(weight, State) or not (bias is None or isinstance(bias, State)):
        raise Barrier("its weight or bias is computed")
    return weight, bias


def _read_conv_module(module: Any, value: Value, weight: State, bias: State | None) -> Mixing:
    axis = len(value.shape) - weight.tensor.dim() + 1
    border = bool(module.transposed) or (
        module.padding_mode == "zeros" and _pads(module.padding, weight.tensor.shape[2:])
    )
    return Mixing(value, axis, weight, bias, module.groups, border, int(module.transposed))


def _read_conv_function(call: Call, value: Value, weight: State, bias: State | None) -> Mixing:
    axis = len(value.shape) - weight.tensor.dim() + 1
    groups = call.argument(GROUPS, "groups", 1)
    if call.node.target in TRANSPOSED_FUNCTIONS:
        return Mixing(value, axis, weight, bias, groups, True, 1)
    padding = call.argument(4, "padding", 0)
    border = _pads(padding, weight.tensor.shape[2:])
    return Mixing(value, axis, weight, bias, groups, border, 0)


def _pads(padding: Any, kernel: tuple[int, ...]) -> bool:
    if padding == "valid":
        return False
    if padding == "same":
        return any(size > 1 for size in kernel)
    sizes = padding if isinstance(padding, (tuple, list)) else (padding,)
    return any(size != 0 for size in sizes)
