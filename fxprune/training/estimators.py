"""How units are told apart on the way to a budget: what pulls at their gates, what keeps them.

The paper's way trains the real gates, straight through, against a penalty whose λ is moved by
feedback:

    penalty = λ·(Σ p·(½w(1 − w) + w) + ½Σ d(1 − d)),   p_u ∝ √(marginal cost of u), mean 1
    log λ += clamp(0.05·(log cost − log target), ±0.02)

The other ranks units by what the loss would lose with them, and keeps as many of the first as the
target of the step allows: the running mean of (∂L/∂w)², the square of that loss to first order
(Molchanov et al., "Importance Estimation for Neural Network Pruning", 2019), over the marginal cost
of the unit in the model as it is now. ∂L/∂w also exists where w' = 0, so that units come back.
"""

import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fxprune.errors import BudgetError
from fxprune.gating.gates import HALF, Gates, clipped
from fxprune.gating.penalties import cost_and_prices
from fxprune.training.selection import gate_strength, meet_, strongest

MEMORY = 0.99  # of the running mean, a step
RANK_EVERY = 20  # steps, as ranking means waiting for the device
TRIES = 32  # a ranking: what does not fit now may be compacted away
LOYALTY = 1.1  # what being kept counts for, lest units come and go with the noise
_ANOTHER = "make the budget as it was made then, for the model as it was then, compacted alike"


class Estimator(Protocol):
    """One way; `Budget` asks it in every step."""

    def follow(self, all_gates: Sequence[Gates], groups: Sequence[Tensor], kind: str) -> None:
        """Take the gates, and the sets of units of which one has to live; anew when they change."""
        ...

    def penalty(self, over: Tensor) -> Tensor:
        """Return what is added to the loss; over: whether the model costs more than it should."""
        ...

    def step(self, cost: Tensor, aim: float | None) -> None:
        """Move what moves after the optimizer; aim: what the model should cost, None for all."""
        ...

    def strengths(self) -> list[Tensor]:
        """Return how strong each unit is, (units,) for each gates."""
        ...

    def state(self) -> dict[str, Any]:
        """Return what it needs to go on."""
        ...

    def require(self, state: dict[str, Any]) -> None:
        """Raise `BudgetError` unless a state is one of this estimator, for these gates."""
        ...

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        ...


class Pull:
    """The paper's: real gates under a penalty, each tensor's strongest unit held above ½."""

    def __init__(self, strength: float, steps: int) -> None:
        """Take the first λ; short runs have to move it faster."""
        self.log_strength = torch.tensor(math.log(strength), dtype=torch.float32, device="cpu")
        self.weakest = math.log(strength / 10)  # or it would have to come a long way back
        self.limit = max(0.02, 16 / steps)
        self.gates: Sequence[Gates] = ()
        self.groups: Sequence[Tensor] = ()
        self.prices: list[Tensor] = []

    def follow(self, all_gates: Sequence[Gates], groups: Sequence[Tensor], kind: str) -> None:
        """Take the gates and price their units."""
        self.gates, self.groups = all_gates, groups
        self.prices = _prices(all_gates, kind)
        self.log_strength = self.log_strength.to(_width(all_gates[0]).device)

    def penalty(self, over: Tensor) -> Tensor:
        """Return λ times what pulls; below the target nothing does but to 0 or 1."""
        total = _width(self.gates[0]).new_zeros(())
        for gates, price in zip(self.gates, self.prices, strict=True):
            width = clipped(_width(gates))
            pull = 0.5 * (1 - width) + over.to(width.device, width.dtype)
            total = total + (price * width * pull).sum().to(total.device)
            total = total + _binary_depth(gates).to(total)
        return self.log_strength.exp().to(total.dtype) * total

    def step(self, cost: Tensor, aim: float | None) -> None:
        """Keep every tensor alive, and move λ."""
        for gates, groups in zip(self.gates, self.groups, strict=True):
            chosen = strongest(_width(gates), groups)
            _width(gates)[chosen] = _width(gates)[chosen].clamp_min(HALF)
        if aim is not None:
            move = 2.5 * self.limit * (cost.log() - math.log(aim))
            self.log_strength += move.clamp(-self.limit, self.limit).to(self.log_strength)
            self.log_strength.clamp_min_(self.weakest)

    def strengths(self) -> list[Tensor]:
        """Return the real gates; of equal ones the gradient decides."""
        return [gate_strength(gates) for gates in self.gates]

    def state(self) -> dict[str, Any]:
        """Return λ."""
        return {"log_strength": self.log_strength.clone()}

    def require(self, state: dict[str, Any]) -> None:
        """Raise `BudgetError` unless there is a λ."""
        strength = state.get("log_strength")
        _require_alike("log_strength", [strength], [self.log_strength])

    def restore(self, state: dict[str, Any]) -> None:
        """Take λ."""
        self.log_strength.copy_(state["log_strength"])


