"""Whether a copy of a model is that model: not where hooks write into what is no part of it.

    blocks[3].register_forward_hook(keep_in(activations))        model.activations = activations

A copy has a dict of its own, and hooks that fill the model's: what it reads there is old.
"""

from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree

from fxprune.errors import ModelError
from fxprune.programs.program import quiet
from fxprune.runtime.randomness import Generators
from fxprune.user_models.inputs import Inputs, another, same, to_device
from fxprune.user_models.modules import copy_model, device_of, evaluating, is_hooked, run_alike


def require_copyable(model: nn.Module, inputs: Inputs) -> None:
    """Raise `ModelError` if a copy computes something else than a model with hooks.

    Models without hooks are not run. Buffers that the run changes get their numbers back.
    """
    lazy = any(map(is_lazy, (*model.parameters(), *model.buffers())))  # is refused elsewhere
    if lazy or not any(map(is_hooked, model.modules())):
        return
    held = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        _require_same(model, copy_model(model), to_device(inputs, device_of(model)))
    finally:
        for buffer, before in held:
            buffer.copy_(before)


def _require_same(model: nn.Module, twin: nn.Module, given: Inputs) -> None:
    cases = (given, pytree.tree_map_only(torch.Tensor, another, given))
    with evaluating(model, twin), torch.no_grad(), quiet():
        for case in cases:
            try:
                expected, actual = (_drawing_the_same(one, case) for one in (model, twin))
            except Exception:  # that the example fails is said elsewhere, and by name
                continue
            if not same(expected, actual, nan=True):
                raise ModelError(
                    f"a copy of {type(model).__name__} computes something else: its hooks write "
                    "into what is no part of it (a dict of their own); let them keep what they "
                    "find in an attribute of the module they are called with, or return it"
                )


def _drawing_the_same(model: nn.Module, case: Inputs) -> Any:
    """Return what a model makes of inputs; Python's generators, and NumPy's, are left as they were.

    That it draws from them is another reason to be refused.
    """
    generators = Generators()
    try:
        return run_alike(model, case)
    finally:
        generators.put_back()
