"""One verb at a time: while a model is traced names of torch's stand for something else.

Two threads that trace at once would each put back what the other had put there.
"""

import threading
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

_P = ParamSpec("_P")
_R = TypeVar("_R")
_turn = threading.RLock()  # verbs call verbs


def in_turn(verb: Callable[_P, _R]) -> Callable[_P, _R]:
    """Let a verb wait for those that other threads have called."""

    @wraps(verb)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        with _turn:
            return verb(*args, **kwargs)

    return call
