"""Verbs analyse on the CPU, whatever device `torch.set_default_device` names for new tensors.

Models run where their weights are. What their own code makes without naming a device lies on the
CPU meanwhile, as it would without a default.
"""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

_P = ParamSpec("_P")
_R = TypeVar("_R")


def on_cpu(verb: Callable[_P, _R]) -> Callable[_P, _R]:
    """Let a verb make its own tensors on the CPU."""

    @wraps(verb)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        if torch.get_default_device().type == "cpu":  # every call would pass through a mode
            return verb(*args, **kwargs)
        with torch.device("cpu"):
            return verb(*args, **kwargs)

    return call
