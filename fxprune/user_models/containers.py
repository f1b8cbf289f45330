"""What lists, dicts, sets and objects hold before code is traced, and whether it writes into them.

    cache.append(k)        outputs["hidden"] = h        state.last = h        LOG.clear()

No graph does so: a trace would write once for all, and leave proxies behind.
"""

from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

_KINDS = (OrderedDict, dict, list, set, deque)
_NO_OBJECTS = (
    *(type, ModuleType, FunctionType, MethodType, BuiltinFunctionType),
    *(nn.Module, Tensor, fx.Proxy, fx.Node),
)
# What is longer (a vocabulary) is believed to be what it was while it is as long.
_LONG = 1000


@dataclass(frozen=True)
class _Container:
    """A container, what it held, and whether it may be a memo: a table that code adds to."""

    name: str
    held: Any
    before: Any
    may_be_memo: bool

    def is_written(self) -> bool:
        """Tell whether it holds something else now."""
        if len(self.held) != len(self.before) and not isinstance(self.held, dict):
            return True
        if isinstance(self.held, dict):
            return self._is_written_dict()
        if len(self.before) > _LONG or isinstance(self.held, set):
            return False
        return any(now is not one for now, one in zip(self.held, self.before, strict=True))

    def put_back(self) -> None:
        """Let it hold what it held."""
        kind: Any = next(one for one in _KINDS if isinstance(self.held, one))
        kind.clear(self.held)  # a user's class may refuse to
        put: Any = kind.extend if hasattr(kind, "extend") else kind.update
        put(self.held, self.before)

    def _is_written_dict(self) -> bool:
        if len(self.held) == len(self.before) and len(self.before) > _LONG:
            return False
        now = dict(dict.items(self.held))
        if any(now.get(key, self) is not value for key, value in self.before.items()):
            return True
        added = now.keys() - self.before.keys()
        return any(not (self.may_be_memo and _is_memo(key, now[key])) for key in added)


class Contents:
    """What containers hold, and the containers and objects in them."""

    def __init__(
        self,
        named: Iterable[tuple[str, Any]],
        is_object: Callable[[Any], bool],
        *,
        memos: bool = False,
    ) -> None:
        """Remember what is in them.

        is_object: which objects to look into. memos: entries that are added to a dict by what code
        looks up there are no matter.
        """
        self.containers: list[_Container] = []
        waiting, met = list(named), set[int]()
        while waiting:
            name, value = waiting.pop()
            if id(value) in met:
                continue
            met.add(id(value))
            held = _held(value, is_object)
            if held is None:
                continue
            if not isinstance(held, tuple):
                memo = memos and held is value
                self.containers.append(_Container(name, held, _copy(held), memo))
            if len(held) <= _LONG:
                waiting += [(name, one) for one in _values(held)]

    def written(self) -> str:
        """Return the name of what is written into, "" if nothing is."""
        return next((one.name for one in self.containers if one.is_written()), "")

    def put_back(self) -> None:
        """Take out again what was written; memos stay where nothing traced is in them."""
        for one in self.containers:
            if one.is_written() or has_proxies(one.held):
                one.put_back()


def _held(value: Any, is_object: Callable[[Any], bool]) -> Any:
    """Return the container that a value is or, as an object, has; None if there is none."""
    if isinstance(value, (*_KINDS, tuple)):
        return value
    if isinstance(value, _NO_OBJECTS) or not is_object(value):
        return None
    return getattr(value, "__dict__", None)


def _copy(held: Any) -> Any:
    """Copy a container by its entries: a user's class may have ideas of its own."""
    return dict(dict.items(held)) if isinstance(held, dict) else [*held]


def _values(held: Any) -> list[Any]:
    return list(dict.values(held) if isinstance(held, dict) else held)


def _is_memo(key: Any, value: Any) -> bool:
    """Tell whether an entry that code added is a memo: by a traced size, or of what it made once.

    Numbers by a name are counts and notes.
    """
    if isinstance(key, fx.Proxy) or has_proxies(key):
        return True
    plain = value is None or isinstance(value, (bool, int, float, str))
    return not has_proxies(value) and not (plain and isinstance(key, str))


def has_proxies(value: Any) -> bool:
    """Tell whether something that is being traced is in a structure, at the keys of a dict too."""
    parts = [*value, *dict.values(value)] if isinstance(value, dict) else value
    return any(isinstance(leaf, fx.Proxy) for leaf in pytree.tree_leaves(parts))
