"""What an operator is to the channel analysis, and the registry of operators.

A rule is a few functions. `flow` says, as data, which tags an operator's outputs carry, which tags
share their fate, which input channels each live output channel reads, and which constants pass
through. Three more say how the operator follows when channels go: `absorb` folds constant input
channels into its bias, `rewrite` gives its new arguments, `resize` updates a module's attributes
after its parameters were cut. An operator without a rule is a barrier: all channels of its inputs
and outputs stay.
"""

from collections.abc import Callable, Generator, Hashable
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, is_dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fxprune.dataflow.cuts import Arguments, Cut, Literal
from fxprune.dataflow.values import (
    Barrier,
    ShapeOf,
    State,
    Value,
    as_value,
    fixed,
    flatten,
    map_values,
    unknown,
)
from fxprune.errors import one_line
from fxprune.programs.observation import TensorSpec
from fxprune.runtime.kinds import PASSES
from fxprune.user_models.custom_functions import forward_of
from fxprune.user_models.modules import is_hooked
from fxprune.user_models.plain_weights import computes_weights
from fxprune.user_models.replaced_methods import replaced_methods


@dataclass(frozen=True)
class Read:
    """An operator's outputs mix its inputs.

    outputs: tags (O,); inputs: tags (I,). Output o reads input i where `pattern` (O, I) says so,
    everywhere if it is None; if `pairwise`, output i reads input i alone. An input for which
    `foldable` (I,) holds is a constant the operator can absorb, so that its channel may go although
    it is read.
    """

    outputs: Tensor
    inputs: Tensor
    pattern: Tensor | None
    foldable: Tensor
    reason: str
    pairwise: bool = False

    def needed(self, alive: Tensor) -> Tensor:
        """Return which inputs (I,) are read as they are, where the outputs `alive` (O,) are."""
        return self.taken(alive) & ~self.foldable

    def taken(self, alive: Tensor) -> Tensor:
        """Return which inputs (I,) are read at all, where the outputs `alive` (O,) are."""
        if self.pairwise:
            return alive
        if self.pattern is None or not bool(alive.any()):
            return alive.any().expand(self.foldable.shape)
        return self.pattern[alive].any(0)


@dataclass
class Flow:
    """What one operator does with channels: the answer of `OpRule.flow`."""

    outputs: Any
    ties: list[tuple[Tensor, Tensor]] = field(default_factory=list[tuple[Tensor, Tensor]])
    reads: list[Read] = field(default_factory=list[Read])
    keeps: list[tuple[Tensor, str]] = field(default_factory=list[tuple[Tensor, str]])


CPU = torch.device("cpu")
# The rule of what is made of sizes alone, and has the channels of the tensors they are of.
FILLED = "filled"


@dataclass
class Call:
    """An operator in its place: a node with its arguments as `Value`, `State` or plain Python.

    spec: its observed output, `TensorSpec` for each tensor. new_tags: hands out tags nobody has.
    generic: only facts that hold for whatever weights training may find. sole_use: no other node
    or module uses its parameters. device: where to run it on constants, that they are rounded there
    as they will be (CUDA's hardsigmoid knows its 1/6 in float32); all else is on the CPU. trained:
    constants are only those that training mode computes, too.
    """

    node: fx.Node
    module: nn.Module | None
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    spec: Any
    states: Callable[[str], State | None]
    new_tags: Callable[[int], Tensor]
    generic: bool = False
    sole_use: bool = True
    device: torch.device = CPU
    trained: bool = False
    _made: Tensor | None = None

    def state(self, name: str) -> State | None:
        """Return a parameter or buffer of the called module, None if it has none."""
        return self.states(f"{self.node.target}.{name}")

    def made_channels(self, count: int) -> Tensor:
        """Return the tags of channels that begin at this operator, the same at every call."""
        if self._made is None:
            self._made = self.new_tags(count)
        return self._made

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        """Return an argument given by position or by keyword."""
        if position < len(self.args):
            return self.args[position]
        return self.kwargs.get(name, default)

    def value(self, position: int = 0, name: str = "input") -> Value:
        """Return a tensor argument; `Barrier` if it is not one tensor."""
        found = as_value(self.argument(position, name))
        if not isinstance(found, Value):
            raise Barrier(f"its argument {name!r} is no tensor")
        return found

    def values(self) -> list[Value]:
        """Return all tensor arguments, in order."""
        leaves = flatten((self.args, self.kwargs))
        return [v for v in map(as_value, leaves) if isinstance(v, Value)]

    def tensor_spec(self) -> TensorSpec:
        """Return shape and dtype of its one output; `Barrier` if it has several."""
        if not isinstance(self.spec, TensorSpec):
            raise Barrier("it does not return one tensor")
        return self.spec

    def output(self, tags: Tensor, constants: Tensor | None = None) -> Value:
        """Build the value of its one output; with no constants given, none are known.

        `Barrier` if the tags are not broadcastable to it: the operator was then misread.
        """
        spec = self.tensor_spec()
        pairs = zip(tags.shape, spec.shape, strict=False)
        if tags.dim() != len(spec.shape) or any(have not in (1, size) for have, size in pairs):
            raise Barrier("its output is not of the shape its arguments say")
        return Value(
            spec.shape, spec.dtype, tags, unknown(tags) if constants is None else constants
        )

    def execute(self, replace: Callable[[Any], Any]) -> Any:
        """Run the operator itself, each tensor argument replaced."""
        args = map_values(replace, self.args)
        kwargs = map_values(replace, self.kwargs)
        return execute(self.node, self.module, args, kwargs)


def _nothing(call: Call, cut: Cut) -> None:
    return None


def _unchanged(call: Call) -> None:
    return None


