"""torch.fx's tracer, where proxies know what they are on the example inputs.

Python that asks a traced value for a size is answered by that, and the answer is noted
(`assumptions`). What is run to find an answer leaves no trace.
"""

import inspect
import math
import operator
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from enum import Enum
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.fx.proxy import TraceError as FxTraceError

from fxprune.runtime.storages import share_memory
from fxprune.tracing.askable import OF_GRADIENTS, Askable, AskableNumber
from fxprune.tracing.assignments import CannotAssign
from fxprune.tracing.assumptions import refusal
from fxprune.tracing.example_values import ExampleValues, UnknownValueError
from fxprune.tracing.expressions import expression
from fxprune.tracing.stale_names import Write, stale_read

# What an argument may be to have its value, rather than its shape, in the trace.
PLAIN = (
    *(type(None), bool, int, float, complex, str, Enum),
    *(torch.dtype, torch.device, torch.layout, torch.Size, slice, np.generic),
)
_SIZES = (int, torch.Size)
# What comparisons of a size say where there is something, by what it is compared to.
_OF_SOMETHING: dict[tuple[Any, int], bool] = {
    (operator.eq, 0): False,
    (operator.ne, 0): True,
    (operator.gt, 0): True,
    (operator.le, 0): False,
    (operator.lt, 1): False,
    (operator.ge, 1): True,
}
# What sizes are that depend on data (of what a mask picks): numbers nobody knows before it runs.
_DATA_DEPENDENT: dict[type, type] = {
    torch.SymInt: int,
    torch.SymFloat: float,
    torch.SymBool: bool,
}
# `int` as torch's exporter needs it: of `int` itself an open size comes out as the example's. Bound
# here, as math's own names are wrappers while a model is traced.
_INT = math.trunc
_REFUSAL = "symbolically traced variables cannot be used as inputs to control flow"
# Torch's own functions in C try `__index__` on what they are given. None needs an answer: all take
# a traced size as it is, so that they are called by node at once.
_C: Any = torch._C
IN_C = frozenset(
    function
    for space in (_C._VariableFunctions, _C._nn, _C._fft)
    for name, function in inspect.getmembers(space, callable)
    if not name.startswith("_")
)
# These do not dispatch on what they are given: torch.fx's own tracer fails on their calls. While a
# model is traced the names are those of wrappers.
_AS_TENSOR, _FULL, _STACK, _TENSOR = torch.as_tensor, torch.full, torch.stack, torch.tensor
_FROM_DATA = (_TENSOR, _AS_TENSOR)


