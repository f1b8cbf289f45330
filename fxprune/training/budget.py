"""Train to a budget: what pulls at the gates is moved until the model costs what was asked for.

The target falls from the full cost to the budget, fast at first and slowly at the end, where every
unit is missed. How units are told apart on the way is the question of `training.estimators`. After
the shrinking the gates are made binary, the budget is met to the unit by what the finalised model
is seen to cost, and the weights settle. While it shrinks every tensor keeps its strongest unit, and
nonlinearities come back where all units together would not spend the budget. All is computed on the
gates' device, and waits for it only where units are ranked.
"""

import copy
import math
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any
from weakref import ReferenceType, WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fxprune.compiler import finalize
from fxprune.errors import BudgetError
from fxprune.gating.gates import Gates, gate_owners
from fxprune.gating.optimizer_groups import require_trained, require_undecayed
from fxprune.gating.owners import gates_by_name
from fxprune.gating.penalties import Depth, cost_of
from fxprune.gating.sharding import is_sharded
from fxprune.gating.terms import LATENCY, MACS, NEURONS, PARAMETERS
from fxprune.inspection import freeze
from fxprune.training.estimators import Pull
from fxprune.training.estimators import estimator as find_estimator
from fxprune.training.selection import has_slack, least_cost, meet_, restore_nonlinearity_, units_of

CHECK_EVERY = 50  # steps, where looking at a number means waiting for the device
EASE = 2.0  # power of what is left of the way, in the logarithm of the cost
ROUNDS = 6  # of finalising the model to see what it costs
NEAR = 0.01  # as part of the budget: not worth another round


@dataclass(frozen=True)
class Phases:
    """Where the phases end, as parts of the steps: warm-up, shrinking, and its coming to rest.

    Up to `warm_up` no gate is pulled at; up to `shrink` the target falls; up to `settle` it is
    held; then the gates are frozen and only the weights train on.
    """

    warm_up: float = 0.02
    shrink: float = 0.5
    settle: float = 0.7

    def __post_init__(self) -> None:
        """Raise `BudgetError` unless they follow each other."""
        parts = (self.warm_up, self.shrink, self.settle)
        are_numbers = all(isinstance(part, Real) for part in parts)
        if not are_numbers or not 0 <= self.warm_up < self.shrink <= self.settle <= 1:
            raise BudgetError(
                f"{self} are no phases; take 0 ≤ warm_up < shrink ≤ settle ≤ 1, as parts of a run"
            )


