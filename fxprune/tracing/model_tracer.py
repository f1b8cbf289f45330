"""torch.fx's tracer, which retreats to leaves: a submodule that it cannot trace is kept whole.

As small a submodule as possible, which the analysis then treats as a barrier. What a forward does
beside computing is put back after every call of a submodule: what it kept in attributes, wrote
into lists or drew (`user_models.keeping`, `user_models.beside`, `runtime.randomness`).
"""

import functools
import inspect
import sys
from collections import OrderedDict
from collections.abc import Callable, Collection, Generator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fxprune.errors import TraceError
from fxprune.runtime.randomness import Generators
from fxprune.tracing.asked_tracer import PLAIN
from fxprune.tracing.mappings import arguments_of
from fxprune.tracing.notes import OWNER, leave_note
from fxprune.tracing.own_hooks import HOOKED, hooks_traced
from fxprune.tracing.signatures import flat_arguments, in_order, may_be_none, optional_inputs
from fxprune.tracing.source_lines import first_line, first_line_of, user_line
from fxprune.tracing.stale_names import stale_read
from fxprune.tracing.stand_ins import standing_in
from fxprune.tracing.unrecorded import UnrecordedTracer
from fxprune.tracing.watching import OwnTensors
from fxprune.user_models.beside import Beside
from fxprune.user_models.deeds import ADDING, contents_of, written_beside, written_into
from fxprune.user_models.keeping import Held, Written
from fxprune.user_models.modules import has_hooks, tensors_in
from fxprune.user_models.naming import RESERVED
from fxprune.user_models.replaced_methods import replaced_methods

_NOTHING = contents_of({})
_TRANSFORMERS = (
    *(nn.TransformerEncoderLayer, nn.TransformerDecoderLayer, nn.TransformerDecoder),
    nn.Transformer,
)


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
        self.packages: Collection[str] = ()  # of the model's own code
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

        own: Any = vars(self.root).get("forward")  # torch.fx takes the class's

        @functools.wraps(root_fn)
        def forward(*args: Any) -> Any:
            called, given = (root_fn, args) if own is None else (own, args[1:])
            return called(*given, **bound.kwargs)

        return forward, [self.root, *bound.args]

    def _inputs(self, signature: inspect.Signature) -> dict[str, Any]:
        """Return what stands for every argument: a proxy, a structure of proxies, a constant."""
        given = dict(flat_arguments(signature, self.given))
        optional = optional_inputs(signature, given)
        proxies = {
            name: self.create_proxy("placeholder", name, (value,) if name in optional else (), {})
            for name, value in given.items()
        }
        self.examples |= {proxy.node: given[name] for name, proxy in proxies.items()}
        for name in may_be_none(signature, given, anything=self.inside):
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
        """Lower an argument; a dict of a class of its own (a ModelOutput) is made by that."""
        if isinstance(a, np.generic):
            return a.item()  # a graph's code would name numpy
        if isinstance(a, Tensor) and self.own is not None:
            name = self.own.name_of(a)
            if name and a not in self.tensor_attrs and not isinstance(a, nn.Parameter):
                raise TraceError(
                    f"it reads {name!r} under a second name (.data, a list), as no graph does: use "
                    f"self.{name}"
                )
        arguments = arguments_of(a) if isinstance(a, dict) else None
        if arguments is None:
            return self._lowered(a)
        args, kwargs = (self._lowered(part) for part in arguments)
        return self.create_node("call_function", type(a), args, kwargs)

    def _lowered(self, a: Any) -> Any:
        try:
            return super().create_arg(a)
        except (NotImplementedError, KeyError) as error:  # it may take any attribute for a key
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
        is_torchs = super().is_leaf_module(m, module_qualified_name)
        if is_torchs and replaced_methods(m):
            if module_qualified_name in self.whole:
                raise TraceError(_not_its_class(m, module_qualified_name))
            return False
        return is_torchs or module_qualified_name in self.whole

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
        node.meta["source"] = first_line_of(self.root) if is_end else user_line(sys._getframe(1))
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
            args, kwargs = in_order(m, args, kwargs)
        try:
            hooked = has_hooks(m) and not is_leaf
            with self._hooks_traced(m) if hooked else nullcontext():
                result = super().call_module(m, forward, args, kwargs)
            self.require_fresh(writes)
            kept = held.kept()
            self.note(held.put_back(), path)
            if kept:  # in evaluation as in training a module may be called again, and read it
                vars(m).update(kept)
                self.keeping.append(held)
            require_drawn_nothing(generators)
            require_unwritten(beside)
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
            self.leaves[path] = f"{type(error).__name__}: {first_line(error)}"
            while len(self.module_stack) > depth:
                self.module_stack.popitem()
            self._erase_after(last)
            if replaced_methods(m) and super().is_leaf_module(m, path):
                raise TraceError(f"{_not_its_class(m, path)}: {error}") from error
            return self.create_proxy("call_module", path, args, kwargs)

    def _hooks_traced(self, m: nn.Module) -> AbstractContextManager[None]:
        """Call hooks of the model's own code; in a part of it, they are of what is around it."""
        if self.inside:
            raise TraceError(HOOKED)
        return hooks_traced(m, self.packages)

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
        node.meta |= {"source": first_line_of(part), "is_wrapped": True}

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


def _not_its_class(module: nn.Module, path: str) -> str:
    """Say why a layer of torch's cannot be kept whole: all would take it for one of its class."""
    names = ", ".join(sorted(replaced_methods(module)))
    return (
        f"{path} is a {type(module).__name__} with a {names} of its own, which cannot be traced; "
        "make it a class"
    )


def _no_values(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """Return the arguments that are no traced values themselves: lists, dicts, objects."""
    return tuple(one for one in (*args, *kwargs.values()) if not isinstance(one, fx.Proxy))


def _has_masks(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Tell whether an encoder is given more than what it encodes."""
    beside = [*args[1:], *(value for name, value in kwargs.items() if name != "src")]
    return any(value is not None and value is not False for value in beside)


def require_drawn_nothing(generators: Generators | None) -> None:
    """Raise `TraceError` if random numbers were drawn, and put the generators back."""
    who = "" if generators is None else generators.drew()
    if who and generators is not None:
        generators.put_back()
        raise TraceError(
            f"its forward draws random numbers ({who}), which a trace would draw once for all; "
            "draw them like a tensor of the graph (torch.rand_like(x), F.dropout)"
        )


def require_unwritten(beside: Beside | None) -> None:
    """Raise `TraceError` if something beside the model was written into."""
    if beside is not None and (name := beside.written()):
        raise TraceError(written_beside(name, beside.place(name)))
