"""What a graph module needs to be unpickled: torch.fx saves its code, and traces that again.

Then the code runs for once, on proxies: Python's own functions (`x is None`, the class of an
output) would be answered, not traced, arithmetic on buffers alone would become constants that no
state dict and no device reaches, and training flags what they were.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxprune.runtime.kinds import PASSES
from fxprune.tracing.asked_tracer import IN_C
from fxprune.tracing.dtype_limits import LIMITS, asking_for_limits
from fxprune.tracing.modes import answering_modes, follows_mode
from fxprune.tracing.notes import OWNER
from fxprune.tracing.two_modes import CodeGenOfBothModes, has_both_modes, join
from fxprune.user_models.modules import free_name

# Modules of Python's own functions, which do not dispatch on proxies.
_PYTHONS = ("builtins", "_operator")
_FACTORIES = (torch.zeros, torch.ones, torch.empty, torch.rand, torch.randn)
_MARKS = (PASSES, "leaf_because")


class LiveTracer(fx.Tracer):
    """torch.fx's tracer, where buffers and training flags are values of the graph, too."""

    proxy_buffer_attributes = True

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        """Trace as torch.fx does; who reads a flag meanwhile is the code that is traced."""
        with answering_modes(self._flag), asking_for_limits():
            return super().trace(root, concrete_args)

    def create_arg(self, a: Any) -> Any:
        """Lower an argument; the model itself is whose attributes the code sets."""
        return OWNER if a is self.root else super().create_arg(a)

    def _flag(self, module: nn.Module) -> Any:
        path = self.path_of_module(module)
        return self.create_proxy("get_attr", f"{path}.training" if path else "training", (), {})


class TracerOfBothModes(LiveTracer):
    """The same for a model with a graph for each mode: traced in either, one behind the other."""

    mode = False

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        """Trace in evaluation, then in training."""
        self.mode = True
        training = super().trace(root, concrete_args)
        self.mode = False
        evaluation = super().trace(root, concrete_args)
        join(evaluation, training)
        evaluation.set_codegen(CodeGenOfBothModes())
        return evaluation

    def _flag(self, module: nn.Module) -> Any:
        return self.mode if module is self.root else super()._flag(module)


def wrap_functions_(graph: fx.Graph) -> None:
    """Let the code of a graph say which functions are to be traced as calls.

    What makes tensors takes a proxy as one of its sizes in a tuple only.
    """
    for node in graph.nodes:
        several = node.op == "call_function" and node.target in _FACTORIES and len(node.args) > 1
        if several and node.all_input_nodes:
            node.args = (node.args,)
        node.meta["is_wrapped"] = _is_wrapped(node)


def keep_buffers_(module: fx.GraphModule) -> None:
    """Let torch's own tracer, which a plain result is traced again by, see buffers as values.

    It takes submodules for operators: behind an `nn.Identity` a buffer is what one returned.
    """
    nodes = list(module.graph.nodes)
    alone = [node for node in nodes if _needs_buffers(node, module)]
    reads = {s: None for node in alone for s in node.all_input_nodes if _is_buffer(s, module)}
    for read in reads:
        name = free_name(module, f"{read.name}_read")
        module.add_submodule(name, nn.Identity().train(module.training))
        with module.graph.inserting_after(read):
            value = module.graph.call_module(name, (read,))
        value.meta["source"] = read.meta.get("source")
        read.replace_all_uses_with(value, delete_user_cb=lambda user, own=value: user is not own)
    if reads:
        module.graph.lint()
        module.recompile()


def keep_questions_(module: fx.GraphModule) -> None:
    """Let a plain result that asks for modes, or limits of dtypes, do so when it is loaded.

    That takes our tracer: it cannot be loaded without fxprune.
    """
    if has_both_modes(module.graph):
        return  # it has a tracer of ours
    if any(follows_mode(node) or node.target in LIMITS for node in module.graph.nodes):
        module._tracer_cls = module.graph._tracer_cls = LiveTracer


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
    module = getattr(node.target, "__module__", None) or ""
    if node.target in IN_C or module.split(".")[0] == "torch":  # torch's own dispatch
        return False
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
