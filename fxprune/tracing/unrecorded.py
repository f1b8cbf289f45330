"""What a forward computes under `torch.no_grad`: no graph has such blocks, so it detaches results.

    with torch.no_grad():                  target = self.teacher.first(x).detach()
        target = self.teacher(x)     →     target = self.teacher.last(target).detach()

So nothing is kept for a backward there, as in the model. Only what is made in the block, and
buffers, may be written into: elsewhere the gradient of what was there before would go on.
"""

import inspect
import operator
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.proxy import TraceError as FxTraceError
from torch.utils import _pytree as pytree

from fxprune.errors import TraceError
from fxprune.runtime.kinds import CALLS
from fxprune.tracing.asked_tracer import PLAIN, AskedTracer

_are_on = torch.is_grad_enabled  # while a model is traced it is another
# What only looks into a list, or an object.
_LOOKING: tuple[Any, ...] = (operator.getitem, getattr)
_PLAIN = (*PLAIN, torch.Size, torch.dtype, torch.device, torch.SymInt, torch.SymFloat)


class UnrecordedTracer(AskedTracer):
    """A tracer of models that switch gradients off for a while."""

    def __init__(self) -> None:
        super().__init__()
        self._unrecorded: set[fx.Node] = set()
        self._structures: set[fx.Node] = set()  # of tensors that could not be detached at once

    def create_proxy(
        self, kind: str, target: Any, args: Any, kwargs: Any, *more: Any, **named: Any
    ) -> fx.Proxy:
        """Create a node, and one that detaches what it gives where gradients are off."""
        if kind not in CALLS or self.answering:
            return super().create_proxy(kind, target, args, kwargs, *more, **named)
        writes = not _are_on() and self._writes(kind, target, args, kwargs)
        if writes:
            args, kwargs = self._to_be_written(args, kwargs)
        proxy = super().create_proxy(kind, target, args, kwargs, *more, **named)
        if _are_on():
            return self._outside(proxy)
        if not writes:
            return self._detached(proxy)
        self._unrecorded.add(proxy.node)
        return proxy  # it is what was written into

    def note_write(self, old: fx.Node, new: fx.Node, index: Any = None) -> None:
        """Note an overwriting that is traced as something new; refuse to lose a gradient by it."""
        if not _are_on():
            self._require_own(old)
        super().note_write(old, new, index)

    def _outside(self, proxy: fx.Proxy) -> fx.Proxy:
        """Return a value made where gradients are on, detached if it is out of such a structure."""
        if self._structures.isdisjoint(proxy.node.all_input_nodes):
            return proxy
        if proxy.node.target not in _LOOKING:
            raise TraceError(
                "it passes on a list, or an object, of tensors that were made with gradients off: "
                "take them out of it there"
            )
        return self._detached(proxy)

    def _detached(self, proxy: fx.Proxy) -> fx.Proxy:
        self._unrecorded.add(proxy.node)
        try:
            value = self.example(proxy)
        except FxTraceError:  # a tensor of a size that data decide
            return self._detach(proxy)
        if isinstance(value, Tensor):
            differentiable = value.is_floating_point() or value.is_complex()
            return self._detach(proxy) if differentiable else proxy
        if not all(isinstance(leaf, _PLAIN) for leaf in pytree.tree_leaves(value)):
            self._structures.add(proxy.node)
        return proxy

    def _detach(self, proxy: fx.Proxy) -> fx.Proxy:
        detached = super().create_proxy("call_method", "detach", (proxy,), {})
        self._unrecorded.add(detached.node)
        return detached

    def _writes(self, kind: str, target: Any, args: Any, kwargs: Any) -> bool:
        """Tell whether an operator writes into its first argument, by its name and arguments."""
        if kind == "call_module":
            return bool(getattr(self.root.get_submodule(target), "inplace", False))
        name = target if isinstance(target, str) else getattr(target, "__name__", "")
        if name.endswith("_") and not name.endswith("__"):
            return True
        return kwargs.get("out") is not None or (
            kind == "call_function" and _in_place(target, args, kwargs)
        )

    def _to_be_written(self, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Return arguments of which the first is written into, the others detached."""
        first, *others = args or (kwargs.get("input"),)
        if not isinstance(first, fx.Proxy) or kwargs.get("out") is not None:
            raise TraceError("it writes into a list of tensors while gradients are off")
        self._require_own(first.node)
        known = {key: value for key, value in kwargs.items() if args or key != "input"}
        others, known = pytree.tree_map_only(fx.Proxy, self._silent, (others, known))
        return (first, *others), known

    def _silent(self, proxy: fx.Proxy) -> fx.Proxy:
        """Return a value that is read while something is written, detached if it is a tensor."""
        kind = self.class_of(proxy)  # a proxy's, where it is not known
        detached = proxy.node in self._unrecorded or not issubclass(kind, (Tensor, fx.Proxy))
        return proxy if detached else self._detach(proxy)

    def _require_own(self, node: fx.Node) -> None:
        """Raise `TraceError` unless gradients cannot tell whether a node is written into."""
        is_buffer = node.op == "get_attr" and node.target in self._buffers()
        if not is_buffer and node not in self._unrecorded:
            raise TraceError(
                f"it writes into {node.name} while gradients are off, which no graph does: make a "
                "new tensor, or write into a buffer"
            )

    def _buffers(self) -> set[str]:
        return {name for name, _ in self.root.named_buffers(remove_duplicate=False)}


def _in_place(function: Any, args: Any, kwargs: Any) -> bool:
    """Tell whether a function is told to work in place."""
    try:
        given = inspect.signature(function).bind(*args, **kwargs).arguments
    except (TypeError, ValueError):  # it is none of Python's, which have names that say so
        return False
    return given.get("inplace", False) is True
