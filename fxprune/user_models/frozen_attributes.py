"""Plain attributes of a model, which its trace holds as the values that they had.

    model.temperature = 0.5        model.blocks.drop_path_rate = 0.2

Set on a traced model such an attribute would be read by nobody. So it says what it was, and what to
do instead. What torch and others set on any module, and what the model never had, may be set.

A graph module has a class of its own, and lets its copies have the same; modules that only hold
others get one, and are plain modules to pickle. What was saved and loaded refuses nothing.
"""

from collections.abc import Collection
from typing import Any

from torch import Tensor, fx, nn

from fxprune.errors import TraceError
from fxprune.runtime.kinds import MADE_BY_TRACING

_PLAIN = (bool, int, float, complex, str, type(None))
_KEPT = "_as_traced"
_TENSOR = "a tensor"


def attributes_of(root: nn.Module, traced: fx.GraphModule) -> dict[str, dict[str, Any]]:
    """Return the plain attributes of a model, by the paths of the parts that were traced into."""
    free = {
        path: _plain_attributes(root.get_submodule(path))
        for path, module in traced.named_modules()
        if not path or type(module) is nn.Module
    }
    return {path: attributes for path, attributes in free.items() if attributes}


def freeze_(model: nn.Module) -> None:
    """Let the graph modules in a model refuse what `attributes_of` found when they were traced."""
    for module in [one for one in model.modules() if isinstance(one, fx.GraphModule)]:
        frozen: dict[str, dict[str, Any]] = module.meta.get(_KEPT, {})
        if frozen:
            _freeze_one_(module, frozen)


def note_(traced: fx.GraphModule, root: nn.Module, *, but: Collection[str]) -> None:
    """Note in a trace what the attributes of its model are, `but` those that its calls set."""
    traced.meta[_KEPT] = {
        path: {name: one for name, one in held.items() if f"{path}.{name}".lstrip(".") not in but}
        for path, held in attributes_of(root, traced).items()
    }


def _freeze_one_(module: fx.GraphModule, frozen: dict[str, dict[str, Any]]) -> None:
    kind: Any = type(module)  # nobody else's: torch.fx makes one for each
    kind.__setattr__, kind.__deepcopy__ = _set_on_graph, _copy_graph
    for path in filter(None, frozen):
        part = _part(module, path)
        if type(part) is nn.Module:
            vars(part)[_KEPT] = {"path": path, "attributes": frozen[path]}
            part.__class__ = _Part


def _part(module: nn.Module, path: str) -> nn.Module | None:
    """Return what is at a path, None if nothing is left of it."""
    part: Any = module
    for name in path.split("."):
        part = part and part._modules.get(name)
    return part


class _Part(nn.Module):
    """A module that holds others, and refuses to be given other attributes than it had."""

    def __setattr__(self, name: str, value: Any) -> None:
        kept = vars(self).get(_KEPT)
        if kept:
            _require_same(self, kept["path"], kept["attributes"], name, value)
        super().__setattr__(name, value)

    def __reduce_ex__(self, protocol: Any) -> Any:
        state = {key: value for key, value in vars(self).items() if key != _KEPT}
        return nn.Module, (), state


def _set_on_graph(module: fx.GraphModule, name: str, value: Any) -> None:
    frozen = vars(module).get("meta", {}).get(_KEPT, {}).get("", {})
    _require_same(module, "", frozen, name, value)
    fx.GraphModule.__setattr__(module, name, value)


def _copy_graph(module: fx.GraphModule, memo: dict[int, Any]) -> fx.GraphModule:
    twin = fx.GraphModule.__deepcopy__(module, memo)
    freeze_(twin)
    return twin


def _require_same(
    module: nn.Module, path: str, frozen: dict[str, Any], name: str, value: Any
) -> None:
    """Raise `TraceError` unless a plain attribute is given the value that it had.

    A tensor may be a buffer of the trace, which reads it by its name.
    """
    if name not in frozen or isinstance(value, (nn.Module, nn.Parameter)):
        return
    if name in module._buffers:
        return
    before = frozen[name]
    if isinstance(value, Tensor) or type(before) is not type(value) or before != value:
        was = before if before == _TENSOR else repr(before)
        raise TraceError(
            f"{path}{'.' if path else ''}{name} was {was} when the model was traced, and setting "
            "it now would change nothing: make it a buffer of the original model, or set it there "
            "and instrument that again"
        )


def _plain_attributes(module: nn.Module) -> dict[str, Any]:
    kinds = [kind for kind in reversed(type(module).__mro__) if _is_users(kind)]
    held = {k: v for kind in kinds for k, v in vars(kind).items() if _is_settable(v)} | vars(module)
    return {
        name: _TENSOR if isinstance(value, Tensor) else value
        for name, value in held.items()
        if name not in _MACHINERY
        and not name.startswith(("__", MADE_BY_TRACING))
        and _is_settable(value)
    }


def _is_settable(value: Any) -> bool:
    if type(value) in (tuple, list):
        return all(map(_is_settable, value))
    return isinstance(value, (*_PLAIN, Tensor))


def _is_users(kind: type) -> bool:
    return kind.__module__.partition(".")[0] not in ("torch", "builtins")


_MACHINERY = frozenset(
    {*dir(fx.GraphModule), *vars(nn.Module()), *vars(fx.GraphModule(nn.Module(), fx.Graph()))}
)
