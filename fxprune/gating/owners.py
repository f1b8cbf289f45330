"""The gates of a model, whatever wraps it: an error where there are none, or parts of some."""

import re

from torch import nn

from fxprune.errors import GateError
from fxprune.gating.gates import Gates, gate_owners
from fxprune.gating.sharding import require_whole_gates


def gates_of(model: nn.Module) -> Gates:
    """Return the gates of an instrumented model, also inside a wrapper such as DDP.

    Raises `GateError` if there are none.
    """
    return next(iter(gates_with_owners(model)))


def gates_by_name(model: nn.Module) -> dict[str, Gates]:
    """Return all gates of a model, by the name of the part that holds them: "" for all of it.

    Raises `GateError` if there are none.
    """
    owners = {owner: gates for gates, owner in gates_with_owners(model).items()}
    names = {name: owners[part] for name, part in model.named_modules() if part in owners}
    # What a wrapper calls its model is no part of the model.
    return {
        re.sub(r"^((module|_orig_mod)(\.|$))+", "", name): gates for name, gates in names.items()
    }


def gates_with_owners(model: nn.Module) -> dict[Gates, nn.Module]:
    """Return all gates of a model, each with the module that holds them; `GateError` if none."""
    found = gate_owners(model)
    if not found:
        raise GateError(
            f"{type(model).__name__} has no gates; call fxprune.instrument(model) first and train "
            "what it returns"
        )
    for gates in found:
        require_whole_gates(gates)
    return found
