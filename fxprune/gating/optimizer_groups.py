"""What an optimizer does with gates: it trains them, at their own rate, and decays none."""

from math import inf
from numbers import Real
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from fxprune.errors import GateError
from fxprune.gating.gates import Gates
from fxprune.gating.owners import gates_with_owners


def parameter_groups(
    gated: nn.Module, *, lr: float, gate_lr: float | None = None, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Return optimizer parameter groups: the weights, and the gates without weight decay.

    lr, weight_decay: for the weights. gate_lr: for the gates, 0.1 if not given. Decay would pull
    gates to 0 whatever the loss says. Raises `GateError` if the model was not instrumented, or for
    what is no rate: optimizers check those of their own only, and would train uphill, or to NaN.
    """
    for name, rate in {"lr": lr, "gate_lr": gate_lr, "weight_decay": weight_decay}.items():
        if rate is not None and not _is_rate(rate):  # without one some optimizers find their own
            raise GateError(f"{name}={rate!r} is no rate; take a finite number, 0 or more")
    mine = {id(p) for gates in gates_with_owners(gated) for p in gates.parameters()}
    trained = [p for p in gated.parameters() if p.requires_grad]
    weights = [p for p in trained if id(p) not in mine]
    gates = [p for p in trained if id(p) in mine]
    return [
        {"params": weights, "lr": lr, "weight_decay": weight_decay},
        {"params": gates, "lr": 0.1 if gate_lr is None else gate_lr, "weight_decay": 0.0},
    ]


def require_undecayed(gated: nn.Module, optimizer: Optimizer) -> None:
    """Raise `GateError` if an optimizer decays gates: they would close whatever the loss says.

    `parameter_groups` keeps them apart; this is for groups made by hand.
    """
    if not hasattr(optimizer, "param_groups"):
        raise GateError(
            f"{type(optimizer).__name__} is no optimizer; pass the one that trains gated"
        )
    mine = {id(p) for gates in gates_with_owners(gated) for p in gates.parameters()}
    for place, group in enumerate(optimizer.param_groups):
        if group.get("weight_decay") and any(id(p) in mine for p in group["params"]):
            raise GateError(
                f"group {place} of {type(optimizer).__name__} holds gates and has a weight decay "
                f"of {group['weight_decay']:g}; make the groups by fxprune.parameter_groups(gated, "
                "lr=…, weight_decay=…), which leaves gates alone"
            )


def require_trained(gates: Gates, remedy: str) -> None:
    """Raise `GateError` if the optimizer of gates trains others: nothing would move these."""
    if gates.superseded:
        raise GateError(
            f"the optimizer of these gates trains what fxprune.compact returned; {remedy}"
        )


def _is_rate(value: Any) -> bool:
    is_number = isinstance(value, Real) or (isinstance(value, Tensor) and value.numel() == 1)
    return is_number and 0 <= float(value) < inf
