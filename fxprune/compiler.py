"""The two verbs, as pipelines, and why their passes run in this order.

Both work on a copy: what the user holds is never modified.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, cast

from torch import fx, nn

from fxprune.assumptions import assumptions
from fxprune.channels import analyse
from fxprune.costs import Costs, costs_of, count_costs
from fxprune.errors import ExampleInputError, GateError, TraceError, VerificationError
from fxprune.example_inputs import infer_example_inputs
from fxprune.gates import Gates, gate_owners
from fxprune.passes.affine_inputs import fold_affine_inputs
from fxprune.passes.batch_norm import fold_batch_norm
from fxprune.passes.constant_branches import remove_constant_branches
from fxprune.passes.dead_channels import eliminate_dead_channels
from fxprune.passes.early_pools import advance_pools
from fxprune.passes.gate_removal import remove_gates
from fxprune.passes.in_place import make_functional
from fxprune.passes.instrumentation import insert_gates
from fxprune.passes.layer_modules import make_layers_modules
from fxprune.passes.linear_chains import fold_linear_chains
from fxprune.passes.no_ops import remove_no_ops, remove_products_with_ones
from fxprune.passes.padding_hoisting import hoist_padding as hoist
from fxprune.passes.parallel_branches import fold_parallel_branches
from fxprune.passes.rank_questions import ask_inputs_for_ranks
from fxprune.passes.size_unpacking import unpack_sizes
from fxprune.passes.stream_gathers import insert_gathers, remove_unsettled_gathers
from fxprune.piecewise import Parts, joined, parts_in_evaluation, parts_in_training, with_whole
from fxprune.pipeline import Change, Pass, keeps_shapes, run
from fxprune.program import (
    Inputs,
    Program,
    device_of,
    evaluating,
    memory_of,
    model_inputs,
    remember_,
    same,
    to_device,
    widened,
)
from fxprune.regions import Region
from fxprune.report import Report
from fxprune.sharding import require_whole
from fxprune.verification import Verification, verify

if TYPE_CHECKING:

    class GatedModel(fx.GraphModule):
        """What `instrument` returns."""

        report: Report
        gates: Gates
        penalties: nn.ModuleDict

    class PlainModel(fx.GraphModule):
        """What `finalize` returns."""

        report: Report

else:  # at run time both are what they are: the result needs no class of ours
    GatedModel = PlainModel = fx.GraphModule

# Of the channels around convolutions to be merged, where it is asked whether that could pay.
ENDS_LEFT = 0.5

READABLE: tuple[Pass, ...] = (
    # A size inside a computed tuple could not follow the channels it counts.
    unpack_sizes,
    # A layer whose rank is asked for has a reader too many to be merged.
    ask_inputs_for_ranks,
    # Layers written as functions could neither fold nor take constants in.
    make_layers_modules,
)

PLAIN: tuple[Pass, ...] = (
    # What the gates decided becomes zeros, which all later passes understand.
    remove_gates,
    # Bypassing operators is safe once none of them overwrites its input.
    make_functional,
    *READABLE,
)


def remove_dead_units(program: Program) -> list[Change]:
    """Remove constant branches, then dead channels: one analysis serves all that change nothing.

    A branch that nothing is left of would keep a unit, and the stream it joins from shrinking.
    """
    known = analyse(program)
    changes = remove_constant_branches(program, known)
    known = analyse(program) if changes else known
    gathers = insert_gathers(program, known)
    changes += gathers + eliminate_dead_channels(program, None if gathers else known)
    return changes + remove_unsettled_gathers(program)


CUT: tuple[Pass, ...] = (
    # Units go before anything is folded: a merged layer no longer has them.
    remove_dead_units,
    # Gates that kept all they still have are products with ones by now.
    remove_products_with_ones,
)


def folding(cost: str = "parameters") -> tuple[Pass, ...]:
    """Return the passes that fold; what is merged never costs more than it did apart."""

    @keeps_shapes
    def fold_layers(program: Program) -> list[Change]:
        """Merge chains and sums in turns: a branch becomes one layer first, then its sum does."""
        changes: list[Change] = []
        while True:
            new = fold_linear_chains(program, cost=cost)
            new += fold_parallel_branches(program, cost=cost)
            if not new:
                return changes
            changes += new

    @keeps_shapes
    def fold_pools(program: Program) -> list[Change]:
        return fold_linear_chains(program, cost=cost, pools=True)

    fold_pools.__name__ = fold_linear_chains.__name__
    return (
        # Only now: a model that is not folded may be trained on, with its dropout.
        remove_no_ops,
        # Gates that stood in the way are gone.
        ask_inputs_for_ranks,
        # A batch norm between two layers would keep them apart.
        fold_batch_norm,
        # What is left stands behind no layer of its own; the one behind it may take it in.
        fold_affine_inputs,
        fold_layers,
        # Where a 1×1 was one with the layer before it, there is no 1×1 any more.
        advance_pools,
        # A pool between two layers does not keep them apart, but is better left alone.
        fold_pools,
        # Folding leaves modules behind that nobody calls.
        remove_no_ops,
    )


def instrument(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    width_init: float = 0.75,
    linear_init: float = 0.25,
    penalties: nn.ModuleDict | None = None,
    hoist_padding: bool = False,
    check: bool = True,
) -> GatedModel:
    """Return a copy of `model` with tri-state gates at its nonlinearities, computing the same.

    Train it as you would train the model, with `fxprune.penalty(gated)` added to the loss. Its
    outputs are bit-equal to the model's until an optimizer moves a gate.

    model: any `nn.Module`; it is not modified. example_inputs: a tensor, a tuple of arguments or a
    dict of keyword arguments the model runs on; guessed from the first layer if not given.
    width_init, linear_init: where the real gates start, in [½, 1] and [0, ½). penalties: the
    regularisers, `fxprune.paper_penalties()` if not given. hoist_padding: where zeros padded
    between convolutions keep them from being merged, let the first pad all of them; this changes
    outputs near the border, which the report states, so train afterwards. It also counts on half of
    the channels around such convolutions to go when it asks whether merging could pay. check: run
    model, trace and gated model on the example inputs and require the same bits (with hoist_padding
    those of the model so changed); without it nothing but shapes is looked at.

    Raises `TraceError`, `ExampleInputError`, `ModelError`, and `NothingToDoError` with the reasons
    if no gate can go anywhere. After Srinivas & Babu, BMVC 2016.
    """
    if gate_owners(model):
        raise GateError(f"{type(model).__name__} is instrumented already; finalize it first")
    inputs = inputs_for(model, example_inputs)
    name = type(model).__name__
    reports: dict[str, Report] = {}

    ends = ENDS_LEFT if hoist_padding else 1.0

    def insertion(program: Program) -> list[Change]:
        return insert_gates(
            *(program,),
            width_init=width_init,
            linear_init=linear_init,
            penalties=penalties,
            ends=ends,
        )

    def hoisting(program: Program) -> list[Change]:
        return hoist(program, ends=ends)

    insertion.__name__ = insert_gates.__name__
    hoisting.__name__ = hoist.__name__

    def gate(region: Region) -> None:
        _require_both_modes(region.program, model)
        report = reports[region.path] = Report("instrument", name, {})
        if hoist_padding and region.path:
            report.refused.append(Change("padding", "not moved: that is for models traced whole"))
        elif hoist_padding:
            report.passes |= run(region.program, (hoisting,))
        before = _outputs(region.program) if check else None
        report.passes |= run(region.program, (unpack_sizes, insertion))
        if check and not same(before, _outputs(region.program)):
            raise VerificationError(
                f"the gates changed the outputs of {region.path or name}; this is a bug in fxprune"
            )

    parts = parts_in_training(model, inputs, gate, check=check)
    return cast(GatedModel, _assembled("instrument", name, inputs, parts, reports))


def finalize(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    fold: bool = True,
    cost: Literal["parameters", "macs", "latency"] = "parameters",
    check: bool = True,
) -> PlainModel:
    """Return a smaller, plain copy of `model` that computes the same, proved by running both.

    Takes what `instrument` returned, trained, or any model with zeroed channels (masks of
    `torch.nn.utils.prune` included). The result is an `fx.GraphModule` of ordinary layers in
    evaluation mode; its `report` says what was done and what was refused.

    model: it is not modified. example_inputs: as in `instrument`, which remembers them for its
    models. fold: also fold batch norms and chains of layers; without it the result can be trained
    on. cost: what layers are merged to save, and never take more of: "parameters"; on the example
    inputs "macs"; or "latency", of single layers in onnxruntime, measured here where the user's
    cache does not know it. check: prove trace and result, in float64 to 1e-9 and in the model's
    dtype to 1e-4.

    Raises `TraceError`, `ExampleInputError`, `ModelError`, and `VerificationError` if the result is
    not the same function.
    """
    reference = gated_model(model)
    inputs = inputs_for(reference, example_inputs)
    parts = parts_in_evaluation(reference, inputs, check=check)
    name = str(memory_of(reference).get("model", type(model).__name__))
    passes = (*CUT, *folding(cost)) if fold else CUT
    reports = {
        region.path: _cut(region, reference.get_submodule(region.path), passes, check=check)
        for region in parts.regions
    }
    small = _assembled("finalize", name, inputs, parts, reports)
    report: Report = small.report
    if parts.paths:
        report.before, report.after = _costs(reference, inputs), _costs(small, inputs)
    if report.verification is not None:
        report.verification = with_whole(report.verification, reference, small, inputs, parts)
        report.verification.require()
    return cast(PlainModel, small)


def _cut(region: Region, reference: nn.Module, passes: tuple[Pass, ...], *, check: bool) -> Report:
    """Make a part of a model smaller, in place."""
    program = region.program
    source = program.clone() if check else None
    report = Report("finalize", type(reference).__name__, run(program, PLAIN))
    report.before = costs_of(program, reference)
    report.passes |= run(program, passes)
    program.module.delete_all_unused_submodules()
    report.after = costs_of(program)
    report.plans = list(program.plans.values())
    report.refused = [
        Change(place, f"all channels around it stay: {reason}")
        for place, reason in program.barriers.items()
    ]
    if source is not None:
        proof = _prove(reference, source, program, (*PLAIN, *passes), region.other_inputs())
        report.verification = proof
    return report


def gated_model(model: nn.Module) -> nn.Module:
    """Unwrap an instrumented model from DDP or torch.compile; a model without gates is returned."""
    require_whole(model)
    owners = gate_owners(model).values()
    if not owners or model in owners or memory_of(model):
        return model
    wrapped = getattr(model, "module", None) or getattr(model, "_orig_mod", None)
    if wrapped is not None:
        return gated_model(wrapped)
    raise GateError(
        f"{type(model).__name__} holds an instrumented model inside; finalize that part, "
        "then put the result in its place"
    )


def inputs_for(model: nn.Module, example_inputs: Any) -> Inputs:
    """Return the inputs given, remembered or guessed, in this order."""
    if example_inputs is not None:
        return model_inputs(example_inputs)
    remembered = memory_of(model)
    if remembered:
        return remembered["example_inputs"]
    if gate_owners(model):
        raise ExampleInputError("the gated model has lost its example inputs; pass example_inputs=")
    return infer_example_inputs(model)


def _require_both_modes(program: Program, model: nn.Module) -> None:
    if program.module.meta["evaluation_only"] and model.training:
        raise TraceError(
            f"{type(model).__name__} runs other operators in training than in evaluation "
            "(auxiliary heads?); switch them off, or call model.eval() first to instrument the "
            "model as it is in evaluation"
        )


def _costs(model: nn.Module, inputs: Inputs) -> Costs:
    return count_costs(model, to_device(inputs, device_of(model)))


def _outputs(program: Program) -> Any:
    with evaluating(program.module):
        return program.run()


def _prove(
    reference: nn.Module,
    source: Program,
    program: Program,
    passes: tuple[Pass, ...],
    extra_inputs: Sequence[Inputs],
) -> Verification:
    """Compare a part of the result with that of the model it was made from.

    The rewrite itself is proved in float64, on a model that the same passes made from the same
    weights in float64: rounding the merged weights to their dtype would hide what it does.
    """
    exact = widened(source)
    if exact is not None:
        run(exact, passes)
    return verify(
        reference,
        program.module,
        (source.args, source.kwargs),
        exact=None if exact is None else exact.module,
        extra_inputs=extra_inputs,
    )


def _assembled(
    verb: str, model: str, inputs: Inputs, parts: Parts, reports: dict[str, Report]
) -> Any:
    """Put every part in its place, and give the model what a user asks of it."""
    for region in parts.regions:
        program, report = region.program, reports[region.path]
        assumed = assumptions(program.graph)
        report.assumptions = [Change(node.name, text) for node, text in assumed.items()]
        remember_(program.module, report, (program.args, program.kwargs), model=model)
        parts.put(region.path, program.module)
    report = joined(verb, model, parts, reports)
    remember_(parts.root, report, inputs, model=model, regions=parts.paths)
    return parts.root
