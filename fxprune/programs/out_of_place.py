"""The ordinary forms of operators that overwrite their input.

Torch marks them in four ways: a flag of the module, a flag of the call, a name that ends in `_`,
and augmented arithmetic.
"""

import copy
import itertools
import operator
from typing import Any

import torch
from torch import Tensor, fx

from fxprune.runtime.kinds import OVERWROTE
from fxprune.user_models.modules import submodule


def make_out_of_place(node: fx.Node, module: fx.GraphModule) -> bool:
    """Let an operator leave its input alone, all calls of a module at once; tell if that is new."""
    before = (node.target, node.kwargs, overwrites(node, module))
    owner: Any = submodule(module, str(node.target)) if node.op == "call_module" else None
    if hasattr(owner, "inplace"):
        owner.inplace = False
    if node.op == "call_method" and (twin := _method_out_of_place(str(node.target))):
        node.target = twin
    if node.kwargs.get("inplace"):
        node.kwargs = {**node.kwargs, "inplace": False}
    if node.op == "call_function" and (twin := _out_of_place(node.target)):
        node.target = twin
        node.meta[OVERWROTE] = True
    return before != (node.target, node.kwargs, overwrites(node, module))


def ordinary_call(node: fx.Node) -> Any:
    """Return what to call in the place of an in-place function or method; None if nothing is."""
    if node.op == "call_method" and (twin := _method_out_of_place(str(node.target))):
        return getattr(Tensor, twin)
    return _out_of_place(node.target) if node.op == "call_function" else None


def give_own_module(node: fx.Node, module: fx.GraphModule) -> None:
    """Let a node that calls a module as others do call a copy of it instead."""
    path, _, name = str(node.target).rpartition(".")
    owner = submodule(module, path)
    own = next(f"{name}_{i}" for i in itertools.count(2) if not hasattr(owner, f"{name}_{i}"))
    owner.add_module(own, copy.deepcopy(owner.get_submodule(name)))
    node.target = f"{path}.{own}" if path else own


def overwrites(node: fx.Node, module: fx.GraphModule) -> bool:
    """Tell whether a node calls a module that works in place."""
    if node.op != "call_module":
        return False
    return bool(getattr(submodule(module, str(node.target)), "inplace", False))


def returns_its_input(node: fx.Node, module: fx.GraphModule) -> bool:
    """Tell whether an operator of torch's that writes to its first argument returns that."""
    if node.op == "call_method":
        return _method_out_of_place(str(node.target)) is not None
    if node.op == "call_function":
        return bool(node.kwargs.get("inplace")) or _out_of_place(node.target) is not None
    owner = submodule(module, str(node.target)) if node.op == "call_module" else None
    return overwrites(node, module) and type(owner).__module__.startswith("torch.nn.")


def _method_out_of_place(name: str) -> str | None:
    """Return the method that does the same without overwriting; `copy_` and `zero_` have none."""
    twin = name.removesuffix("_")
    in_place = name.endswith("_") and not name.endswith("__")
    return twin if in_place and callable(getattr(Tensor, twin, None)) else None


def _out_of_place(function: Any) -> Any:
    """Return the function that does the same as an in-place one without overwriting."""
    name = getattr(function, "__name__", "")
    if getattr(function, "__module__", "") == "_operator" and name.startswith("i"):
        twins = (getattr(operator, name[1:] + end, None) for end in ("", "_"))  # and is a keyword
        return next((twin for twin in twins if twin is not None), None)
    if not name.endswith("_") or name.endswith("__"):
        return None
    spaces = (torch, torch.nn.functional)
    return next((f for s in spaces if (f := getattr(s, name[:-1], None)) is not None), None)
