"""What models are given and give back: tensors in nested structures."""

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fxprune.errors import ExampleInputError

Inputs = tuple[tuple[Any, ...], dict[str, Any]]

NESTED = "whose lengths no analysis follows; use a padded tensor and a mask"


def model_inputs(example_inputs: Any) -> Inputs:
    """Normalise what users pass as example inputs: a tensor, a tuple, or a mapping of keywords."""
    tensors = tensors_of(example_inputs)
    if tensors and not any(map(torch.numel, tensors)):
        raise ExampleInputError(
            f"the example inputs {describe(example_inputs)} are empty; pass a sample or more"
        )
    if isinstance(example_inputs, Tensor):
        return (example_inputs,), {}
    if isinstance(example_inputs, Mapping):
        mapping: Mapping[Any, Any] = example_inputs
        return (), {str(key): value for key, value in mapping.items()}
    if isinstance(example_inputs, (tuple, list)):
        return tuple(example_inputs), {}
    raise ExampleInputError(
        f"example_inputs is {type(example_inputs).__name__}; pass a tensor, a tuple of arguments, "
        "or a dict of keyword arguments"
    )


def to_device(inputs: Inputs, device: torch.device) -> Inputs:
    """Return the inputs, detached, on `device`."""
    return pytree.tree_map_only(Tensor, lambda tensor: tensor.detach().to(device), inputs)


def another(tensor: Tensor) -> Tensor:
    """Return other numbers than a tensor's."""
    dense = tensor.is_floating_point() and tensor.layout == torch.strided
    return tensor * 0.5 + 0.25 if dense else tensor


def copied(inputs: Inputs) -> Inputs:
    """Return copies of the tensors of inputs: a model may overwrite what it is given."""
    return pytree.tree_map_only(Tensor, Tensor.clone, inputs)


def tensors_of(values: Any) -> list[Tensor]:
    """Return the tensors of a nested structure, in its order."""
    return [leaf for leaf in pytree.tree_leaves(opened(values)) if isinstance(leaf, Tensor)]


def opened(structure: Any) -> Any:
    """Return a nested structure with dicts in the place of what pytree cannot name the parts of.

    Those are dataclasses and mappings that it sees whole, and classes that were made known to it
    without keys.
    """

    def entries(leaf: Any) -> Any:
        if _is_registered_without_keys(leaf):
            return opened(_parts(leaf))
        if isinstance(leaf, Mapping):
            return opened(_entries(leaf))
        if not is_dataclass(leaf) or isinstance(leaf, type):
            return leaf
        return opened({field.name: getattr(leaf, field.name) for field in fields(leaf)})

    return pytree.tree_map(entries, structure, is_leaf=_is_registered_without_keys)


def is_nested(value: Any) -> bool:
    """Tell whether a value is a nested tensor: several of different lengths in one."""
    return isinstance(value, Tensor) and value.is_nested


def apart(structure: Any) -> Any:
    """Return a structure with nested tensors, which nothing compares, as dicts of their parts."""

    def parts(leaf: Any) -> Any:
        if not is_nested(leaf):
            return leaf
        return {"layout": str(leaf.layout), **dict(enumerate(leaf.unbind()))}

    return pytree.tree_map(parts, structure)


def _is_registered_without_keys(value: Any) -> bool:
    known = pytree.SUPPORTED_NODES.get(type(value))
    return known is not None and known.flatten_with_keys_fn is None


def _entries(mapping: Mapping[Any, Any]) -> dict[Any, Any]:
    return dict(mapping)


def _parts(value: Any) -> dict[Any, Any]:
    """Return the parts of what is registered without keys: by its own, if it is a dict, too."""
    if isinstance(value, Mapping):
        return _entries(value)
    return dict(enumerate(pytree.SUPPORTED_NODES[type(value)].flatten_fn(value)[0]))


def leading_size(inputs: Any) -> int | None:
    """Return the batch size of inputs: dim 0 of their first tensor that has one."""
    return next((len(tensor) for tensor in tensors_of(inputs) if tensor.ndim), None)


def describe(inputs: Any) -> str:
    """Return shapes and dtypes of the tensors of an input structure, for messages."""
    return "(" + ", ".join(map(_description, pytree.tree_leaves(inputs))) + ")"


def _description(leaf: Any) -> str:
    if is_nested(leaf):
        return f"nested{describe(leaf.unbind())}"
    if isinstance(leaf, Tensor):
        return f"{str(leaf.dtype).removeprefix('torch.')}{list(leaf.shape)}"
    return repr(leaf)


def same(left: Any, right: Any, *, nan: bool = False) -> bool:
    """Tell whether two output structures hold bit-equal tensors in the same places.

    Structures are compared by keys and positions: a dict may stand for an OrderedDict. nan: NaN is
    the same as NaN.
    """
    flat_left, flat_right = _leaves(left), _leaves(right)
    return (
        _classes(left) == _classes(right)
        and flat_left.keys() == flat_right.keys()
        and all(_same_leaf(leaf, flat_right[path], nan) for path, leaf in flat_left.items())
    )


def _classes(structure: Any) -> list[type]:
    leaves = pytree.tree_leaves(structure)
    return [type(leaf) for leaf in leaves if is_dataclass(leaf) or isinstance(leaf, Mapping)]


def _leaves(structure: Any) -> dict[str, Any]:
    leaves = pytree.tree_flatten_with_path(apart(opened(structure)))[0]
    return {pytree.keystr(path): leaf for path, leaf in leaves}


def _same_leaf(left: Any, right: Any, nan: bool) -> bool:
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        if nan and left.dtype == right.dtype and left.shape == right.shape:
            return bool(((left == right) | (left.isnan() & right.isnan())).all())
        return left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, Tensor) or isinstance(right, Tensor):
        return False
    if isinstance(left, np.ndarray) or isinstance(right, np.ndarray):
        return type(left) is type(right) and np.array_equal(left, right)
    return bool(left == right)
