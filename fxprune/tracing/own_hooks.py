"""Forward hooks that a model's own code has put on its parts: traced, as its forwards are.

    def collect(module, args, output):
        if (found := COLLECTOR.get()) is not None: found.append(output)

They are part of what the model computes: transformers collects hidden states so, and leaves the
hooks where they are when nobody collects. Whoever only listens (a logger, a printer) must go on
listening: hooks of other packages, and those that call anything but the model's code and torch, are
none of these. What they write into is watched like what forwards write (`user_models.beside`).
"""

import functools
import sys
from collections.abc import Callable, Collection, Generator
from contextlib import contextmanager
from types import FrameType, FunctionType, ModuleType
from typing import Any

from torch import nn

from fxprune.errors import TraceError

HOOKED = "it has hooks, which a trace would call once; remove them first, and add them again then"
# Built-in functions that do something beside returning, and whose methods do not.
_DOING = (print, open, input, exec, eval, __import__, setattr, delattr)
_ASKED = {"builtins", "_contextvars", "collections", "_operator", "math", "itertools", "functools"}


@contextmanager
def hooks_traced(module: nn.Module, packages: Collection[str]) -> Generator[None]:
    """Let a module be called with its hooks; `TraceError` for those that are not of `packages`.

    And where one calls what is of neither of these nor of torch, or removes one.
    """
    kinds: Any = (module._forward_hooks, module._forward_pre_hooks)
    if module._backward_hooks or module._backward_pre_hooks:
        raise TraceError(HOOKED)
    if not all(_is_of(hook, packages) for hooks in kinds for hook in hooks.values()):
        raise TraceError(HOOKED)
    before = [dict(hooks) for hooks in kinds]
    watched = [{key: _watched(hook, packages) for key, hook in held.items()} for held in before]
    for hooks, held in zip(kinds, watched, strict=True):
        hooks.update(held)
    try:
        yield
        if any(hooks.keys() != held.keys() for hooks, held in zip(kinds, before, strict=True)):
            raise TraceError(HOOKED)
    finally:
        for hooks, held in zip(kinds, before, strict=True):
            hooks.clear()
            hooks.update(held)


def _is_of(hook: Any, packages: Collection[str]) -> bool:
    return isinstance(hook, FunctionType) and _package(hook.__module__) in packages


def _watched(hook: Callable[..., Any], packages: Collection[str]) -> Callable[..., Any]:
    """Let a hook raise `TraceError` where its own code calls a stranger."""

    @functools.wraps(hook)
    def watched(*args: Any, **kwargs: Any) -> Any:
        strangers: list[Any] = []

        def notice(frame: FrameType, event: str, arg: Any) -> None:
            if event == "call" and frame.f_back is not None and is_own(frame.f_back):
                if not is_own(frame) and _package_of(frame) not in ("torch", "fxprune"):
                    strangers.append(frame.f_code)
            elif event == "c_call" and is_own(frame) and not _only_returns(arg):
                strangers.append(arg)

        def is_own(frame: FrameType) -> bool:
            return _package_of(frame) in packages

        before = sys.getprofile()
        sys.setprofile(notice)
        try:
            result = hook(*args, **kwargs)
        finally:
            sys.setprofile(before)
        if strangers:
            raise TraceError(HOOKED)
        return result

    return watched


def _only_returns(function: Any) -> bool:
    """Tell whether a built-in function, or method of an object, does nothing that a trace loses."""
    owner = getattr(function, "__self__", None)
    if owner is None or isinstance(owner, ModuleType):
        kind = getattr(function, "__module__", None) or _package(type(function).__module__)
    else:
        kind = (owner if isinstance(owner, type) else type(owner)).__module__
    return function not in _DOING and _package(kind) in {*_ASKED, "torch"}


def _package_of(frame: FrameType) -> str:
    return _package(frame.f_globals.get("__name__", ""))


def _package(name: str | None) -> str:
    return (name or "").partition(".")[0]
