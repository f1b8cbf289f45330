"""Functions compiled by `torch.jit.script`, traced as the Python they were compiled from."""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from fxprune.tracing.stand_ins import standing_in

# Where torch keeps that Python, for its own compiler to look into.
_PYTHON = "_torchdynamo_inline"


@contextmanager
def inlined(tracer: Any) -> Generator[None]:
    """Let scripted functions that are called with traced values run as Python.

    tracer: while it is `answering`, scripts run as they are.
    """
    kind: Any = torch.jit.ScriptFunction
    compiled: Any = kind.__call__

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        python = getattr(self, _PYTHON, None)
        traced = any(isinstance(leaf, fx.Proxy) for leaf in pytree.tree_leaves((args, kwargs)))
        function = python if traced and python is not None and not tracer.answering else None
        return compiled(self, *args, **kwargs) if function is None else function(*args, **kwargs)

    with standing_in((kind, "__call__", call)):
        yield
