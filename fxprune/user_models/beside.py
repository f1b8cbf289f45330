"""What the code of a model can reach beside the model: by its globals and closures.

    LOG: list[Tensor] = []        def forward(self, x): … LOG.append(h)        RECORDER.add(h)

From `forward` on, by the names that code says: functions, classes, and objects of the packages that
the model's classes are of, and containers of anybody's.
"""

import functools
import gc
import inspect
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import CellType, CodeType, FunctionType, ModuleType
from typing import Any

from torch import fx, nn

from fxprune.user_models.containers import Contents
from fxprune.user_models.deeds import place_of

_CONTAINERS = (dict, list, set, deque)
# What `functools.lru_cache` makes of a function: it remembers what that returned.
_Remembering: Any = type(functools.lru_cache(int))
# What of it is looked into for traced values, and these.
_LOOKED_INTO = (tuple, *_CONTAINERS, fx.Proxy)


class Beside(Contents):
    """What containers and objects hold that the code of a model can reach by names."""

    def __init__(self, root: nn.Module) -> None:
        search = _Search(list(root.modules()))
        super().__init__(search.run(), search.is_users, memos=True)
        self.functions, self.remembering = search.functions, search.remembering
        self.packages = search.packages
        self.remembering_as = search.remembering_as

    def forget_traced(self) -> None:
        """Clear what functions remember of a trace: the model would be given it for its own."""
        for _, function in self.remembering:
            if _holds_traced(function):
                function.cache_clear()

    def place(self, name: str) -> str:
        """Return where code writes into something, or says its name."""
        return place_of(self.functions, name.rpartition(".")[2])


@contextmanager
def forgetful(models: Sequence[nn.Module]) -> Generator[None]:
    """Let functions that remember what they returned run anew, and remember nothing.

    They would give a model in float64 what they made for one in float32, and the other way round.
    """
    search = _Search([part for model in models for part in model.modules()])
    search.run()
    with search.remembering_as(lambda function: function.__wrapped__):
        yield


def names_said(parts: Sequence[nn.Module]) -> set[str]:
    """Return the names that code of the classes of modules says, and functions that it calls.

    Whoever calls it, if not for the making of a module, which is done.
    """
    search = _Search(parts)
    for name, functions in list(search.by_name.items()):
        for one in functions if name != "__init__" else ():
            search.meet_function(name, one)
    search.run()
    return {name for one in search.functions for name in names_in(one)}