class Budget:
    """A controller of the penalties of a gated model.

        budget = fxprune.Budget(gated, macs=0.5, steps=epochs * len(loader))
        for x, y in loader:
            loss = criterion(gated(x), y) + budget.penalty()
            optimizer.zero_grad(); loss.backward(); optimizer.step(); budget.step()

    gated: what `instrument` returned, also inside a wrapper. neurons, parameters, macs, latency:
    one of them, the cost to reach: a fraction of the full cost if ≤ 1, else a number (of units, of
    parameters, of a sample's multiply-accumulates or nanoseconds) of the finalised model; for
    latency see `fxprune.Cost`. steps: optimizer steps in the whole run. phases: when what happens.
    strength: the first λ. depth: λ4, which pulls nonlinearities towards linear, so that layers are
    merged; where that saves more than asked for they come back. estimator: how units are told
    apart, "gates" as in the paper, or "taylor" by the squared gradients of their gates, for which
    gates' rates do not matter. optimizer: if given it is checked not to decay gates.

    What `fxprune.compact` removed does not come back where the cost falls below the target: compact
    during the shrinking only with "taylor", which keeps to it, else once the gates are frozen.

    In `DistributedDataParallel` take `find_unused_parameters=True`: frozen gates get no gradient.

    `cost` is counted, as `fxprune.Cost` is, and may be too low while every unit of a tensor is
    dead; at the end the model is finalised, and what it then costs is what has to meet the budget.

    It stands in for `fxprune.penalty(gated)`: the terms of `gated.penalties` do not enter. Gates
    that the user freezes stay as they are. Of a model instrumented region by region the regions
    are counted. Raises `BudgetError` for a budget nobody can meet, `GateError` without gates.
    """

    def __init__(
        self,
        gated: nn.Module,
        *,
        steps: int,
        neurons: float | None = None,
        parameters: float | None = None,
        macs: float | None = None,
        latency: float | None = None,
        phases: Phases | None = None,
        strength: float = 1e-4,
        depth: float = 0.0,
        estimator: str = "gates",
        optimizer: Optimizer | None = None,
    ) -> None:
        if optimizer is not None:
            require_undecayed(gated, optimizer)
        asked = {NEURONS: neurons, PARAMETERS: parameters, MACS: macs, LATENCY: latency}
        given = {kind: amount for kind, amount in asked.items() if amount is not None}
        if len(given) != 1:
            raise BudgetError(
                f"give one of neurons, parameters, macs and latency, not {len(given)}"
            )
        ((self.kind, amount),) = given.items()
        amount = _number(self.kind, amount)
        strength, depth = _number("strength", strength), _number("depth", depth)
        if not _is_count(steps, least=1) or not strength > 0 or not depth >= 0:
            raise BudgetError(
                f"steps={steps}, strength={strength}, depth={depth}: steps, a whole number, and "
                "strength must be positive, depth not negative"
            )
        self.steps, self.phases = int(steps), phases or Phases()
        if not hasattr(self.phases, "settle"):
            raise BudgetError(f"phases={phases!r} are no fxprune.Phases")
        self.steps_done = 0
        self._frozen_here: dict[nn.Parameter, Tensor] = {}  # and at what
        self._estimator = find_estimator(estimator, strength, steps)
        self._depth = Depth(depth)
        self.follow(gated)
        self.full = sum(gates.costs.full(self.kind) for gates in self._gates if gates.costs)
        self.target = amount * self.full if amount <= 1 else float(amount)
        least = least_cost(self._gates, self._groups, self.kind)
        if not least <= self.target <= self.full:
            raise BudgetError(
                f"{self.target:,.0f} {self.kind} cannot be met: with a unit in every layer they "
                f"are {least:,.0f}, with all units {self.full:,.0f}"
            )

    def follow(self, gated: nn.Module) -> None:
        """Go on with what `fxprune.compact` returned, or on another device, as before."""
        self.gated = gated
        self._gates = [g for g in gates_by_name(gated).values() if g.width is not None]
        if not self._gates:
            raise BudgetError("the model has no width gates, so that nothing can get smaller")
        for gates in self._gates:
            gates.superseded = False  # who follows them trains them
        self._groups = [units_of(gates) for gates in self._gates]
        self._leads = False
        self._last_cost: Tensor | None = None
        self._estimator.follow(self._gates, self._groups, self.kind)

    @property
    def strength(self) -> float:
        """λ now, 0 where no λ moves; waits for the device."""
        pull = self._estimator
        return math.exp(float(pull.log_strength)) if isinstance(pull, Pull) else 0.0

    @property
    def cost(self) -> float:
        """What the model would cost finalised now; waits for the device."""
        return float(self._cost())

    @property
    def aim(self) -> float:
        """The target of this step, between the full cost and the budget."""
        start, end = self.phases.warm_up, self.phases.shrink
        done = (self.steps_done / self.steps - start) / (end - start)
        left = 1 - min(max(done, 0.0), 1.0)
        return self.full * (self.target / self.full) ** (1 - left**EASE)

    @property
    def frozen(self) -> bool:
        """Whether the gates are frozen, by the budget or by `fxprune.freeze`."""
        return not any(_width(gates).requires_grad for gates in self._gates)

    @property
    def phase(self) -> str:
        """The phase of the next step: "warm-up", "shrink", "hold" or "settle"."""
        part = self.steps_done / self.steps
        if self.frozen or part >= self.phases.settle:
            return "settle"
        if part < self.phases.warm_up:
            return "warm-up"
        return "shrink" if part < self.phases.shrink else "hold"

    @property
    def status(self) -> str:
        """One line on how it stands; waits for the device."""
        cost = self.cost
        return (
            f"step {self.steps_done}/{self.steps} {self.phase}: {self.kind} {cost:,.0f} "
            f"({cost / self.full:.1%} of all, {cost / self.target:.1%} of the budget), "
            f"λ {self.strength:.2e}"
        )

    def penalty(self) -> Tensor:
        """Return what to add to the loss: a scalar, differentiable, on the gates' device.

        Raises `GateError` if the model was compacted and the budget does not follow.
        """
        self._require_trained()
        if self.phase in ("warm-up", "settle"):
            return _width(self._gates[0]).new_zeros(())
        cost = self._cost() if self._last_cost is None else self._last_cost
        over = cost > self.aim  # no pull below the target: units come back there
        total = self._estimator.penalty(over)
        return sum((self._depth(gates).to(total) for gates in self._gates), total)

    def step(self, loss: Tensor | float | None = None) -> None:
        """Move λ and, when it is time, freeze the gates; call it after `optimizer.step()`.

        loss: if given it is looked at too. Raises `BudgetError` if it or a gate is NaN: at once on
        the CPU, on another device within 50 steps, or if another budget moves the gates in turn:
        the first to freeze them would leave the other's missed. Raises `GateError` as `penalty`
        does.
        """
        self._require_trained()
        self._lead_()
        phase = self.phase
        self.steps_done += 1
        self._require_numbers(loss)
        if self.frozen:
            return
        with torch.no_grad():
            slack = has_slack(self._gates, self.kind, self.target)
            restore_nonlinearity_(self._gates, slack)
            self._last_cost = self._cost()
            moves = phase in ("shrink", "hold")
            self._estimator.step(self._last_cost, self.aim if moves else None)
            if self.steps_done >= round(self.phases.settle * self.steps):
                self.finish()

    def finish(self) -> None:
        """Freeze the gates now, keeping as many of the strongest units as the budget allows.

        The model is finalised a few times to see what it costs, unless it is sharded over ranks.
        Raises `BudgetError` if it costs more than was counted, whatever goes.
        """
        self._require_numbers(None, wait=True)
        if not self.frozen:
            self._meet_()
            self._freeze_()

    @torch.no_grad()
    def put_back(self) -> None:
        """Put the gates that this budget froze back, where something else moved them since.

        An average of weights that was begun before they were frozen brings some back.
        """
        for gate, frozen_at in self._frozen_here.items():
            gate.copy_(frozen_at)

    def state_dict(self) -> dict[str, Any]:
        """Return what a run needs to go on, beside the model's and the optimizer's state."""
        return {
            "kind": self.kind,
            "target": self.target,
            "steps": self.steps,
            "steps_done": self.steps_done,
            "frozen": self.frozen,
            **self._estimator.state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where a run stopped; the model and the optimizer load their own state.

        A run may also go back to where its gates were not frozen yet: they are trained again.
        Raises `BudgetError` if the state is that of another budget, or none; nothing has changed
        then.
        """
        _require_state(state)
        mine = (self.kind, self.target)
        if (state["kind"], state["target"]) != mine:
            raise BudgetError(
                f"the state is of a budget of {state['target']:,.0f} {state['kind']}, this one is "
                f"of {self.target:,.0f} {self.kind}; make the budget as it was made then"
            )
        self._estimator.require(state)
        if not state["frozen"]:
            self._thaw_()
        self.steps, self.steps_done = int(state["steps"]), int(state["steps_done"])
        self._leads = False
        self._estimator.restore(state)
        self._last_cost = None
        if state["frozen"]:
            self._freeze_()

    def _freeze_(self) -> None:
        """Freeze the gates, and note whose gates were trained until now."""
        gates = [g for one in gates_by_name(self.gated).values() for g in one.parameters()]
        frozen_now = [gate for gate in gates if gate.requires_grad]
        self._frozen_here |= {gate: gate.detach().clone() for gate in frozen_now}
        freeze(self.gated)

    def _thaw_(self) -> None:
        """Let gates be trained again that this budget froze; those of the user stay as they are."""
        mine = {id(gate) for gate in self._frozen_here}
        if self.frozen and not any(id(_width(gates)) in mine for gates in self._gates):
            raise BudgetError(
                "the state is of a run whose gates were trained, those of this model are frozen; "
                "load it for a model as it was then"
            )
        for gate in self._frozen_here:
            gate.requires_grad_(True)
        self._frozen_here.clear()

    @torch.no_grad()
    def _meet_(self) -> None:
        """Make the width gates binary so that the finalised model costs what the budget allows."""
        while bool(has_slack(self._gates, self.kind, self.target)):
            restore_nonlinearity_(self._gates)
        strengths = self._estimator.strengths()
        aim, best, most = self.target, self._state(), 0.0
        for _ in range(ROUNDS):
            meet_(self._gates, self._groups, self.kind, aim, strengths)
            found, counted = self._finalised_cost(), self.cost
            if most < found <= self.target:
                best, most = self._state(), found
            corrected = self.target * counted / found
            if found > self.target:
                aim = min(corrected, aim * (1 - NEAR))
            elif found >= self.target * (1 - NEAR):
                break
            elif all(bool(gates.live().all()) for gates in self._gates):
                if not bool(has_slack(self._gates, self.kind, corrected)):
                    break
                restore_nonlinearity_(self._gates)
            elif math.isclose(aim, corrected, rel_tol=1e-3):
                break  # one more unit would be too much
            else:
                aim = corrected
        if not most:
            raise BudgetError(
                f"{self.target:,.0f} {self.kind} were not met: finalised, the model takes more "
                "than was counted; ask for a larger budget"
            )
        for gates, state in zip(self._gates, best, strict=True):
            gates.load_state_dict(state)

    def _state(self) -> list[dict[str, Any]]:
        return [copy.deepcopy(gates.state_dict()) for gates in self._gates]

    def _finalised_cost(self) -> float:
        """Return what the finalised model costs, if that can be found out, else what is counted."""
        owners = [o for gates, o in gate_owners(self.gated).items() if gates in self._gates]
        if self.kind in (NEURONS, LATENCY) or any(map(is_sharded, owners)):
            return self.cost
        reports = [finalize(owner, check=False).report for owner in owners]
        return sum(getattr(report.after, self.kind) for report in reports)

    def _cost(self) -> Tensor:
        with torch.no_grad():
            costs = [cost_of(gates, self.kind) for gates in self._gates]
            return torch.stack([cost.to(costs[0].device) for cost in costs]).sum()

    def _require_trained(self) -> None:
        for gates in [] if self.frozen else self._gates:
            require_trained(gates, "call budget.follow() with that model")

    def _lead_(self) -> None:
        """Take the lead over the gates; raise `BudgetError` if another took it since this had."""
        leaders = [_LEADERS.get(gates, ref(self))() for gates in self._gates]
        if self._leads and any(one is not None and one is not self for one in leaders):
            raise BudgetError(
                "another budget moves these gates in turn, and a model meets one: train to the "
                "first, then make the other for what fxprune.compact returns, or drop one"
            )
        _LEADERS.update(dict.fromkeys(self._gates, ref(self)))
        self._leads = True

    def _require_numbers(self, loss: Tensor | float | None, *, wait: bool = False) -> None:
        """Raise if the loss or a gate is NaN."""
        waits = _width(self._gates[0]).device.type != "cpu"
        if waits and not wait and self.steps_done % CHECK_EVERY:
            return
        found = ["the gates"] * any(
            bool(gate.isnan().any()) for gates in self._gates for gate in gates.parameters()
        )
        if loss is not None and not bool(torch.as_tensor(loss).detach().isfinite().all()):
            found.insert(0, "the loss")
        if found:
            raise BudgetError(
                f"{' and '.join(found)} became NaN by step {self.steps_done}; take up the last "
                "checkpoint with a lower learning rate, of gates or weights, or clip gradients"
            )


_LEADERS: WeakKeyDictionary[Gates, ReferenceType[Budget]] = WeakKeyDictionary()  # the last to step


def _width(gates: Gates) -> nn.Parameter:
    assert gates.width is not None
    return gates.width


def _number(name: str, value: Any) -> float:
    """Return a number that was given, in whatever form; raise `BudgetError` for what is none."""
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise BudgetError(f"{name}={value!r} is no number") from error
    if not math.isfinite(number):
        raise BudgetError(f"{name}={value!r} is not finite")
    return number


def _is_count(value: Any, least: int) -> bool:
    return isinstance(value, Integral) and int(value) >= least


def _require_state(state: Any) -> None:
    """Raise `BudgetError` unless a state is one of a budget."""
    wanted = ("kind", "target", "steps", "steps_done", "frozen")
    missing = [key for key in wanted if not isinstance(state, dict) or key not in state]
    if missing:
        raise BudgetError(f"this is no state of a budget: it has no {', '.join(missing)}")
    if not _is_count(state["steps"], least=1) or not _is_count(state["steps_done"], least=0):
        raise BudgetError(
            f"this is no state of a budget: steps={state['steps']!r}, "
            f"steps_done={state['steps_done']!r}"
        )
