"""Put random networks through both verbs and compare numbers: `make fuzz ARGS="--cases 2000"`.

Each case: instrumenting changes no bit, in either mode; then gates are closed, or weights zeroed in
a model without gates, and what finalize makes of it equals it in float64, at other batch sizes and
other sizes of maps too, sharing nothing with it; and units change places without a change of
outputs. A case is a number, and what fails is shrunk to a network of a few lines and printed.
(Drawn by hypothesis, cases were much alike: three operators in four never stood where they
mattered.)
"""

import copy
import random
import re
import statistics
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any
from unittest.mock import patch

import torch
import typer
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import fxprune
from fxprune.dataflow.rules import STRICT
from fxprune.errors import FxpruneError
from fxprune.gating.gates import UNGATED
from fxprune.gating.owners import gates_of
from fxprune.passes import stream_gathers
from fxprune.permutation import exchange_units
from fxprune.programs.program import capture, quiet
from fxprune.tracing.one_mode import without_fused_layers
from fxprune.user_models.inputs import same
from tools.cases import Surgery, draw, simpler
from tools.networks import BATCH, Network, build, example, write

TOLERANCE = 1e-9
NOTE_EVERY = 100  # networks, in a log


@dataclass
class Tally:
    """What the cases came to, on a device."""

    device: str = "cpu"
    outcomes: Counter[str] = field(default_factory=Counter[str])
    exchanged: int = 0
    picks: int = 0
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
            f"median spread of outputs {middle:.2g}, {flat} of {len(self.spreads)} flat; "
            f"{self.exchanged} units exchanged; readers with channels of their own in {self.picks}"
        )


def check(network: Network, surgery: Surgery, tally: Tally) -> None:
    """Raise AssertionError, or whatever fxprune raises that it should not, if the case fails."""
    source = write(network)
    model = build(source, network.seed).to(tally.device)
    inputs = drawn(network, tally, BATCH)
    exchanged = exchange_units(capture(model, (inputs, {})))
    assert exchanged.error <= TOLERANCE, f"units are not what they seem: {exchanged}"
    tally.exchanged += exchanged.moved
    reference = (gate(model, inputs, surgery) or silence(model, surgery)).eval()
    held = copy.deepcopy(reference.state_dict())
    with patch.object(stream_gathers, "COPY", 0):  # networks are small: no copying would pay
        small = fxprune.finalize(reference, inputs, check=surgery.seed % 10 == 9)
    require_own_weights(small, reference, held)
    spreads = [
        compare(reference, small, drawn(network, tally, batch, size))
        for batch, size in ((BATCH, 6), (1, 6), (2, 8))
    ]
    before, after = small.report.before, small.report.after
    assert before is not None and after is not None
    shrank = after.parameters < before.parameters
    tally.outcomes["shrank" if shrank else "kept all"] += 1
    tally.picks += any("picks" in str(c) for c in small.report.passes["remove_dead_units"])
    if shrank:
        tally.spreads.append(spreads[0])
    draws_alike = not re.search("Transformer|dropout", source, re.IGNORECASE)
    if network.training and draws_alike and hasattr(reference, "gates"):
        check_training(reference, inputs, source)


def check_training(gated: nn.Module, inputs: tuple[Tensor, ...], source: str) -> None:
    """Hold what is cut and trained on against the gated model, in training.

    What is always the same number is another where norms take the statistics of a batch, and
    computed weights, which are numbers once cut, may change in training (spectral norm).
    """
    expected = in_training(gated, inputs)
    if expected is None:
        return
    cuts: list[Callable[[Any], nn.Module]] = [fxprune.compact]
    if "norm" not in source.lower():
        cuts.append(partial(fxprune.finalize, fold=False, check=False))
    for cut in cuts:
        found = in_training(cut(gated), inputs)
        assert found is not None, "what was cut does not run in training"
        require_close(expected, found, f"in training, by {cut}")


def in_training(model: nn.Module, inputs: tuple[Tensor, ...]) -> list[Tensor] | None:
    """Return the outputs of a copy in training, without dropout, which fewer units draw otherwise.

    None if that fails: there may be too few elements for the statistics of a batch.
    """
    twin = copy.deepcopy(model).train()
    for part in twin.modules():
        part.train(not isinstance(part, nn.modules.dropout._DropoutNd) and part.training)
    torch.manual_seed(0)
    try:
        with torch.no_grad(), without_fused_layers(), quiet():
            return tree_leaves(twin(*(x.clone() for x in inputs)))
    except ValueError:
        return None


def require_close(expected: list[Tensor], found: list[Tensor], where: str) -> None:
    """Raise unless outputs are the same up to rounding."""
    for left, right in zip(expected, found, strict=True):
        assert left.shape == right.shape, f"{tuple(left.shape)} became {tuple(right.shape)}"
        wrong = float((left - right).abs().max()) / max(float(left.abs().max()), 1e-2)
        assert wrong <= TOLERANCE, f"outputs moved by {wrong} {where}"


def drawn(network: Network, tally: Tally, batch: int, size: int = 6) -> tuple[Tensor, ...]:
    """Return example inputs on the device of the tally."""
    return tuple(x.to(tally.device) for x in example(network, batch, size))