class Ranking:
    """Units ranked by what the loss would lose with them, a unit of cost."""

    def __init__(self, strength: float) -> None:
        """Take the weight of what makes linearity gates binary."""
        self.strength, self.kind, self.calls = strength, "", 0
        self.gates: Sequence[Gates] = ()
        self.groups: Sequence[Tensor] = ()
        self.kept: list[Tensor] = []

    def follow(self, all_gates: Sequence[Gates], groups: Sequence[Tensor], kind: str) -> None:
        """Take the gates, and for kept what is."""
        self.gates, self.groups, self.kind = all_gates, groups, kind
        self.kept = [gates.live().to(_width(gates)) for gates in all_gates]

    def penalty(self, over: Tensor) -> Tensor:
        """Return what makes linearity gates binary."""
        total = _width(self.gates[0]).new_zeros(())
        for gates in self.gates:
            total = total + _binary_depth(gates).to(total)
        return self.strength * total

    def step(self, cost: Tensor, aim: float | None) -> None:
        """Measure; now and then rank anew; undo what the optimizer did to the width gates."""
        for gates in self.gates:
            _measure(gates)
        self.calls += 1
        if aim is not None and self.calls % RANK_EVERY == 0:
            meet_(self.gates, self.groups, self.kind, aim, self.strengths(), TRIES)
            self.kept = [_width(gates).detach().clone() for gates in self.gates]
        for gates, kept in zip(self.gates, self.kept, strict=True):
            _width(gates).copy_(kept)

    def strengths(self) -> list[Tensor]:
        """Return the importance of the units over their prices, those kept before preferred."""
        found: list[Tensor] = []
        for gates, kept in zip(self.gates, self.kept, strict=True):
            _, price = cost_and_prices(gates, self.kind, _width(gates))
            price = price.clamp_min(1e-3 * float(price.mean()) or 1.0)
            found.append(gates.importance / price.to(gates.importance) * LOYALTY**kept)
        return found

    def state(self) -> dict[str, Any]:
        """Return what was measured, and who is kept."""
        measured = [gates.importance.clone() for gates in self.gates]
        kept = [one.clone() for one in self.kept]  # loading another writes over them
        return {"calls": self.calls, "kept": kept, "importance": measured}

    def require(self, state: dict[str, Any]) -> None:
        """Raise `BudgetError` unless as many units were measured as there are."""
        if not isinstance(state.get("calls"), int):
            raise BudgetError(f"the state has no calls; {_ANOTHER}")
        for name in ("kept", "importance"):
            _require_alike(name, state.get(name), self.kept)

    def restore(self, state: dict[str, Any]) -> None:
        """Take what was measured."""
        self.calls = state["calls"]
        pairs = zip(self.gates, self.kept, state["kept"], state["importance"], strict=True)
        for gates, kept, was_kept, measured in pairs:
            kept.copy_(was_kept)
            gates.importance.copy_(measured)


ESTIMATORS = ("gates", "taylor")


def estimator(name: str, strength: float, steps: int) -> Estimator:
    """Return the estimator of a name; raise `BudgetError` if there is none."""
    if name not in ESTIMATORS:
        raise BudgetError(f"there is no estimator {name!r}; take one of {', '.join(ESTIMATORS)}")
    return Pull(strength, steps) if name == "gates" else Ranking(strength)


def _require_alike(name: str, found: Any, mine: Sequence[Tensor]) -> None:
    """Raise `BudgetError` unless tensors are of the shapes of these, and numbers."""
    shapes = [getattr(one, "shape", None) for one in found] if isinstance(found, list) else None
    if shapes != [one.shape for one in mine]:
        raise BudgetError(f"the state has no {name} that fits; {_ANOTHER}")
    if not all(bool(one.isfinite().all()) for one in found):
        raise BudgetError(f"{name} of the state is not finite; take up an earlier checkpoint")


def _measure(gates: Gates) -> None:
    """Let the last gradient enter the running mean, unless mixed precision lost it."""
    gradient = _width(gates).grad
    if gradient is None:
        raise BudgetError(
            "the width gates have no gradient to rank units by; call budget.step() after "
            "optimizer.step() and before optimizer.zero_grad()"
        )
    squared = gradient.detach().square()
    mean = gates.importance.lerp(squared.to(gates.importance), 1 - MEMORY)
    gates.importance = torch.where(squared.isfinite(), mean, gates.importance)


def _binary_depth(gates: Gates) -> Tensor:
    """Return ½Σ d(1 − d)."""
    if gates.linear is None:
        return _width(gates).new_zeros(())
    linear = clipped(gates.linear)
    return 0.5 * (linear * (1 - linear)).sum()


def _prices(all_gates: Sequence[Gates], kind: str) -> list[Tensor]:
    """Return what each unit costs beside all others, to the power ½ and with mean 1."""
    found = [cost_and_prices(gates, kind)[1].sqrt() for gates in all_gates]
    mean = sum(float(price.sum()) for price in found) / sum(map(len, found))
    return [price / (mean or 1.0) for price in found]


def _width(gates: Gates) -> nn.Parameter:
    assert gates.width is not None
    return gates.width
