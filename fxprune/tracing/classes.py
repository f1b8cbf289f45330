"""What a traced value is an instance of, to a model that asks: of what it will be when it runs.

    if not torch.is_tensor(timestep): …        if isinstance(x, list): …

A proxy is no tensor, and what torch does in C must not take it for one. So the models' own modules
get an `isinstance` of theirs while they are traced. Who asks for proxies by their name is told the
truth.
"""

import builtins
import sys
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxprune.tracing.stand_ins import standing_in


@contextmanager
def of_their_classes(modules: Sequence[ModuleType], tracer: Any) -> Generator[None]:
    """Let the code of the modules that a model is made of see what traced values will be.

    tracer: says of what class a value is; while it is `answering` values are what they are.
    """

    def is_instance(value: Any, kinds: Any) -> bool:
        if not issubclass(type(value), fx.Proxy) or tracer.answering:
            return builtins.isinstance(value, kinds)
        if kinds is fx.Proxy:  # who asks for that has another way of doing things in a trace
            return True
        try:
            found = tracer.class_of(value)
            if issubclass(found, fx.Proxy) and issubclass(Tensor, kinds):
                tracer.assume_tensor(value)  # nearly everything is one
                return True
            return issubclass(found, kinds)
        except TypeError:  # what tells instances by other means
            return builtins.isinstance(value, kinds)

    def is_tensor(value: Any) -> bool:
        return is_instance(value, Tensor)

    def is_scripted_instance(value: Any, kinds: Any) -> bool:
        traced = issubclass(type(value), fx.Proxy)
        return is_instance(value, kinds) if traced else scripted(value, kinds)

    torchs: Any = torch.jit
    scripted: Any = torchs.isinstance
    users = [(one, "isinstance", is_instance) for one in modules if "isinstance" not in vars(one)]
    with standing_in(
        (torch, "is_tensor", is_tensor), (torchs, "isinstance", is_scripted_instance), *users
    ):
        yield


def modules_of(root: nn.Module) -> list[ModuleType]:
    """Return the modules of the packages whose classes a model is made of."""
    kinds = {kind for module in root.modules() for kind in type(module).__mro__}
    packages = {kind.__module__.partition(".")[0] for kind in kinds} - _NOT_THE_USERS
    return [
        module for name, module in list(sys.modules.items()) if name.partition(".")[0] in packages
    ]


_NOT_THE_USERS = {"torch", "builtins", "fxprune"}
