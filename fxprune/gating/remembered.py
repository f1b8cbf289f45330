"""What a verb leaves in its result for the next: a report, example inputs, regions, a run."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fxprune.gating.gates import Gates
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


def _held_by_gates(model: nn.Module) -> dict[str, Any]:
    held = (vars(part).get(_HELD) for part in model.children() if isinstance(part, Gates))
    return next((one.memory for one in held if one is not None), {})


def remember_(model: nn.Module, report: Any, example_inputs: Inputs, /, **memory: Any) -> None:
    """Leave a report in a result, and what the next verb asks for; copies and pickles keep both.

    Of a graph module a deep copy keeps the meta data, a pickle the attributes, and a copy of what
    was loaded neither: but its gates. What a run did is for copies only.
    """
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
