"""The two verbs, as pipelines, and why their passes run in this order.

Both work on a copy: what the user holds is never modified.
"""

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from fxprune.assumptions import assumptions
from fxprune.costs import costs_of
from fxprune.errors import ExampleInputError, GateError, TraceError, VerificationError
from fxprune.example_inputs import infer_example_inputs
from fxprune.gates import Gates, gate_owners
from fxprune.passes.batch_norm import fold_batch_norm
from fxprune.passes.constant_branches import remove_constant_branches
from fxprune.passes.dead_channels import eliminate_dead_channels
from fxprune.passes.gate_removal import remove_gates
from fxprune.passes.in_place import make_functional
from fxprune.passes.instrumentation import insert_gates
from fxprune.passes.linear_chains import fold_linear_chains
from fxprune.passes.no_ops import remove_no_ops, remove_products_with_ones
from fxprune.pipeline import Change, Pass, run
from fxprune.program import (
    Inputs,
    Program,
    capture,
    check_parameters,
    copy_model,
    device_of,
    evaluating,
    model_inputs,
    same,
    to_device,
    widened,
)
from fxprune.report import Report
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

PLAIN: tuple[Pass, ...] = (
    # What the gates decided becomes zeros, which all later passes understand.
    remove_gates,
    # Bypassing operators is safe once none of them overwrites its input.
    make_functional,
)
CUT: tuple[Pass, ...] = (
    # A branch that nothing is left of would keep a unit, and the stream it joins from shrinking.
    remove_constant_branches,
    # Units go before anything is folded: a merged layer no longer has them.
    eliminate_dead_channels,
    # Gates that kept all they still have are products with ones by now.
    remove_products_with_ones,
)
FOLD: tuple[Pass, ...] = (
    # Only now: a model that is not folded may be trained on, with its dropout.
    remove_no_ops,
    # A batch norm between two layers would keep them apart.
    fold_batch_norm,
    fold_linear_chains,
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
    check: bool = True,
) -> GatedModel:
    """Return a copy of `model` with tri-state gates at its nonlinearities, computing the same.

    Train it as you would train the model, with `fxprune.penalty(gated)` added to the loss. Its
    outputs are bit-equal to the model's until an optimizer moves a gate.

    model: any `nn.Module`; it is not modified. example_inputs: a tensor, a tuple of arguments or a
    dict of keyword arguments the model runs on; guessed from the first layer if not given.
    width_init, linear_init: where the real gates start, in [½, 1] and [0, ½). penalties: the
    regularisers, `fxprune.paper_penalties()` if not given. check: run model, trace and gated model
    on the example inputs and require the same bits; without it nothing but shapes is looked at.

    Raises `TraceError`, `ExampleInputError`, `ModelError`, and `NothingToDoError` with the reasons
    if no gate can go anywhere. After Srinivas & Babu, BMVC 2016.
    """
    if gate_owners(model):
        raise GateError(f"{type(model).__name__} is instrumented already; finalize it first")
    inputs = inputs_for(model, example_inputs)
    program = capture(model, inputs, make_masks_permanent=False, check=check)
    if program.module.meta["evaluation_only"] and model.training:
        raise TraceError(
            f"{type(model).__name__} runs other operators in training than in evaluation "
            "(auxiliary heads?); switch them off, or call model.eval() first to instrument the "
            "model as it is in evaluation"
        )
    expected = _outputs(program) if check else None
    report = Report("instrument", type(model).__name__, {})

    def insertion(program: Program) -> list[Change]:
        return insert_gates(
            program, width_init=width_init, linear_init=linear_init, penalties=penalties
        )

    insertion.__name__ = insert_gates.__name__
    report.passes = run(program, (insertion,))
    if check and not same(expected, _outputs(program)):
        raise VerificationError(
            f"the gates changed the outputs of {type(model).__name__}; this is a bug in fxprune"
        )
    _remember(program, inputs, report)
    return cast(GatedModel, program.module)


