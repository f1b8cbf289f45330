"""From any module to a `torch.fx.GraphModule` that means the same in training and evaluation.

Two rungs of a ladder: symbolic tracing; and, where a submodule cannot be traced, that submodule as
a leaf, as small as possible, which the analysis then treats as a barrier. The model is traced once
in training and once in evaluation mode: a flag that torch.fx would have frozen
(`F.dropout(x, training=self.training)`) becomes a read of the live flag instead.
"""

import functools
import inspect
import operator
import os
import sys
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxprune.errors import ExampleInputError, TraceError

_NOT_THE_USERS = tuple(f"{Path(file).parent}{os.sep}" for file in (torch.__file__, __file__))


class ModelTracer(fx.Tracer):
    """torch.fx's tracer; it notes the user's source lines and retreats to leaves where it must."""

    # Arithmetic on buffers alone is part of the graph: they may change after tracing.
    proxy_buffer_attributes = True

    def __init__(self, given: Mapping[str, Any]) -> None:
        super().__init__()
        self.given = given
        self.leaves: dict[str, str] = {}
        self.evaluation_only = False
        self._parameter_proxies: dict[str, fx.Proxy] = {}

    def create_args_for_root(
        self,
        root_fn: Callable[..., Any],
        is_module: bool,
        concrete_args: Any = None,
    ) -> tuple[Callable[..., Any], list[Any]]:
        """Make inputs of the given arguments; Python supplies the defaults of the others."""
        signature = inspect.signature(self.root.forward)
        bound = inspect.BoundArguments(signature, OrderedDict())
        for name, value in self.given.items():
            parameter = signature.parameters[name]
            if parameter.kind is parameter.VAR_POSITIONAL:
                inputs = (self._input(f"{name}_{index}") for index in range(len(value)))
                bound.arguments[name] = tuple(inputs)
            elif parameter.kind is parameter.VAR_KEYWORD:
                bound.arguments[name] = {key: self._input(key) for key in value}
            else:
                bound.arguments[name] = self._input(name)

        @functools.wraps(root_fn)
        def forward(*args: Any) -> Any:
            return root_fn(*args, **bound.kwargs)

        return forward, [self.root, *bound.args]

    def _input(self, name: str) -> fx.Proxy:
        return self.create_proxy("placeholder", name, (), {})

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, fx.Proxy]) -> Any:
        """Read a parameter, and remember where torch.fx remembers the node that does."""
        self._parameter_proxies = parameter_proxy_cache
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        """Create a node that remembers which line of the user's code asked for it.

        A graph knows no `torch.no_grad`. A submodule that uses it is kept whole; where the model
        itself does, the graph is good for evaluation only.
        """
        if not torch.is_grad_enabled():
            if self.module_stack:
                raise TraceError("it switches gradients off, which no graph does")
            self.evaluation_only = True
        node = super().create_node(*args, **kwargs)
        node.meta["source"] = _user_line(sys._getframe(1))
        return node

    def call_module(
        self,
        m: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Trace into `m`, or make it a leaf if that fails."""
        last, depth = self._last_node(), len(self.module_stack)
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception as error:
            path = self.path_of_module(m)
            self.leaves[path] = f"{type(error).__name__}: {_first_line(error)}"
            while len(self.module_stack) > depth:
                self.module_stack.popitem()
            self._erase_after(last)
            return self.create_proxy("call_module", path, args, kwargs)

    def _last_node(self) -> fx.Node | None:
        return next(iter(reversed(self.graph.nodes)), None)

    def _erase_after(self, last: fx.Node | None) -> None:
        erased: set[fx.Node] = set()
        while (node := self._last_node()) is not None and node is not last:
            self.graph.erase_node(node)
            erased.add(node)
        for name, proxy in list(self._parameter_proxies.items()):
            if proxy.node in erased:
                del self._parameter_proxies[name]


def trace(root: nn.Module, given: Mapping[str, Any]) -> fx.GraphModule:
    """Trace `root`; its forward arguments in `given` are inputs, all others keep their defaults.

    The graph module shares the parameters of `root`. Where the two modes run different operators
    (auxiliary heads), it is the graph of evaluation and `meta["evaluation_only"]` says so.
    Raises `TraceError`.
    """
    flags = {module: module.training for module in root.modules()}
    try:
        training, _ = _trace_in_mode(root, given, training=True)
        evaluation, tracer = _trace_in_mode(root, given, training=False)
    finally:
        for module, flag in flags.items():
            module.training = flag
    same_in_both_modes = _same_structure(root, training, evaluation)
    if same_in_both_modes:
        _thaw_modes(training, evaluation)
    module = fx.GraphModule(root, evaluation, type(root).__name__)
    module.meta["evaluation_only"] = tracer.evaluation_only or not same_in_both_modes
    for name, part in module.named_modules():
        part.training = flags[root.get_submodule(name)]
    for node in module.graph.nodes:
        if node.op == "call_module" and node.target in tracer.leaves:
            node.meta["leaf_because"] = tracer.leaves[node.target]
    return module


def bound_arguments(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the forward arguments that example inputs give, by name."""
    name = type(model).__name__
    try:
        signature = inspect.signature(model.forward)
    except ValueError as error:
        raise TraceError(
            f"{name}.forward is not Python ({error}); pass the model that {name} was made from"
        ) from error
    try:
        return dict(signature.bind(*args, **kwargs).arguments)
    except TypeError as error:
        raise ExampleInputError(
            f"the example inputs do not fit {name}.forward{signature}: {error}; "
            "pass example_inputs=(…) in the order of its arguments"
        ) from error


def _trace_in_mode(
    root: nn.Module, given: Mapping[str, Any], *, training: bool
) -> tuple[fx.Graph, ModelTracer]:
    root.train(training)
    tracer = ModelTracer(given)
    try:
        with torch.enable_grad():
            graph = tracer.trace(root)
    except Exception as error:
        raise TraceError(
            f"{type(root).__name__} cannot be traced: {type(error).__name__}: {_first_line(error)}"
            f"{_place(error)}; move the data-dependent Python of its forward into a submodule of "
            "its own (a submodule that cannot be traced is kept whole), or instrument its parts"
        ) from error
    # Unpickling a graph module calls its tracer's class; torch.fx's own has all that takes.
    graph._tracer_cls = None
    return graph, tracer


def _same_structure(root: nn.Module, training: fx.Graph, evaluation: fx.Graph) -> bool:
    """Tell whether both graphs run the same operators on the same arguments, rates apart."""
    if len(training.nodes) != len(evaluation.nodes):
        return False
    twins = dict(zip(training.nodes, evaluation.nodes, strict=True))
    return all(
        yes.op == no.op
        and _same_target(root, yes, no)
        and _alike(yes.args, no.args, twins)
        and _alike(yes.kwargs, no.kwargs, twins)
        for yes, no in twins.items()
    )


def _same_target(root: nn.Module, yes: fx.Node, no: fx.Node) -> bool:
    """Compare targets; torch.fx gives a constant tensor another name in every trace."""
    if yes.target == no.target:
        return True
    if yes.op != "get_attr":
        return False
    left, right = (getattr(root, str(node.target), None) for node in (yes, no))
    if not isinstance(left, Tensor) or not isinstance(right, Tensor):
        return False
    return left.dtype == right.dtype and torch.equal(left, right)


def _alike(yes: Any, no: Any, twins: Mapping[fx.Node, fx.Node]) -> bool:
    """Compare arguments of twin nodes: equal, or flags and rates that follow the mode."""
    if isinstance(yes, fx.Node):
        return twins[yes] is no
    if isinstance(yes, slice) and isinstance(no, slice):
        return _alike((yes.start, yes.stop, yes.step), (no.start, no.stop, no.step), twins)
    if isinstance(yes, (tuple, list)) and isinstance(no, (tuple, list)):
        pairs = zip(yes, no, strict=False)
        return len(yes) == len(no) and all(_alike(a, b, twins) for a, b in pairs)
    if isinstance(yes, Mapping) and isinstance(no, Mapping):
        return yes.keys() == no.keys() and all(_alike(yes[key], no[key], twins) for key in yes)
    return _follows_mode(yes, no) or yes is no or (type(yes) is type(no) and yes == no)


def _follows_mode(yes: Any, no: Any) -> bool:
    """Tell whether two constants are a flag or a rate that differs; sizes must not."""
    types = {type(yes), type(no)}
    return (types == {bool} or (float in types and types <= {int, float})) and yes != no


def _thaw_modes(training: fx.Graph, evaluation: fx.Graph) -> None:
    """Turn flags and rates that differ between the modes into reads of the training flag."""
    for in_training, node in list(zip(training.nodes, evaluation.nodes, strict=True)):
        stack = node.meta.get("nn_module_stack") or {"": ("", None)}
        owner = list(stack.values())[-1][0]
        flag_name = f"{owner}.training" if owner else "training"

        def thaw(yes: Any, no: Any, at: fx.Node = node, name: str = flag_name) -> Any:
            if _follows_mode(yes, no):
                with evaluation.inserting_before(at):
                    flag = evaluation.get_attr(name)
                    if (yes, no) != (True, False):
                        flag = evaluation.call_function(operator.getitem, ((no, yes), flag))
                flag.meta["source"] = at.meta["source"]
                return flag
            if isinstance(no, (tuple, list)):
                return type(no)(thaw(a, b) for a, b in zip(yes, no, strict=True))
            if isinstance(no, Mapping):
                return {key: thaw(yes[key], no[key]) for key in no}
            return no

        node.args = thaw(in_training.args, node.args)
        node.kwargs = thaw(in_training.kwargs, node.kwargs)


def _user_line(frame: FrameType | None) -> str | None:
    while frame is not None:
        name = frame.f_code.co_filename
        if not name.startswith(_NOT_THE_USERS) and not name.startswith("<"):
            return f"{name}:{frame.f_lineno}"
        frame = frame.f_back
    return None


def _place(error: Exception) -> str:
    traceback, line = error.__traceback__, None
    while traceback is not None:
        name = traceback.tb_frame.f_code.co_filename
        if not name.startswith(_NOT_THE_USERS):
            line = f"{name}:{traceback.tb_lineno}"
        traceback = traceback.tb_next
    return f" (at {line})" if line else ""


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
