"""How far the outputs of two models are apart.

Outputs are flattened to values by path. Floats differ by max|a − b| / max|a|, integers and bools by
the part that is unequal; where nothing can be measured (another structure, shape or dtype, NaN in
another place) the error is infinite.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fxprune.user_models.inputs import apart, describe, opened

# The part of integer outputs (argmax, comparisons) that rounding alone may flip.
FLIPS = 1e-3


@dataclass(frozen=True)
class Difference:
    """How far one output is from its reference.

    error: max|a − b| / max|a| of a float tensor; the part of unequal entries where values must be
    `exact` (integers, bools); infinite for another shape, dtype, Python value, or place of NaN and
    infinity; NaN where nothing can be compared. index: where in the tensor the error is.
    """

    output: str
    error: float
    exact: bool = True
    index: tuple[int, ...] | None = None
    message: str = ""


def output_leaves(output: Any) -> dict[str, Any]:
    """Flatten an output: its values by path (`output`, `output['logits']`), tensors on the CPU.

    A complex tensor is given as pairs of real numbers.
    """
    return {
        f"output{pytree.keystr(path)}": _on_cpu(leaf) if isinstance(leaf, Tensor) else leaf
        for path, leaf in pytree.tree_flatten_with_path(apart(opened(output)))[0]
    }


def _on_cpu(tensor: Tensor) -> Tensor:
    tensor = tensor.detach().cpu()
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def differences(
    reference: Mapping[str, Any], candidate: Mapping[str, Any], *, same_dtype: bool = True
) -> list[Difference]:
    """Compare outputs flattened by `output_leaves`, in the order of the reference.

    Containers are compared by keys and positions: a dict may stand for an OrderedDict.
    """
    if list(reference) != list(candidate):
        message = f"is made of {', '.join(candidate)} instead of {', '.join(reference)}"
        return [Difference("output", math.inf, message=message)]
    return [_difference(path, reference[path], candidate[path], same_dtype) for path in reference]


def _difference(path: str, a: Any, b: Any, same_dtype: bool) -> Difference:
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return _value_difference(path, a, b)
    if a.shape != b.shape or (same_dtype and a.dtype != b.dtype):
        message = f"is {describe(b)} instead of {describe(a)}"
        return Difference(path, math.inf, message=message)
    if a.numel() == 0:
        return Difference(path, 0.0)
    if a.is_floating_point():
        return _float_difference(path, a.double(), b.double())
    unequal = a != b
    message = f"is unequal in {int(unequal.sum())} of {a.numel()} entries"
    return Difference(path, unequal.double().mean().item(), True, _peak(unequal), message)


def _value_difference(path: str, a: Any, b: Any) -> Difference:
    if isinstance(a, float) and isinstance(b, float):
        return _float_difference(path, *torch.tensor([a, b], dtype=torch.float64))
    if isinstance(a, bool | int | str | None) or type(a) is not type(b):
        same = type(a) is type(b) and a == b
        message = f"is {b!r:.40} instead of {a!r:.40}"
        return Difference(path, 0.0 if same else math.inf, message=message)
    message = f"is a {type(a).__name__}, which cannot be compared"
    return Difference(path, math.nan, message=message)


def _float_difference(path: str, a: Tensor, b: Tensor) -> Difference:
    misplaced = (a.isnan() != b.isnan()) | ((a.isinf() | b.isinf()) & (a != b))
    if misplaced.any():
        message = f"has NaN or infinity in other places, {int(misplaced.sum())} of {a.numel()}"
        return Difference(path, math.inf, False, _peak(misplaced), message)
    finite = a.isfinite()
    if not finite.any():
        return Difference(path, math.nan, False, message="has no finite entry")
    gap = torch.where(finite, (a - b).abs(), 0.0)
    largest, size = gap.max().item(), a[finite].abs().max().item()
    error = largest / size if size else (math.inf if largest else 0.0)
    message = f"is off by {largest:.2g} where the reference reaches {size:.2g}"
    return Difference(path, error, False, _peak(gap), message)


def _peak(values: Tensor) -> tuple[int, ...]:
    # torch has this too, and imports sympy for it, which takes seconds.
    place = np.unravel_index(int(values.double().argmax()), tuple(values.shape))
    return tuple(int(i) for i in place)
