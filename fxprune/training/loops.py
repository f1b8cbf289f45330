"""What a training loop that is not ours has to do for gates, as hooks between its own steps.

The penalty is no part of the loss there: its gradient is added once an optimizer step, to what the
loop has accumulated, averaged over ranks and unscaled. That is what adding it to the loss would
have done, but for the number the loop shows.
"""

from contextlib import suppress
from importlib import import_module
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from fxprune.errors import FxpruneError
from fxprune.gating.gates import gate_owners
from fxprune.gating.penalties import penalty
from fxprune.training.budget import Budget


def library(module: str, name: str) -> Any:
    """Import a module of an optional library; `name` is also that of the extra that brings it."""
    try:
        return import_module(module)
    except ImportError as error:
        raise FxpruneError(
            f"fxprune.{name} needs {module.split('.')[0]}; pip install 'fxprune[{name}]'"
        ) from error


def unscale_(scaler: Any, optimizer: Optimizer) -> None:
    """Take a `GradScaler`'s factor out of the gradients, unless the loop has, as when it clips."""
    if scaler is not None:
        with suppress(RuntimeError):  # raised by a second time, which the scaler remembers
            scaler.unscale_(optimizer)


def add_penalty_gradients_(gated: nn.Module, budget: Budget | None = None) -> None:
    """Add the gradients of the penalty to those that are there; call it before a step.

    budget: whose penalty to take, that of the model if not given. No hook of a parameter runs: the
    gradients are the same on all ranks, and there is nothing to average.
    """
    total = penalty(gated) if budget is None else budget.penalty()
    owners = gate_owners(gated)
    parts: list[Any] = [*owners, *(owner.penalties for owner in owners.values())]
    trained = [p for part in parts for p in part.parameters() if p.requires_grad]
    if not total.requires_grad:
        return
    grads: Any = torch.autograd.grad(total, trained, allow_unused=True)
    for parameter, grad in zip(trained, grads, strict=True):
        if grad is None:
            continue
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        parameter.grad.add_(grad)  # in place: it may be a view of a bucket of DDP


def finish_step_(gated: nn.Module, budget: Budget | None = None) -> None:
    """Clip the gates and move the budget; call it after a step."""
    for gates in gate_owners(gated):
        gates.clip_()
    if budget is not None:
        budget.step()


def trains_gates(optimizer: Optimizer, gated: nn.Module) -> bool:
    """Tell whether an optimizer holds a model's gates."""
    mine = {id(p) for gates in gate_owners(gated) for p in gates.parameters()}
    return any(id(p) in mine for group in optimizer.param_groups for p in group["params"])
