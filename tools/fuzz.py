"""Put random networks through both verbs and compare numbers: `make fuzz ARGS="--cases 2000"`.

Each case: instrumenting changes no bit, in either mode; then gates are closed, or weights zeroed in
a model without gates, and what finalize makes of it equals it in float64, at other batch sizes and
other sizes of maps too. What fails is shrunk to the smallest network that does, and printed.
"""

import copy
import itertools
import random
import statistics
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
import typer
from hypothesis import HealthCheck, Phase, given, note, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fxprune
from fxprune.errors import FxpruneError
from fxprune.gates import UNGATED
from fxprune.penalties import gates_of
from fxprune.program import quiet, same
from tools import network_steps as network_steps
from tools.networks import BATCH, SHAPES, WRITERS, Network, Step, build, example, write

TOLERANCE = 1e-9
OFTEN = ("mix_and_activate",) * 6 + ("activation",) * 3 + ("relu",) * 2 + ("residual",) * 3


@dataclass(frozen=True)
class Surgery:
    """What is taken from a model: by gates or by zeros, which share of what, and a seed."""

    how: str = "gates"
    share: float = 0.5
    linearise: bool = False
    seed: int = 0


@dataclass
class Tally:
    """What the cases came to."""

    outcomes: Counter[str] = field(default_factory=Counter[str])
    steps: Counter[str] = field(default_factory=Counter[str])
    spreads: list[float] = field(default_factory=list[float])
    started: float = field(default_factory=time.perf_counter)

    def __str__(self) -> str:
        total = sum(self.outcomes.values())
        seconds = time.perf_counter() - self.started
        found = ", ".join(f"{name} {n / total:.0%}" for name, n in self.outcomes.most_common())
        middle = statistics.median(self.spreads) if self.spreads else 0.0
        flat = sum(spread < 1e-6 for spread in self.spreads)
        return (
            f"{total} cases, {1000 * seconds / max(total, 1):.0f} ms each: {found}; "
            f"median spread of outputs {middle:.2g}, {flat} of {len(self.spreads)} flat"
        )


def networks() -> st.SearchStrategy[Network]:
    """Draw networks; every second step mixes, so that there is something to take away."""
    stream = st.sampled_from([0, 0, 0, 1, 2, 3])
    picks = st.lists(st.integers(0, 27), max_size=5).map(tuple)
    step = st.builds(Step, st.sampled_from([*OFTEN, *WRITERS]), stream, picks)
    mixing = st.builds(Step, st.just("mix_and_activate"), stream, picks)
    steps = st.lists(st.one_of(st.tuples(step), st.tuples(step, mixing)), min_size=1, max_size=9)
    inputs = [("map",), ("vector",), ("last",), ("map", "map"), ("vector", "map")]
    return st.builds(
        lambda kinds, first, pairs, head, seed: Network(
            kinds, (first, *itertools.chain.from_iterable(pairs)), head, seed
        ),
        st.sampled_from(inputs),
        mixing,
        steps,
        st.sampled_from([True, True, False]),
        st.integers(0, 9),
    )


def surgeries() -> st.SearchStrategy[Surgery]:
    return st.builds(
        Surgery,
        st.sampled_from(["gates", "gates", "zeros"]),
        st.sampled_from([0.5, 0.3, 0.5, 0.7, 1.0]),
        st.booleans(),
        st.integers(0, 9),
    )


def check(network: Network, surgery: Surgery, tally: Tally) -> None:
    """Raise AssertionError, or whatever fxprune raises that it should not, if the case fails."""
    source = write(network)
    note(f"{source}\n{network.seed=} {surgery}")
    model, inputs = build(source, network.seed), example(network, BATCH)
    reference = (gate(model, inputs, surgery) or silence(model, surgery)).eval()
    small = fxprune.finalize(reference, inputs, check=surgery.seed == 9)
    spreads = [
        compare(reference, small, example(network, batch, size), source)
        for batch, size in ((BATCH, 6), (1, 6), (2, 8))
    ]
    before, after = small.report.before, small.report.after
    assert before is not None and after is not None
    shrank = after.parameters < before.parameters
    tally.outcomes["shrank" if shrank else "kept all"] += 1
    tally.steps.update(step.name for step in network.steps)
    if shrank:
        tally.spreads.append(spreads[0])


def gate(model: nn.Module, inputs: tuple[Tensor, ...], surgery: Surgery) -> nn.Module | None:
    """Return the model with gates, some of them closed; None where zeros are wanted, or none fits."""
    if surgery.how != "gates":
        return None
    try:
        gated = fxprune.instrument(model, inputs)
    except fxprune.NothingToDoError:
        return None
    compare_modes(model, gated, inputs)
    close(gated, surgery)
    return gated


