"""The two verbs: what they take and check, what they run (`pipelines`), prove and report.

Both work on a copy: what the user holds is never modified.
"""

from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, fx, nn

from fxprune.costs import Costs, count_costs
from fxprune.dataflow.memories import memory_of_run
from fxprune.errors import ExampleInputError, FxpruneError, GateError, VerificationError
from fxprune.gating.gates import Gates, gate_owners, sound_inits
from fxprune.gating.penalties import require_terms
from fxprune.gating.remembered import memory_of, remember_, remembered_inputs
from fxprune.gating.sharding import require_whole
from fxprune.parts.cutting import cut_
from fxprune.parts.gate_insertion import gate_
from fxprune.parts.piecewise import (
    Parts,
    joined,
    parts_in_evaluation,
    parts_in_training,
    with_whole,
)
from fxprune.parts.recording import copies
from fxprune.parts.regions import Region
from fxprune.parts.remarks import unread
from fxprune.passes.instrumentation import insert_gates
from fxprune.passes.padding_hoisting import hoist_padding as hoist
from fxprune.pipelines import CUT, CUT_TO_BE_TRAINED, folding
from fxprune.programs.copying import require_copyable
from fxprune.programs.example_inputs import infer_example_inputs
from fxprune.programs.pipeline import Change, with_options
from fxprune.progress import shown
from fxprune.proof.comparison import differences, output_leaves
from fxprune.report import Report
from fxprune.runtime.default_device import on_cpu
from fxprune.runtime.eager import uncompiled
from fxprune.runtime.parameter_tags import carry_tags_, renamed_path
from fxprune.runtime.turns import in_turn
from fxprune.tracing.assumptions import assumptions
from fxprune.tracing.notes import begin_notes_, noted
from fxprune.tracing.retracing import marks_in
from fxprune.user_models.frozen_attributes import freeze_
from fxprune.user_models.hooks import drop_later_hooks_, hooks_of
from fxprune.user_models.inputs import Inputs, model_inputs, to_device
from fxprune.user_models.keeping import put_back_plain
from fxprune.user_models.modules import copy_model, device_of, evaluating, require_no_gradient_hooks
from fxprune.user_models.naming import RESERVED, renamed_in
from fxprune.user_models.plain_weights import with_plain_weights

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
# What layers may be merged to save.
COSTS = ("parameters", "macs", "latency")
# Of the channels around convolutions to be merged, where it is asked whether that could pay.
ENDS_LEFT = 0.5
# What outputs may differ by where weights are computed, or were once.
COMPUTED = 1e-4


@in_turn
@uncompiled
@on_cpu
@shown("instrument")
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
    outputs are bit-equal to the model's until an optimizer moves a gate. Numbers that the model
    holds as plain attributes (a temperature) stay what they are: setting one raises `TraceError`.
    Plain attributes of parameters (`p.no_decay = True`) go along, by every verb, tensors do not.

    model: any `nn.Module`; it is not modified. example_inputs: a tensor, a tuple of arguments or a
    dict of keyword arguments the model runs on; guessed from the first layer if not given.
    width_init, linear_init: where the real gates start, in [½, 1] and [0, ½). penalties: the
    regularisers, `fxprune.paper_penalties()` if not given. hoist_padding: where zeros padded
    between convolutions keep them from being merged, let the first pad all of them; this changes
    outputs near the border, which the report states, so train afterwards. It also counts on half of
    the channels around such convolutions to go when it asks whether merging could pay. check: run
    model, trace and gated model on the example inputs and require the same bits (with hoist_padding
    those of the model so changed), model and trace on other numbers, too; without it nothing but
    shapes is looked at. A model with forward hooks is run, once beside its copy, whatever is asked.

    Raises `TraceError`, `ExampleInputError`, `ModelError`, also for parameters with gradient hooks,
    and `NothingToDoError` with the reasons if no gate can go anywhere. After Srinivas & Babu, BMVC
    2016.
    """
    if penalties is not None:
        require_terms(penalties)
    sound_inits(width_init, linear_init)
    if gate_owners(model):
        raise GateError(f"{type(model).__name__} is instrumented already; finalize it first")
    require_no_gradient_hooks(model, "register them on what instrument returns")
    inputs = inputs_for(model, example_inputs)
    require_copyable(model, inputs)
    name = type(model).__name__
    reports: dict[str, Report] = {}

    ends = ENDS_LEFT if hoist_padding else 1.0
    inits = {"width_init": width_init, "linear_init": linear_init}
    insertion = with_options(insert_gates, **inits, penalties=penalties, ends=ends)
    hoisting = with_options(hoist, ends=ends) if hoist_padding else None

    def gate(region: Region) -> None:
        options = {"trained": model.training, "check": check}
        reports[region.path] = gate_(region, name, insertion, hoisting, **options)

    parts = parts_in_training(model, inputs, gate, check=check)
    reports = {region.path: reports[region.path] for region in parts.regions}  # not of what failed
    _count_insides_once(parts)
    gated = _assembled("instrument", name, inputs, parts, reports)
    for region in parts.regions:
        begin_notes_(region.program.module, noted(region.program.graph), model)
    gated.report.refused += unread(model, gated)
    _restore_state(model, gated)
    carry_tags_(model, gated, renamed_in(gated))
    return cast(GatedModel, gated)


@in_turn
@uncompiled
@on_cpu
@shown("finalize")
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
    on, and what is constant in evaluation only stays. cost: what layers are merged to save, and
    never take more of: "parameters"; on the example inputs "macs"; or "latency", of single layers
    in onnxruntime, measured here where the user's cache does not know it. check: prove trace and
    result, in float64 to 1e-9 and in the model's dtype to 1e-4; without `fold` also a step of
    training in float64, by its outputs, its gradients by inputs and its buffers.

    Raises `TraceError`, `ExampleInputError`, `ModelError`, and `VerificationError` if the result is
    not the same function.
    """
    if cost not in COSTS:
        raise FxpruneError(f"there is no cost {cost!r}; take one of {', '.join(COSTS)}")
    original = gated_model(model)
    reference = with_plain_weights(original)
    inputs = inputs_for(reference, example_inputs)
    require_copyable(original, inputs)
    parts = parts_in_evaluation(reference, inputs, check=check, in_training=not fold)
    if check and reference is not original:
        _require_plain(original, reference, inputs)
    name = str(memory_of(reference).get("model", type(model).__name__))
    passes = (*CUT, *folding(cost)) if fold else CUT_TO_BE_TRAINED
    reports = {
        region.path: cut_(
            region, reference.get_submodule(region.path), passes, check=check, trained=not fold
        )
        for region in parts.regions
    }
    small = _assembled("finalize", name, inputs, parts, reports)
    carry_tags_(original, small, renamed_in(small))
    report: Report = small.report
    if parts.paths:
        report.before, report.after = _costs(reference, inputs), _costs(small, inputs)
    if report.verification is not None:
        report.verification = with_whole(report.verification, reference, small, inputs, parts)
        report.verification.require()
    return cast(PlainModel, small)


