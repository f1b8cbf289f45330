"""`torch.finfo(x.dtype)` of what is traced stays a question of the graph, whatever runs in it.

    scores.masked_fill(mask, torch.finfo(scores.dtype).min)

Torch's own takes no proxy. The example's dtype would not do instead: under autocast scores have
another, whose least number is another.
"""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx

LIMITS: tuple[type, ...] = (torch.finfo, torch.iinfo)


@contextmanager
def asking_for_limits(tracer: fx.Tracer) -> Generator[None]:
    """Let `torch.finfo` and `torch.iinfo` of a traced dtype be nodes of the graph."""
    names: Any = torch
    for kind in LIMITS:
        setattr(names, kind.__name__, _asking(kind, tracer))
    try:
        yield
    finally:
        for kind in LIMITS:
            setattr(names, kind.__name__, kind)


def _asking(kind: type, tracer: fx.Tracer) -> Callable[..., Any]:
    def limits(*args: Any, **kwargs: Any) -> Any:
        if any(isinstance(argument, fx.Proxy) for argument in (*args, *kwargs.values())):
            return tracer.create_proxy("call_function", kind, args, kwargs)
        return kind(*args, **kwargs)

    return limits
