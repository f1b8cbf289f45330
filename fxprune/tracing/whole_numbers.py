"""`int(…)` of what is computed from sizes, and `len(…)` of a tensor, stay numbers of the graph.

    b = int(windows.shape[0] / (h * w / size / size))        side = int(n ** 0.5)        b = len(x)

Python lets an object only say which int it is, and what came of that would hold for the example's
batch alone. So modules that call `int` get one of theirs while they are traced; those that do
anything else with it (`type(x) is int`, `dtype=int`), other than ask for instances, do not.
"""

import builtins
import dis
import functools
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from types import CodeType, FunctionType, ModuleType
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, fx

from fxprune.tracing.stand_ins import StandIn, standing_in
from fxprune.user_models.beside import attribute_of

_DEFINED = (type, FunctionType, type(functools.lru_cache(int)))
_QUESTIONS = ("isinstance", "issubclass")
_known: WeakKeyDictionary[ModuleType, bool] = WeakKeyDictionary()


@contextmanager
def kept_whole(modules: Sequence[ModuleType], tracer: Any) -> Generator[None]:
    """Let modules' `int` and `len` be operators of the graph where they are given traced values.

    tracer: says what a traced number is; while it is `answering` values are what they are.
    """

    def length(value: Any) -> Any:
        traced = issubclass(type(value), fx.Proxy) and not tracer.answering
        of_tensor = traced and issubclass(tracer.class_of(value), Tensor)
        return tracer.first_size(value) if of_tensor else builtins.len(value)

    whole = _Whole("int", (), {"kind": int, "tracer": tracer})
    users: list[tuple[ModuleType, str, Any]] = [(one, "len", length) for one in modules]
    users += [(one, "int", whole) for one in modules if _calls_int(one)]
    with standing_in(*((one, name, ours) for one, name, ours in users if name not in vars(one))):
        yield


class _Whole(StandIn):
    """A class that passes for `int`, and makes a node of what is computed from sizes."""

    tracer: Any

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and issubclass(type(args[0]), fx.Proxy) and not cls.tracer.answering:
            kind = cls.tracer.class_of(args[0])
            if kind in (int, float):
                return cls.tracer.whole_number(args[0])
            if issubclass(kind, Tensor) and _is_whole(cls.tracer.example(args[0])):
                return cls.tracer.whole_element(args[0])
        return builtins.int(*args, **kwargs)


def _is_whole(tensor: Tensor) -> bool:
    """Tell whether a tensor is one whole number."""
    return not tensor.dim() and not tensor.dtype.is_floating_point and not tensor.dtype.is_complex


def _calls_int(module: ModuleType) -> bool:
    """Tell whether functions of a module call `int`, and do with it nothing but that."""
    if module not in _known or module.__name__ == "__main__":
        uses = [use for code in _codes(module) if "int" in code.co_names for use in _uses(code)]
        _known[module] = bool(uses) and all(uses)
    return _known[module]


def _uses(code: CodeType) -> Iterator[bool]:
    """Yield for every time that code reads the global `int` whether it is called, or asked of."""
    callee = ""
    for one in dis.get_instructions(code):
        if one.opname not in ("LOAD_GLOBAL", "LOAD_NAME"):
            continue
        called = "NULL" in one.argrepr
        if one.argval == "int":
            yield called or callee in _QUESTIONS
        elif called:
            callee = str(one.argval)


def _codes(module: ModuleType) -> Iterator[CodeType]:
    """Yield the code of the functions and classes that a module defines."""
    pending: list[Any] = [
        value for value in vars(module).values() if _is_of(value, module.__name__)
    ]
    met: set[int] = set()
    while pending:
        one = pending.pop()
        if id(one) in met:
            continue
        met.add(id(one))
        if isinstance(one, type):
            pending.extend(vars(one).values())
        elif isinstance(one, CodeType):
            yield one
            pending.extend(const for const in one.co_consts if isinstance(const, CodeType))
        else:
            pending.extend(_inside(one))


def _inside(value: Any) -> list[Any]:
    """Return what a function, or something around functions, is made of."""
    functions: list[Any] = [attribute_of(value, "__func__")]
    if isinstance(value, property):
        functions += [value.fget, value.fset]
    functions.append(_unwrapped(value))
    codes = [attribute_of(function, "__code__") for function in functions]
    return [code for code in codes if isinstance(code, CodeType)]


def _unwrapped(value: Any) -> Any:
    """Return what decorators were put around."""
    met: set[int] = set()
    while id(value) not in met:
        met.add(id(value))
        value = attribute_of(value, "__wrapped__") or value
    return value


def _is_of(value: Any, name: str) -> bool:
    return isinstance(value, _DEFINED) and value.__module__ == name