def finalize(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    fold: bool = True,
    check: bool = True,
) -> PlainModel:
    """Return a smaller, plain copy of `model` that computes the same, proved by running both.

    Takes what `instrument` returned, trained, or any model with zeroed channels (masks of
    `torch.nn.utils.prune` included). The result is an `fx.GraphModule` of ordinary layers in
    evaluation mode; its `report` says what was done and what was refused.

    model: it is not modified. example_inputs: as in `instrument`, which remembers them for its
    models. fold: also fold batch norms and chains of linear layers; without it the result can be
    trained on. check: prove trace and result, in float64 to 1e-9 and in the model's dtype to 1e-4.

    Raises `TraceError`, `ExampleInputError`, `ModelError`, and `VerificationError` if the result is
    not the same function.
    """
    reference = gated_model(model)
    inputs = inputs_for(reference, example_inputs)
    program = capture_any(reference, inputs, check=check)
    program.module.eval()
    source = program.clone() if check else None
    name = str(program.module.meta.get("fxprune", {}).get("model", type(model).__name__))
    report = Report("finalize", name, run(program, PLAIN))
    report.before = costs_of(program, reference)
    passes = (*CUT, *FOLD) if fold else CUT
    report.passes |= run(program, passes)
    program.module.delete_all_unused_submodules()
    report.after = costs_of(program)
    report.refused = [
        Change(place, f"all channels around it stay: {reason}")
        for place, reason in program.barriers.items()
    ]
    if source is not None:
        report.verification = _prove(reference, source, program, (*PLAIN, *passes))
    _remember(program, inputs, report)
    return cast(PlainModel, program.module)


def gated_model(model: nn.Module) -> nn.Module:
    """Unwrap an instrumented model from DDP or torch.compile; a model without gates is returned."""
    owners = gate_owners(model).values()
    if not owners or model in owners:
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
    remembered = getattr(model, "meta", {}).get("fxprune")
    if remembered is not None:
        return remembered["example_inputs"]
    if gate_owners(model):
        raise ExampleInputError("the gated model has lost its example inputs; pass example_inputs=")
    return infer_example_inputs(model)


def capture_any(model: nn.Module, inputs: Inputs, *, check: bool = True) -> Program:
    """Copy an instrumented model, which is traced already; capture any other, masks and all."""
    if not isinstance(model, fx.GraphModule) or not gate_owners(model):
        return capture(model, inputs, make_masks_permanent=True, check=check)
    check_parameters(model)
    args, kwargs = to_device(inputs, device_of(model))
    return Program(copy_model(model), args, kwargs)


def _outputs(program: Program) -> Any:
    with evaluating(program.module):
        return program.run()


def _prove(
    reference: nn.Module, source: Program, program: Program, passes: tuple[Pass, ...]
) -> Verification:
    """Compare the result with the model it was made from; raise unless they are equal.

    The rewrite itself is proved in float64, on a model that the same passes made from the same
    weights in float64: rounding the merged weights to their dtype would hide what it does.
    """
    exact = widened(source)
    if exact is not None:
        run(exact, passes)
    found = verify(
        reference,
        program.module,
        (source.args, source.kwargs),
        exact=None if exact is None else exact.module,
    )
    found.require()
    return found


def _remember(program: Program, inputs: Inputs, report: Report) -> None:
    """Give the module what a user asks of it: its report, and inputs for what comes next."""
    assumed = assumptions(program.graph)
    report.assumptions = [Change(node.name, text) for node, text in assumed.items()]
    module: Any = program.module
    module.meta["fxprune"] = {
        "model": report.model,
        "example_inputs": pytree.tree_map_only(torch.Tensor, torch.Tensor.cpu, inputs),
    }
    module.report = report
    module.meta["_user_preserved_attributes"] = {"report": report}  # survives a deep copy
