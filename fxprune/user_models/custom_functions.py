"""What a module with a backward of its own computes forward, as a graph of torch's operators.

    class Swish(torch.autograd.Function): …        x = Swish.apply(x)

Such a module stays whole, for the sake of its backward. Its forward is Python like any other's,
and tells what the module is: an activation, most often one that saves memory.
"""

import copy
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import fx, nn

from fxprune.user_models.modules import has_hooks
from fxprune.user_models.replaced_methods import replaced_methods

_Function = torch.autograd.Function


class CannotInlineError(Exception):
    """The function does what no graph of its forward tells."""


class _Context:
    """Takes what a forward leaves for its backward."""

    def save_for_backward(self, *_: Any) -> None:
        """Take tensors; nobody asks for them."""

    def mark_dirty(self, *_: Any) -> None:
        """Refuse: it overwrites what it is given."""
        raise CannotInlineError


def forward_of(module: nn.Module) -> list[fx.Graph] | None:
    """Return the graphs of a module's forward in training and evaluation; None if there is none.

    Only of modules that hold nothing, and take one argument.
    """
    if next(module.children(), None) is not None or has_hooks(module):
        return None
    if replaced_methods(module):  # torch.fx traces the forward of the class
        return None
    if module._parameters or module._buffers or isinstance(module, torch.jit.ScriptModule):
        return None
    graphs: list[fx.Graph] = []
    for training in (True, False):
        twin = copy.copy(module)
        twin.training = training
        try:
            with _inlined():
                graphs.append(fx.Tracer().trace(twin))
        except Exception:  # whatever it is, there is no graph
            return None
    takes_one = all(sum(n.op == "placeholder" for n in graph.nodes) == 1 for graph in graphs)
    return graphs if takes_one else None


@contextmanager
def _inlined() -> Generator[None]:
    """Let autograd's functions run their forward as Python."""

    def apply(cls: Any, *args: Any) -> Any:
        if cls.setup_context is not _Function.setup_context:
            return cls.forward(*args)
        return cls.forward(_Context(), *args)

    with patch.object(_Function, "apply", classmethod(apply)):
        yield
