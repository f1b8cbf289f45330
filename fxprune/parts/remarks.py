"""What a report says of a part of a model besides what passes did to it."""

from collections.abc import Iterator
from typing import Any

from torch import fx, nn

from fxprune.parts.regions import Region
from fxprune.programs.pipeline import Change
from fxprune.runtime.parameter_tags import renamed_path
from fxprune.tracing.notes import noted
from fxprune.user_models.naming import renamed_in

_OVERWRITTEN = (
    "the model overwrites this argument, which the result may leave as it was: its outputs are the "
    "same, but do not count on what is in the argument after a call"
)
_NOTED = "is set by every call, as the model does; what is finalised sets no attributes"
_FORGOTTEN = (
    "is set by the model's forward, not by the result: let the forward return what is to be read"
)
_UNREAD = "no forward reads it, so that the gated model has none; train what reads it by itself"
_NESTED = (
    "is a class inside of another, which the code that torch.fx writes into a file cannot import: "
    "saved whole, the result cannot be loaded; move the class to the top of its module, or save "
    "the state_dict"
)
EVALUATION_ONLY = (
    "not as in the model, which runs other operators then: gated, it computes in training what it "
    "does in evaluation, only batch norms and dropout modules follow the mode"
)


def renaming(region: Region) -> dict[str, list[Change]]:
    """Return what to report of parts whose names are taken."""
    renamed: dict[str, str] = region.program.module.meta.get("renamed", {})
    changes = [Change(old, f"is called {new}: its name is taken") for old, new in renamed.items()]
    return {"renaming": changes} if changes else {}


def overwritten(region: Region) -> list[Change]:
    """Return what to report of arguments that the model overwrites: its result may not."""
    names: list[str] = region.program.module.meta.get("overwrites", [])
    return [Change(name, _OVERWRITTEN) for name in names]


def notes(region: Region) -> dict[str, list[Change]]:
    """Return what to report of attributes that are set by every call."""
    program = region.program
    names = noted(program.graph)
    if program.in_training is not None:
        names |= noted(program.in_training.program.graph)
    changes = [Change(name, _NOTED) for name in sorted(names)]
    return {"notes": changes} if changes else {}


def forgotten(region: Region) -> list[Change]:
    """Return what to report of attributes that are not set any more."""
    return [Change(name, _FORGOTTEN) for name in region.program.module.meta.get("forgotten", [])]


def unread(model: nn.Module, gated: nn.Module) -> list[Change]:
    """Return what to report of parameters that the model has, and what was gated has not."""
    renamed = renamed_in(gated)
    names = {name for name, _ in gated.named_parameters(remove_duplicate=False)}
    found = list(model.named_parameters(remove_duplicate=False))
    there = {id(tensor) for name, tensor in found if renamed_path(name, renamed) in names}
    occupied = {path for name, tensor in found if id(tensor) in there for path in _around(name)}
    missing = [name for name, tensor in found if id(tensor) not in there]
    # As large a module as holds nothing that is there.
    places = dict.fromkeys(
        next((path for path in _around(name) if path not in occupied), name) for name in missing
    )
    return [Change(place, _UNREAD) for place in places]


def _around(name: str) -> list[str]:
    """Return the paths of the modules around a parameter, the largest first."""
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts))]


def unloadable(region: Region) -> list[Change]:
    """Return what to report of classes that a saved graph module could not name."""
    found = {kind for node in region.program.graph.nodes for kind in _classes(node)}
    names = (kind.__qualname__ for kind in found)
    return [Change(name, _NESTED) for name in sorted(names) if "." in name and "<" not in name]


def _classes(node: fx.Node) -> Iterator[type]:
    """Yield the classes that a node makes an object of, and those of tuples in its arguments."""
    if isinstance(node.target, type):
        yield node.target
    waiting: list[Any] = [*node.args, *node.kwargs.values()]
    while waiting:
        value = waiting.pop()
        if isinstance(value, (tuple, list)):
            yield type(value)
            waiting += value
        elif isinstance(value, dict):
            waiting += value.values()


def modes(region: Region) -> dict[str, list[Change]]:
    """Return what to report of modules that do not follow `train`, as the model says."""
    modes: dict[str, bool] = region.program.module.meta.get("modes", {})
    changes = [
        Change(
            path, f"stays in {'training' if stays else 'evaluation'}, as the model's train() says"
        )
        for path, stays in sorted(modes.items())
    ]
    return {"modes": changes} if changes else {}