def compare_modes(model: nn.Module, gated: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """Hold the outputs of the gated model against the original's, to the bit, in both modes."""
    for training in (False, True):
        left, right = copy.deepcopy(model).train(training), copy.deepcopy(gated).train(training)
        outputs: list[Any] = []
        for one in (left, right):
            torch.manual_seed(0)
            try:
                with torch.no_grad():
                    outputs.append(one(*(x.clone() for x in inputs)))
            except ValueError:  # too few elements for the statistics of a batch
                return
        assert same(*outputs), f"the gates changed the outputs, {training=}"


def compare(reference: nn.Module, small: nn.Module, inputs: tuple[Tensor, ...], source: str) -> float:
    """Return the spread of the outputs over the batch; raise unless both compute the same."""
    with torch.no_grad(), quiet():
        try:
            expected = reference(*(x.clone() for x in inputs))
        except (RuntimeError, ValueError):
            return 0.0  # it holds sizes that these inputs do not fit
        actual = small(*(x.clone() for x in inputs))
    found = [expected] if isinstance(expected, Tensor) else list(expected)
    results = [actual] if isinstance(actual, Tensor) else list(actual)
    for left, right in zip(found, results, strict=True):
        assert left.shape == right.shape, f"{tuple(left.shape)} became {tuple(right.shape)}"
        wrong = float((left - right).abs().max()) / max(float(left.abs().max()), 1e-2)
        assert wrong <= TOLERANCE, f"outputs moved by {wrong} at {[tuple(x.shape) for x in inputs]}"
    return max(float(t.std(0).mean()) if len(t) > 1 else 0.0 for t in found)


def close(gated: nn.Module, surgery: Surgery) -> None:
    """Close a share of the width gates, perhaps all of one site; linearise some layers."""
    chance = random.Random(surgery.seed)
    gates = gates_of(gated)
    with torch.no_grad():
        if gates.width is not None:
            for unit in range(len(gates.width)):
                gates.width[unit] = float(chance.random() >= surgery.share)
            site = chance.choice(gates.width_sites)
            if surgery.seed % 3 == 2:
                gates.width[[unit for unit in site.units if unit != UNGATED]] = 0
        if gates.linear is not None and surgery.linearise:
            gates.linear.copy_(torch.tensor([float(chance.random() < 0.5) for _ in gates.linear]))


def silence(model: nn.Module, surgery: Surgery) -> nn.Module:
    """Zero rows, columns and norms of a copy at random, biases sometimes with them."""
    chance, model = random.Random(surgery.seed), copy.deepcopy(model)
    share = surgery.share * 0.6
    for name, parameter in model.named_parameters():
        if parameter.dim() == 0:
            continue
        dead = torch.tensor([chance.random() < share for _ in parameter])
        if parameter.dim() > 1 and chance.random() < 0.6:
            parameter.data[dead] = 0
            owner = model.get_submodule(name.rpartition(".")[0])
            bias = getattr(owner, "bias", None)
            if isinstance(bias, Tensor) and len(bias) == len(dead) and chance.random() < 0.6:
                bias.data[dead] = 0
        elif parameter.dim() > 1:
            columns = torch.tensor([chance.random() < share for _ in range(parameter.shape[1])])
            parameter.data[:, columns] = 0
        elif chance.random() < 0.5:
            parameter.data[dead] = 0
    return model


def hunt(cases: int, tally: Tally, progress: Callable[[], None], *, derandomize: bool = False) -> None:
    """Try random cases; raise the smallest failure found, with its network in the notes."""

    @settings(
        max_examples=cases,
        deadline=None,
        derandomize=derandomize,
        database=None,
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=True,
        phases=(Phase.generate, Phase.shrink),
        print_blob=False,
    )
    @given(networks(), surgeries())
    def property(network: Network, surgery: Surgery) -> None:
        try:
            check(network, surgery, tally)
        except FxpruneError as error:
            if isinstance(error, fxprune.VerificationError):
                raise
            tally.outcomes[type(error).__name__] += 1
        progress()

    property()


def fuzz(cases: Annotated[int, typer.Option(help="how many networks")] = 500) -> None:
    """Hunt, with a line of progress; the exit status is 1 after a failure."""
    torch.set_num_threads(1)
    tally, counter = Tally(), itertools.count(1)

    def progress() -> None:
        done = next(counter)
        if done % 50 == 0 and sys.stderr.isatty():
            print(f"\r{tally}", end="", file=sys.stderr, flush=True)

    try:
        hunt(cases, tally, progress)
    except Exception as error:
        report(error)
        sys.exit(1)
    finally:
        print(f"\n{tally}")


def report(error: BaseException) -> None:
    """Print each failure: our own frames, the error, the network in its notes."""
    for one in error.exceptions if isinstance(error, BaseExceptionGroup) else [error]:
        frames = traceback.extract_tb(one.__traceback__)
        print("", *(f"{f.filename}:{f.lineno} {f.line}" for f in frames[-8:]), sep="\n")
        print(f"{type(one).__name__}: {one}", *getattr(one, "__notes__", ()), sep="\n")


if __name__ == "__main__":
    typer.run(fuzz)
