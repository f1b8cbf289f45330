"""What a forward writes into its arguments and into what lies beside the model, told by a run.

    cache.append(k)        outputs["hidden"] = h        x.add_(1)        LOG.append(h)

A trace takes lists and dicts apart, and what it writes there is written once. Tensors are another
matter: what is computed of an overwritten one is in the graph, whether it is overwritten or not.
"""

import dis
import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import CodeType
from typing import Any

import torch
from torch import Tensor

from fxprune.user_models.containers import Contents
from fxprune.user_models.inputs import tensors_of

ADDING = frozenset(
    "append appendleft extend insert update clear pop popleft popitem setdefault add remove "
    "discard".split()
)
_WRITING = {*ADDING, "STORE_SUBSCR", "DELETE_SUBSCR", "STORE_ATTR", "DELETE_ATTR"}


def contents_of(arguments: Mapping[str, Any]) -> Contents:
    """Return what lists, dicts and objects among arguments hold, by the arguments' names."""
    return Contents(arguments.items(), lambda value: True)


@dataclass(frozen=True)
class Given:
    """Arguments by their names, and what they were before a forward saw them."""

    arguments: Mapping[str, Any]
    before: Mapping[str, Any]
    contents: Contents

    def overwritten(self) -> list[str]:
        """Return the names of the arguments with tensors that hold other numbers now."""
        return [
            name
            for name, value in self.arguments.items()
            if any(map(_differ, tensors_of(value), tensors_of(self.before[name])))
        ]


def written_into(name: str, place: str = "") -> str:
    """Return what to say of a forward that writes into an argument."""
    return (
        f"its forward writes into its argument {name!r} (a list, a dict, an attribute){place}, "
        "which a trace would do once for all; return such values instead"
    )


def written_beside(name: str, place: str = "") -> str:
    """Return what to say of a forward that writes into what is no part of the model."""
    return (
        f"its forward writes into {name!r} beside the model{place}, which a trace would do once "
        "for all; return such values instead, or let a submodule do so, which is kept whole then"
    )


def place_of(functions: Iterable[Any], name: str) -> str:
    """Return " at file:line", where code writes into what it calls `name`, or first says that."""
    said = ""
    for function in functions:
        code = getattr(inspect.unwrap(function), "__code__", None)
        for line, words in _lines(code) if code else ():
            if name in words and code is not None:
                place = f" at {code.co_filename}:{line}"
                if not words.isdisjoint(_WRITING):
                    return place
                said = said or place
    return said


def _lines(code: CodeType) -> list[tuple[int, set[Any]]]:
    """Return the lines of a function, with the operators and the names in each."""
    found: dict[int, set[Any]] = {}
    line = code.co_firstlineno
    for one in dis.get_instructions(code):
        positions = one.positions
        line = (positions.lineno if positions else None) or line
        names: Any = one.argval if isinstance(one.argval, tuple) else (one.argval,)
        found.setdefault(line, set()).update((one.opname, *names))
    return sorted(found.items())


def _differ(now: Tensor, before: Tensor) -> bool:
    if now.shape != before.shape or now.dtype != before.dtype or now.layout != torch.strided:
        return now.shape != before.shape or now.dtype != before.dtype
    return not torch.equal(now, before) and not torch.equal(now.nan_to_num(), before.nan_to_num())
