"""A layer whose weights a graph computes from its parameters: standardised, masked, low-rank.

    F.conv2d(x, self.weight * self.gain / deviation, self.bias)

Written out in a model, such a layer is two dozen operators. Called as one it is to the analysis
what a layer with weight norm is: plain, with the numbers its weights have.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxprune.user_models.modules import copy_model


class ComputedLayer(nn.Module):
    """Apply a layer's function to an input, its tensors computed on every call.

    It has the parameters, buffers and parts of the module it stands for, under their names.
    """

    def __init__(
        self,
        function: Callable[..., Tensor],
        options: dict[str, Any],
        layer: nn.Module,
        computing: fx.GraphModule,
        sources: Sequence[str],
    ) -> None:
        """Keep a function with its options, and who computes its tensors from which of its own.

        layer: the plain layer it is, whose `weight` and `bias` are not used. computing: returns the
        function's tensors, by name.
        """
        super().__init__()
        self.function, self.options, self.sources = function, options, tuple(sources)
        for name in [name for name, tensor in layer._parameters.items() if tensor is not None]:
            layer._parameters[name] = None
        self.plain_layer, self.computing = layer, computing

    def tensors(self) -> dict[str, Tensor]:
        """Return the function's tensors, by name, as they are now."""
        return self.computing(*(getattr(self, name) for name in self.sources))

    def forward(self, x: Tensor) -> Tensor:
        """Return what the layer makes of `x`."""
        return self.function(x, **self.tensors(), **self.options)

    def plain(self) -> nn.Module:
        """Return the layer with its weights as numbers; what is not computed is the same tensor."""
        layer: nn.Module = copy_model(self.plain_layer)
        own = {id(parameter): parameter for parameter in self._parameters.values()}
        trained = any(p.requires_grad for p in self.parameters(recurse=False))
        with torch.no_grad():
            found = self.tensors()
        for name, tensor in found.items():
            known = own.get(id(tensor))
            number = nn.Parameter(tensor.detach().clone(), requires_grad=trained)
            layer._parameters[name] = number if known is None else known
        return layer.train(self.training)


def make_plain_(root: nn.Module) -> list[str]:
    """Put plain layers in the place of those in `root` that compute their weights; return paths."""
    computed = {path: m for path, m in root.named_modules() if isinstance(m, ComputedLayer)}
    plain = {module: module.plain() for module in computed.values()}
    for owner in list(root.modules()):
        for name, module in owner._modules.items():
            if isinstance(module, ComputedLayer):
                owner._modules[name] = plain[module]
    return list(computed)
