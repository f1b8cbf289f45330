"""What every unit adds to a model's costs, from the channel analysis its gates were planned by.

A parameter has as many numbers as the channels along its axes multiply to. An operator that mixes
channels multiplies in proportion to the channels it makes and to those it reads; one that does not,
to the channels that pass through it. What the analysis does not understand costs what it costs.
What folding does is counted: where batch norms go (`planning.absorption`), and what chains of
layers become where linearity gates are open, or where nothing is between them (`planning.mergers`).
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor, fx

from fxprune.dataflow.rules import rule_for
from fxprune.dataflow.values import Value, as_value
from fxprune.folding.convolutions import Geometry, Sizes, geometry_of
from fxprune.folding.layer_costs import nanoseconds, output_places
from fxprune.folding.transposed_convolutions import transposed_geometry
from fxprune.gating.chain_costs import Way
from fxprune.gating.gates import UNGATED
from fxprune.gating.latency_tables import Axis, Timing
from fxprune.gating.terms import Row, Term
from fxprune.gating.unit_costs import UnitCosts
from fxprune.ops.recurrence import input_products
from fxprune.planning.absorption import Absorption, find_absorptions
from fxprune.planning.mergers import Merger, Run, find_runs
from fxprune.planning.pooled_layers import comes_after, shrinking_pool
from fxprune.planning.sites import Plan
from fxprune.programs.observation import Observation
from fxprune.programs.program import Program
from fxprune.programs.sharing import sole_modules
from fxprune.runtime.kinds import LAYERS
from fxprune.user_models.inputs import leading_size
from fxprune.user_models.modules import submodule

_Taken = tuple[fx.Node, Absorption]


def account(
    program: Program,
    plan: Plan,
    seen: Observation,
    units: Mapping[int, int],
    depth: Mapping[fx.Node, int],
) -> UnitCosts:
    """Return the costs of a program in its gates: of what `finalize` returns.

    plan: where the gates go. seen: what a run showed. units: the number of every class of channels
    that has a gate. depth: the linearity gates of nonlinearities.

    Exact as long as no tensor is left without channels, for weights as training leaves them: of a
    batch norm that shifts nothing, as a new one, no bias remains. Counted as they stand, though
    `finalize` may make less of them: sums of parallel branches, and chains with transposed
    convolutions or average pools in them.
    """
    return _Accountant(program, plan, seen, units, depth).account()


class _Accountant:
    def __init__(
        self,
        program: Program,
        plan: Plan,
        seen: Observation,
        units: Mapping[int, int],
        depth: Mapping[fx.Node, int],
    ) -> None:
        self.program, self.channels, self.seen, self.depth = program, plan.channels, seen, depth
        self.number = torch.full((len(plan.channels.classes),), UNGATED)
        self.number[list(units)] = torch.tensor(list(units.values()), dtype=torch.int64)
        self.units = len(units)
        self.samples = leading_size((program.args, program.kwargs)) or 1
        self.rows: dict[bytes, Row] = {}
        self.rows_of: dict[fx.Node, Row] = {}
        self.fixed = Row(1)
        self.open = [Row(0, (self.units + site,), (1,)) for site in range(len(depth))]
        self.reads: dict[fx.Node, list[Tensor]] = {}
        for node, read in plan.channels.reads:
            if len(read.inputs) > 1:
                self.reads.setdefault(node, []).append(read.inputs)
        self.states = {id(state.tensor): state for state in plan.channels.states.values()}
        self.sole = sole_modules(program)
        self.absorbed = find_absorptions(program, depth, self.sole, seen)
        self.given = _by([(one.before, (n, one)) for n, one in self.absorbed.items()])
        self.taken = _by([(one.behind, (n, one)) for n, one in self.absorbed.items()])
        self.biases = {node: self._new_bias(node) for node in self.sole}

    def account(self) -> UnitCosts:
        biased = [n for n, terms in self.biases.items() if len(terms) == 1 == len(terms[0].rows)]
        runs = find_runs(self.program, self.depth, biased, self.seen)
        merging = {node for run in runs for node in run.nodes}
        layers = {id(p) for node in merging for p in self.sole[node].parameters()}
        gone = self._gone()
        parameters = [
            term
            for tensor in self._parameters()
            if id(tensor) not in layers
            for term in self._unless(self._parameter(tensor), gone.get(id(tensor)))
        ]
        for node, bias in self.biases.items():
            parameters += [] if node in merging else bias
        others = [node for node in self.seen.macs if node not in merging]
        macs = [term for node in others for term in self._operators(node)]
        timings = [timing for node in others if (timing := self._timing(node)) is not None]
        chains = [self._ways(run) for run in runs]
        return UnitCosts(
            *(self.units, parameters, macs, self.samples),
            sites=len(self.depth),
            chains=chains,
            timings=timings,
        )

    def _parameters(self) -> Iterator[Tensor]:
        """Yield what the graph uses: what training, or a note, uses alone is not finalised."""
        used = {name for names in self.channels.uses.values() for name in names}
        for name, tensor in self.program.module.named_parameters():
            if name in used:
                yield tensor

    def _gone(self) -> dict[int, tuple[int, ...]]:
        """Return which parameters go when the linearity gates given are open."""
        gone: dict[int, tuple[int, ...]] = {}
        for node, site in self.depth.items():
            module = self.sole.get(node)
            gone |= {id(p): (site,) for p in ([] if module is None else module.parameters())}
        for one in self.absorbed.values():
            gone |= {id(p): one.sites if one.behind is None else () for p in one.parameters}
        return gone

    def _new_bias(self, node: fx.Node) -> list[Term]:
        """Return the bias a layer gets from what it takes in."""
        module: Any = self.sole[node]
        if type(module) not in LAYERS or module.bias is not None:
            return []
        given = [one for _, one in self.given.get(node, ()) if one.shifts]
        taken = [one for _, one in self.taken.get(node, ()) if one.shifts]
        row = self._made(node)
        bias = Term(row.size, (row,))
        if any(not one.sites for one in given) or any(one.before is None for one in taken):
            return [bias]
        if given:  # what stands further behind needs more gates to be open
            return [self._where(bias, given[0].sites)]
        return self._unless(bias, taken[0].sites) if taken else []

    def _ways(self, run: Run) -> list[Way]:
        """Return what the layers of a run cost alone, and what those that may be one do."""
        found = [
            Way(
                *(place, place + 1, (), self._layer(node), (self._operator(node),)),
                timing=self._timing(node),
            )
            for place, node in enumerate(run.nodes)
        ]
        return found + [self._merged(run, merger) for merger in run.mergers]

    def _layer(self, node: fx.Node) -> tuple[Term, ...]:
        own = [self._parameter(tensor) for tensor in self.sole[node].parameters()]
        return (*own, *self.biases[node])

    def _merged(self, run: Run, merger: Merger) -> Way:
        first, last, geometry = run.nodes[merger.start], run.nodes[merger.stop - 1], merger.geometry
        made, read = self._made(last), self._made(first.all_input_nodes[0])
        ones = geometry.outputs * prod(geometry.kernel) if geometry.ones else 0
        along = (made,) if 1 < geometry.groups == geometry.inputs else (made, read)
        weights = [Term(geometry.weights - ones, along), Term(ones, (made,))]
        bias = [Term(geometry.outputs, (made,))] if geometry.bias else self.biases[last]
        places = self._places(last, geometry)
        macs = [Term(term.full * prod(places), term.rows) for term in weights]
        timing = self._timed(geometry, places, made, None if len(along) == 1 else read)
        return Way(
            *(merger.start, merger.stop, merger.sites, (*weights, *bias), tuple(macs)),
            timing=timing,
        )

    def _parameter(self, tensor: Tensor) -> Term:
        state = self.states.get(id(tensor))
        if state is None or not tensor.numel():
            return Term(tensor.numel(), ())
        if state.whole is not None:
            along = _varying(self.channels.classes[state.whole])
            return Term(tensor.numel(), (self._row_of_classes(along),))
        return Term(tensor.numel(), tuple(map(self._row, state.axes.values())))

    def _operators(self, node: fx.Node) -> list[Term]:
        """Return what shrinks alike of an operator's work, each a term."""
        call = self.channels.calls.get(node)
        if call is None or node in self.channels.barriers:  # which may have no rule
            return [self._operator(node)]
        if rule_for(node, call.module).name != "recurrence":
            return [self._operator(node)]
        tags, count = input_products(call)
        return [Term(count, (self._row(tags),)), Term(self.seen.macs[node] - count, ())]

    def _operator(self, node: fx.Node) -> Term:
        call, value = self.channels.calls.get(node), self.channels.values.get(node)
        count = self.seen.macs.get(node, 0)  # none where a mask picked nothing
        geometry = geometry_of(self.sole.get(node))
        if geometry is not None:
            count = geometry.macs(prod(self._places(node, geometry)))
        if call is None or node in self.channels.barriers or not isinstance(value, Value):
            return Term(count, ())
        reads = self.reads.get(node, [])
        match rule_for(node, call.module).name:
            case "attention":  # whole heads go, which its output tells
                reads = []
            case "bilinear":  # every channel of one input meets every one of the other
                pass
            case _:
                reads = reads[:1]
        return Term(count, tuple(map(self._row, [value.tags, *reads])))

    def _timing(self, node: fx.Node) -> Timing | None:
        """Return the timing of a layer; other operators are not counted."""
        module: Any = None
        if node.op == "call_module":
            module = submodule(self.program.module, str(node.target))
        geometry = geometry_of(module) or transposed_geometry(module, 1)
        if geometry is None or not isinstance(self.channels.values.get(node), Value):
            return None
        if self.biases.get(node):
            geometry = replace(geometry, bias=True)
        term = self._operator(node)
        made, read = (*term.rows, None, None)[:2]
        return self._timed(geometry, self._places(node, geometry), made, read)

    def _timed(
        self, geometry: Geometry, places: Sizes, made: Row | None, read: Row | None
    ) -> Timing:
        depthwise = 1 < geometry.groups == geometry.inputs
        step = geometry.outputs // geometry.groups if depthwise else geometry.groups
        one = (max(places[0] // self.samples, 1), *places[1:])
        return Timing(
            self._axis(made, geometry.outputs, step),
            self._axis(None if depthwise else read, geometry.inputs, geometry.groups),
            partial(nanoseconds, geometry, one),
        )

    def _axis(self, row: Row | None, channels: int, step: int) -> Axis:
        return Axis(self.fixed if row is None else row, channels, row.size if row else 1, step)

    def _places(self, node: fx.Node, geometry: Geometry) -> Sizes:
        """Return at which places a layer works, once averages are taken before it."""
        pool = shrinking_pool(self.program, node, self._passed(node), self.seen)
        pooled = pool is not None and comes_after(geometry, pool[1])
        spec = self.seen.values[pool[0] if pool is not None and pooled else node]
        return output_places(geometry, spec)

    def _passed(self, node: fx.Node) -> list[fx.Node]:
        """Return what surely goes from behind a layer."""
        return [n for n, one in self.given.get(node, ()) if not one.sites]

    def _made(self, node: fx.Node) -> Row:
        """Return the row of what a node gives: every way to merge layers asks for two."""
        if node not in self.rows_of:
            given = as_value(self.channels.values[node])  # a buffer, perhaps
            self.rows_of[node] = self._row(given.tags)
        return self.rows_of[node]

    def _where(self, term: Term, sites: tuple[int, ...]) -> Term:
        """Return a term that counts where gates are open."""
        return Term(term.full, (*term.rows, *(self.open[site] for site in sites)))

    def _unless(self, term: Term, sites: tuple[int, ...] | None) -> list[Term]:
        """Return a term that counts unless all the gates are open; None: it always does."""
        if sites is None:
            return [term]
        gone = self._where(term, sites)
        return [] if not sites else [term, Term(-gone.full, gone.rows)]

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


def _by(pairs: Iterable[tuple[fx.Node | None, _Taken]]) -> dict[fx.Node, list[_Taken]]:
    """Return what is given to every layer."""
    found: dict[fx.Node, list[_Taken]] = {}
    for layer, one in pairs:
        if layer is not None:
            found.setdefault(layer, []).append(one)
    return found


def _varying(classes: Tensor) -> Tensor:
    """Return the classes along the one axis on which they vary; a box has no other."""
    for axis in range(classes.dim()):
        front = classes.movedim(axis, 0).reshape(classes.shape[axis], -1)
        if classes.shape[axis] > 1 and bool((front == front[:, :1]).all()):
            return front[:, 0]
    return classes.reshape(-1)[:1]