@dataclass(frozen=True)
class OpRule:
    """An operator's answers; see the module's docstring."""

    name: str
    flow: Callable[[Call], Flow]
    absorb: Callable[[Call, Cut], None] = _nothing
    rewrite: Callable[[Call, Cut], Arguments | Literal | None] = _nothing
    resize: Callable[[Call], None] = _unchanged


def absorbs(call: Call) -> bool:
    """Tell whether an operator takes constants in, and stops reading what is one."""
    return call.module is not None and rule_for(call.node, call.module).absorb is not _nothing


RULES: dict[Hashable, OpRule] = {}
# The rule of modules with a backward of their own that are activations.
POINTWISE = "a function of numbers"
_OF_NUMBERS = ("elementwise", "product", "cast")
_EXCLUDED = ("rrelu", *(f"i{name}" for name in ("add", "sub", "mul", "truediv", "pow")))
# What a module is that is no example of its class; no rule is registered under it.
_OF_ITS_OWN = object()
_pointwise: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
# Whether what goes wrong in a rule is raised, as our own tests want it.
STRICT = ContextVar("STRICT", default=False)


def register(rule: OpRule, *targets: Hashable) -> None:
    """Give module types, functions and method names their rule; a second rule for one raises.

    What is not torch's own is named in full, `package.module.name`, and need not be installed.
    """
    for target in targets:
        if target in RULES:
            raise ValueError(f"{target!r} has the rule {RULES[target].name!r} already")
        RULES[target] = rule


def key_of(node: fx.Node, module: nn.Module | None) -> Hashable:
    """Return what a node's rule is registered under: its operator, or the full name of it."""
    operator: Any = type(module) if node.op == "call_module" else node.target
    if module is not None and replaced_methods(module):
        return _OF_ITS_OWN
    name = f"{getattr(operator, '__module__', '')}.{getattr(operator, '__qualname__', '')}"
    if module is not None and node.meta.get("leaf_because") and operator not in RULES:
        takes_one = len(node.args) == 1 and isinstance(node.args[0], fx.Node) and not node.kwargs
        return POINTWISE if takes_one and _is_pointwise(module) else operator
    return name if name in RULES else operator


def _is_pointwise(module: nn.Module) -> bool:
    """Tell whether a module that was kept whole applies a function of numbers to each number."""
    if module not in _pointwise:
        graphs = forward_of(module)
        _pointwise[module] = graphs is not None and all(map(_applies_numbers, graphs))
    return _pointwise[module]


def _applies_numbers(graph: fx.Graph) -> bool:
    """Tell whether a graph is made of operators that look at one place, and overwrite none."""
    calls = [node for node in graph.nodes if node.op not in ("placeholder", "output")]
    names = [getattr(node.target, "__name__", str(node.target)) for node in calls]
    settings = [value for node in calls for value in (*node.args, *node.kwargs.values())]
    overwrites = any(value is True for value in settings)  # F.relu(x, True)
    if overwrites or any(name.endswith("_") or name in _EXCLUDED for name in names):
        return False
    (result,) = next(iter(reversed(graph.nodes))).args
    return result in calls and all(rule_name(node, None) in _OF_NUMBERS for node in calls)


def rule_name(node: fx.Node, module: nn.Module | None) -> str:
    """Return the name of the rule of a node's operator, "" if it has none."""
    rule = RULES.get(key_of(node, module))
    return "" if rule is None else rule.name


def rule_for(node: fx.Node, module: nn.Module | None) -> OpRule:
    """Return the rule of a node's operator; `Barrier`, saying why, if it has none."""
    rule = RULES.get(key_of(node, module))
    if rule is None and node.meta.get(PASSES):
        rule = RULES[nn.Identity]
    if module is not None and computes_weights(module):
        raise Barrier("its weights are computed by a norm, a parametrization or a mask")
    if rule is None:
        raise Barrier(_unknown(node))
    if module is not None and is_hooked(module):
        raise Barrier("the module has forward hooks")
    return rule


def _unknown(node: fx.Node) -> str:
    """Return why nothing is known of an operator."""
    because = node.meta.get("leaf_because")
    if because:
        return f"it could not be traced into: {because}"
    target: Any = node.target
    is_structure = isinstance(target, type) and (issubclass(target, dict) or is_dataclass(target))
    return f"it is handed over in the {target.__name__}" if is_structure else "unknown operator"


def flow_of(call: Call) -> Flow:
    """Ask the rule of an operator for its flow; `Barrier` if it has none, or cannot tell."""
    with _answering():
        return rule_for(call.node, call.module).flow(call)


def rewritten(call: Call, cut: Cut) -> Arguments | Literal | None:
    """Ask the rule of an operator how it follows a cut; `Barrier` if it cannot."""
    with _answering():
        return rule_for(call.node, call.module).rewrite(call, cut)


@contextmanager
def _answering() -> Generator[None]:
    """Take what goes wrong in a rule for a barrier: nothing is known of that operator then."""
    try:
        yield
    except (Barrier, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if STRICT.get():
            raise
        raise Barrier(f"its rule fails here, a bug in fxprune: {one_line(error)}") from error


def execute(node: fx.Node, module: nn.Module | None, args: Any, kwargs: Any) -> Any:
    """Run a node's operator on other arguments."""
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    target: Any = module if node.op == "call_module" else node.target
    return target(*args, **kwargs)


def barrier_flow(call: Call, reason: str) -> Flow:
    """Return the flow of an operator nothing is known of."""
    outputs = pytree.tree_map_only(TensorSpec, fixed, call.spec)
    shapes = [leaf for leaf in flatten((call.args, call.kwargs)) if isinstance(leaf, ShapeOf)]
    values = [*call.values(), *(shape.value for shape in shapes)]
    return Flow(outputs, keeps=[(value.tags, reason) for value in values])