class _Search:
    def __init__(self, parts: Sequence[nn.Module]) -> None:
        kinds = {kind for one in set(map(type, parts)) for kind in one.__mro__}
        self.packages = {_package(kind) for kind in kinds} - _NOT_THE_USERS
        self.found: list[tuple[str, Any]] = []
        self.by_name: dict[str, list[Any]] = {}
        self.said: set[str] = {"forward"}
        self.met: set[int] = set()
        self.waiting: list[FunctionType] = []
        self.functions: list[FunctionType] = []
        # And how to put something else in their place.
        self.remembering: list[tuple[Callable[[Any], None], Any]] = []
        for kind in kinds:
            self._meet_class(kind)
        for part in parts:
            hooks = (*part._forward_hooks.values(), *part._forward_pre_hooks.values())
            for value in (*vars(part).values(), *hooks):
                if isinstance(value, FunctionType):
                    self._meet("", value, ())

    def run(self) -> list[tuple[str, Any]]:
        """Return containers and objects, by name."""
        while self.waiting:
            function = self.waiting.pop()
            self.functions.append(function)
            names = names_in(function)
            for name in names - self.said:
                self.said.add(name)
                for one in self.by_name.get(name, ()):
                    self._meet(name, one, ())
            known = function.__globals__
            for name in names & known.keys():
                self._note(known[name], partial(known.__setitem__, name))
                self._meet(name, known[name], names)
            for name, cell, value in _closed_over(function):
                self._note(value, partial(setattr, cell, "cell_contents"))
                self._meet(name, value, names)
        return self.found

    @contextmanager
    def remembering_as(self, stand_in: Callable[[Any], Any]) -> Generator[None]:
        """Let something stand in for every function that remembers what it returned."""
        places = [(put, function, stand_in(function)) for put, function in self.remembering]
        try:
            for put, _, other in places:
                put(other)
            yield
        finally:
            for put, function, _ in places:
                put(function)

    def is_users(self, value: Any) -> bool:
        """Tell whether something is, or is an object, of a package that the model is of."""
        kind = value if isinstance(value, (type, FunctionType)) else type(value)
        return _package(kind) in self.packages

    def meet_function(self, name: str, function: FunctionType) -> None:
        """Take a function into the search that nobody may have named."""
        self._meet(name, function, ())

    def _meet(self, name: str, value: Any, names: Any) -> None:
        if id(value) in self.met:
            return
        if isinstance(value, ModuleType):
            if value.__name__.partition(".")[0] in self.packages:
                for one in names & vars(value).keys():
                    self._note(vars(value)[one], partial(setattr, value, one))
                    self._meet(f"{name}.{one}", vars(value)[one], names)
            return
        self.met.add(id(value))
        if isinstance(value, _CONTAINERS):
            self.found.append((name, value))
        elif isinstance(value, _Remembering):
            self._meet(name, value.__wrapped__, names)
        elif isinstance(value, FunctionType):
            if self.is_users(value):
                self.waiting.append(value)
        elif isinstance(value, type):
            self._meet_class(value)
        elif self.is_users(value) and not isinstance(value, nn.Module):
            self.found.append((name, value))
            self._meet_class(type(value))

    def _meet_class(self, kind: type) -> None:
        if not self.is_users(kind):
            return
        for name, value in vars(kind).items():
            if isinstance(value, _CONTAINERS) and not name.startswith("__"):
                self._meet(f"{kind.__name__}.{name}", value, ())
            self._note_method(kind, name, value)
            function = _function(value)
            if function is not None:
                self.by_name.setdefault(name, []).append(function)
                if name in self.said or name == "__call__":
                    self._meet(name, function, ())

    def _note_method(self, kind: type, name: str, value: Any) -> None:
        """Note a method that remembers, and one that another wraps, which closes over it."""
        if isinstance(value, (staticmethod, classmethod)):
            wrap = type(value)
            self._note(value.__func__, lambda other: setattr(kind, name, wrap(other)))
        else:
            self._note(value, partial(setattr, kind, name))
        while (inner := attribute_of(value, "__wrapped__")) is not None:
            for _, cell, one in _closed_over(value) if isinstance(value, FunctionType) else ():
                self._note(one, partial(setattr, cell, "cell_contents"))
            value = inner

    def _note(self, value: Any, put: Callable[[Any], None]) -> None:
        if isinstance(value, _Remembering):
            self.remembering.append((put, value))


def attribute_of(value: Any, name: str) -> Any:
    """Return what anything has under a name; None if it has nothing, and is not asked for it.

    Stand-ins for packages that are not installed raise errors of their own at whatever name.
    """
    has_none = inspect.getattr_static(value, name, None) is None
    return None if has_none else getattr(value, name, None)


def _function(value: Any) -> FunctionType | None:
    """Return the function of a method, class method or property."""
    for name in ("__func__", "fget", "__wrapped__"):
        value = attribute_of(value, name) or value
    return value if isinstance(value, FunctionType) else None


def _holds_traced(function: Any) -> bool:
    """Tell whether a traced value is among what a function was called with and returned.

    Python's collector is told of both; nobody else is.
    """
    waiting = [one for one in gc.get_referents(function) if isinstance(one, _LOOKED_INTO)]
    met: set[int] = set()
    while waiting:
        one = waiting.pop()
        if isinstance(one, fx.Proxy):
            return True
        if id(one) not in met:
            met.add(id(one))
            waiting += [held for held in gc.get_referents(one) if isinstance(held, _LOOKED_INTO)]
    return False


def names_in(function: FunctionType) -> set[str]:
    """Return the names that the code of a function says: globals, attributes, what it imports."""
    return set(_names(function.__code__))


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for one in code.co_consts:
        if isinstance(one, CodeType):
            yield from _names(one)


def _closed_over(function: FunctionType) -> Iterator[tuple[str, CellType, Any]]:
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield name, cell, cell.cell_contents
        except ValueError:  # nothing is in it yet
            continue


def _package(kind: Any) -> str:
    return (getattr(kind, "__module__", None) or "").partition(".")[0]


_NOT_THE_USERS = {"torch", "builtins", "fxprune", "collections", "typing", "abc", ""}
