"""What a graph module needs to be unpickled: torch.fx saves its code, and traces that again.

Then the code runs for once, on proxies: Python's own functions (`x is None`, the class of an
output) would be answered, not traced, and arithmetic on buffers alone would become constants that
no state dict and no device reaches.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, fx, nn

from fxprune.assumptions import IN_C
from fxprune.kinds import PASSES

# Modules of Python's own functions, which do not dispatch on proxies.
_PYTHONS = ("builtins", "_operator")
_MARKS = (PASSES, "leaf_because")


class BufferTracer(fx.Tracer):
    """torch.fx's tracer, where buffers are values of the graph as parameters are."""

    proxy_buffer_attributes = True


def wrap_functions_(graph: fx.Graph) -> None:
    """Let the code of a graph say which functions are to be traced as calls."""
    for node in graph.nodes:
        node.meta["is_wrapped"] = _is_wrapped(node)


def keep_buffers_(module: fx.GraphModule) -> None:
    """Let a graph module be traced again by `BufferTracer`, if it needs that.

    Otherwise it is torch's own tracer that traces it, so that nothing of ours is pickled.
    """
    if any(_needs_buffers(node, module) for node in module.graph.nodes):
        module._tracer_cls = module.graph._tracer_cls = BufferTracer


def marks_in(graph: fx.Graph) -> dict[str, dict[str, Any]]:
    """Return what tracing found out about modules kept whole, by path."""
    found = {
        str(node.target): {mark: node.meta[mark] for mark in _MARKS if mark in node.meta}
        for node in graph.find_nodes(op="call_module")
    }
    return {path: marks for path, marks in found.items() if marks}


def mark_(graph: fx.Graph, marks: Mapping[str, Mapping[str, Any]]) -> None:
    """Tell a graph what `marks_in` found in what it was made from."""
    for node in graph.find_nodes(op="call_module"):
        node.meta |= marks.get(str(node.target), {})


def _is_wrapped(node: fx.Node) -> bool:
    if node.target in IN_C:  # torch's own dispatch
        return False
    module = getattr(node.target, "__module__", None)
    by_user = node.meta.get("is_wrapped", False)
    return isinstance(node.target, type) or module in _PYTHONS or by_user


def _needs_buffers(node: fx.Node, module: fx.GraphModule) -> bool:
    """Tell whether a buffer is all that a node computes with, or what it calls or indexes."""
    held = [_is_buffer(source, module) for source in node.all_input_nodes]
    if node.op not in ("call_function", "call_method") or not any(held):
        return False
    first = node.args[0] if node.args else None
    asks = node.op == "call_method" or getattr(node.target, "__name__", "") == "getitem"
    return all(held) or (asks and isinstance(first, fx.Node) and _is_buffer(first, module))


def _is_buffer(node: fx.Node, module: fx.GraphModule) -> bool:
    if node.op != "get_attr":
        return False
    owner, _, name = str(node.target).rpartition(".")
    value: Any = getattr(module.get_submodule(owner), name, None)
    return isinstance(value, Tensor) and not isinstance(value, nn.Parameter)
