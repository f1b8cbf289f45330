"""A part of a model given its gates, in place, and seen to compute the same, to the bit."""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from fxprune.errors import VerificationError
from fxprune.parts.piecewise import in_training_if_it_runs
from fxprune.parts.regions import Region
from fxprune.parts.remarks import (
    EVALUATION_ONLY,
    forgotten,
    modes,
    notes,
    overwritten,
    renaming,
    unloadable,
)
from fxprune.passes.latest_names import read_latest_names
from fxprune.passes.notes import drop_overwritten_notes
from fxprune.pipelines import READABLE
from fxprune.planning.lowering import lower_
from fxprune.programs.observation import observe
from fxprune.programs.pipeline import Change, Pass, run
from fxprune.programs.program import Program, trained_outputs
from fxprune.report import Report
from fxprune.tracing.notes import erase_notes_, forget_, left_in, noted, put_back, set_aside
from fxprune.tracing.two_modes import has_both_modes, join, of_mode
from fxprune.user_models.inputs import same
from fxprune.user_models.modules import evaluating
from fxprune.user_models.plain_weights import plain_weights_in

_BOTH_MODES = (
    "runs other operators than evaluation: costs are those of evaluation, gates go where both do "
    "the same, and operators of training alone have none"
)
_NOT_HOISTED = "not moved: that is for models traced whole, by one graph for both modes"


def gate_(
    region: Region, name: str, insertion: Pass, hoisting: Pass | None, *, trained: bool, check: bool
) -> Report:
    """Insert gates into a part of a model, in place, and return what there is to report.

    name: the model's. insertion: the pass that inserts gates. hoisting: that which moves padding to
    the first of convolutions, if it is to be moved. trained: the model was given in training mode.
    Raises `VerificationError` if the gates change what it computes, with `check`.
    """
    program = region.program
    report = Report("instrument", name, renaming(region) | modes(region))
    report.refused += overwritten(region) + forgotten(region) + unloadable(region)
    if hoisting is not None and (region.path or program.in_training is not None):
        report.refused.append(Change("padding", _NOT_HOISTED))
        hoisting = None
    before = _outputs(program) if check else None
    before_in_training = _outputs_in_training(program) if check else None
    report.passes |= run(program, READABLE, recompile=check)
    in_training = in_training_if_it_runs(program, required=trained)
    if in_training is None:
        before_in_training = None
    if program.module.meta["evaluation_only"]:
        only = f"{EVALUATION_ONLY} ({program.untrained})"
        report.refused.append(Change("training", only if in_training is None else _BOTH_MODES))
    if hoisting is not None:
        with _notes_aside(program):
            report.passes |= run(program, (hoisting,), recompile=False)
        program.module.recompile()
        before = _outputs(program) if check else None
    if in_training is not None:
        run(in_training.program, (read_latest_names,), recompile=False)
    report.refused += _drop_overwritten_notes(program)
    report.passes |= notes(region)
    with plain_weights_in(program.module), _notes_aside(program):
        report.passes |= run(program, (insertion,), recompile=False)
    if in_training is not None:
        join(program.graph, in_training.program.graph, in_training.told)
    lower_(program.module)
    if check and not (
        _is_same(before, _outputs(program))
        and _is_same(before_in_training, _outputs_in_training(program), nan=True)
    ):
        raise VerificationError(
            f"the gates changed the outputs of {region.path or name}; this is a bug in fxprune"
        )
    return report


def _drop_overwritten_notes(program: Program) -> list[Change]:
    """Let a program leave no notes, in either mode, of what either mode overwrites then."""
    found = [program]
    if program.in_training is not None:
        found.append(program.in_training.program)
    changes = {change.where: change for one in found for change in drop_overwritten_notes(one)}
    for one in found:
        forget_(one.graph, changes)
        erase_notes_(one.module, changes)
    return list(changes.values())


@contextmanager
def _notes_aside(program: Program) -> Generator[None]:
    """Let a program leave no notes for a while, nor compute what they hold."""
    seen = observe(program)
    aside = set_aside(program.graph, {*seen.mutated, *seen.draws})
    try:
        yield
    finally:
        put_back(program.graph, aside)


def _outputs(program: Program) -> Any:
    """Return what a program computes, and leaves in attributes."""
    with evaluating(program.module):
        return program.run(), left_in(program.module, noted(program.graph))


def _outputs_in_training(program: Program) -> Any:
    """Return what a program with a graph of training computes then, and leaves; of others, None."""
    if has_both_modes(program.graph):
        graph = of_mode(program.graph, training=True)
        return trained_outputs(program.module, (program.args, program.kwargs), noted(graph))
    if program.in_training is None:
        return None
    found = program.in_training.program
    return trained_outputs(found.module, (program.args, program.kwargs), noted(found.graph))


def _is_same(before: Any, after: Any, *, nan: bool = False) -> bool:
    """Tell whether a program computes what it did, and leaves that where it still leaves any."""
    if before is None or after is None:
        return before is after
    (outputs, left), (actual, found) = before, after
    return found.keys() <= left.keys() and same(
        (outputs, {name: left[name] for name in found}), (actual, found), nan=nan
    )
