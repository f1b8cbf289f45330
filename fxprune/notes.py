"""What a forward leaves in attributes for others to read: losses of parts, attention maps.

    self.balance = load.square().mean()  # in the training loop: loss + model.experts.balance

A gated model leaves them there as well, by an operator without a result that reads what the
attribute holds. Nothing is planned by them: what is finalised leaves none.
"""

from collections.abc import Iterator
from typing import Any

from torch import fx, nn
from torch.fx.node import has_side_effect


class _Owner:
    """Stands in a graph for the module that runs it; its code says `self`."""

    def __repr__(self) -> str:
        return "self"

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Owner":
        return self

    def __reduce__(self) -> str:
        return "OWNER"


OWNER = _Owner()


@has_side_effect
def leave_note(owner: Any, path: str, value: Any) -> None:
    """Set an attribute of a part; an interpreter, which has no module to give, sets none."""
    if not isinstance(owner, nn.Module):
        return
    *way, name = path.split(".")
    for part in way:
        if not hasattr(owner, part):  # of what has no tensors nothing else is left
            setattr(owner, part, nn.Module())
        owner = getattr(owner, part)
    setattr(owner, name, value)


def notes_in(graph: fx.Graph) -> list[fx.Node]:
    """Return the nodes that set attributes."""
    return graph.find_nodes(op="call_function", target=leave_note)


def noted(graph: fx.Graph) -> set[str]:
    """Return the attributes that a graph sets, as "part.name"."""
    return {str(node.args[1]) for node in notes_in(graph)}


def left_in(module: nn.Module, paths: set[str]) -> dict[str, Any]:
    """Return what attributes hold, by "part.name"."""
    return {f"{path}.{name}".lstrip("."): value for path, name, _, value in _held(module, paths)}


def erase_notes_(module: nn.Module, paths: set[str]) -> None:
    """Delete attributes that a run has set."""
    for _, name, part, _ in list(_held(module, paths)):
        del vars(part)[name]


def _held(module: nn.Module, paths: set[str]) -> Iterator[tuple[str, str, nn.Module, Any]]:
    parts = dict(module.named_modules())
    for full in sorted(paths):
        path, _, name = full.rpartition(".")
        part = parts.get(path)
        if part is not None and name in vars(part):
            yield path, name, part, vars(part)[name]
