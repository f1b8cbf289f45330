"""What an optimizer does with gates: it trains them, at their own rate, and decays none."""

from typing import Any

from torch import nn
from torch.optim import Optimizer

from fxprune.errors import GateError
from fxprune.gating.gates import Gates
from fxprune.gating.owners import gates_with_owners


def parameter_groups(
    gated: nn.Module, *, lr: float, gate_lr: float | None = None, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Return optimizer parameter groups: the weights, and the gates without weight decay.

    lr, weight_decay: for the weights. gate_lr: for the gates, 0.1 if not given. Decay would pull
    gates to 0 whatever the loss says. Raises `GateError` if the model was not instrumented.
    """
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
