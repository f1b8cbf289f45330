"""Sizes of maps that no input changes: 1 behind a mean over space, 7 behind a pool to 7×7.

Told from the operators that lead there; whatever is not known to keep a size may change it.
"""

from typing import Any

import torch
from torch import fx, nn

from fxprune.dataflow.rules import rule_name
from fxprune.programs.observation import Observation, TensorSpec
from fxprune.runtime.kinds import LAYERS
from fxprune.user_models.modules import submodule

# By rule, what gives every place of its inputs one place.
_PLACEWISE = frozenset(
    {"elementwise", "product", "identity", "prelu", "batch_norm", "gate", "linearity gate", "cast"}
)
_REDUCTIONS = frozenset({torch.mean, torch.amax, torch.sum, "mean", "amax", "sum"})


def is_fixed(module: nn.Module, node: fx.Node, axis: int, seen: Observation) -> bool:
    """Tell whether a tensor is as long along an axis, not the first, whatever the input's size."""
    while axis:
        called: Any = submodule(module, str(node.target)) if node.op == "call_module" else None
        if _makes_size(node, called, axis, seen):
            return True
        tensors = [one for one in node.all_input_nodes if _rank(one, seen)]
        if len(tensors) != 1 or _rank(tensors[0], seen) != _rank(node, seen):
            return False
        if rule_name(node, called) not in _PLACEWISE and not _is_of_one_place(called, axis):
            return False
        node = tensors[0]
    return False


def _makes_size(node: fx.Node, called: Any, axis: int, seen: Observation) -> bool:
    """Tell whether an operator gives all its outputs one size along an axis."""
    target: Any = type(called) if called is not None else node.target
    if "adaptive" in getattr(target, "__name__", "").lower():
        given = node.args[1:2] or node.kwargs.get("output_size", ())
        sizes = _flat(given if called is None else called.output_size)
        written = bool(sizes) and all(isinstance(one, int) for one in sizes)  # not computed
        return _rank(node, seen) > axis > 1 and written
    if target not in _REDUCTIONS:
        return False
    given = [*node.args[1:], node.kwargs.get("dim", ()), node.kwargs.get("keepdim", False)]
    if not given or True not in [one for one in given if isinstance(one, bool)]:
        return False
    dims = [one for one in _flat(given) if isinstance(one, int) and not isinstance(one, bool)]
    return axis in [one % _rank(node, seen) for one in dims]


def _is_of_one_place(called: Any, axis: int) -> bool:
    """Tell whether a layer reads, for every place along an axis, that place alone."""
    if type(called) not in LAYERS or isinstance(called, nn.Linear) or called.transposed:
        return False
    windows = (called.kernel_size, called.stride)
    return (
        axis > 1
        and called.padding in ((0,) * len(windows[0]), "valid")
        and all(window[axis - 2] == 1 for window in windows)
    )


def _rank(node: fx.Node, seen: Observation) -> int:
    shown = seen.values.get(node)
    return len(shown.shape) if isinstance(shown, TensorSpec) else 0


def _flat(structure: Any) -> list[Any]:
    if isinstance(structure, (tuple, list)):
        return [leaf for part in structure for leaf in _flat(part)]
    return [structure]
