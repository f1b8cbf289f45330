"""Names that mean something else in a graph module: a model's own parts of that name get another.

Graph modules have a `graph`, a `code`, a `meta`; what fxprune returns has `gates`, `penalties` and
a `report`; and code cannot say `self.lambda`. Only names at the top of what is traced matter.
"""

import keyword
from typing import Any

import torch
from torch import fx, nn

from fxprune.user_models.modules import free_name

OURS = ("gates", "penalties", "report", "_fxprune")


def _reserved() -> frozenset[str]:
    empty = fx.GraphModule(nn.Module(), fx.Graph())
    of_graphs = {*dir(fx.GraphModule), *vars(empty)} - {*dir(nn.Module), *vars(nn.Module())}
    return frozenset({*of_graphs, *OURS, "self", *keyword.kwlist})


RESERVED = _reserved()


def free_names_(root: nn.Module) -> dict[str, str]:
    """Rename what `root` itself holds under a reserved name; return the new names by the old.

    Its forward finds everything under the old names still.
    """
    if isinstance(root, (fx.GraphModule, torch.jit.ScriptModule)):
        return {}  # their names are said already
    held: list[dict[str, Any]] = [root._modules, root._parameters, root._buffers]
    taken = sorted(name for parts in held for name in parts if name in RESERVED)
    renamed = {name: free_name(root, f"{name}_") for name in taken}
    if not renamed:
        return {}
    for parts in held:
        entries = [(renamed.get(name, name), part) for name, part in parts.items()]
        parts.clear()  # their order is that of the parameters
        parts.update(entries)
    unsaved = root._non_persistent_buffers_set
    root._non_persistent_buffers_set = {renamed.get(name, name) for name in unsaved}
    kind = type(root)
    aliases = {old: property(_reading(new)) for old, new in renamed.items()}
    root.__class__ = type(kind.__name__, (kind,), {"__module__": kind.__module__, **aliases})
    return renamed


def _reading(name: str) -> Any:
    return lambda module: getattr(module, name)


def renamed_in(module: nn.Module) -> dict[str, str]:
    """Return the new paths of what was renamed in a traced model or its regions, by the old."""
    found: dict[str, str] = {}
    for path, part in module.named_modules():
        meta: Any = vars(part).get("meta")  # a class of the user's may have another
        names: dict[str, str] = meta.get("renamed", {}) if isinstance(meta, dict) else {}
        prefix = f"{path}." if path else ""
        found |= {prefix + old: prefix + new for old, new in names.items()}
    return found
