"""`torch.finfo(x.dtype)` of what is traced stays a question of the graph, whatever runs in it.

    scores.masked_fill(mask, torch.finfo(scores.dtype).min)

Torch's own takes no proxy. The example's dtype would not do instead: under autocast scores have
another, whose least number is another.
"""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx

from fxprune.tracing.stand_ins import StandIn, standing_in

LIMITS: tuple[type, ...] = (torch.finfo, torch.iinfo)


@contextmanager
def asking_for_limits() -> Generator[None]:
    """Let `torch.finfo` and `torch.iinfo` of a traced dtype be nodes of the graph."""
    kinds = {kind.__name__: kind for kind in LIMITS}
    asking = [(torch, name, _Asking(name, (), {"kind": kind})) for name, kind in kinds.items()]
    with standing_in(*asking):
        yield


class _Asking(StandIn):
    """A class that passes for `torch.finfo`, and makes a node of what is asked of a proxy."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        for argument in (*args, *kwargs.values()):
            if isinstance(argument, fx.Proxy):
                return argument.tracer.create_proxy("call_function", cls.kind, args, kwargs)
        return cls.kind(*args, **kwargs)