def require_own_weights(small: nn.Module, reference: nn.Module, held: dict[str, Any]) -> None:
    """Hold the result to sharing nothing with the model, which finalize left as it was."""
    for name, tensor in reference.state_dict().items():
        assert torch.equal(tensor, held[name]), f"finalize changed {name} of the model it was given"
    parts = ((*model.parameters(), *model.buffers()) for model in (small, reference))
    mine, theirs = ({t.untyped_storage().data_ptr() for t in part if t.numel()} for part in parts)
    assert not mine & theirs, "the result shares memory with the model"


def gate(model: nn.Module, inputs: tuple[Tensor, ...], surgery: Surgery) -> nn.Module | None:
    """Return the model with some gates closed; None where zeros are wanted, or no gate fits."""
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
    """Hold the outputs of the gated model against the original's, to the bit, in both modes.

    torch's transformer layers run the operators that a trace has; fused, they round otherwise.
    """
    for training in (False, True):
        left, right = copy.deepcopy(model).train(training), copy.deepcopy(gated).train(training)
        outputs: list[Any] = []
        for one in (left, right):
            torch.manual_seed(0)
            try:
                with torch.no_grad(), without_fused_layers():
                    outputs.append(one(*(x.clone() for x in inputs)))
            except ValueError:  # too few elements for the statistics of a batch
                return
        assert same(*outputs), f"the gates changed the outputs, {training=}"


def compare(reference: nn.Module, small: nn.Module, inputs: tuple[Tensor, ...]) -> float:
    """Return the spread of the outputs over the batch; raise unless both compute the same."""
    with torch.no_grad(), quiet():
        try:
            expected = reference(*(x.clone() for x in inputs))
        except (RuntimeError, ValueError, IndexError):
            return 0.0  # it holds sizes that these inputs do not fit
        actual = small(*(x.clone() for x in inputs))
    found = [expected] if isinstance(expected, Tensor) else list(expected)
    results = [actual] if isinstance(actual, Tensor) else list(actual)
    require_close(found, results, f"at {[tuple(x.shape) for x in inputs]}")
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
            if surgery.seed % 8 == 2:
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


def shrink(
    network: Network, surgery: Surgery, kind: type[BaseException], device: str = "cpu"
) -> tuple[Network, Surgery]:
    """Return the smallest case on the way down that fails with the same kind of error."""
    smaller = True
    while smaller:
        smaller = False
        for candidate in simpler(network, surgery):
            if isinstance(failure(*candidate, Tally(device)), kind):
                (network, surgery), smaller = candidate, True
                break
    return network, surgery


def failure(network: Network, surgery: Surgery, tally: Tally) -> BaseException | None:
    """Return what is wrong with a case, if anything; a refusal in our own words is not."""
    try:
        check(network, surgery, tally)
    except fxprune.VerificationError as error:
        return error
    except FxpruneError as error:
        tally.outcomes[type(error).__name__] += 1
    except Exception as error:
        return error
    return None


def hunt(numbers: Iterable[int], tally: Tally, progress: Callable[[str], None]) -> list[str]:
    """Try cases, tally what they come to, and return each failure as text, shrunk."""
    failures = list[str]()
    for number in numbers:
        network, surgery = draw(number)
        error = failure(network, surgery, tally)
        if error is not None:
            tally.outcomes["FAILED"] += 1
            failures.append(describe(number, network, surgery, error, tally.device))
            progress(failures[-1])
    return failures


def describe(
    number: int, network: Network, surgery: Surgery, error: BaseException, device: str = "cpu"
) -> str:
    """Return a failure shrunk: where it came from, the error, the source."""
    network, surgery = shrink(network, surgery, type(error), device)
    error = failure(network, surgery, Tally(device)) or error
    frames = traceback.extract_tb(error.__traceback__)
    ours = [
        f"  {f.filename}:{f.lineno} {f.line}" for f in frames if "site-packages" not in f.filename
    ]
    message = f"{type(error).__name__}: {error}"
    return "\n".join([f"case {number}: {message}", *ours[-5:], write(network), f"{surgery}"])


def fuzz(
    cases: Annotated[int, typer.Option(help="how many networks")] = 500,
    first: Annotated[int, typer.Option(help="the number of the first")] = 0,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
) -> None:
    """Hunt, and print each failure as a network that can be pasted into a test."""
    torch.set_num_threads(1)
    STRICT.set(True)
    console = Console()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, about odd but legal networks
        numbers = _counted(range(first, first + cases), console)
        tally = Tally(device)
        failures = hunt(numbers, tally, lambda text: console.print(f"\n{text}", markup=False))
    console.print(f"{tally}; {len(failures)} failed", markup=False)
    sys.exit(bool(failures))


def _counted(numbers: range, console: Console) -> Iterator[int]:
    """Yield numbers, and show how far it is: a bar, or lines where nothing can be drawn."""
    if console.is_terminal:
        yield from track(numbers, "networks", console=console)
        return
    for done, number in enumerate(numbers):
        if done and done % NOTE_EVERY == 0:
            console.print(f"{done}/{len(numbers)} networks")
        yield number


if __name__ == "__main__":
    typer.run(fuzz)