def _count_insides_once(parts: Parts) -> None:
    """Let the costs of a whole model leave out those of its parts with gates of their own."""
    whole, *insides = (cast(Any, region.program.module) for region in parts.regions)
    if not parts.has_whole or not insides:
        return
    numbers = {
        module.gates.costs: sum(parameter.numel() for parameter in module.parameters())
        - sum(gate.numel() for gate in module.gates.parameters())
        for module in insides
    }
    whole.gates.costs = whole.gates.costs.without(numbers)


def _require_plain(model: nn.Module, plain: nn.Module, inputs: Inputs) -> None:
    """Raise `VerificationError` unless a model computes its weights as they were written down."""
    twin = copy_model(model)
    outputs: list[dict[str, Any]] = []
    with evaluating(twin, plain), torch.no_grad():
        for one in (twin, plain):
            args, kwargs = copies(to_device(inputs, device_of(model)))
            outputs.append(output_leaves(one(*args, **kwargs)))
    far = [found for found in differences(*outputs) if found.error > COMPUTED]
    if far:
        raise VerificationError(
            f"{type(model).__name__} is not what its computed weights (weight norm, "
            f"parametrizations, masks) say in evaluation mode: {far[0].output} {far[0].message}; "
            "make them permanent first (torch.nn.utils.parametrize.remove_parametrizations)"
        )


@torch.no_grad()
def _restore_state(model: nn.Module, gated: nn.Module) -> None:
    """Let what a model keeps from call to call be what it was before it was run here.

    That is what it counts in buffers, and what its own parts, which are kept whole, put into
    attributes and parameters, and the hooks they register, at their first call.
    """
    renamed, buffers = renamed_in(gated), dict(gated.named_buffers())
    for name, buffer in model.named_buffers():
        _set_back(buffers.get(renamed_path(name, renamed)), buffer)
    parts = dict(gated.named_modules())
    pairs: list[tuple[nn.Module, nn.Module]] = []
    for path, part in model.named_modules():
        twin = parts.get(renamed_path(path, renamed))
        # Torch's own keep what they keep in buffers.
        is_torchs = type(part).__module__.startswith(("torch.nn.", "torch.jit."))
        if twin is None or type(twin) is not type(part):
            continue
        drop_later_hooks_(twin, hooks_of(part))
        if is_torchs:
            continue
        pairs.append((part, twin))
        for name, parameter in part.named_parameters(recurse=False):
            _set_back(twin._parameters.get(name), parameter)
    put_back_plain(pairs, RESERVED)


def _set_back(own: Tensor | None, tensor: Tensor) -> None:
    """Give a tensor of a gated model the numbers of the original's, if it has others."""
    if own is None:
        return
    if own.shape != tensor.shape:
        own.data = tensor.detach().clone()
    elif not torch.equal(own, tensor):
        own.data.copy_(tensor)  # in place: others may share its memory


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
    remembered = remembered_inputs(model)
    if remembered is not None:
        return remembered
    if gate_owners(model):
        raise ExampleInputError("the gated model has lost its example inputs; pass example_inputs=")
    return infer_example_inputs(model)


def _costs(model: nn.Module, inputs: Inputs) -> Costs:
    return count_costs(model, to_device(inputs, device_of(model)))


def _assembled(
    verb: str, model: str, inputs: Inputs, parts: Parts, reports: dict[str, Report]
) -> Any:
    """Put every part in its place, and give the model what a user asks of it.

    What was inside of a part that nobody calls any more went with it.
    """
    for region in list(parts.regions):
        if not parts.holds(region.path):
            parts.regions.remove(region)
            del reports[region.path]
            continue
        program, report = region.program, reports[region.path]
        assumed = assumptions(program.graph)
        report.assumptions = [Change(node.name, text) for node, text in assumed.items()]
        memory = {"model": model, "marks": marks_in(program.graph)}
        remember_(program.module, report, (program.args, program.kwargs), **memory)
        parts.put(region.path, program.module)
    report = joined(verb, model, parts, reports)
    memory = {**memory_of(parts.root), "model": model, "regions": parts.paths}
    memory["whole"] = parts.has_whole
    if verb == "instrument" and parts.has_whole:
        memory["run"] = memory_of_run(parts.regions[0].program)
    remember_(parts.root, report, inputs, **memory)
    freeze_(parts.root)
    return parts.root
