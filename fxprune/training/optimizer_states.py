"""What optimizers know of parameters, cut as the parameters are.

Pairs give for every old parameter its successor, None if nothing of it remains, and what of it
stayed: axes and positions. All states are cut before the first optimizer is changed.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils import _pytree as pytree

from fxprune.errors import GateError
from fxprune.programs.program import narrowed

Pairs = Mapping[nn.Parameter, tuple[nn.Parameter | None, list[tuple[int, Tensor]]]]

_OPTIMIZERS_OWN = ("param_groups", "state", "defaults")
_REMEDY = "compact without the optimizer, and make a new one"


def as_optimizers(given: Optimizer | Sequence[Optimizer] | None) -> list[Any]:
    """Return the optimizers given; raise `GateError` for what is none."""
    found: list[Any] = list(given) if isinstance(given, list | tuple) else [given]
    found = [] if given is None else found
    for one in found:
        if not (hasattr(one, "param_groups") and hasattr(one, "state")):
            raise GateError(f"{type(one).__name__} is no optimizer; pass the one that trains gated")
    return found


def require_replaceable(optimizer: Optimizer, model: nn.Module) -> None:
    """Raise `GateError` unless an optimizer trains a model, by its groups alone."""
    name, mine = type(optimizer).__name__, {id(p) for p in model.parameters()}
    if not any(id(p) in mine for group in optimizer.param_groups for p in group["params"]):
        raise GateError(
            f"{name} holds no parameter of the model; pass the optimizer that trains it, and the "
            "model that the last compact returned"
        )
    place = _kept_elsewhere(optimizer, mine)
    if place is not None:
        raise GateError(
            f"{name} keeps parameters in {place}, where none can be replaced; {_REMEDY}"
        )


def states_of(optimizer: Optimizer, pairs: Pairs) -> dict[Any, Any]:
    """Return what remains of an optimizer's state; raise `GateError` for what cannot be cut."""
    states: dict[Any, Any] = {}
    for parameter, (successor, kept) in pairs.items():
        if parameter not in optimizer.state or successor is None:
            continue
        states[successor] = {
            name: _cut(optimizer, parameter, name, value, kept)
            for name, value in optimizer.state[parameter].items()
        }
    return states


def hand_over_(optimizer: Optimizer, pairs: Pairs, states: dict[Any, Any]) -> None:
    """Let an optimizer train the successors."""
    for parameter in pairs:
        optimizer.state.pop(parameter, None)
    optimizer.state.update(states)
    for group in optimizer.param_groups:
        found = [pairs[p][0] if p in pairs else p for p in group["params"]]
        group["params"] = [parameter for parameter in found if parameter is not None]


def _kept_elsewhere(optimizer: Optimizer, mine: set[int]) -> str | None:
    """Return the attribute, other than its groups and states, in which an optimizer has parameters.

    LBFGS makes a list of them when it is made, and would go on with it.
    """
    for name, value in vars(optimizer).items():
        if name in _OPTIMIZERS_OWN:
            continue
        if isinstance(value, Optimizer):  # a wrapper's
            inner = _kept_elsewhere(value, mine)
            if inner is not None:
                return f"{name}.{inner}"
        keys: list[Any] = list(value) if isinstance(value, dict) else []
        leaves = [*keys, *pytree.tree_leaves(value)]
        if any(isinstance(leaf, Tensor) and id(leaf) in mine for leaf in leaves):
            return name
    return None


def _cut(
    optimizer: Optimizer, parameter: Tensor, name: str, value: Any, kept: list[tuple[int, Tensor]]
) -> Any:
    def cut(tensor: Tensor) -> Tensor:
        if tensor.numel() == 1 != parameter.numel():
            return tensor
        if tensor.shape != parameter.shape:
            raise GateError(
                f"{type(optimizer).__name__} keeps {name} of shape {tuple(tensor.shape)} for a "
                f"parameter of shape {tuple(parameter.shape)}: it cannot be cut; {_REMEDY}"
            )
        return narrowed(tensor, kept)

    return pytree.tree_map_only(Tensor, cut, value) if kept else value
