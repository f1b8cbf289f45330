"""Weights that are computed: by masks, norms and parametrizations of torch.nn.utils, or a forward.

A layer behind them does with its weight what a plain one does with numbers. So they are analysed as
plain layers, and in the end are: what is deployed needs no mask and no norm.
"""

from collections import Counter
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn
from torch.nn.utils import (
    parametrizations,
    parametrize,
    prune,
    remove_spectral_norm,
    remove_weight_norm,
)
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from fxprune.user_models.computed_layers import ComputedLayer, make_plain_
from fxprune.user_models.modules import copy_model, evaluating


def with_plain_weights(model: nn.Module) -> nn.Module:
    """Return a model whose weights are numbers: a copy where norms or parametrizations make them.

    The numbers are those of evaluation, in the dtype of the model. A graph that calls what computes
    a weight keeps it.
    """
    if not _computing(model):
        return model
    plain: nn.Module = copy_model(model)
    if isinstance(plain, ComputedLayer):
        return plain.plain()
    make_plain_(plain)
    computing = _computing(plain)
    held = Counter(id(p) for module in plain.modules() for p in module._parameters.values())
    for module in computing:
        _bake_norms(module)
        _bake_masks(module, held)
    return plain


@contextmanager
def plain_weights_in(root: nn.Module) -> Generator[None]:
    """Let the modules in `root` that compute their weights be plain ones for a while."""
    computing = set(_computing(root))
    plain = {module: with_plain_weights(module) for module in computing}
    places = [
        (owner, name, module)
        for owner in root.modules()
        for name, module in owner._modules.items()
        if module in computing
    ]
    for owner, name, module in places:
        owner._modules[name] = plain[module]
    try:
        yield
    finally:
        for owner, name, module in places:
            owner._modules[name] = module


def computes_weights(module: nn.Module) -> bool:
    """Tell whether a module's weights are not just numbers."""
    kinds = (WeightNorm, SpectralNorm, prune.BasePruningMethod)
    hooked = any(isinstance(hook, kinds) for hook in module._forward_pre_hooks.values())
    return hooked or parametrize.is_parametrized(module) or isinstance(module, ComputedLayer)


def _computing(root: nn.Module) -> list[nn.Module]:
    """Return the modules that compute their weights, but for those whose parts a graph uses."""
    used: set[nn.Module] = set()
    for module in root.modules():
        if not isinstance(module, fx.GraphModule):
            continue
        for node in module.graph.nodes:
            if node.op in ("call_module", "get_attr"):
                *owners, _ = str(node.target).split(".")
                used |= set(_along(module, owners))
    return [module for module in root.modules() if computes_weights(module) and module not in used]


def _along(module: nn.Module, path: list[str]) -> Iterator[nn.Module]:
    for name in path:
        module = getattr(module, name)
        yield module


def _bake_masks(module: nn.Module, held: Counter[int]) -> None:
    """Write the masks of `torch.nn.utils.prune` into a module's weights.

    held: by how many modules each tensor is held; others (an embedding beside its head) see it
    whole.
    """
    hooks = list(module._forward_pre_hooks.values())
    for name in {h._tensor_name for h in hooks if isinstance(h, prune.BasePruningMethod)}:
        whole = module._parameters[f"{name}_orig"]
        if whole is not None and held[id(whole)] > 1:
            own = nn.Parameter(whole.detach().clone(), requires_grad=whole.requires_grad)
            module._parameters[f"{name}_orig"] = own
        prune.remove(module, name)


def _bake_norms(module: nn.Module) -> None:
    for hook in list(module._forward_pre_hooks.values()):
        if isinstance(hook, WeightNorm):
            remove_weight_norm(module, hook.name)
        elif isinstance(hook, SpectralNorm):
            remove_spectral_norm(module, hook.name)
    if parametrize.is_parametrized(module):
        _bake_parametrizations(module)


def _bake_parametrizations(module: Any) -> None:
    """Do what torch's removal does, but to the class that copies of the module share.

    What weight norm hangs on the loading of state dicts goes too: nobody could pickle it.
    """
    parametrized: Any = module.parametrizations
    with evaluating(module), torch.no_grad():
        found = {name: getattr(module, name).detach().clone() for name in parametrized}
    module.__class__ = parametrize.type_before_parametrizations(module)
    del module._modules["parametrizations"]
    for key, hook in list(module._load_state_dict_pre_hooks.items()):
        if getattr(hook.hook, "__module__", None) == parametrizations.__name__:
            del module._load_state_dict_pre_hooks[key]
    for name, tensor in found.items():
        held = list(parametrized[name].parameters())
        if not held:
            module.register_buffer(name, tensor)
            continue
        trained = any(parameter.requires_grad for parameter in held)
        module.register_parameter(name, nn.Parameter(tensor, requires_grad=trained))
