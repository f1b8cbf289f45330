"""Traced values that Python asks: for sizes, truth, elements, and to be assigned to.

What torch.fx's own proxies refuse is passed on to the tracer (`asked_tracer`).
"""

import math
import operator
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import numpy as np
from torch import Tensor, fx
from torch.fx.proxy import Attribute
from torch.fx.proxy import TraceError as FxTraceError
from torch.utils import _pytree as pytree

from fxprune.runtime.kinds import OVERWROTE, overwritten
from fxprune.tracing.assignments import CannotAssign, assigned
from fxprune.tracing.lookups import is_lookup, is_name
from fxprune.tracing.stale_names import plain_index

# What numpy's operators are in Python, of numbers to the bit.
_ARITHMETIC: dict[Any, Callable[..., Any]] = {
    np.add: operator.add,
    np.subtract: operator.sub,
    np.multiply: operator.mul,
    np.true_divide: operator.truediv,
    np.floor_divide: operator.floordiv,
    np.remainder: operator.mod,
    np.power: operator.pow,
}
_OF_NUMBERS: dict[Any, Callable[..., Any]] = {np.sqrt: math.sqrt}
# These give whole numbers in Python, floats in numpy.
_ROUNDED: dict[Any, Callable[..., Any]] = {np.ceil: math.ceil, np.floor: math.floor}
OF_GRADIENTS = frozenset({"requires_grad", "grad", "grad_fn", "is_leaf", "retains_grad"})
_WRITABLE = frozenset({"data", "grad", "requires_grad"})
_OF_ARRAYS = frozenset({"__array_struct__", "__array_interface__"})  # numpy asks for them first
_OF_PROXIES = frozenset({"tracer", "node", "_node", "root", "attr", "lineno"})


