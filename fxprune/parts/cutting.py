"""A part of a model made smaller, in place, and proved to be what it was."""

import operator
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace

import torch
from torch import Tensor, nn

from fxprune.costs import costs_of
from fxprune.dataflow.values import flatten
from fxprune.errors import VerificationError
from fxprune.parts.regions import Region
from fxprune.parts.remarks import EVALUATION_ONLY, forgotten, overwritten, renaming, unloadable
from fxprune.pipelines import PLAIN
from fxprune.programs.observation import TensorSpec, observe
from fxprune.programs.pipeline import Change, Pass, run
from fxprune.programs.program import Program, widened
from fxprune.proof.precision import reading_float64
from fxprune.proof.training_steps import verify_step
from fxprune.proof.verification import EXACT, Verification, verify
from fxprune.report import Report
from fxprune.runtime.memory_formats import formats_in, restore_formats_
from fxprune.tracing.retracing import keep_buffers_, keep_questions_
from fxprune.tracing.two_modes import has_both_modes
from fxprune.user_models.graph_modules import own_
from fxprune.user_models.inputs import Inputs
from fxprune.user_models.modules import copy_model


def cut_(
    region: Region,
    reference: nn.Module,
    passes: tuple[Pass, ...],
    *,
    check: bool,
    trained: bool,
) -> Report:
    """Make a part of a model smaller, in place. trained: it is trained on."""
    program = region.program
    source = program.clone() if check else None
    formats = formats_in(program.module)
    report = Report("finalize", type(reference).__name__, renaming(region))
    report.passes |= run(program, PLAIN, recompile=False)
    report.before = costs_of(program, reference)
    report.passes |= run(program, passes)
    own_(program.module, reference)
    program.module.eval()  # the proof runs a copy so, whatever passes left layers in
    program.module.delete_all_unused_submodules()
    restore_formats_(program.module, formats)
    report.after = costs_of(program)
    keep_buffers_(program.module)
    keep_questions_(program.module)
    report.plans = list(program.plans.values())
    report.refused = [
        Change(place, f"all channels around it stay: {reason}")
        for place, reason in program.barriers.items()
    ]
    report.refused += overwritten(region) + forgotten(region) + unloadable(region)
    of_evaluation = program.module.meta.get("evaluation_only")
    if trained and of_evaluation and not has_both_modes(program.graph):
        report.refused.append(Change("training", f"{EVALUATION_ONLY} ({program.untrained})"))
    if source is not None:
        _require_untouched(reference, source)
        trained = trained and (not of_evaluation or has_both_modes(program.graph))
        all_passes = (*PLAIN, *passes)
        report.verification = _prove(
            reference, source, program, all_passes, region.other_inputs(), trained=trained
        )
    return report


def _prove(
    reference: nn.Module,
    source: Program,
    program: Program,
    passes: tuple[Pass, ...],
    extra_inputs: Sequence[Inputs],
    *,
    trained: bool,
) -> Verification:
    """Compare a part of the result with that of the model it was made from.

    trained: it is trained on, so that a step of training is compared, too.

    The rewrite itself is proved in float64, on a model that the same passes made from the same
    weights in float64: rounding the merged weights to their dtype would hide what it does. Where
    Python made constants (`torch.linspace(0, 1, 7)`) a trace holds them as they were rounded, and
    is the reference there: as it came, before the passes write constants of their own into it.
    """
    traced = copy_model(source.module) if _holds_constants(source, reference) else None
    exact = widened(source)
    if exact is not None:
        casts = _casts_to_float32(exact)
        if casts:
            exact.seen = None
        # As the proof reads them: a pass may compute what is constant.
        with reading_float64() if casts else nullcontext():
            run(exact, passes)
    inputs = source.args, source.kwargs
    proof = verify(
        reference,
        program.module,
        inputs,
        exact=None if exact is None else exact.module,
        traced=traced,
        extra_inputs=extra_inputs,
    )
    if not trained or exact is None or proof.verdict != "equal":
        return proof
    step = verify_step(traced or reference, exact.module, inputs, exact.cuts, EXACT)
    return proof if step is None else replace(proof, checks=(*proof.checks, step))


@torch.no_grad()
def _require_untouched(reference: nn.Module, source: Program) -> None:
    """Raise unless a model holds the weights it had when its program was made, and put these back.

    A program borrows weights. Who writes into one makes of the model whatever it makes of the
    result, and of the program that stands for it in float64: the proof would call that equal.
    """
    before = dict(source.module.named_parameters())
    touched = [
        (name, parameter, before[name])
        for name, parameter in reference.named_parameters()
        # Others than dense ones are never lent.
        if name in before and parameter.layout is torch.strided
        if not torch.equal(parameter, before[name])
    ]
    for _, parameter, was in touched:
        parameter.copy_(was)
    if touched:
        raise VerificationError(
            f"{touched[0][0]} of {type(reference).__name__} was overwritten while its copy was "
            "made smaller; this is a bug in fxprune"
        )


def _holds_constants(source: Program, reference: nn.Module) -> bool:
    """Tell whether a trace holds numbers that Python made while it ran, not the model."""
    names = {str(node.target) for node in source.graph.nodes if node.op == "get_attr"}
    names -= {name for name, _ in reference.named_parameters(remove_duplicate=False)}
    names -= {name for name, _ in reference.named_buffers(remove_duplicate=False)}
    found = (operator.attrgetter(name)(source.module) for name in names)
    return any(isinstance(one, Tensor) and one.is_floating_point() for one in found)


def _casts_to_float32(exact: Program) -> bool:
    shown = flatten(list(observe(exact).values.values()))
    return any(isinstance(one, TensorSpec) and one.dtype == torch.float32 for one in shown)
