"""Averages of a model's weights (EMA, SWA), cut as the model is.

What averages holds a copy of the gated model in `module`: torch's `AveragedModel`, timm's
`ModelEma`. Averages are taken weight by weight, so that those of the slices that remain are what
they would have been.
"""

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from fxprune.compiler import gated_model
from fxprune.errors import GateError
from fxprune.programs.program import narrowed
from fxprune.user_models.modules import copy_model, device_of

Cuts = Mapping[str, list[tuple[int, Tensor]]]


def averages_of(given: Any, model: nn.Module) -> list[Any]:
    """Return what averages a model, as a list; raise `GateError` for what does not."""
    found: list[Any] = list(given) if isinstance(given, list | tuple) else [given]
    found = [] if given is None else found
    for one in found:
        _require_copy(one, model)
    return found


@torch.no_grad()
def cut_(averaged: Any, new: nn.Module, cuts: Cuts) -> None:
    """Let what averages go on with a copy of a compacted model, and averages of what remains."""
    old = gated_model(averaged.module)
    twin: nn.Module = copy_model(new).to(device_of(old))
    tensors = _tensors(old)
    for name, own in _tensors(twin).items():
        if name in tensors:  # what was made to cut is the model's
            own.data = narrowed(tensors[name].detach(), cuts.get(name, [])).clone()
            own.requires_grad_(tensors[name].requires_grad)
    parts = dict(old.named_modules())
    for path, part in twin.named_modules():
        part.training = parts.get(path, part).training
    averaged.module = twin


def _require_copy(one: Any, model: nn.Module) -> None:
    name = type(one).__name__
    if not isinstance(one, nn.Module):
        raise GateError(f"{name} averages no model; pass a torch.optim.swa_utils.AveragedModel")
    inside = getattr(one, "module", None)
    copied = gated_model(inside) if isinstance(inside, nn.Module) else model
    mine, its = (_tensors(module).items() for module in (model, copied))
    if copied is model or [key for key, _ in mine] != [key for key, _ in its]:
        raise GateError(f"{name} holds no copy of the model in its module; pass what averages it")
    if [tensor.shape for _, tensor in mine] != [tensor.shape for _, tensor in its]:
        raise GateError(
            f"{name} holds a copy of another model than this one; pass it to every compact, or "
            "make a new one of what compact returns"
        )


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    named: Sequence[Any] = (module.named_parameters(), module.named_buffers())
    return dict(chain(*named))
