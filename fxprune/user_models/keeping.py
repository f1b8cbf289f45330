"""What a forward writes into its own module: a trace would keep proxies there, and lose the deed.

A buffer that is given another tensor changes from call to call, which no graph says. Attributes are
mostly notes of what was last seen (attention maps); whether they are more, a second run tells.
"""

import copy
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from fxprune.runtime.kinds import MADE_BY_TRACING, overwritten
from fxprune.user_models.containers import has_proxies
from fxprune.user_models.hooks import drop_later_hooks_, hooks_of

_PLAIN = (bool, int, float, complex, str, bytes, torch.Size, torch.dtype)
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
            and "." not in name
            and not name.startswith(MADE_BY_TRACING)
            and has_proxies(value)
        }

    def put_back(self) -> Written:
        """Take proxies out of the module again, and say what was written."""
        written = Written()
        for held, before in self.registered:
            for name, value in list(held.items()):
                if isinstance(value, fx.Proxy):
                    held[name] = before[name]
                    if not self._is_still(name, value):
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
            by_torch = name.startswith(MADE_BY_TRACING) and not has_proxies(value)
            if value is before or by_torch:
                continue
            written.attributes.append(name)
            if has_proxies(value):
                if before is self:
                    del now[name]
                else:
                    now[name] = before
        return written

    def _is_still(self, name: str, value: fx.Proxy) -> bool:
        """Tell whether what a buffer was given is the buffer itself: `self.count += 1`."""
        node = overwritten(value.node)
        owner, _, own = str(node.target).rpartition(".")
        tracer: Any = value.tracer
        is_own = node.op == "get_attr" and own == name
        return is_own and tracer.root.get_submodule(owner) is self.module


class Parts:
    """What the modules of a model hold before it is traced, whoever writes it: a rate of a part."""

    def __init__(self, root: nn.Module) -> None:
        # A script makes attributes of its own as they are asked for.
        parts = [one for one in root.modules() if not isinstance(one, torch.jit.ScriptModule)]
        self.root, self.held = root, {part: dict(vars(part)) for part in parts}
        self.hooks = {part: hooks_of(part) for part in parts}
        self.registered: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
            (path, held, dict(held))
            for path, part in root.named_modules()
            if part in self.held
            for held in (part._parameters, part._buffers, part._modules)
        ]
        kinds = {kind for part in root.modules() for kind in type(part).__mro__}
        self.classes = {kind: dict(vars(kind)) for kind in kinds if not _is_torchs(kind)}

    def changed(self) -> set[str]:
        """Return the attributes that are others now, as "part.name"."""
        paths = {part: path for path, part in self.root.named_modules()}
        return {
            f"{paths[part]}.{name}" if paths.get(part) else name
            for part, before in self.held.items()
            for name in _changed(before, vars(part))
        }

    def shared(self) -> str:
        """Return the name of an attribute of a class that something traced was put in, "" if none.

        The classes are the user's: theirs are put back at once.
        """
        found = ""
        for kind, before in self.classes.items():
            for name, value in list(vars(kind).items()):
                if value is not before.get(name, before) and has_proxies(value):
                    found = f"{kind.__name__}.{name}"
                    if name in before:
                        setattr(kind, name, before[name])
                    else:
                        delattr(kind, name)
        return found

    def replaced(self) -> str:
        """Return the name of a tensor or part that is another object now, "" if none is."""
        return next(
            (
                f"{path}.{name}" if path else name
                for path, held, before in self.registered
                for name in {*held, *before}
                if held.get(name) is not before.get(name) and not name.startswith(MADE_BY_TRACING)
            ),
            "",
        )

    def put_back(self) -> None:
        """Give all modules the attributes, parameters, buffers and hooks they had."""
        for _, held, before in self.registered:
            made = {n: t for n, t in held.items() if n.startswith(MADE_BY_TRACING)}
            held.clear()
            held.update(before | made)
        for part, before in self.held.items():
            drop_later_hooks_(part, self.hooks[part])
            now = vars(part)
            for name in _changed(before, now):
                if name in before:
                    now[name] = before[name]
                else:
                    del now[name]


