"""Remove dead units while training goes on, so that the rest of it costs what is left.

A unit whose gate is 0 sends zeros and receives no gradient: without it every loss is what it would
have been, until the gate would have opened again. What remains of every parameter also remains of
what the optimizer knows of it.
"""

from collections.abc import Sequence
from numbers import Integral
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fxprune.compiler import GatedModel, gated_model, inputs_for
from fxprune.errors import GateError
from fxprune.gating.gates import Gates, require_numbers
from fxprune.gating.owners import gates_of
from fxprune.gating.remembered import leave_with_gates_, memory_of
from fxprune.passes.dead_channels import eliminate_dead_channels
from fxprune.passes.gate_marking import mark_gates, restore_gates
from fxprune.programs.pipeline import Change, run
from fxprune.programs.program import Program, narrowed
from fxprune.progress import shown
from fxprune.runtime.default_device import on_cpu
from fxprune.runtime.eager import uncompiled
from fxprune.runtime.parameter_tags import carry_tags_
from fxprune.runtime.turns import in_turn
from fxprune.tracing.notes import erase_notes_, noted
from fxprune.training.averaged_models import Cuts, averages_of, cut_
from fxprune.training.optimizer_states import (
    as_optimizers,
    hand_over_,
    require_replaceable,
    states_of,
)
from fxprune.training.selection import strongest, units_of
from fxprune.user_models.inputs import to_device
from fxprune.user_models.modules import copy_model, device_of, is_hooked, require_no_gradient_hooks
from fxprune.user_models.plain_weights import computes_weights


@in_turn
@uncompiled
@on_cpu
@shown("compact")
def compact(
    gated: nn.Module,
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
    *,
    patience: int = 0,
    averaged: nn.Module | Sequence[nn.Module] | None = None,
) -> GatedModel:
    """Return the gated model without its dead units; let the optimizer train what remains.

    Train on with what it returns, as with the model before: gates, penalties, modes, values and
    gradients are those of the units that remain. A dead unit can open again; a removed one is gone.

    gated: what `instrument` returned; it is not modified, but the optimizer no longer trains it. Of
    a wrapper (DistributedDataParallel, torch.compile) the model inside is taken: wrap the result
    anew. optimizer: its groups get the new parameters, its state what remains of it: every tensor
    of the parameter's shape; of several, that train parts of the model, give all. One whose steps
    go by shapes (the rates of Muon, the norms of Adafactor) takes those of the smaller model from
    here on. patience: leave a unit until that many calls before found it dead. averaged: what
    averages the model in training, such as `torch.optim.swa_utils.AveragedModel`s: each gets a copy
    of the result in `module`, with its averages of what remains. One that is not given cannot go
    on; make a new one.

    A tensor all of whose units are dead keeps the strongest. Returns the very model if nothing
    goes; what is gated inside of submodules that could not be traced stays. Raises `GateError` if
    it was instrumented region by region, if something keeps dead units (forward hooks; weights that
    a norm, a parametrization or a mask computes), if gates are NaN, if the optimizer trains another
    model, or keeps what cannot be cut (a state of Adafactor) or replaced (LBFGS), or if `averaged`
    averages another model, and `ModelError` if parameters have gradient hooks; nothing has changed
    then.
    """
    if not isinstance(patience, Integral) or patience < 0:
        raise GateError(f"patience={patience!r} is no whole number of calls; take 0 or more")
    model = gated_model(gated)
    gates = gates_of(model)
    require_numbers(gates)
    optimizers = as_optimizers(optimizer)
    for one in optimizers:
        require_replaceable(one, model)
    averages = averages_of(averaged, model)
    memory = memory_of(model)
    if memory.get("regions") and not memory.get("whole"):
        raise GateError("a model instrumented region by region cannot be compacted while training")
    keep = _kept(gates, patience)
    if gates.width is None or bool(keep.all()):
        return cast(GatedModel, model)
    require_no_gradient_hooks(model, "register them on what compact returns")
    args, kwargs = to_device(inputs_for(model, None), device_of(model))
    program = Program(copy_model(model), args, kwargs)

    def mark(program: Program) -> list[Change]:
        return mark_gates(program, keep)

    def cut(program: Program) -> list[Change]:
        return eliminate_dead_channels(program, in_training=True)

    erase_notes_(program.module, noted(program.graph))
    run(program, (mark, cut, restore_gates))
    _require_gone(program, keep)
    leave_with_gates_(program.module, memory)  # they are new ones
    _hand_over(model, program.module, optimizers, program.cuts)
    for one in averages:
        cut_(one, program.module, program.cuts)
    return cast(GatedModel, program.module)


def _kept(gates: Gates, patience: int) -> Tensor:
    """Count the calls, and return which units stay, bool (units,)."""
    if gates.width is None:
        return torch.ones(0, dtype=torch.bool)
    live = gates.live()
    gates.dead_calls.add_(1).mul_((~live).long())
    keep = gates.dead_calls <= patience
    keep[strongest(gates.width, units_of(gates))] = True
    return keep


def _require_gone(program: Program, keep: Tensor) -> None:
    """Raise `GateError` if dead units stay, and modules nobody may cut are why."""
    width = gates_of(program.module).width
    left = 0 if width is None else len(width) - int(keep.sum())
    if left > 0 and any(map(_is_untouchable, program.module.modules())):
        reasons = "; ".join(f"{place}: {reason}" for place, reason in program.barriers.items())
        raise GateError(
            f"{left} dead units cannot be removed while training: {reasons}; train on without "
            "compacting: finalize removes what it can, and reports the rest"
        )


def _is_untouchable(module: nn.Module) -> bool:
    return computes_weights(module) or is_hooked(module)


def _hand_over(old: nn.Module, new: nn.Module, optimizers: Sequence[Any], cuts: Cuts) -> None:
    """Give the gradients to the new parameters, and the new parameters to the optimizers."""
    carry_tags_(old, new, {})
    successors = dict(new.named_parameters())
    pairs = {p: (successors.get(name), cuts.get(name, [])) for name, p in old.named_parameters()}
    states = [states_of(optimizer, pairs) for optimizer in optimizers]
    for parameter, (successor, kept) in pairs.items():
        if successor is not None and parameter.grad is not None:
            successor.grad = narrowed(parameter.grad, kept)
    for optimizer, state in zip(optimizers, states, strict=True):
        hand_over_(optimizer, pairs, state)
    gates_of(old).superseded = bool(optimizers)
