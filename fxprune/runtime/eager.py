"""Whether operators run as they are called, and letting them do so.

Functions may do several at once where they do; what a user compiled is looked into.
"""

import sys
from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch

_P = ParamSpec("_P")
_R = TypeVar("_R")


def is_eager() -> bool:
    """Tell whether nothing compiles or traces operators, or maps them over samples.

    A compiler fuses by itself, and `torch.func` and what traces should see plain operators.
    """
    tracing: Any = torch.jit.is_tracing  # pyright: ignore[reportPrivateImportUsage]
    transforms: Any = torch._C._are_functorch_transforms_active  # pyright: ignore[reportPrivateUsage]
    return not torch.compiler.is_compiling() and not transforms() and not tracing()


def uncompiled(verb: Callable[_P, _R]) -> Callable[_P, _R]:
    """Let functions that a model compiled for itself run, and be traced, as the Python they are.

    Inference mode is left: its tensors tell nobody that they were written to, nor can be trained.
    """

    @wraps(verb)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        if torch.is_inference_mode_enabled():
            with torch.inference_mode(False):
                return call(*args, **kwargs)
        dynamo: Any = sys.modules.get("torch._dynamo")
        if dynamo is None:  # nobody compiled anything
            return verb(*args, **kwargs)
        patch = dynamo.config.patch(error_on_nested_fx_trace=False)
        with torch.compiler.set_stance("force_eager"), patch:
            return verb(*args, **kwargs)

    return call
