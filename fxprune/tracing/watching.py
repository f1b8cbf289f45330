"""What a forward does to the model itself while it is traced, and no graph would do again.

    for p, q in zip(self.student.parameters(), self.teacher.parameters()): q.data.lerp_(p, 0.1)
    self.teacher.eval()        self.critic.requires_grad_(False)        sum(p.square().sum() for …)

A parameter or buffer read as an attribute is part of the graph. Reached in another way it is a
tensor like any other: what is computed with it is computed once, while the model is traced, and
what is written into it is written then. Modes and `requires_grad` are switched then, too.
"""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxprune.errors import TraceError
from fxprune.runtime.dispatch import DispatchMode
from fxprune.runtime.storages import storage_of
from fxprune.tracing.stand_ins import standing_in


class OwnTensors:
    """The parameters and buffers of a model, told by the memory they share with what is of them."""

    def __init__(self, root: nn.Module) -> None:
        named: Any = (*root.named_parameters(), *root.named_buffers())
        self.names = {storage_of(one): name for name, one in named}

    def name_of(self, tensor: Tensor) -> str:
        """Return whose memory a tensor is in, "" if it is nobody's."""
        return self.names.get(storage_of(tensor), "")


@contextmanager
def left_alone(own: OwnTensors, tracer: Any) -> Generator[None]:
    """Raise `TraceError` where traced code computes with, or changes, a model by other ways.

    tracer: says whether it is `answering`, when code runs that is not traced.
    """
    with _Refusing(own, tracer), _refusing_switches(own, tracer):
        yield


class _Refusing(DispatchMode):
    def __init__(self, own: OwnTensors, tracer: Any) -> None:
        super().__init__()
        self.own, self.tracer = own, tracer

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not self.tracer.answering:
            for one in pytree.tree_leaves((args, kwargs)):
                name = self.own.name_of(one) if isinstance(one, Tensor) else ""
                if name:
                    raise TraceError(
                        f"it computes with, or writes into, {name!r} by another way than its "
                        "attribute (parameters(), a list, a second name), which a trace would do "
                        f"once for all: use self.{name}"
                    )
        return func(*args, **kwargs)


@contextmanager
def _refusing_switches(own: OwnTensors, tracer: Any) -> Generator[None]:
    modules: Any = nn.Module
    train, set_attribute = modules.train, modules.__setattr__
    requires_grad_: Any = torch.Tensor.requires_grad_

    def refuse_train(module: nn.Module, mode: bool = True) -> nn.Module:
        if tracer.answering:
            return train(module, mode)
        raise TraceError(_SWITCHES)

    def refuse_flag(module: nn.Module, name: str, value: Any) -> None:
        if name == "training" and not tracer.answering:
            raise TraceError(_SWITCHES)
        set_attribute(module, name, value)

    def refuse_requires_grad(tensor: Tensor, requires_grad: bool = True) -> Tensor:
        name = "" if tracer.answering else own.name_of(tensor)
        if name:
            raise TraceError(
                f"it switches requires_grad of {name!r}, which a trace would do once for all; do "
                "so in the training loop"
            )
        return requires_grad_(tensor, requires_grad)

    with standing_in(
        (modules, "train", refuse_train),
        (modules, "__setattr__", refuse_flag),
        (torch.Tensor, "requires_grad_", refuse_requires_grad),
    ):
        yield


_SWITCHES = (
    "it switches modules between training and evaluation, which a trace would do once for all; do "
    "so in an overridden train(), or in the training loop"
)
