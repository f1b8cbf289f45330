"""Who shares what: a module may be edited only where no one else uses its tensors.

Tied weights, modules called twice and hooks all make an edit at one place felt at another.
"""

from typing import Any

from torch import fx, nn

from fxprune.programs.program import Program
from fxprune.user_models.modules import submodule, tensors_in


def sole_modules(program: Program) -> dict[fx.Node, nn.Module]:
    """Return the modules that may be edited, by calling node: no one else uses their tensors."""
    held: dict[fx.Node, set[int]] = {}
    users: dict[int, int] = {}
    for node in program.graph.nodes:
        if node.op == "call_module":
            module = submodule(program.module, str(node.target))
            held[node] = {id(tensor) for tensor in tensors_in(module)}
        elif node.op == "get_attr":
            held[node] = {id(_attribute(program.module, str(node.target)))}
        for key in held.get(node, ()):
            users[key] = users.get(key, 0) + 1
    return {
        node: module
        for node, keys in held.items()
        if node.op == "call_module"
        and all(users[key] == 1 for key in keys)
        and not (module := submodule(program.module, str(node.target)))._forward_hooks
        and not module._forward_pre_hooks
    }


def _attribute(module: nn.Module, path: str) -> Any:
    owner, _, name = path.rpartition(".")
    return getattr(submodule(module, owner), name, None)
