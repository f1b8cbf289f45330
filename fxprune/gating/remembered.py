"""What a verb leaves in its result for the next: a report, example inputs, regions, a run."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fxprune.gating.gates import Gates, gate_owners
from fxprune.runtime.structure import Unchanging
from fxprune.user_models.inputs import Inputs

_HELD = "_fxprune"


@dataclass(frozen=True)
class _Held(Unchanging):
    memory: dict[str, Any]


def memory_of(model: nn.Module) -> dict[str, Any]:
    """Return what a verb left in its result: the model's name, example inputs, regions; or {}."""
    kept = vars(model).get("_fxprune")
    if isinstance(model, fx.GraphModule):
        kept = model.meta.get("fxprune", kept) or _held_by_gates(model)
    return kept or {}


def remembered_inputs(model: nn.Module) -> Inputs | None:
    """Return the example inputs a verb left, in the dtype that the model was put in since."""
    memory = memory_of(model)
    before, now = memory.get("dtype"), _dtype_of(model)
    inputs: Inputs | None = memory.get("example_inputs")
    if inputs is None or before is None or now is None:
        return inputs
    return pytree.tree_map_only(Tensor, lambda t: t.to(now) if t.dtype == before else t, inputs)


def _dtype_of(model: nn.Module) -> torch.dtype | None:
    """Return the dtype of all of a model's parameters, None if they have several, or none."""
    gates = {tensor for owner in gate_owners(model) for tensor in owner.parameters()}
    dtypes = {parameter.dtype for parameter in model.parameters() if parameter not in gates}
    return dtypes.pop() if len(dtypes) == 1 else None


def _held_by_gates(model: nn.Module) -> dict[str, Any]:
    held = (vars(part).get(_HELD) for part in model.children() if isinstance(part, Gates))
    return next((one.memory for one in held if one is not None), {})


def remember_(model: nn.Module, report: Any, example_inputs: Inputs, /, **memory: Any) -> None:
    """Leave a report in a result, and what the next verb asks for; copies and pickles keep both.

    Of a graph module a deep copy keeps the meta data, a pickle the attributes, and a copy of what
    was loaded neither: but its gates. What a run did is for copies only.
    """
    memory["dtype"] = _dtype_of(model)
    memory["example_inputs"] = pytree.tree_map_only(Tensor, Tensor.cpu, example_inputs)
    vars(model)["report"] = report
    vars(model)["_fxprune"] = {key: value for key, value in memory.items() if key != "run"}
    if isinstance(model, fx.GraphModule):
        model.meta["fxprune"] = memory
        kept = {"report": report, "_fxprune": vars(model)["_fxprune"]}  # a copy may be pickled
        model.meta.setdefault("_user_preserved_attributes", {}).update(kept)
        leave_with_gates_(model, memory)


def leave_with_gates_(model: nn.Module, memory: dict[str, Any]) -> None:
    """Leave what a verb asks for with the gates of a module, if it has any."""
    kept = _Held({key: value for key, value in memory.items() if key != "run"})
    for part in model.children():
        if isinstance(part, Gates):
            vars(part)[_HELD] = kept