class Askable(fx.Proxy):
    """A traced value that answers Python's questions for sizes."""

    tracer: Any

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _WRITABLE:
            raise FxTraceError(f"it sets {name} of a tensor, which no graph does: use copy_")
        if name not in _OF_PROXIES and self._is_held_elsewhere():
            raise FxTraceError(
                f"it sets {name} of its argument, which no graph does: return what is set"
            )
        super().__setattr__(name, value)

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **options: Any) -> Any:
        """Let numpy's numbers meet traced values: `np.sqrt(64) * x`, `x / np.sqrt(x.shape[1])`."""
        plain = [one.item() if isinstance(one, np.generic) else one for one in inputs]
        if method != "__call__" or options or any(isinstance(one, np.ndarray) for one in plain):
            return NotImplemented
        if ufunc in _ARITHMETIC:
            return _ARITHMETIC[ufunc](*plain)
        traced = [one for one in plain if isinstance(one, fx.Proxy)]
        if any(self.tracer.class_of(one) not in (int, float) for one in traced):
            return NotImplemented
        if ufunc in _OF_NUMBERS:
            return self.tracer.of_number(_OF_NUMBERS[ufunc], self)
        if ufunc in _ROUNDED:
            return self.tracer.of_number(float, self.tracer.of_number(_ROUNDED[ufunc], self))
        return self._of_example(ufunc, plain, {})

    def _of_example(self, function: Any, args: Any, options: Any) -> Any:
        """Let numpy compute what Python could to another last bit, from what the example has."""
        args, options = pytree.tree_map_only(Askable, _told, (args, options))
        return function(*args, **options)

    def __array_function__(self, function: Any, _: Any, args: Any, options: Any) -> Any:
        """Let numpy multiply a shape: `np.prod(x.shape[1:])`."""
        if function is np.prod and not options and isinstance(self.tracer.example(self), tuple):
            return self.tracer.create_proxy("call_function", math.prod, args, {})
        return self._of_example(function, args, options)

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        """Let numpy have a size, or a shape, as the example has it: `np.array(x.shape) % 32`."""
        return np.array(_told(self), dtype)

    def __hash__(self) -> int:
        """Let what is looked up in a table be what the example has, if that is plain."""
        if self.tracer.answering or not is_lookup(sys._getframe(1)):
            return super().__hash__()
        plain = self.tracer.known(self)
        return super().__hash__() if plain is None else hash(plain)

    def __deepcopy__(self, _: Any) -> Any:
        """Copy what a model copies; of one that a copied module holds there is nothing to copy."""
        copied = not self.tracer.answering and issubclass(self.tracer.class_of(self), Tensor)
        return self.tracer.create_proxy("call_method", "clone", (self,), {}) if copied else self

    def __getattr__(self, k: str) -> Attribute:
        if k in _OF_ARRAYS:
            raise AttributeError(k)
        return AskableAttribute(self, k)

    def __len__(self) -> int:
        return self.tracer.length(self)

    def __int__(self) -> int:
        return int(self.tracer.number(self))

    def __index__(self) -> int:
        number: Any = self.tracer.number(self)
        return operator.index(number)

    def __float__(self) -> float:
        return float(self.tracer.number(self))

    def __round__(self, *digits: int) -> Any:
        return self.tracer.create_proxy("call_function", round, (self, *digits), {})

    def __format__(self, format_spec: str) -> str:
        plain = self.tracer.known(self) if self._is_name(sys._getframe(1)) else None
        return repr(self) if plain is None else format(plain, format_spec)

    def __str__(self) -> str:
        plain = self.tracer.known(self) if self._is_name(sys._getframe(1)) else None
        return repr(self) if plain is None else str(plain)

    def _is_held_elsewhere(self) -> bool:
        """Tell whether others than the forward hold a value: an argument, an object in one."""
        if self.tracer.answering:
            return False
        return self.node.op == "placeholder" or not issubclass(self.tracer.class_of(self), Tensor)

    def _is_name(self, frame: FrameType) -> bool:
        return not self.tracer.answering and is_name(frame)

    def __setitem__(self, index: Any, value: Any) -> None:
        """Assign out of place, and go by the new tensor's name from here on."""
        example = self.tracer.example(self)
        if not isinstance(example, Tensor) or isinstance(self, Attribute):
            raise CannotAssign("it assigns to a part of what is no tensor")
        if example._is_view() and self.tracer.is_lasting(example):
            raise CannotAssign("it assigns to a part of what has another name (a view, a buffer)")
        if isinstance(value, fx.Proxy):
            self.tracer.drop_write(self.node, index, value.node)
        new = assigned(self, example, index, value, self.tracer.example).node
        self.tracer.note_write(self.node, new, plain_index(index))
        self.node = new

    def __iadd__(self, other: Any) -> Any:
        """Add out of place, as torch.fx does, and note that the model does not.

        To a buffer it is added in place: the next call reads it.
        """
        if self._is_buffer():
            return self._overwritten("add_", other)
        total = self._replaced(self + other)
        total.node.meta[OVERWROTE] = True
        return total

    def __isub__(self, other: Any) -> Any:
        if self._is_buffer():
            return self._overwritten("sub_", other)
        return self._replaced(self - other)

    def __imul__(self, other: Any) -> Any:
        if self._is_buffer():
            return self._overwritten("mul_", other)
        return self._replaced(self * other)

    def __itruediv__(self, other: Any) -> Any:
        if self._is_buffer():
            return self._overwritten("div_", other)
        return self._replaced(self / other)

    def _replaced(self, result: Any) -> Any:
        """Note that a result stands for what the model overwrites: a tensor, no number."""
        self.tracer.note_write(self.node, result.node)
        return result

    def _is_buffer(self) -> bool:
        """Tell whether a value is a buffer, or what remained of it once it was overwritten."""
        node = overwritten(self.node)
        return node.op == "get_attr" and node.target in dict(self.tracer.root.named_buffers())

    def _overwritten(self, method: str, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_method", method, (self, other), {})


class AskableAttribute(Askable, Attribute):
    """An attribute of a traced value, or a method about to be called."""

    @property
    def node(self) -> fx.Node:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Return the node that reads it: made when asked for, and again if a retreat erased it."""
        if self._node is not None and self._node._erased:
            self._node = None
        return super().node

    __hash__ = Askable.__hash__


class AskableNumber(Askable):
    """A traced number that Python takes for one.

    A dict may be asked for it, which then asks whether it is that key; a list repeated.
    """

    __hash__ = Askable.__hash__

    def __rmul__(self, other: Any) -> Any:
        if isinstance(other, (list, tuple, str)):
            return other * operator.index(self)
        return self.tracer.create_proxy("call_function", operator.mul, (other, self), {})


def _told(value: Askable) -> Any:
    """Return a size or shape as the example has it, which is noted."""
    plain = value.tracer.known(value)
    if plain is None:
        raise FxTraceError("it gives a traced tensor to numpy, which no graph does: use torch")
    return plain
