"""What every unit adds to a model's costs, from the channel analysis its gates were planned by.

A parameter has as many numbers as the channels along its axes multiply to. An operator that mixes
channels multiplies in proportion to the channels it makes and to those it reads; one that does not,
to the channels that pass through it. What the analysis does not understand costs what it costs.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, fx

from fxprune.gates import UNGATED
from fxprune.inputs import leading_size
from fxprune.observation import Observation
from fxprune.program import Program
from fxprune.rules import rule_for
from fxprune.sites import Plan
from fxprune.unit_costs import Row, Term, UnitCosts
from fxprune.values import State, Value


def account(program: Program, plan: Plan, seen: Observation, units: Mapping[int, int]) -> UnitCosts:
    """Return the costs of a program in the units of its gates.

    plan: where the gates go. seen: what a run showed. units: the number of every class of channels
    that has a gate. The costs are those of what `finalize(…, fold=False)` returns, as long as no
    tensor is left without channels.
    """
    return _Accountant(program, plan, seen, units).account()


class _Accountant:
    def __init__(
        self, program: Program, plan: Plan, seen: Observation, units: Mapping[int, int]
    ) -> None:
        self.program, self.channels, self.seen = program, plan.channels, seen
        self.number = torch.full((len(plan.channels.classes),), UNGATED)
        for label, unit in units.items():
            self.number[label] = unit
        self.units = len(units)
        self.rows: dict[bytes, Row] = {}
        self.reads: dict[fx.Node, Tensor] = {}
        for node, read in plan.channels.reads:
            if len(read.inputs) > 1:
                self.reads.setdefault(node, read.inputs)

    def account(self) -> UnitCosts:
        states = {id(state.tensor): state for state in self.channels.states.values()}
        parameters = [
            self._parameter(tensor, states.get(id(tensor)))
            for tensor in self.program.module.parameters()
        ]
        macs = [self._operator(node, count) for node, count in self.seen.macs.items()]
        samples = leading_size((self.program.args, self.program.kwargs)) or 1
        return UnitCosts(self.units, parameters, macs, samples)

    def _parameter(self, tensor: Tensor, state: State | None) -> Term:
        if state is None:
            return Term(tensor.numel(), ())
        if state.whole is not None:
            along = _varying(self.channels.classes[state.whole])
            return Term(tensor.numel(), (self._row_of_classes(along),))
        return Term(tensor.numel(), tuple(map(self._row, state.axes.values())))

    def _operator(self, node: fx.Node, count: int) -> Term:
        call, value = self.channels.calls.get(node), self.channels.values.get(node)
        if call is None or node in self.channels.barriers or not isinstance(value, Value):
            return Term(count, ())
        rows = [self._row(value.tags)]
        # Of attention whole heads go, which its output tells.
        if node in self.reads and rule_for(node, call.module).name != "attention":
            rows.append(self._row(self.reads[node]))
        return Term(count, tuple(rows))

    def _row(self, tags: Tensor) -> Row:
        return self._row_of_classes(self.channels.classes[tags.reshape(-1)])

    def _row_of_classes(self, classes: Tensor) -> Row:
        numbers = self.number[classes]
        key = numbers.numpy().tobytes()
        if key not in self.rows:
            self.rows[key] = _as_row(numbers)
        return self.rows[key]


def _as_row(numbers: Tensor) -> Row:
    units, times = numbers.unique(return_counts=True)
    pairs = dict(zip(units.tolist(), times.tolist(), strict=True))
    base = pairs.pop(UNGATED, 0)
    return Row(base, tuple(pairs), tuple(pairs.values()))


def _varying(classes: Tensor) -> Tensor:
    """Return the classes along the one axis on which they vary; a box has no other."""
    for axis in range(classes.dim()):
        front = classes.movedim(axis, 0).reshape(classes.shape[axis], -1)
        if classes.shape[axis] > 1 and bool((front == front[:, :1]).all()):
            return front[:, 0]
    return classes.reshape(-1)[:1]
