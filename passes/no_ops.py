"""Remove what does nothing in evaluation: dropout, identities, products with ones, unused modules.

Assertions that always hold go too. Neutral also means safe to forward: where something writes into
the result in place, the operator stays, as its input would be overwritten instead.
"""

from collections.abc import Callable, Collection
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxprune.dataflow.rules import key_of
from fxprune.programs.observation import observe
from fxprune.programs.pipeline import Change, keeps_shapes
from fxprune.programs.program import Program
from fxprune.runtime.kinds import PASSES

_IDENTITIES = (
    *(nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d),
    *(nn.AlphaDropout, nn.FeatureAlphaDropout),
)
_DETACHING: tuple[Any, ...] = ("detach", torch.detach)
# Where each takes the flag that switches it off.
_FLAGS: dict[Any, int] = {
    F.dropout: 2,
    F.dropout1d: 2,
    F.dropout2d: 2,
    F.dropout3d: 2,
    F.alpha_dropout: 2,
    F.feature_alpha_dropout: 2,
    "torchvision.ops.stochastic_depth.stochastic_depth": 3,
}


@keeps_shapes
def remove_products_with_ones(program: Program) -> list[Change]:
    """Bypass what is the identity in training too: gates that kept every channel they have."""
    changes = _bypass(program, lambda node: _multiplies_ones(node, program), "it multiplies by 1")
    program.module.delete_all_unused_submodules()
    drop_unread_tensors(program, set(program.module._buffers))
    return changes


@keeps_shapes
def remove_no_ops(program: Program) -> list[Change]:
    """Bypass operators that are the identity in evaluation; drop dead code and unused modules."""
    modules = dict(program.module.named_modules())
    changes = _bypass(
        program, lambda node: _is_neutral(node, modules, program), "it does nothing in evaluation"
    )
    program.module.delete_all_unused_submodules()
    drop_unread_tensors(program)
    return changes


def _bypass(program: Program, is_neutral: Callable[[fx.Node], bool], why: str) -> list[Change]:
    """Let users of neutral operators use their inputs, then drop dead code."""
    seen = observe(program)
    overwritten = {node for nodes in seen.mutated.values() for node in nodes}
    changes: list[Change] = []
    for node in list(program.graph.nodes):
        source = _source(node)
        if node in overwritten or node in seen.draws or source is None:
            continue
        if not _are_alike(seen.values[node], seen.values[source]) or not is_neutral(node):
            continue
        if seen.alias[node] is not seen.alias[source] and seen.written(node, source):
            continue  # a copy, of which one is written into
        node.replace_all_uses_with(source)
        node.graph.erase_node(node)
        name = str(node.target) if node.op == "call_module" else node.name
        changes.append(Change(name, f"removed: {why}"))
    changes += _drop_settled_assertions(program)
    seen.drop_dead_code(program.graph)
    return changes


def _are_alike(one: Any, other: Any) -> bool:
    same = one == other
    return same if isinstance(same, bool) else False  # arrays compare number by number


def _source(node: fx.Node) -> fx.Node | None:
    """Return what a node passes on if it is neutral: its first argument, or the only part of it."""
    first: Any = node.args[0] if node.args else None
    if isinstance(first, (list, tuple)) and len(first) == 1:
        first = first[0]
    return first if isinstance(first, fx.Node) else None


def _drop_settled_assertions(program: Program) -> list[Change]:
    """Remove assertions on literals alone, as frozen sizes are: they ran, so they hold."""
    numbers: set[fx.Node] = set()
    changes: list[Change] = []
    for node in list(program.graph.nodes):
        if node.op != "call_function" or not numbers.issuperset(node.all_input_nodes):
            continue
        if node.target is torch._assert:
            changes.append(Change(node.name, "removed: it always holds"))
            program.graph.erase_node(node)
        elif getattr(node.target, "__module__", "") in ("_operator", "math", "builtins"):
            numbers.add(node)
    return changes


def _is_neutral(node: fx.Node, modules: dict[str, nn.Module], program: Program) -> bool:
    if node.op == "call_module":
        module = modules[str(node.target)]
        idle = type(module) in _IDENTITIES or node.meta.get(PASSES)
        return bool(idle) and not module._forward_hooks
    if node.target in _DETACHING:
        return all(_is_detached(user) for user in node.users)
    if node.op != "call_function":
        return False
    if node.target is torch.cat:
        return node.args[0] == [_source(node)]
    place = _FLAGS.get(key_of(node, None))
    if place is not None:
        return _is_off(node, place)
    return _multiplies_ones(node, program)


def _is_detached(node: fx.Node) -> bool:
    """Tell whether nobody reads a result but to detach it: no gradient goes beyond anyway."""
    return bool(node.users) and all(user.target in _DETACHING for user in node.users)


def _is_off(node: fx.Node, place: int) -> bool:
    """Tell whether a functional dropout is off; flags that follow the mode are settled by now."""
    flag: Any = node.kwargs.get("training", node.args[place] if len(node.args) > place else True)
    return flag is False


def _multiplies_ones(node: fx.Node, program: Program) -> bool:
    """Tell whether a product is with a buffer of ones: a gate whose units all stayed."""
    mask = node.args[1] if node.target is torch.mul and len(node.args) > 1 else None
    if not isinstance(mask, fx.Node) or mask.op != "get_attr":
        return False
    buffer = program.module._buffers.get(str(mask.target))
    return isinstance(buffer, Tensor) and bool((buffer == 1).all())


def tensors_read(program: Program) -> set[str]:
    """Return the names of the tensors that a graph reads by themselves, of no module it calls."""
    return {str(node.target) for node in program.graph.nodes if node.op == "get_attr"}


def drop_unread_tensors(program: Program, among: Collection[str] | None = None) -> None:
    """Drop what nobody reads of modules that are only there to hold others: folded scales.

    among: the names of what may go; any if not given.
    """
    used = tensors_read(program)
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_module"}
    inside: set[str] = set()
    for path, module in program.module.named_modules():
        if path in called or path.rpartition(".")[0] in inside:
            inside.add(path)
            continue
        for name in [*module._parameters, *module._buffers]:
            full = f"{path}.{name}".lstrip(".")
            if full not in used and (among is None or full in among):
                delattr(module, name)
