"""What a forward makes for the sizes it meets, and makes again for others: anchors, grids, masks.

A model that has run holds it, and its forward asks whether the sizes are those of last time: traced
as it is, it would be good for these sizes only, batches too. Without what it remembers, the trace
makes it from the sizes, as the first run did. What every run writes is no memo but a note.
"""

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fxprune.user_models.cases import random_cases
from fxprune.user_models.inputs import Inputs, leading_size, same
from fxprune.user_models.modules import copy_model, evaluating, run_alike


@dataclass
class SizeMemos:
    """Attributes by the path of their module, and inputs of sizes for which they are replaced."""

    attributes: set[tuple[str, str]] = field(default_factory=set[tuple[str, str]])
    others: list[Inputs] = field(default_factory=list[Inputs])


def may_hold_memos(model: nn.Module) -> bool:
    """Tell whether a module keeps a tensor, or sizes, among its plain attributes."""
    return any(
        isinstance(value, (Tensor, torch.Size))
        for module in model.modules()
        for value in vars(module).values()
    )


def find_size_memos(model: nn.Module, inputs: Inputs) -> SizeMemos:
    """Run a copy of a model on inputs of several sizes, and see what it replaces in itself."""
    found = SizeMemos()
    twin, more = copy_model(model), (leading_size(inputs) or 0) + 1
    for others in random_cases(inputs, (more,), seed=0).values():
        with evaluating(twin), torch.no_grad():
            try:
                run_alike(twin, inputs)
                notes = _replaced_by(twin, inputs)
                made = _replaced_by(twin, others) - notes
            except Exception:  # it takes no others like these
                continue
        if made:
            found.attributes |= made
            found.others.append(others)
    return found


@contextmanager
def forgotten(model: nn.Module, memos: SizeMemos) -> Generator[None]:
    """Let modules hold what their classes do, else None, in place of memos, for a while."""
    kept: list[tuple[dict[str, Any], str, Any]] = []
    for path, name in memos.attributes:
        module = model.get_submodule(path)
        held = vars(module)
        if name not in held:
            continue
        kept.append((held, name, held[name]))
        if hasattr(type(module), name):
            del held[name]
        else:
            held[name] = None
    try:
        yield
    finally:
        for held, name, value in kept:
            held[name] = value


def agree(model: nn.Module, traced: nn.Module, inputs: Inputs) -> bool:
    """Tell whether both compute the same to the bit, in evaluation mode."""
    model = copy_model(model)
    with evaluating(model, traced), torch.no_grad():
        try:
            return same(run_alike(model, inputs), run_alike(traced, inputs))
        except Exception:  # one of them does not take such inputs
            return False


def _replaced_by(model: nn.Module, inputs: Inputs) -> set[tuple[str, str]]:
    """Run a model; return the attributes that are other objects then, or other values."""
    before = {path: dict(vars(module)) for path, module in model.named_modules()}
    run_alike(model, inputs)
    return {
        (path, name)
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if value is not before[path].get(name, before)
    }
