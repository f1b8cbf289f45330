"""Graph modules on their way through the passes: without code, their weights borrowed.

Code is made once, at the end. Most weights are cut or folded, which makes new ones, so that copying
them first would be in vain: those of plain layers, which no run overwrites, are borrowed, and what
is still borrowed at the end is copied then.
"""

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxprune.runtime.kinds import LAYERS, NORMS
from fxprune.runtime.storages import storage_of
from fxprune.user_models.modules import copying, is_hooked, put_parts_in, tensors_in

_PRESERVED = "_user_preserved_attributes"


def without_code(root: nn.Module, graph: fx.Graph, name: str) -> fx.GraphModule:
    """Make a graph module that cannot be called before it is recompiled."""
    module = fx.GraphModule.__new__(fx.GraphModule)
    vars(module)["recompile"] = lambda: None  # torch would call it, and does not ask whether to
    fx.GraphModule.__init__(module, root, graph, name)
    del vars(module)["recompile"]
    return module


def borrowing_copy(model: fx.GraphModule) -> fx.GraphModule:
    """Copy what a graph module computes, without code; `own_` makes its weights its own."""
    memo: dict[int, Any] = {id(weight): _borrowed(weight) for weight in _lent(model)}
    with copying(model):
        put_parts_in(memo, model)
        root = nn.Module()
        root.training = model.training
        for held in (model._modules, model._parameters, model._buffers):
            for name, value in held.items():
                setattr(root, name, copy.deepcopy(value, memo))
        for node in model.graph.nodes:
            if node.op == "get_attr" and not hasattr(root, str(node.target).split(".")[0]):
                setattr(root, node.target, copy.deepcopy(getattr(model, node.target), memo))
        twin = without_code(root, copy.deepcopy(model.graph), type(model).__name__)
        known = {key: value for key, value in model.meta.items() if key != "fxprune"}
        twin.meta = copy.deepcopy(known, memo)
    for name, value in twin.meta.get(_PRESERVED, {}).items():
        setattr(twin, name, value)
    return twin


def own_(module: nn.Module, lender: nn.Module) -> None:
    """Copy the weights that a module still borrows."""
    lent = {storage_of(parameter) for parameter in lender.parameters()}
    for tensor in tensors_in(module):
        if storage_of(tensor) in lent:
            tensor.data = tensor.detach().clone()


def _lent(model: fx.GraphModule) -> Iterator[nn.Parameter]:
    """Yield the weights that nobody uses but layers that never write to them."""
    plain: list[nn.Parameter] = []
    taken = {str(node.target) for node in model.graph.nodes if node.op == "get_attr"}
    held: set[int] = set()
    for path, module in model.named_modules():
        hooked = is_hooked(module)
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            lendable = type(module) in (*LAYERS, *NORMS) and _is_plain(parameter)
            if lendable and not hooked and f"{path}.{name}" not in taken:
                plain.append(parameter)
            else:
                held.add(storage_of(parameter))
    held |= {storage_of(buffer) for buffer in model.buffers()}
    yield from (parameter for parameter in plain if storage_of(parameter) not in held)


def _borrowed(parameter: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(parameter.detach(), requires_grad=parameter.requires_grad)


def _is_plain(tensor: Tensor) -> bool:
    """Tell whether a tensor is of torch's own class and dense; others are never lent."""
    return type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided
