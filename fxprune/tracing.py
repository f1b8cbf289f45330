"""From any module to a `torch.fx.GraphModule` that means the same in training and evaluation.

Three rungs of a ladder: symbolic tracing; where Python asks for a size, the example inputs' (see
`assumptions`); and, where a submodule cannot be traced, that submodule as a leaf, as small as
possible, which the analysis then treats as a barrier. A model that asks for its mode is traced once
in training and once in evaluation mode: a flag that torch.fx would have frozen
(`F.dropout(x, training=self.training)`) becomes a read of the live flag instead.
"""

import functools
import inspect
import keyword
import sys
from collections import OrderedDict
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fxprune.assumptions import PLAIN
from fxprune.beside import Beside
from fxprune.call_state import CallState, answers_matter, asked_of
from fxprune.classes import modules_of, of_their_classes
from fxprune.deeds import ADDING, contents_of, place_of, written_beside, written_into
from fxprune.dtype_limits import asking_for_limits
from fxprune.einops_backend import teach_einops
from fxprune.errors import ExampleInputError, TraceError
from fxprune.frozen_attributes import note_
from fxprune.garbage import uncollected
from fxprune.graph_modules import without_code
from fxprune.imports import imported_unchanged
from fxprune.keeping import Held, Parts, Written, count_on_
from fxprune.kinds import PASSES
from fxprune.lookups import NOT_THE_USERS
from fxprune.modes import (
    copy_alike,
    differ_in_constants,
    flags_after,
    forget_counts,
    keep_flags_,
    mode_questions,
    overrides_train,
    same_structure,
    steady_flags,
    thaw_modes,
)
from fxprune.modules import has_hooks, tensors_in
from fxprune.naming import RESERVED
from fxprune.notes import OWNER, leave_note, noted
from fxprune.randomness import Generators
from fxprune.retracing import wrap_functions_
from fxprune.scripts import inlined
from fxprune.stale_names import stale_read
from fxprune.stand_ins import standing_in
from fxprune.tables import sliced_by_name
from fxprune.two_modes import Flags, find_twins, hold_, other_mode
from fxprune.unrecorded import UnrecordedTracer
from fxprune.watching import OwnTensors, left_alone
from fxprune.whole_numbers import kept_whole

_NOTHING = contents_of({})
_TRANSFORMERS = (
    *(nn.TransformerEncoderLayer, nn.TransformerDecoderLayer, nn.TransformerDecoder),
    nn.Transformer,
)
_CHANGES = (
    "what it computes in training changes from call to call, as it counts, draws or keeps "
    "something in Python, which a trace would do once for all; pass such numbers as arguments"
)
_HOOKED = "it has hooks, which a trace would call once; remove them first, and add them again then"


