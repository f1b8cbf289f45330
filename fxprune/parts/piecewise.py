"""A model in parts that are programs: all of it where it can be traced, else its regions.

Where it can be traced but for some submodules, all of it is one part, and what is a program inside
of those submodules others.

The verbs treat every part alike. What remains of the model around the regions is the user's own
Python, so the proof of the whole is this: every region is proved by itself, and with the outputs of
the regions exchanged for those of the original, the rest computes the same to the bit. Comparing
free runs would prove less: where scores tie, rounding decides which boxes survive.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx, nn

from fxprune.dataflow.memories import recalled
from fxprune.errors import ExampleInputError, NothingToDoError, TraceError, VerificationError
from fxprune.gating.gates import gate_owners
from fxprune.gating.remembered import memory_of, remembered_inputs
from fxprune.parts.recording import copies, record
from fxprune.parts.regions import Region, find_regions, leaves_of, put_in_place, recorded_region
from fxprune.planning.lowering import raise_
from fxprune.programs.observation import observe, require_observable
from fxprune.programs.pipeline import Change
from fxprune.programs.program import InTraining, Program, capture
from fxprune.proof.comparison import Difference, differences, output_leaves
from fxprune.proof.precision import Run, run_all
from fxprune.proof.verdicts import Check
from fxprune.proof.verification import Verification
from fxprune.report import Report
from fxprune.tracing.two_modes import drop_requirements_, join, keep_mode_, missing_part
from fxprune.user_models.graph_modules import borrowing_copy
from fxprune.user_models.inputs import Inputs, describe, tensors_of, to_device
from fxprune.user_models.modules import check_parameters, copy_model, device_of
from fxprune.user_models.naming import renamed_in

# Beyond rounding, whatever the model: another region than the one that belongs there.
GROSS = 0.01

Treat = Callable[[Region], Any]


@dataclass
class Parts:
    """A copy of a model, and the parts of it that are programs; the part "" is all of it."""

    root: nn.Module
    regions: list[Region]
    refused: list[Change] = field(default_factory=list[Change])

    @property
    def paths(self) -> list[str]:
        """Return the paths of the regions, nothing for the whole."""
        return [region.path for region in self.regions if region.path]

    @property
    def has_whole(self) -> bool:
        """Tell whether the whole is a program; other parts are inside of what it holds untraced."""
        return any(not region.path for region in self.regions)

    def holds(self, path: str) -> bool:
        """Tell whether the copy still has the submodule at `path`."""
        return any(name == path for name, _ in self.root.named_modules(remove_duplicate=False))

    def put(self, path: str, module: nn.Module) -> None:
        """Replace a part of the copy."""
        if path:
            put_in_place(self.root, path, module)
        else:
            self.root = module


def parts_in_training(
    model: nn.Module, inputs: Inputs, treat: Treat, *, check: bool = True
) -> Parts:
    """Copy a model and let `treat` edit all of it or, where it is no program, its regions.

    treat: edits a region's program, or raises `NothingToDoError`.
    """
    try:
        program = capture(model, inputs, check=check)
        _require_both_modes(program, model)
        require_observable(program)
        whole = Region("", program, ())
    except TraceError as error:
        return _search(copy_model(model), inputs, error, in_training=True, treat=treat)
    try:
        treat(whole)
    except NothingToDoError as error:
        if not leaves_of(program):
            raise
        return _search(copy_model(model), inputs, error, in_training=True, treat=treat)
    return _with_insides(whole, inputs, in_training=True, treat=treat)


def _with_insides(whole: Region, inputs: Inputs, *, in_training: bool, treat: Treat) -> Parts:
    """Add to a program what is one in the submodules it could not be traced into."""
    program = whole.program
    leaves = leaves_of(program)
    if not in_training:  # the model that they are compared with calls these otherwise
        renamed = tuple(f"{name}." for name in renamed_in(program.module).values())
        leaves = [leaf for leaf in leaves if not f"{leaf}.".startswith(renamed)]
    if not leaves:
        return Parts(program.module, [whole])
    regions, refused = find_regions(
        program.module, inputs, in_training=in_training, treat=treat, within=leaves
    )
    return Parts(program.module, [whole, *regions], refused)


def _require_both_modes(program: Program, model: nn.Module) -> None:
    """Raise `TraceError` for a model to be trained whose graph is that of evaluation.

    Or for one of which a part is in another mode, so that neither graph is what it does; or that
    would be trained by another backward than its own, whatever its mode is now.
    """
    if program.other_mode:
        raise TraceError(program.other_mode)
    if name := program.module.meta["backward"]:
        raise TraceError(
            f"{type(model).__name__} calls {name}.apply, whose backward is its own, which no graph "
            f"has; call it in a module of its own, which is kept whole (class {name}Layer("
            f"nn.Module): def forward(self, x): return {name}.apply(x))"
        )
    if program.untrained and model.training:
        raise TraceError(
            f"{type(model).__name__} does something else in training than in evaluation, of which "
            f"there is no graph to train by ({program.untrained}): move that into a submodule of "
            "its own, which is kept whole, switch it off, or call model.eval() first to instrument "
            "the model as it is in evaluation"
        )


def parts_in_evaluation(
    model: nn.Module, inputs: Inputs, *, check: bool = True, in_training: bool = False
) -> Parts:
    """Copy a model, gated or not, into evaluation mode, in parts to cut.

    in_training: with what they do in training, where that is something else.
    """
    memory = memory_of(model)
    found = _found_before(model, inputs, memory.get("regions", ()))
    treat = _with_training if in_training else _without_training
    for region in [] if found is None else found.regions:
        treat(region)
    if found and not memory.get("whole"):
        return found
    try:
        program = capture_any(model, inputs, check=check)
        require_observable(program)
    except TraceError as error:
        root = copy_model(model).eval()
        return _search(root, inputs, error, in_training=False, treat=treat)
    program.module.eval()
    whole = Region("", program, ())
    treat(whole)
    if found:
        return Parts(program.module, [whole, *found.regions])
    if gate_owners(model):
        return Parts(program.module, [whole])
    if leaves_of(program):
        program.module.recompile()
    return _with_insides(whole, inputs, in_training=False, treat=treat)


def _found_before(model: nn.Module, inputs: Inputs, paths: Sequence[str]) -> Parts | None:
    """Return the regions of a model at known paths, nothing if it has none."""
    if not paths:
        return None
    root = copy_model(model).eval()
    calls = record(root, inputs, paths).calls
    regions: list[Region] = []
    for path in paths:
        # A copy of what was loaded remembers nothing.
        remembered = remembered_inputs(model.get_submodule(path))
        assert remembered is not None
        remembered = to_device(remembered, device_of(root))
        regions.append(recorded_region(root, path, calls[path], remembered))
    return Parts(root, regions)


def _without_training(region: Region) -> None:
    """Leave of a region what it does in evaluation."""
    keep_mode_(region.program.graph, training=False)
    drop_requirements_(region.program.graph)


def _with_training(region: Region) -> None:
    """Let a region that has just been traced do in training what it does then."""
    program = region.program
    in_training = in_training_if_it_runs(program, required=False)
    if in_training is not None:
        join(program.graph, in_training.program.graph, in_training.told)
        raise_(program.module)


def in_training_if_it_runs(program: Program, *, required: bool) -> InTraining | None:
    """Return what a program does in training, if that runs once the program is readable.

    required: raise where it does not; else it is left out.
    """
    found = program.in_training
    if found is None:
        return None
    try:
        if missing := missing_part(program.module, found.program.graph):
            raise TraceError(
                f"in training it uses {missing} otherwise than in evaluation, where it is part of "
                "a layer; use it alike in both, or call model.eval() first"
            )
        observe(found.program)
    except (ExampleInputError, TraceError):  # maps too small for an auxiliary head
        if required:
            raise
        program.in_training = None
    return program.in_training


def capture_any(model: nn.Module, inputs: Inputs, *, check: bool) -> Program:
    """Copy an instrumented model, which is traced already; capture any other.

    The copy borrows weights of the instrumented model, see `graph_modules`.
    """
    if not isinstance(model, fx.GraphModule) or not gate_owners(model):
        return capture(model, inputs, check=check)
    check_parameters(model)
    args, kwargs = to_device(inputs, device_of(model))
    program = Program(borrowing_copy(model), args, kwargs)
    program.seen = recalled(program, memory_of(model).get("run"))
    return program


def _search(
    root: nn.Module, inputs: Inputs, whole: Exception, *, in_training: bool, treat: Treat
) -> Parts:
    if isinstance(root, torch.jit.ScriptModule):
        raise whole  # nobody can listen to its parts
    regions, refused = find_regions(root, inputs, in_training=in_training, treat=treat)
    if not regions:
        tried = "; ".join(map(str, refused)) or "no submodule is called with tensors"
        raise type(whole)(f"{whole}. Nor did its submodules by themselves do: {tried}") from whole
    return Parts(root, regions, [Change("the whole", str(whole)), *refused])


def joined(verb: str, model: str, parts: Parts, reports: dict[str, Report]) -> Report:
    """Return one report of what was done to the parts of a model."""
    if list(reports) == [""]:
        reports[""].model = model
        return reports[""]
    total = Report(verb, model, {})
    for path, report in reports.items():
        for name, changes in report.passes.items():
            total.passes.setdefault(name, []).extend(_prefixed(changes, path))
        total.refused += _prefixed(report.refused, path)
        total.plans += _prefixed(report.plans, path)
        total.assumptions += _prefixed(report.assumptions, path)
    total.refused += parts.refused
    proofs = {path: report.verification for path, report in reports.items()}
    checks = [
        replace(check, name=f"{path}: {check.name}" if path else check.name)
        for path, proof in proofs.items()
        if proof is not None
        for check in proof.checks
    ]
    parts_proved = tuple(proof for proof in proofs.values() if proof is not None)
    total.verification = Verification(tuple(checks), parts_proved) if checks else None
    return total


def _prefixed(changes: list[Change], path: str) -> list[Change]:
    return [
        replace(change, where=f"{path}.{change.where}") if path else change for change in changes
    ]


def with_whole(
    proofs: Verification, reference: nn.Module, result: nn.Module, inputs: Inputs, parts: Parts
) -> Verification:
    """Add to the proofs of the regions one of what is around them; of a whole program, nothing.

    Where the whole is a program it has its own proof, with the regions in it as they were.
    """
    if not parts.paths:
        return proofs
    if parts.has_whole:
        before = reference
        reference = copy_model(result)
        for path in parts.paths:
            put_in_place(reference, path, copy_model(before.get_submodule(path)))
    around = _check_around(reference, result, inputs, parts.paths)
    return replace(proofs, checks=(around, *proofs.checks))


def _check_around(
    reference: nn.Module, result: nn.Module, inputs: Inputs, paths: list[str]
) -> Check:
    """Run both as they are, each region of the result corrected to the bit by the reference's.

    A region that is grossly off (how far exactly, its own proof says), or anything in the outputs
    that is not the same to the bit, makes them different. Where the rest takes gradients through a
    region (forces, of an energy), it is the reference's that is called: those are its own, too.
    """
    models = [copy_model(model).eval() for model in (reference, result)]
    own: dict[str, nn.Module] = {}
    said: list[tuple[str, Any]] = []

    def listen(path: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            said.append((path, copies(output)))

        return hook

    def correct(path: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
            expected_path, expected = said.pop(0) if said else ("", None)
            if path != expected_path:
                raise VerificationError(f"{path} is called where {expected_path or 'none'} was")
            for found in differences(output_leaves(expected), output_leaves(output)):
                if found.error > GROSS:
                    raise VerificationError(f"{found.output} of {path} {found.message}")
            if not any(tensor.requires_grad for tensor in tensors_of(output)):
                return expected
            if path not in own:
                own[path] = copy_model(reference.get_submodule(path)).eval()
            return own[path](*args, **kwargs)

        return hook

    for path in paths:
        models[0].get_submodule(path).register_forward_hook(listen(path))
        models[1].get_submodule(path).register_forward_hook(correct(path), with_kwargs=True)
    runs = run_all(models, {"example": inputs}, [None, None])["example"]
    return _judged(runs, inputs, bool(said))


def _judged(runs: Sequence[Run], inputs: Inputs, unsaid: bool) -> Check:
    reference, candidate = runs
    found = differences(reference.outputs, candidate.outputs)
    worst = max(found, key=lambda difference: difference.error, default=Difference("output", 0.0))
    verdict, reason = "equal", ""
    if reference.failure:
        verdict, reason = "skipped", f"the reference fails: {reference.failure}"
    elif candidate.failure:
        verdict, reason = "different", f"the candidate fails: {candidate.failure}"
    elif unsaid or worst.error:
        verdict = "different"
        reason = f"{worst.output} {worst.message}" if worst.error else "it calls fewer regions"
    return Check(
        name="around the regions",
        dtype="float32",
        verdict=verdict,
        reason=reason,
        error=math.nan if reference.failure or candidate.failure else worst.error,
        tolerance=GROSS,
        spread=math.nan,
        output=worst.output,
        index=worst.index,
        inputs=describe(inputs),
        seconds=sum(run.seconds for run in runs),
    )