def count_on_(root: nn.Module, names: Iterable[str]) -> None:
    """Let numbers that a forward counts up be what they are after a million calls more."""
    parts = dict(root.named_modules())
    for name in names:
        path, _, last = name.rpartition(".")
        held = vars(parts[path]) if path in parts else {}  # setattr takes names with dots, too
        if type(held.get(last)) in (int, float):
            held[last] += 1_000_000


def put_back_plain(pairs: Sequence[tuple[nn.Module, nn.Module]], but: Collection[str]) -> None:
    """Give copies of parts, which have run, what the parts have: plain values, tensors, and lists.

    What parts share (a list that one fills and another reads) their copies share.
    but: attributes that copies have by right.
    """
    memo = _unchanged(pairs)
    for part, twin in pairs:
        _put_back_attributes(vars(part), vars(twin), but, memo)
        for name, buffer in part._buffers.items():
            if buffer is None and name in twin._buffers:
                twin._buffers[name] = None


def _unchanged(pairs: Sequence[tuple[nn.Module, nn.Module]]) -> dict[int, Any]:
    """Return the lists and dicts in copies that are as they were, by the ids of the originals."""
    return {
        id(value): vars(twin).get(name)
        for part, twin in pairs
        for name, value in vars(part).items()
        if type(value) in (list, dict) and _is_alike(value, vars(twin).get(name))
    }


def _put_back_attributes(
    before: dict[str, Any], now: dict[str, Any], but: Collection[str], memo: dict[int, Any]
) -> None:
    for name in _changed(before, now):
        value = before.get(name)
        if name not in before:
            if name not in but:
                del now[name]
        elif isinstance(value, torch.Tensor):
            now[name] = value.detach().clone()
        elif value is None or isinstance(value, _PLAIN):
            now[name] = value
        elif type(value) in (list, dict, tuple) and not _is_alike(value, now.get(name)):
            _put_back_structure(now, name, value, memo)


def _put_back_structure(now: dict[str, Any], name: str, value: Any, memo: dict[int, Any]) -> None:
    """Put back nested lists and dicts of plain values and tensors; those of modules stay."""
    leaves = pytree.tree_leaves(value)
    if all(leaf is None or isinstance(leaf, (*_PLAIN, torch.Tensor)) for leaf in leaves):
        for leaf in leaves:
            if isinstance(leaf, torch.Tensor) and id(leaf) not in memo:
                memo[id(leaf)] = leaf.detach().clone()
        now[name] = copy.deepcopy(value, memo)


def _is_alike(one: Any, other: Any) -> bool:
    """Tell whether nested lists and dicts hold the same numbers, as far as they can be compared."""
    (leaves, form), (others, found) = pytree.tree_flatten(one), pytree.tree_flatten(other)
    return form == found and all(map(_is_same_leaf, leaves, others))


def _is_same_leaf(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return torch.equal(one, other)
    return type(one) is type(other) and (not isinstance(one, _PLAIN) or one == other)


def _changed(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return the names of attributes that came, went, or are other objects now."""
    return [
        name
        for name in {*before, *now}
        if now.get(name, now) is not before.get(name, now)
        and name not in _TORCHS
        and not name.startswith(MADE_BY_TRACING)
    ]


def _is_torchs(kind: type) -> bool:
    return kind.__module__.partition(".")[0] in ("torch", "builtins")


def values_in(held: Any) -> Iterator[Any]:
    """Yield what is in nested dicts, lists and tuples, which may hold themselves."""
    waiting, met = [held], set[int]()
    while waiting:
        value = waiting.pop()
        if not isinstance(value, (dict, list, tuple)):
            yield value
        elif id(value) not in met:
            met.add(id(value))
            # By iterators: a user's tuple may have no length.
            waiting.extend(iter(value.values() if isinstance(value, dict) else value))
