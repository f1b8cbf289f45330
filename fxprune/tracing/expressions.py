"""A number computed in a graph, as the Python that computes it: `x.shape[2] % 7 == 0`.

Tensors go by their names; so the text tells one question from another.
"""

import math
import operator
from collections.abc import Mapping
from typing import Any

from torch import fx

from fxprune.runtime.kinds import QUESTIONS

_ARITHMETIC = {
    operator.add: "+",
    operator.sub: "-",
    operator.mul: "*",
    operator.truediv: "/",
    operator.floordiv: "//",
    operator.mod: "%",
    operator.pow: "**",
}
_COMPARISONS = {
    operator.eq: "==",
    operator.ne: "!=",
    operator.lt: "<",
    operator.le: "<=",
    operator.gt: ">",
    operator.ge: ">=",
    operator.is_: "is",
    operator.is_not: "is not",
}
# What functions are called in the Python that they stand for.
_NAMES: dict[Any, str] = {operator.truth: "bool", math.trunc: "int"}
# Methods of tensors that tell of their shape.
_QUESTIONS = QUESTIONS | {"keys"}
# What is nested deeper goes by its name: nobody could read it.
_DEPTH = 8


def expression(argument: Any, depth: int = 0) -> str:
    """Return an argument as text, nodes as the expressions they stand for."""
    if isinstance(argument, (list, tuple)) and not hasattr(argument, "_fields"):
        inside = ", ".join(expression(part, depth + 1) for part in argument)
        return f"[{inside}]" if isinstance(argument, list) else f"({inside})"
    if isinstance(argument, slice):
        ends = [argument.start, argument.stop, *([] if argument.step is None else [argument.step])]
        return ":".join("" if end is None else expression(end, depth + 1) for end in ends)
    if not isinstance(argument, fx.Node):
        return repr(argument)
    if argument.op == "placeholder":
        return str(argument.target)
    if depth > _DEPTH or argument.kwargs:
        return argument.name
    return _call(argument, depth)


def _call(node: fx.Node, depth: int) -> str:
    target: Any = node.target
    if node.op == "call_method" and target in _QUESTIONS:
        rest = ", ".join(expression(arg, depth + 1) for arg in node.args[1:])
        return f"{_owner(node, depth)}.{target}({rest})"
    if node.op != "call_function":
        return node.name
    if target is getattr:
        return f"{_owner(node, depth)}.{node.args[1]}"
    if target is operator.getitem:
        return f"{_owner(node, depth)}[{expression(node.args[1], depth + 1)}]"
    if target in _COMPARISONS or target in _ARITHMETIC:
        return _binary(node, depth)
    if target is operator.not_:
        return f"not {expression(node.args[0], depth + 1)}"
    if getattr(target, "__module__", "") in ("math", "builtins", "_operator"):
        inside = ", ".join(expression(arg, depth + 1) for arg in node.args)
        return f"{_NAMES.get(target, target.__name__)}({inside})"
    return node.name


def _owner(node: fx.Node, depth: int) -> str:
    return _operand(node.args[0], depth, _COMPARISONS | _ARITHMETIC)


def _binary(node: fx.Node, depth: int) -> str:
    target: Any = node.target
    symbol = _COMPARISONS.get(target) or _ARITHMETIC[target]
    looser = _COMPARISONS if target in _COMPARISONS else _COMPARISONS | _ARITHMETIC
    left, right = (_operand(arg, depth, looser) for arg in node.args)
    return f"{left} {symbol} {right}"


def _operand(argument: Any, depth: int, looser: Mapping[Any, str]) -> str:
    """Return an argument, in parentheses if its operator binds no tighter than what uses it."""
    text = expression(argument, depth + 1)
    nested = isinstance(argument, fx.Node) and argument.target in looser and text != argument.name
    return f"({text})" if nested else text
