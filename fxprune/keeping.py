"""What a forward writes into its own module: a trace would keep proxies there, and lose the deed.

A buffer that is given another tensor changes from call to call, which no graph says. Attributes are
mostly notes of what was last seen (attention maps); whether they are more, a second run tells.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

_MADE_BY_TRACING = "_tensor_constant"
_TORCHS = frozenset(vars(nn.Module()))


@dataclass
class Written:
    """What a traced forward wrote: parameters and buffers it replaced, and other attributes."""

    tensors: list[str] = field(default_factory=list[str])
    attributes: list[str] = field(default_factory=list[str])


class Held:
    """What a module holds before its forward is traced."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.registered: list[tuple[dict[str, Any], dict[str, Any]]] = []
        if not isinstance(module, torch.jit.ScriptModule):  # nobody looks into a script
            self.registered = [(held, dict(held)) for held in (module._parameters, module._buffers)]
        self.attributes = dict(vars(module))
        self.containers = [
            (name, value, copy.copy(value))
            for name, value in self.attributes.items()
            if name not in _TORCHS and type(value) in (dict, list)
        ]

    def kept(self) -> dict[str, Any]:
        """Return the attributes that something traced was put in, which the next call may read."""
        return {
            name: value
            for name, value in vars(self.module).items()
            if value is not self.attributes.get(name, self)
            and name not in _TORCHS
            and not name.startswith(_MADE_BY_TRACING)
            and _has_proxies(value)
        }

    def put_back(self) -> Written:
        """Take proxies out of the module again, and say what was written."""
        written = Written()
        for held, before in self.registered:
            for name in [name for name, value in held.items() if isinstance(value, fx.Proxy)]:
                held[name] = before[name]
                written.tensors.append(name)
        for name, held, before in self.containers:
            traced = any(isinstance(value, fx.Proxy) for value in values_in(held))
            if traced or len(held) != len(before):
                written.attributes.append(name)
            if traced and isinstance(held, dict):
                held.clear()
                held.update(before)
            elif traced:
                held[:] = before
        now = vars(self.module)
        for name, value in list(now.items()):
            before = self.attributes.get(name, self)  # nothing else is this object
            if value is before or name.startswith(_MADE_BY_TRACING):
                continue
            written.attributes.append(name)
            if _has_proxies(value):
                if before is self:
                    del now[name]
                else:
                    now[name] = before
        return written


def _has_proxies(value: Any) -> bool:
    return any(isinstance(leaf, fx.Proxy) for leaf in pytree.tree_leaves(value))


def values_in(held: Any) -> Iterator[Any]:
    """Yield what is in nested dicts, lists and tuples, which may hold themselves."""
    waiting, met = [held], set[int]()
    while waiting:
        value = waiting.pop()
        if not isinstance(value, (dict, list, tuple)):
            yield value
        elif id(value) not in met:
            met.add(id(value))
            waiting += value.values() if isinstance(value, dict) else value
