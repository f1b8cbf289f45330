"""Tensors that modules hold as plain attributes, indexed by sizes that are traced.

    self.turns[: x.shape[1]]        # turns: rotary embeddings, as in Llama

A tracer knows parameters and buffers by their names. Any other tensor is a constant to it, and what
its slices begin and end with a number: that of the example, for good. While a model is traced such
a slice reads the tensor by its name instead.

    torch.eye(3).view(1, 9).repeat(x.shape[0], 1)

What a forward makes of plain numbers is a constant as well, and spread out by a traced size it was
one of the example's: that spreading is an operator of the graph.
"""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, fx, nn

from fxprune.tracing.stand_ins import is_given_traced, standing_in


@contextmanager
def sliced_by_name(root: nn.Module, tracer: Any) -> Generator[None]:
    """Let slices of `root`'s plain tensors by traced values be values themselves.

    tracer: whose values these are; while it is `answering` all numbers are what they are.
    """
    names = {
        id(value): f"{path}.{name}" if path else name
        for path, module in root.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, Tensor)
    }
    if not names:
        yield
        return
    inherited: Any = Tensor.__getitem__

    def read(self: Tensor, index: Any) -> Any:
        name = names.get(id(self))
        if name is None or tracer.answering or not _is_traced(index):
            return inherited(self, index)
        return tracer.create_proxy("get_attr", name, (), {})[index]

    with standing_in((Tensor, "__getitem__", read)):
        yield


@contextmanager
def spread_by_size(tracer: Any) -> Generator[None]:
    """Let constants that are repeated or expanded by traced sizes be values.

    tracer: whose values these are; while it is `answering` all numbers are what they are.
    """
    with standing_in(*((Tensor, name, _spreading(name, tracer)) for name in ("repeat", "expand"))):
        yield


def _spreading(name: str, tracer: Any) -> Any:
    inherited: Any = getattr(Tensor, name)

    def spread(self: Tensor, *sizes: Any, **named: Any) -> Any:
        if tracer.answering or not is_given_traced(sizes, named):
            return inherited(self, *sizes, **named)
        return tracer.create_proxy("call_method", name, (self, *sizes), named)

    return spread


def _is_traced(index: Any) -> bool:
    """Tell whether an index holds a traced value, in a slice perhaps."""
    if isinstance(index, (tuple, list)):
        return any(map(_is_traced, index))
    if isinstance(index, slice):
        return _is_traced((index.start, index.stop, index.step))
    return isinstance(index, fx.Proxy)
