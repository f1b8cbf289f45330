"""What users write on parameters (`p.no_decay = True`), which no copy of torch's takes along.

It is said of the parameter of that name, whatever its shape: who reads it (the groups of an
optimizer, a wrapper) asks whose it is. A tensor or an object of some class may be of the very
numbers that were cut, and is left behind.
"""

import copy
from collections.abc import Mapping
from types import FunctionType
from typing import Any

import torch
from torch import nn

_ATOMS = (bool, int, float, complex, str, bytes, type(None), torch.dtype, FunctionType)


def carry_tags_(old: nn.Module, new: nn.Module, renamed: Mapping[str, str]) -> None:
    """Give parameters the plain attributes that those of their names have.

    renamed: new paths by the old, of what is called otherwise now.
    """
    successors = dict(new.named_parameters(remove_duplicate=False))
    for name, parameter in old.named_parameters(remove_duplicate=False):
        tags = {key: value for key, value in vars(parameter).items() if _is_plain(value)}
        successor = successors.get(renamed_path(name, renamed)) if tags else None
        if successor is not None and type(successor) is type(parameter) is nn.Parameter:
            vars(successor).update(copy.deepcopy(tags))


def renamed_path(path: str, renamed: Mapping[str, str]) -> str:
    """Return the path of a part or parameter after it, or what it is in, was renamed."""
    for old, new in renamed.items():
        if path == old or path.startswith(f"{old}."):
            path = new + path[len(old) :]
    return path


def _is_plain(value: Any) -> bool:
    if type(value) is dict:
        return all(map(_is_plain, (*value, *value.values())))
    if type(value) in (tuple, list, set, frozenset):
        return all(map(_is_plain, value))
    return isinstance(value, _ATOMS)