class ModelTracer(UnrecordedTracer):
    """torch.fx's tracer; it notes the user's source lines and retreats to leaves where it must."""

    # Arithmetic on buffers alone is part of the graph: they may change after tracing.
    proxy_buffer_attributes = True

    def __init__(
        self, given: Mapping[str, Any], whole: Collection[str] = (), *, inside: bool = False
    ) -> None:
        super().__init__()
        self.given = given
        self.whole = whole
        self.inside = inside
        self.passes: dict[str, bool] = {}
        self.leaves: dict[str, str] = {}
        self.written: set[str] = set()
        self.idle: Collection[str] = whole
        self.watching = self.drew = False
        self.masked: set[str] = set()
        self.evaluation_only = False
        self._parameter_proxies: dict[str, fx.Proxy] = {}
        self.own: OwnTensors | None = None
        self._registered: dict[int, tuple[str, Tensor]] | None = None
        self.keeping: list[Held] = []
        self.arguments = contents_of({})
        self.beside: Beside | None = None
        self.other: ModelTracer | None = None  # of training, if that has a graph of its own
        self.untrained = ""  # why it has none
        self.asked: set[nn.Module] = set()  # who asks for its mode, in either
        self.backward = ""  # whose backward a graph to train by would lose

    def create_args_for_root(
        self,
        root_fn: Callable[..., Any],
        is_module: bool,
        concrete_args: Any = None,
    ) -> tuple[Callable[..., Any], list[Any]]:
        """Make inputs of the given arguments; Python supplies the defaults of the others."""
        signature = inspect.signature(self.root.forward)
        inputs = self._inputs(signature)
        self.arguments = contents_of(inputs)
        bound = inspect.BoundArguments(signature, OrderedDict())
        for name, value in self.given.items():
            parameter = signature.parameters[name]
            if parameter.kind is parameter.VAR_POSITIONAL:
                bound.arguments[name] = tuple(inputs[f"{name}_{i}"] for i in range(len(value)))
            elif parameter.kind is parameter.VAR_KEYWORD:
                bound.arguments[name] = {key: inputs[key] for key in value}
            else:
                bound.arguments[name] = inputs[name]

        @functools.wraps(root_fn)
        def forward(*args: Any) -> Any:
            return root_fn(*args, **bound.kwargs)

        return forward, [self.root, *bound.args]

    def _inputs(self, signature: inspect.Signature) -> dict[str, Any]:
        """Return what stands for every argument: a proxy, a structure of proxies, a constant."""
        given = dict(_flat_arguments(signature, self.given))
        optional = _optional(signature, given)
        proxies = {
            name: self.create_proxy("placeholder", name, (value,) if name in optional else (), {})
            for name, value in given.items()
        }
        self.examples |= {proxy.node: given[name] for name, proxy in proxies.items()}
        for name in _may_be_none(signature, given, anything=self.inside):
            self.assume_given(proxies[name])
        return {name: self._specialised(proxies[name], value) for name, value in given.items()}

    def _specialised(self, proxy: fx.Proxy, value: Any) -> Any:
        """Return an input as Python sees it: its plain values and structure are the example's."""
        if isinstance(value, PLAIN):
            self.assume_value(proxy, value)
            return value
        paths, spec = pytree.tree_flatten_with_path(value, is_leaf=lambda part: part is not value)
        if spec.is_leaf():
            return proxy
        self.assume_structure(proxy, value)
        parts = [self._specialised(pytree.key_get(proxy, path), part) for path, part in paths]
        return pytree.tree_unflatten(parts, spec)

    def create_arg(self, a: Any) -> Any:
        """Lower an argument; a dict that is a dataclass too (a ModelOutput) stays what it is."""
        if isinstance(a, np.generic):
            return a.item()  # a graph's code would name numpy
        if isinstance(a, Tensor) and self.own is not None:
            name = self.own.name_of(a)
            if name and a not in self.tensor_attrs and not isinstance(a, nn.Parameter):
                raise TraceError(
                    f"it reads {name!r} under a second name (.data, a list), as no graph does: use "
                    f"self.{name}"
                )
        if not isinstance(a, dict) or not is_dataclass(a):
            return self._lowered(a)
        entries = {field.name: self.create_arg(getattr(a, field.name)) for field in fields(a)}
        if not entries.keys() >= a.keys():
            raise TraceError(f"a {type(a).__name__} has entries besides its fields")
        return self.create_node("call_function", type(a), (), entries)

    def _lowered(self, a: Any) -> Any:
        try:
            return super().create_arg(a)
        except NotImplementedError as error:
            raise TraceError(
                f"no graph holds a {type(a).__name__}, as is passed on or returned; do without it "
                "(models of transformers: model.config.use_cache = False)"
            ) from error

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Trace into torch's own transformer layers: what is between their linear layers can go."""
        if isinstance(m, _TRANSFORMERS):
            return False
        if isinstance(m, nn.TransformerEncoder):  # looks at its masks, and packs what they leave
            return module_qualified_name in {*self.masked, *self.whole}
        if isinstance(m, torch.jit.ScriptModule):  # its forward is no Python
            return True
        return module_qualified_name in self.whole or super().is_leaf_module(
            m, module_qualified_name
        )

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, fx.Proxy]) -> Any:
        """Read a parameter or buffer; torch.fx goes through all of them to find each name."""
        if self.answering or not isinstance(attr_val, Tensor):
            return attr_val
        self._parameter_proxies = parameter_proxy_cache
        if self._registered is None:
            named: Any = (*self.root.named_buffers(), *self.root.named_parameters())
            self._registered = {id(tensor): (name, tensor) for name, tensor in reversed(named)}
        name, tensor = self._registered.get(id(attr_val), ("", None))
        if tensor is not attr_val:  # it was registered since
            return super().getattr(attr, attr_val, parameter_proxy_cache)
        if name not in parameter_proxy_cache:
            parameter_proxy_cache[name] = self.create_proxy("get_attr", name, (), {})
        return parameter_proxy_cache[name]

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        """Create a node that remembers which line of the user's code asked for it."""
        node = super().create_node(*args, **kwargs)
        if node.op == "call_method" and node.target in ADDING:
            self._require_no_object(node)
        is_end = node.op in ("placeholder", "output")
        node.meta["source"] = _first_line_of(self.root) if is_end else _user_line(sys._getframe(1))
        return node

    def call_module(
        self,
        m: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Trace into `m`, or make it a leaf if that fails."""
        if self.answering or self._is_made_on_the_way(m):
            return forward(*args, **kwargs)
        last, depth = self._last_node(), len(self.module_stack)
        path, held, mark = self.path_of_module(m), Held(m), len(self.keeping)
        writes = len(self.writes)
        others = _no_values(args, kwargs)
        given = contents_of({"": others}) if others else _NOTHING
        beside = self._unwritten_beside()
        generators = Generators() if self.watching else None
        if isinstance(m, nn.TransformerEncoder) and _has_masks(args, kwargs):
            self.masked.add(path)
            self.leaves[path] = "it looks at its masks, and packs what they leave"
        is_leaf = self.is_leaf_module(m, path)
        if kwargs and is_leaf:
            args, kwargs = _in_order(m, args, kwargs)
        try:
            if has_hooks(m) and not is_leaf:
                raise TraceError(_HOOKED)
            result = super().call_module(m, forward, args, kwargs)
            self.require_fresh(writes)
            kept = held.kept()
            self.note(held.put_back(), path)
            if kept:  # in evaluation as in training a module may be called again, and read it
                vars(m).update(kept)
                self.keeping.append(held)
            _require_drawn_nothing(generators)
            _require_unwritten(beside)
            passes = self._last_node() is last and len(args) == 1 and result is args[0]
            self.passes[path] = passes and self.passes.get(path, True)
            return result
        except Exception as error:
            self.put_back(mark)
            held.put_back()
            if beside is not None:
                beside.put_back()
            if given.written():
                given.put_back()
                raise TraceError(
                    f"{path} writes into what it is given, and cannot be traced: {error}"
                ) from error
            if generators is not None:
                generators.put_back()
            self.leaves[path] = f"{type(error).__name__}: {_first_line(error)}"
            while len(self.module_stack) > depth:
                self.module_stack.popitem()
            self._erase_after(last)
            return self.create_proxy("call_module", path, args, kwargs)

    def _value(self, obj: fx.Proxy, *, tensors: bool = False) -> Any:
        """Answer a question; whoever is run for it may write, which is not the forward's deed."""
        beside = self._unwritten_beside()
        try:
            return super()._value(obj, tensors=tensors)
        finally:
            if beside is not None:
                beside.put_back()

    def _unwritten_beside(self) -> Beside | None:
        """Return what lies beside the model, if it is watched and nobody has written there yet."""
        return None if self.beside is None or self.beside.written() else self.beside

    def put_back(self, mark: int = 0) -> None:
        """Take what is traced out of the modules that have kept it, since there were `mark`."""
        while len(self.keeping) > mark:
            self.keeping.pop().put_back()

    def _is_made_on_the_way(self, m: nn.Module) -> bool:
        """Tell whether a forward made a module, of the model's own parts or of none."""
        try:
            self.path_of_module(m)
        except NameError:
            own = {id(tensor) for tensor in tensors_in(self.root)}
            if has_hooks(m) or any(id(tensor) not in own for tensor in tensors_in(m)):
                raise TraceError(
                    f"its forward makes a {type(m).__name__} with weights of its own, which are no "
                    "part of the model; make it in __init__"
                ) from None
            return True
        return False

    @contextmanager
    def refusing_autocast(self) -> Generator[None]:
        """Let no traced code switch autocast: a graph would forget that (norms kept in float32)."""
        enter, tracer = torch.autocast.__enter__, self

        def refuse(self: torch.autocast) -> Any:
            if tracer.answering:
                return enter(self)
            raise TraceError("it switches autocast, which no graph does")

        with standing_in((torch.autocast, "__enter__", refuse)):
            yield

    @contextmanager
    def noting_functions(self) -> Generator[None]:
        """Note a function of autograd that the model itself applies: its backward would be lost.

        In a submodule it is refused, so that the submodule is kept whole. Torch's own, which save
        memory by computing twice, have the backward that a graph has.
        """
        apply, tracer = inspect.getattr_static(torch.autograd.Function, "apply"), self

        def noting(cls: Any, *args: Any, **kwargs: Any) -> Any:
            is_torchs = str(cls.__module__).startswith("torch.")
            traced = any(isinstance(one, fx.Proxy) for one in args)
            if traced and not is_torchs and not tracer.answering:
                tracer.note_backward(cls.__name__)
            return apply.__get__(None, cls)(*args, **kwargs)

        with standing_in((torch.autograd.Function, "apply", classmethod(noting))):
            yield

    def note_backward(self, name: str) -> None:
        """Note that a model needs the backward of a function; `TraceError` in a submodule."""
        if self.module_stack:
            raise TraceError(f"it calls {name}, whose backward is its own, which no graph has")
        self.evaluation_only = True
        self.backward = name
        self.untrained = f"it calls {name}, whose backward is its own"

    def note(self, written: Written, path: str = "") -> None:
        """Remember which attributes a forward wrote; `TraceError` if it replaced a tensor."""
        if written.tensors:
            raise TraceError(
                f"its forward replaces its tensor {written.tensors[0]!r}, which no graph does: "
                f"write into it instead (self.{written.tensors[0]}.copy_(…), .add_(…))"
            )
        self.written |= {f"{path}.{name}" if path else name for name in written.attributes}

    def leave_notes(self, held: Held) -> None:
        """Let the graph set the attributes that something traced was put in, by whatever part.

        held: what the model itself held before. In a part of a model, which may be kept for what it
        is, nobody is told of them.
        """
        end = self.graph.output_node()
        for one in () if self.inside else (*self.keeping, held):
            path = self.path_of_module(one.module) if one is not held else ""
            for name, value in one.kept().items():
                if path or name not in RESERVED:
                    self._leave_note(end, f"{path}.{name}".lstrip("."), value, one.module)
        while (stale := stale_read(self.graph, self.writes, self._tensor_of)) is not None:
            for node in (*stale.users, stale):  # what it holds was overwritten since
                self.graph.erase_node(node)

    def _leave_note(self, end: fx.Node, path: str, value: Any, part: nn.Module) -> None:
        try:
            with self.graph.inserting_before(end):
                args: Any = (OWNER, path, self.create_arg(value))
                node = self.graph.call_function(leave_note, args)
        except TraceError:  # in an object of the user's
            return
        node.meta |= {"source": _first_line_of(part), "is_wrapped": True}

    def _require_no_object(self, node: fx.Node) -> None:
        """Raise `TraceError` where a method writes into an object that is an argument."""
        held: Any = node.args[0] if node.args else None
        if isinstance(held, fx.Node) and not issubclass(self.class_of(self.proxy(held)), Tensor):
            raise TraceError(written_into(held.name))

    def _last_node(self) -> fx.Node | None:
        return next(iter(reversed(self.graph.nodes)), None)

    def _erase_after(self, last: fx.Node | None) -> None:
        erased: set[fx.Node] = set()
        while (node := self._last_node()) is not None and node is not last:
            self.graph.erase_node(node)
            erased.add(node)
        self.forget(erased)
        for name, proxy in list(self._parameter_proxies.items()):
            if proxy.node in erased:
                del self._parameter_proxies[name]


def _no_values(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """Return the arguments that are no traced values themselves: lists, dicts, objects."""
    return tuple(one for one in (*args, *kwargs.values()) if not isinstance(one, fx.Proxy))


def _has_masks(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Tell whether an encoder is given more than what it encodes."""
    beside = [*args[1:], *(value for name, value in kwargs.items() if name != "src")]
    return any(value is not None and value is not False for value in beside)


def _in_order(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return arguments by position, `layer(input=x)` as `layer(x)`, where a signature says how."""
    try:
        bound = inspect.signature(module.forward).bind(*args, **kwargs)
    except (TypeError, ValueError):  # the call fails, or its forward is not Python
        return args, kwargs
    return bound.args, bound.kwargs


def trace(root: nn.Module, given: Mapping[str, Any], *, inside: bool = False) -> fx.GraphModule:
    """Trace `root`; its forward arguments in `given` are inputs, all others keep their defaults.

    inside: it is called by a model, not by a user who sees what it takes.

    The graph module shares the parameters of `root`, and has no code yet. Where the two modes run
    different operators (auxiliary heads), it is the graph of evaluation and
    `meta["evaluation_only"]` says so; `meta["in_training"]` is then the graph of training, and the
    twins in it of the other's nodes, and what parts are told of the mode, if that can be traced as
    well. Raises `TraceError`.
    """
    flags, parts = {module: module.training for module in root.modules()}, Parts(root)
    try:
        training, evaluation, tracer = _trace_in_both_modes(
            root, given, inside=inside, trained=root.training
        )
        modes = (True, False) if overrides_train(root) else ()
        after = [flags_after(root, training=mode) for mode in modes]
    finally:
        for module, flag in flags.items():
            module.training = flag
        parts.put_back()
    same_in_both_modes = training is evaluation or same_structure(root, training, evaluation)
    if same_in_both_modes and training is not evaluation:
        thaw_modes(training, evaluation, steady_flags(after))
    evaluation_only = tracer.evaluation_only or not same_in_both_modes
    told = _told(root, tracer, after) if evaluation_only else {}
    module = without_code(root, evaluation, type(root).__name__)
    module.meta["written"] = sorted(tracer.written)
    tracers = [tracer] if tracer.other is None else [tracer, tracer.other]
    set_by_calls = {name for one in tracers for name in noted(one.graph)}
    module.meta["forgotten"] = sorted({n for one in tracers for n in one.written} - set_by_calls)
    note_(module, root, but=set_by_calls)
    if after:
        module.meta["modes"] = {path: after[0][path] for path in keep_flags_(module, *after)}
    module.meta["evaluation_only"] = evaluation_only
    module.meta["untrained"] = tracer.untrained
    module.meta["other_mode"] = _other_mode(root, told)
    module.meta["backward"] = tracer.backward
    if tracer.other is not None:
        hold_(module, root, training)
        module.meta["in_training"] = training, find_twins(root, evaluation, training), told
        _say_why_whole(training, tracer.other)
    for name, part in module.named_modules():
        part.training = flags[root.get_submodule(name)]
    _say_why_whole(module.graph, tracer)
    return module


def _told(root: nn.Module, tracer: ModelTracer, after: Sequence[dict[str, bool]]) -> Flags:
    """Return what the traced modules in `root` that ask for their mode are told in either.

    In training, and in evaluation. after: what `flags_after` said of both, if they do not follow.
    """
    leaves = [*tracer.leaves, *tracer.whole, *(tracer.other.leaves if tracer.other else ())]
    paths = [
        path
        for path, module in root.named_modules()
        if path and module in tracer.asked and not _is_inside(path, leaves)
    ]
    return {path: (after[0][path], after[1][path]) if after else (True, False) for path in paths}


def _is_inside(path: str, others: Collection[str]) -> bool:
    return any(f"{path}.".startswith(f"{other}.") for other in others)


def _other_mode(root: nn.Module, told: Flags) -> str:
    """Say which part is in another mode than the model has it in, nothing if none is."""
    for path, (in_training, in_evaluation) in told.items():
        expected = in_training if root.training else in_evaluation
        if text := other_mode(root.get_submodule(path).training, expected, path):
            return text
    return ""


def _say_why_whole(graph: fx.Graph, tracer: ModelTracer) -> None:
    for node in graph.find_nodes(op="call_module"):
        if node.target in tracer.leaves:
            node.meta["leaf_because"] = tracer.leaves[node.target]
        if node.target in tracer.idle:
            node.meta[PASSES] = True


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


def _trace_in_both_modes(
    root: nn.Module, given: Mapping[str, Any], *, inside: bool, trained: bool
) -> tuple[fx.Graph, fx.Graph, ModelTracer]:
    """Return the graphs of training and evaluation, which is one where nobody asks for the mode.

    A module that does something in training only (stochastic depth) is kept whole if then the
    graphs have one structure; in a model that is `trained`, also one without parameters that does
    something else then (in evaluation its graph would do). Otherwise the model has two graphs, or,
    where that of training is none to train by, modules with parameters are kept whole, too.
    """
    in_mode = functools.partial(_trace_in_mode, root, given, inside=inside)
    with uncollected(), mode_questions() as asked:
        evaluation, tracer = in_mode(training=False, drawing=True)
    if tracer.drew and (trained or not asked):
        evaluation, tracer = in_mode(training=False)
    if not asked:
        return evaluation, evaluation, tracer
    tracer.asked = asked
    try:
        with uncollected(), mode_questions() as asked_in_training:
            training, other = in_mode(training=True)
    except TraceError as error:
        if trained:
            raise
        tracer.evaluation_only, tracer.untrained = True, f"in training {error}"
        return evaluation, evaluation, tracer
    tracer.asked = asked | asked_in_training
    idle = {path for path, passes in tracer.passes.items() if passes}
    idle -= {path for path, passes in other.passes.items() if passes}
    copy_alike(training, evaluation)
    if same_structure(root, training, evaluation):
        if not _repeats(root, in_mode, training, other.written):
            if trained:
                raise TraceError(_CHANGES)
            tracer.evaluation_only, tracer.untrained = True, _CHANGES
            return evaluation, evaluation, tracer
        tracer.written |= other.written
        return training, evaluation, tracer

    if idle and (one_graph := _with_leaves(root, in_mode, idle)):
        return one_graph
    busy = _innermost(root, asked | asked_in_training) - idle if trained else set[str]()
    plain = {path for path in busy if not any(True for _ in root.get_submodule(path).parameters())}
    if plain and (one_graph := _with_leaves(root, in_mode, idle, plain)):
        return one_graph
    tracer.untrained = _why_untrained(tracer, other)
    if not tracer.untrained and not _repeats(root, in_mode, training, other.written):
        tracer.untrained = _CHANGES
    if not tracer.untrained:
        tracer.other = other
    elif busy - plain:
        return _with_leaves(root, in_mode, idle, busy) or (training, evaluation, tracer)
    return training, evaluation, tracer


def _with_leaves(
    root: nn.Module,
    in_mode: Callable[..., tuple[fx.Graph, ModelTracer]],
    idle: set[str],
    busy: Collection[str] = (),
) -> tuple[fx.Graph, fx.Graph, ModelTracer] | None:
    """Trace with some modules kept whole; None if that makes no graph for both modes."""
    whole = idle.union(busy)
    with uncollected():
        evaluation, tracer = in_mode(training=False, whole=whole)
        training, other = in_mode(training=True, whole=whole)
    if not same_structure(root, training, evaluation):
        return None
    tracer.written |= other.written
    tracer.idle = idle
    tracer.leaves |= dict.fromkeys(busy, "it runs other operators in training")
    return training, evaluation, tracer


def _why_untrained(tracer: ModelTracer, other: ModelTracer) -> str:
    """Return why a graph of training is none to train by, nothing if it may be one.

    tracer, other: those of evaluation and of training.
    """
    if other.untrained:
        return other.untrained
    if kept := sorted(other.written - tracer.written - noted(other.graph)):
        return f"its forward sets {kept[0]} in training only, which a graph forgets"
    for one, twin in ((other, tracer), (tracer, other)):
        used = {
            str(node.target) for node in twin.graph.nodes if node.op in ("call_module", "get_attr")
        }
        for path in one.leaves:
            if any(name.startswith(f"{path}.") for name in used):
                mode = "training" if one is other else "evaluation"
                return f"in {mode} alone {path} cannot be traced into: {one.leaves[path]}"
    return ""


def _repeats(
    root: nn.Module,
    in_mode: Callable[..., tuple[fx.Graph, ModelTracer]],
    training: fx.Graph,
    written: Collection[str],
) -> bool:
    """Tell whether a later call in training does what the first did: nobody counts, or draws."""
    count_on_(root, written)
    with uncollected():
        again, _ = in_mode(training=True)
    copy_alike(again, training)
    return same_structure(root, again, training) and not differ_in_constants(again, training)


def _innermost(root: nn.Module, asked: Collection[nn.Module]) -> set[str]:
    """Return the paths of the modules that asked for the mode, but for those around others."""
    paths = {path for path, module in root.named_modules() if path and module in asked}
    around = {path.rpartition(".")[0] for path in paths}
    while parents := {path.rpartition(".")[0] for path in around} - around:
        around |= parents
    return paths - around


def _trace_in_mode(
    root: nn.Module,
    given: Mapping[str, Any],
    *,
    training: bool,
    inside: bool,
    whole: Collection[str] = (),
    drawing: bool = False,
) -> tuple[fx.Graph, ModelTracer]:
    """Trace in one mode; drawing: let it draw random numbers of its own, which tells `drew`."""
    root.train(training)
    generators, beside, state = Generators(), Beside(root), CallState()
    in_mode = functools.partial(_traced, root, given, whole, inside=inside)
    try:
        tracer, graph = in_mode(state=state)
        if answers_matter(state.asked, functools.partial(_is_same, root, in_mode, graph)):
            state = CallState(refused=True)
        drew, wrote = bool(generators.drew()), beside.written()
        if drew:
            generators.put_back()
        watching = drew and not drawing
        if watching or wrote or state.refused:
            beside.put_back()
            tracer, graph = in_mode(watching=watching, beside=beside, state=state)
            _require_unwritten(beside)
        if watching:
            _require_drawn_nothing(generators)
        elif drew:
            generators.put_back()
        tracer.drew = drew and drawing
    except Exception as error:
        raise TraceError(
            f"{type(root).__name__} cannot be traced: {type(error).__name__}: {_first_line(error)}"
            f"{_place(error)}; move the data-dependent Python of its forward into a submodule of "
            "its own (a submodule that cannot be traced is kept whole), or instrument its parts"
        ) from error
    finally:
        beside.put_back()
    if training:
        forget_counts(root, graph)
    for node in graph.nodes:
        if node.op in ("call_module", "get_attr"):
            _require_sayable(root, str(node.target))
    wrap_functions_(graph)
    # Unpickling a graph module calls its tracer's class; torch.fx's own has all that takes.
    graph._tracer_cls = None
    return graph, tracer


def _is_same(
    root: nn.Module,
    in_mode: Callable[..., tuple[ModelTracer, fx.Graph]],
    graph: fx.Graph,
    state: CallState,
) -> bool:
    """Tell whether a model has the same graph where its questions are answered by `state`."""
    try:
        _, other = in_mode(state=state)
    except Exception:
        return False
    return same_structure(root, other, graph) and not differ_in_constants(other, graph)


def _traced(
    root: nn.Module,
    given: Mapping[str, Any],
    whole: Collection[str],
    *,
    inside: bool,
    watching: bool = False,
    beside: Beside | None = None,
    state: CallState,
) -> tuple[ModelTracer, fx.Graph]:
    """Trace once.

    watching: for modules that draw random numbers, which are then kept whole. beside: modules
    that write into it are kept whole, too. state: answers questions for gradients and autocast.
    """
    if has_hooks(root):
        raise TraceError(_HOOKED)
    teach_einops()
    tracer, held = ModelTracer(given, whole, inside=inside), Held(root)
    tracer.watching, tracer.own = watching, OwnTensors(root)
    tracer.beside = beside
    parts, users = Parts(root), modules_of(root)
    try:
        with (
            torch.enable_grad(),
            imported_unchanged(),
            left_alone(tracer.own, tracer),
            without_fused_layers(),
            tracer.refusing_autocast(),
            tracer.noting_functions(),
            sliced_by_name(root, tracer),
            of_their_classes(users, tracer),
            asked_of(state, users, tracer),
            kept_whole(users, tracer),
            inlined(tracer),
            asking_for_limits(),
        ):
            graph = tracer.trace(root)
            tracer.require_fresh()
            tracer.leave_notes(held)
    finally:
        tracer.put_back()
        written = held.put_back()
        shared = parts.shared()
    if shared:
        raise TraceError(
            f"its forward keeps a tensor in {shared}, which all models of the class share; keep it "
            "in a buffer"
        )
    tracer.note(written)
    replaced = parts.replaced()
    if replaced:
        raise TraceError(
            f"its forward replaces or adds {replaced!r}, a tensor or part of it, which no graph "
            "does; make it in __init__, and write into tensors (copy_)"
        )
    if name := tracer.arguments.written():
        raise TraceError(written_into(name, place_of([type(root).forward], name)))
    others = sorted(parts.changed() - tracer.written)
    if others:
        raise TraceError(
            f"its forward sets {others[0]!r}, an attribute of a part, which a trace would do once "
            "for all; do so in the training loop"
        )
    return tracer, graph


def _require_drawn_nothing(generators: Generators | None) -> None:
    who = "" if generators is None else generators.drew()
    if who and generators is not None:
        generators.put_back()
        raise TraceError(
            f"its forward draws random numbers ({who}), which a trace would draw once for all; "
            "draw them like a tensor of the graph (torch.rand_like(x), F.dropout)"
        )


def _require_unwritten(beside: Beside | None) -> None:
    if beside is not None and (name := beside.written()):
        raise TraceError(written_beside(name, beside.place(name)))


def _require_sayable(root: nn.Module, path: str) -> None:
    """Raise `TraceError` for a name that Python code cannot say."""
    word = next((part for part in path.split(".") if keyword.iskeyword(part)), None)
    if word is not None:
        raise TraceError(
            f"{type(root).__name__} cannot be traced: {path} has a part named {word!r}, a keyword "
            "of Python; give it another name"
        )


def _flat_arguments(
    signature: inspect.Signature, given: Mapping[str, Any]
) -> Iterator[tuple[str, Any]]:
    """Yield name and value of every input; gathered arguments are inputs one by one."""
    for name, value in given.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            yield from ((f"{name}_{index}", part) for index, part in enumerate(value))
        elif kind is inspect.Parameter.VAR_KEYWORD:
            yield from value.items()
        else:
            yield name, value


def _optional(signature: inspect.Signature, given: Mapping[str, Any]) -> set[str]:
    """Return the last inputs that may be left out: plain values that are their own defaults."""
    found: set[str] = set()
    for name, value in reversed([*given.items()]):
        default = signature.parameters[name].default if name in signature.parameters else None
        plain = isinstance(value, PLAIN) and type(value) is type(default)
        if not plain or name not in signature.parameters or value != default:
            break
        found.add(name)
    return found


def _may_be_none(
    signature: inspect.Signature, given: Mapping[str, Any], *, anything: bool
) -> list[str]:
    """Return the inputs that are not None here, but could be: a forward may ask that of them.

    By default or annotation; or `anything` but the first, where nobody says.
    """
    found: list[str] = []
    for place, (name, parameter) in enumerate(signature.parameters.items()):
        told = parameter.default is None or "None" in str(parameter.annotation)
        told = told or "Optional" in str(parameter.annotation)
        if name in given and not isinstance(given[name], PLAIN) and (told or (anything and place)):
            found.append(name)
    return found


@contextmanager
def without_fused_layers() -> Generator[None]:
    """Let torch's transformer layers run their operators, not one that has them all."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _user_line(frame: FrameType | None) -> str | None:
    while frame is not None:
        name = frame.f_code.co_filename
        if not name.startswith(NOT_THE_USERS) and not name.startswith("<"):
            return f"{name}:{frame.f_lineno}"
        frame = frame.f_back
    return None


def _first_line_of(root: nn.Module) -> str | None:
    """Return where a forward begins, which has the inputs and returns the outputs."""
    code = getattr(inspect.unwrap(root.forward), "__code__", None)
    if code is None or code.co_filename.startswith((*NOT_THE_USERS, "<")):
        return None
    return f"{code.co_filename}:{code.co_firstlineno}"


def _place(error: Exception) -> str:
    traceback, line = error.__traceback__, None
    while traceback is not None:
        name = traceback.tb_frame.f_code.co_filename
        if not name.startswith(NOT_THE_USERS):
            line = f"{name}:{traceback.tb_lineno}"
        traceback = traceback.tb_next
    return f" (at {line})" if line else ""


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