class AskedTracer(fx.Tracer):
    """torch.fx's tracer, where its proxies know what they are on the example inputs."""

    def __init__(self) -> None:
        super().__init__(autowrap_functions=tuple(IN_C))
        self._autowrap_search += [torch, F, torch.fft]
        self.examples: dict[fx.Node, Any] = {}
        self._answers, self._thread = False, threading.get_ident()
        self.assumptions: dict[str, fx.Node] = {}
        self.writes: list[Write] = []
        self._values: ExampleValues | None = None

    @property
    def answering(self) -> bool:
        """Whether code runs that is not traced: for an answer, or in another thread."""
        return self._answers or threading.get_ident() != self._thread

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """Wrap a node in a proxy that answers."""
        return Askable(node, self)

    def create_proxy(
        self, kind: str, target: Any, args: Any, kwargs: Any, *more: Any, **named: Any
    ) -> fx.Proxy:
        """Create a node, of an operator that torch.fx can trace again where the graph is loaded."""
        made_of = args[0] if target in _FROM_DATA and len(args) == 1 else None
        if isinstance(made_of, (list, tuple)) and kwargs.keys() <= {"dtype", "device"}:
            form = self._form_of_numbers(made_of)
            if form is not None:
                told = {name: value for name, value in kwargs.items() if value is not None}
                made = [self._full(one, {"dtype": form} | told) for one in made_of]
                target, args, kwargs = _STACK, (made,), {}
        elif isinstance(made_of, fx.Proxy) and not self.answering:
            form = self.class_of(made_of)
            if form in (bool, int, float):
                target, args = _FULL, ((), made_of)
            elif form is Tensor and target is _AS_TENSOR:
                kwargs = {name: value for name, value in kwargs.items() if value is not None}
                if not kwargs:
                    return made_of
                kind, target = "call_method", "to"
        return super().create_proxy(kind, target, args, kwargs, *more, **named)

    def _full(self, number: Any, options: dict[str, Any]) -> fx.Proxy:
        return super().create_proxy("call_function", _FULL, ((), number), options)

    def _form_of_numbers(self, numbers: Sequence[Any]) -> torch.dtype | None:
        """Return the dtype of a tensor of numbers, some of them traced; None if they are others."""
        if self.answering or not any(isinstance(one, fx.Proxy) for one in numbers):
            return None
        examples = [self.example(one) if isinstance(one, fx.Proxy) else one for one in numbers]
        if not all(type(one) in (bool, int, float) for one in examples):
            return None
        return _TENSOR(examples).dtype

    def to_bool(self, obj: fx.Proxy) -> bool:
        """Answer `if`, `assert`, `and`, `not`."""
        something = self._of_something(obj.node)
        if something is not None:
            self._assume(obj if something else self._call(operator.not_, obj))
            return something
        value = self._value(obj)
        if self._compares_a_size_with_none(obj.node):
            self._drop_unread(obj.node)
            return bool(value)
        if isinstance(value, bool):
            self._assume(obj if value else self._call(operator.not_, obj))
        elif isinstance(value, (int, float)):
            self._assume(self._call(operator.ne if value else operator.eq, obj, 0))
        else:
            self._assume(self._call(operator.truth if value else operator.not_, obj))
        return bool(value)

    def number(self, obj: fx.Proxy) -> int | float:
        """Answer `int`, `float`, `range` and indexing."""
        value = self._value(obj)
        if not isinstance(value, (int, float)):
            raise TypeError(f"a number is needed, not {type(value).__name__}")
        self._assume(self._call(operator.eq, obj, value))
        return value

    def of_number(self, function: Callable[..., Any], obj: fx.Proxy) -> fx.Proxy:
        """Return what a function of Python makes of a traced number."""
        return self.create_proxy("call_function", function, (obj,), {})

    def whole_number(self, obj: fx.Proxy) -> fx.Proxy:
        """Return `int` of a traced number, which no question needs to be asked for."""
        is_whole = self.class_of(obj) is int
        return AskableNumber(obj.node if is_whole else self._call(_INT, obj).node, self)

    def whole_element(self, tensor: fx.Proxy) -> fx.Proxy:
        """Return `int` of a traced tensor of whole numbers that has but one."""
        item = self.create_proxy("call_method", "item", (tensor,), {})
        is_bool = self.example(tensor).dtype == torch.bool
        return AskableNumber(self._call(int, item).node if is_bool else item.node, self)

    def first_size(self, tensor: fx.Proxy) -> fx.Proxy:
        """Return `len` of a traced tensor."""
        return AskableNumber(self.create_proxy("call_method", "size", (tensor, 0), {}).node, self)

    def example(self, obj: fx.Proxy) -> Any:
        """Return what a value is on the example inputs, and note nothing; of a tensor its form."""
        return self._value(obj, tensors=True)

    def class_of(self, obj: fx.Proxy) -> type:
        """Return the class of a value on the example inputs, a proxy's if that is not known."""
        try:
            value = self.example(obj)
        except FxTraceError:
            return type(obj)
        kind = Tensor if isinstance(value, Tensor) else type(value)
        return _DATA_DEPENDENT.get(kind, kind)

    def length(self, obj: fx.Proxy) -> int:
        """Answer `len`, which is a tensor's first size."""
        value = self._value(obj, tensors=True)
        if isinstance(value, Tensor):
            return int(self.number(self.create_proxy("call_method", "size", (obj, 0), {})))
        self._assume(self._call(operator.eq, self._call(len, obj), len(value)))
        return len(value)

    def iter(self, obj: Any) -> Iterator[Any]:
        """Answer a loop, or an unpacking with a star."""
        value = self._value(obj, tensors=True)
        if isinstance(value, (Tensor, Sequence)):
            return iter([obj[place] for place in range(self.length(obj))])
        if isinstance(value, Mapping):
            return iter(self._keys(obj))
        if obj.node.target in ("keys", "values", "items"):
            return self._entries(self.proxy(obj.node.args[0]), obj.node.target)
        return super().iter(obj)

    def known(self, obj: fx.Proxy) -> Any:
        """Return a plain value, noted as what it is on the example inputs; None if it is none."""
        try:
            value = self.example(obj)
        except FxTraceError:
            return None
        if not isinstance(value, PLAIN) or isinstance(value, (slice, np.generic, type(None))):
            return None
        self.assume_value(obj, value)
        return value

    def assume_value(self, obj: fx.Proxy, value: Any) -> None:
        """Note that an input is what the example has."""
        # True is equal to 1, which a model may tell apart.
        same = operator.is_ if value is None or isinstance(value, bool) else operator.eq
        self._assume(self._call(same, obj, value))

    def assume_given(self, obj: fx.Proxy) -> None:
        """Note that an input is not None, which Python can ask of a proxy without its knowing."""
        self._assume(self._call(operator.is_not, obj, None))

    def assume_tensor(self, obj: fx.Proxy) -> None:
        """Note that something of which nothing is known is a tensor."""
        # `torch.is_tensor` would be answered, of a proxy, where the graph's own code is traced.
        self._assume(self._call(hasattr, obj, "__torch_dispatch__"))

    def assume_structure(self, obj: fx.Proxy, value: Any) -> None:
        """Note that an input has the entries that the example has."""
        if isinstance(value, Mapping):
            self._keys(obj)
        else:
            self.length(obj)

    def note_write(self, old: fx.Node, new: fx.Node, index: Any = None) -> None:
        """Note that what a name stood for was overwritten, and is traced as something new."""
        last = next(iter(reversed(self.graph.nodes)))
        self.writes.append(Write(old, new, last, index))

    def drop_write(self, tensor: fx.Node, index: Any, value: fx.Node) -> None:
        """Forget the write to a part that is assigned to where it was: `y[:, 0] *= 2` does both."""
        last = self.writes[-1] if self.writes else None
        if last is None or last.new is not value or last.old.target is not operator.getitem:
            return
        if last.old.args == (tensor, self.create_arg(index)):
            self.writes.pop()

    def is_lasting(self, example: Tensor) -> bool:
        """Tell whether a view is one of an input or buffer, which outlive the call."""
        lasting = [node for node in self.graph.nodes if node.op in ("placeholder", "get_attr")]
        held = [self._tensor_of(node) for node in lasting]
        return any(one is not None and share_memory(one, example) for one in held)

    def require_fresh(self, since: int = 0) -> None:
        """Raise where what was overwritten, since so many writes, is read by another name."""
        reader = stale_read(self.graph, self.writes[since:], self._tensor_of)
        if reader is not None:
            raise CannotAssign(
                "it assigns to a tensor, or to a part of it, that is read by another name (a view) "
                f"later: {reader.name} at {reader.meta.get('source')}"
            )

    def _tensor_of(self, node: fx.Node) -> Tensor | None:
        """Return what a node is on the example inputs, None if no tensor or not known."""
        try:
            example = self.example(self.proxy(node))
        except FxTraceError:
            return None
        return example if isinstance(example, Tensor) else None

    def forget(self, erased: set[fx.Node]) -> None:
        """Forget the assumptions of nodes that are no longer in the graph."""
        self.assumptions = {k: node for k, node in self.assumptions.items() if node not in erased}

    def _value(self, obj: fx.Proxy, *, tensors: bool = False) -> Any:
        """Return what a node is on the example inputs; a tensor only where its shape is asked."""
        node = obj.node
        if node.target is getattr and node.args[1] in OF_GRADIENTS:
            raise FxTraceError(
                f"it asks for {node.args[1]}, which is one thing in training and another where "
                "gradients are off"
            )
        self._answers = True
        try:
            self._values = self._values or self._example_values()
            value = self._values.of(node)
        except UnknownValueError as error:
            raise FxTraceError(f"{_REFUSAL}: {error}") from error
        finally:
            self._answers = False
        if isinstance(value, Tensor) and not tensors:
            raise FxTraceError(f"{_REFUSAL}: {node.name} is a tensor")
        if type(value) in _DATA_DEPENDENT and not tensors:
            raise FxTraceError(f"{_REFUSAL}: {node.name} depends on the numbers in the inputs")
        return value

    def _example_values(self) -> ExampleValues:
        held = {name: tensor for tensor, name in self.tensor_attrs.items()}
        return ExampleValues(self.root, self.graph, self.examples, held)

    def _compares_a_size_with_none(self, node: fx.Node) -> bool:
        """Tell whether an answer is the same for all inputs: no size is None."""
        if node.target not in (operator.eq, operator.ne) or None not in node.args:
            return False
        others = [self.proxy(one) for one in node.args if isinstance(one, fx.Node)]
        return any(self.class_of(one) in _SIZES for one in others)

    def _of_something(self, node: fx.Node) -> bool | None:
        """Return what a question for emptiness is answered: that what data decide is not empty.

        None where it is no such question. It is noted like any other answer.
        """
        size, number = node.args if len(node.args) == 2 else (None, None)
        answer = _OF_SOMETHING.get((node.target, number)) if type(number) is int else None
        if answer is None or not isinstance(size, fx.Node) or not _is_size(size):
            return None
        return answer if isinstance(self.example(self.proxy(size)), torch.SymInt) else None

    def _drop_unread(self, node: fx.Node) -> None:
        """Erase the last node, asked a question that all inputs answer alike, if it is one."""
        if not node.users and node is next(iter(reversed(self.graph.nodes))):
            self.graph.erase_node(node)

    def _call(self, function: Any, *args: Any) -> fx.Proxy:
        return self.create_proxy("call_function", function, args, {})

    def _keys(self, obj: fx.Proxy) -> list[Any]:
        keys = list(self._value(obj))
        self._assume(self._call(operator.eq, self._call(list, obj), keys))
        return keys

    def _entries(self, obj: Any, kind: str) -> Iterator[Any]:
        keys = self._keys(obj)
        values = [] if kind == "keys" else [obj[key] for key in keys]
        return iter(
            {"keys": keys, "values": values}.get(kind, list(zip(keys, values, strict=False)))
        )

    def _assume(self, condition: fx.Proxy) -> None:
        """Assert a condition in the graph, once."""
        text = expression(condition.node)
        if text in self.assumptions:
            return
        message = refusal(condition.node)
        guard = self.create_proxy("call_function", torch._assert, (condition, message), {})
        self.assumptions[text] = guard.node


def _is_size(node: fx.Node) -> bool:
    """Tell whether a node asks a tensor for a size, or for the number of its elements."""
    if node.target is operator.getitem:
        shape: Any = node.args[0]
        return shape.target == "size" or (shape.target is getattr and shape.args[1] == "shape")
    return node.target in ("size", "numel", "nelement", torch.numel)
