"""Which units to keep, the strongest first, so that a cost is met and no tensor left empty.

A unit may be as strong as its real gate; where gates are equal, as many are that were clipped, the
last gradient decides, since it says by how much the loss would rise without the unit. Where all
units cost too little, because layers are merged, nonlinearities come back, the least linear first.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fxprune.errors import GateError
from fxprune.gating.gates import HALF, Gates
from fxprune.gating.penalties import cost_and_prices, cost_of

TRIES = 256
BARELY_SHUT = 0.49  # of a gate that may open again
SLACK = 0.99


def units_of(gates: Gates) -> Tensor:
    """Return sets of units of which one has to live, int64 (sets, size).

    Short ones are filled up with the number of units. Raises `GateError` if there are no costs.
    """
    if gates.costs is None or gates.width is None:
        raise GateError("these gates know of no costs; instrument the model again")
    groups = gates.costs.groups()
    size = max(map(len, groups), default=1)  # nobody is the strongest of none
    rows = [(*group, *(len(gates.width),) * (size - len(group))) for group in groups]
    found = torch.tensor(rows, dtype=torch.int64, device=gates.width.device)
    return found.reshape(len(rows), size)


def strongest(strength: Tensor, groups: Tensor) -> Tensor:
    """Return the strongest unit of every set, int64 (sets,)."""
    filled = torch.cat([strength.detach(), strength.new_full((1,), -torch.inf)])
    return groups.gather(1, filled[groups].argmax(1, keepdim=True)).reshape(-1)


@torch.no_grad()
def least_cost(all_gates: Sequence[Gates], all_groups: Sequence[Tensor], kind: str) -> float:
    """Return a cost that can surely be met: with the first unit of every set alone."""
    total = 0.0
    for gates, groups in zip(all_gates, all_groups, strict=True):
        assert gates.width is not None
        alone = torch.zeros_like(gates.width)
        alone[groups[:, 0]] = 1
        total += float(cost_of(gates, kind, alone))
    return total


@torch.no_grad()
def meet_(
    all_gates: Sequence[Gates],
    all_groups: Sequence[Tensor],
    kind: str,
    target: float,
    strengths: Sequence[Tensor],
    tries: int = TRIES,
) -> None:
    """Set every gate to 0 or 1: the strongest units that cost no more than `target` together.

    tries: how many of the next units are asked whether they still fit, being cheaper.
    """
    strengths = [strength.clone() for strength in strengths]
    for strength, groups in zip(strengths, all_groups, strict=True):
        strength[strongest(strength, groups)] = torch.inf
    whole = torch.cat([strength.cpu() for strength in strengths])
    order = whole.argsort(descending=True, stable=True)
    live = torch.zeros(len(whole), dtype=torch.float64, device=whole.device)

    def fits() -> bool:
        parts = live.split([len(strength) for strength in strengths])
        pairs = zip(all_gates, parts, strict=True)
        costs = [
            float(cost_of(g, kind, part.to(s)))
            for (g, part), s in zip(pairs, strengths, strict=True)
        ]
        return sum(costs) <= target

    least, most = int(whole.isinf().sum()), len(whole)
    while least < most:
        middle = (least + most + 1) // 2
        live[:] = 0
        live[order[:middle]] = 1
        least, most = (middle, most) if fits() else (least, middle - 1)
    live[:] = 0
    live[order[:least]] = 1
    for unit in order[least : least + tries].tolist():
        live[unit] = 1
        live[unit] = float(fits())
    for gates, part in zip(all_gates, live.split(list(map(len, strengths))), strict=True):
        assert gates.width is not None
        gates.width.copy_(part)


@torch.no_grad()
def has_slack(all_gates: Sequence[Gates], kind: str, target: float) -> Tensor:
    """Tell whether all units cost less than `target` by a unit or more, and nonlinearities are off.

    Less than the dearest unit is what whole units may leave, above all where others were removed.
    """
    opened = [
        gates.linearised().any()
        for gates in all_gates
        if gates.linear is not None and gates.linear.requires_grad
    ]
    if not opened:
        assert all_gates[0].width is not None
        return torch.zeros((), dtype=torch.bool, device=all_gates[0].width.device)
    costs, units = zip(*(cost_and_prices(gates, kind) for gates in all_gates), strict=True)
    device = costs[0].device
    total = torch.stack([cost.to(device) for cost in costs]).sum()
    dearest = torch.stack([unit.max().to(device) for unit in units]).max()
    gap = dearest.to(total).clamp_min((1 - SLACK) * target)
    return (total + gap < target) & torch.stack([one.to(device) for one in opened]).any()


@torch.no_grad()
def restore_nonlinearity_(all_gates: Sequence[Gates], wanted: Tensor | None = None) -> None:
    """Close the least open linearity gate of every part; wanted: only if that scalar holds."""
    for gates in all_gates:
        if gates.linear is None or not gates.linear.requires_grad:
            continue
        place = gates.linear.where(gates.linear >= HALF, torch.inf).argmin()
        shut = gates.linear[place].clamp_max(BARELY_SHUT)
        wanted = shut.isfinite() if wanted is None else wanted
        gates.linear[place] = torch.where(wanted.to(shut.device), shut, gates.linear[place])


def gate_strength(gates: Gates) -> Tensor:
    """Return how strong every unit's gate is, (units,)."""
    assert gates.width is not None
    width = gates.width.detach().clamp(0, 1)
    if gates.width.grad is None:
        return width
    gradient = gates.width.grad.detach()
    scale = gradient.abs().amax().clamp_min(torch.finfo(gradient.dtype).tiny)
    return width - 1e-4 * (gradient / scale).nan_to_num()
