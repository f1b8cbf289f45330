"""What an operator is to the channel analysis, and the registry of operators.

A rule is a few functions. `flow` says, as data, which tags an operator's outputs carry, which tags
share their fate, which input channels each live output channel reads, and which constants pass
through. Three more say how the operator follows when channels go: `absorb` folds constant input
channels into its bias, `rewrite` gives its new arguments, `resize` updates a module's attributes
after its parameters were cut. An operator without a rule is a barrier: all channels of its inputs
and outputs stay.
"""

import zlib
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fxprune.observation import TensorSpec
from fxprune.tags import FIXED, TagTable, align, varying_axes


class Barrier(Exception):
    """Raised by a rule for a form of its operator it does not understand; says why."""


@dataclass(frozen=True)
class Value:
    """What is known of a tensor.

    tags: int64, broadcastable to `shape`, of size 1 where they do not vary.
    constants: float64, of the shape of `tags`; the value a channel has everywhere, NaN if unknown.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    tags: Tensor
    constants: Tensor

    def along(self, axis: int) -> "Along":
        """Return the channels along `axis`; `Barrier` if they lie along other axes only.

        Where tags vary along other axes too (sub-pixels), those of one channel must be tied.
        """
        others = [a for a in varying_axes(self.tags) if a != axis % len(self.shape)]
        if others and self.tags.shape[axis] == 1:
            raise Barrier("its input's channels lie along another axis than the one it works on")
        lead = self.tags
        for other in others:
            lead = lead.narrow(other, 0, 1)
        size = self.shape[axis]
        constants = align(self.constants, lead).reshape(-1).expand(size)
        ties = [(self.tags, lead)] if others else []
        return Along(lead.reshape(-1).expand(size), constants, ties)


@dataclass(frozen=True)
class Along:
    """A value's channels along one axis: tags and constants (size,), and what has to be tied."""

    tags: Tensor
    constants: Tensor
    ties: list[tuple[Tensor, Tensor]]


@dataclass
class State:
    """A parameter or buffer, and the tags of its axes, which every operator that uses it shares."""

    name: str
    tensor: Tensor
    table: TagTable
    generic: bool = False
    axes: dict[int, Tensor] = field(default_factory=dict[int, Tensor])
    whole: Tensor | None = None

    def axis(self, axis: int) -> Tensor:
        """Return the tags along one axis, for an operator that knows what its axes mean."""
        if axis not in self.axes:
            self.axes[axis] = self.table.fresh(self.tensor.shape[axis])
            if self.whole is not None:
                self.table.tie(self.axes[axis], torch.zeros_like(self.axes[axis]))
                self.table.tie(self.whole, torch.zeros_like(self.whole))
        return self.axes[axis]

    def value(self) -> Value:
        """Return the tensor as an operand like any other, with a tag for every element."""
        shape = tuple(self.tensor.shape)
        if self.whole is None:
            long = [axis for axis, size in enumerate(shape) if size > 1]
            self.whole = self.table.fresh(self.tensor.numel()).reshape(shape)
            if len(long) == 1 and not self.axes:
                self.axes[long[0]] = self.whole.reshape(-1)
            elif self.axes:
                for tags in self.axes.values():
                    self.table.tie(tags, torch.zeros_like(tags))
                self.table.tie(self.whole, torch.zeros_like(self.whole))
        return Value(shape, self.tensor.dtype, self.whole, self.known())

    def known(self) -> Tensor:
        """Return its numbers in float64; random ones for a parameter if facts are generic."""
        if self.generic and isinstance(self.tensor, nn.Parameter):
            seed = torch.Generator().manual_seed(zlib.crc32(self.name.encode()))
            return torch.rand(self.tensor.shape, generator=seed, dtype=torch.float64) + 0.5
        return self.tensor.detach().cpu().double()


@dataclass(frozen=True)
class Read:
    """An operator's outputs mix its inputs.

    outputs: tags (O,); inputs: tags (I,). Output o reads input i where `pattern` (O, I) says so,
    everywhere if it is None. An input for which `foldable` (I,) holds is a constant the operator
    can absorb, so that its channel may go although it is read.
    """

    outputs: Tensor
    inputs: Tensor
    pattern: Tensor | None
    foldable: Tensor
    reason: str


@dataclass
class Flow:
    """What one operator does with channels: the answer of `OpRule.flow`."""

    outputs: Any
    ties: list[tuple[Tensor, Tensor]] = field(default_factory=list[tuple[Tensor, Tensor]])
    reads: list[Read] = field(default_factory=list[Read])
    keeps: list[tuple[Tensor, str]] = field(default_factory=list[tuple[Tensor, str]])


@dataclass
class Call:
    """An operator in its place: a node with its arguments as `Value`, `State` or plain Python.

    spec: its observed output, `TensorSpec` for each tensor. generic: only facts that hold for
    whatever weights training may find. sole_use: no other node or module uses its parameters.
    """

    node: fx.Node
    module: nn.Module | None
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    spec: Any
    states: Callable[[str], State | None]
    generic: bool = False
    sole_use: bool = True

    def state(self, name: str) -> State | None:
        """Return a parameter or buffer of the called module, None if it has none."""
        return self.states(f"{self.node.target}.{name}")

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
        """Build the value of its one output; with no constants given, none are known."""
        spec = self.tensor_spec()
        return Value(
            spec.shape, spec.dtype, tags, unknown(tags) if constants is None else constants
        )

    def execute(self, replace: Callable[[Any], Any]) -> Any:
        """Run the operator itself, each tensor argument replaced."""
        args = map_values(replace, self.args)
        kwargs = map_values(replace, self.kwargs)
        return execute(self.node, self.module, args, kwargs)


@dataclass(frozen=True)
class Cut:
    """Which tags stay. `kept` is what remains in the tensors, `live` what somebody needs."""

    classes: Tensor
    live: Tensor
    kept: Tensor

    def keep(self, tags: Tensor) -> Tensor:
        """Return a bool tensor, of the shape of `tags`: which of them remain."""
        return self.kept[self.classes[tags]]

    def alive(self, tags: Tensor) -> Tensor:
        """Return a bool tensor, of the shape of `tags`: which of them anything live reads."""
        return self.live[self.classes[tags]]

    def indices(self, value: Value) -> tuple[int, Tensor] | None:
        """Return axis and kept positions (int64) of a value that shrinks, None if it does not."""
        keep = self.keep(value.tags)
        if bool(keep.all()):
            return None
        axes = varying_axes(keep)
        along = [a for a in axes if not torch.equal(keep, keep.narrow(a, 0, 1).expand(keep.shape))]
        if len(along) != 1:
            raise Barrier("what remains of a tensor would not be a box")
        flat = keep.movedim(along[0], 0).reshape(keep.shape[along[0]], -1)[:, 0]
        return along[0], flat.nonzero().reshape(-1)

    def shape(self, value: Value) -> tuple[int, ...]:
        """Return the shape that remains of a value."""
        cut = self.indices(value)
        if cut is None:
            return value.shape
        return tuple(len(cut[1]) if a == cut[0] else size for a, size in enumerate(value.shape))


class ShapeOf(tuple[int, ...]):
    """The shape of a value, which knows whose shape it is."""

    value: Value

    def __new__(cls, value: Value) -> "ShapeOf":
        """Return the shape of `value`."""
        self = super().__new__(cls, value.shape)
        self.value = value
        return self

    def shrinks(self, axis: int, cut: Cut) -> bool:
        """Tell whether the value gets smaller along `axis`."""
        found = cut.indices(self.value)
        return found is not None and found[0] == axis % len(self)


@dataclass(frozen=True)
class Arguments:
    """What `OpRule.rewrite` answers: the new arguments of a node, and its new function if any."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    function: Callable[..., Any] | None = None


@dataclass(frozen=True)
class Literal:
    """What `OpRule.rewrite` answers for a node that must stay the number it was."""

    value: Any


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


RULES: dict[Hashable, OpRule] = {}


def register(rule: OpRule, *targets: Hashable) -> None:
    """Give module types, functions and method names their rule; a second rule for one raises."""
    for target in targets:
        if target in RULES:
            raise ValueError(f"{target!r} has the rule {RULES[target].name!r} already")
        RULES[target] = rule


def key_of(node: fx.Node, module: nn.Module | None) -> Hashable:
    """Return what a node's rule is registered under."""
    return type(module) if node.op == "call_module" else node.target


def rule_for(node: fx.Node, module: nn.Module | None) -> OpRule:
    """Return the rule of a node's operator; `Barrier`, saying why, if it has none."""
    rule = RULES.get(key_of(node, module))
    if rule is None:
        because = node.meta.get("leaf_because")
        raise Barrier("it could not be traced into: " + because if because else "unknown operator")
    if module is not None and (module._forward_hooks or module._forward_pre_hooks):
        raise Barrier("the module has forward hooks")
    return rule


def execute(node: fx.Node, module: nn.Module | None, args: Any, kwargs: Any) -> Any:
    """Run a node's operator on other arguments."""
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    target: Any = module if node.op == "call_module" else node.target
    return target(*args, **kwargs)


def as_value(argument: Any) -> Any:
    """Return a parameter or buffer as the operand it is; anything else unchanged."""
    return argument.value() if isinstance(argument, State) else argument


def flatten(structure: Any) -> list[Any]:
    """Return the leaves of nested arguments; `Value` and `State` are leaves."""
    return pytree.tree_leaves(structure)


def map_values(replace: Callable[[Any], Any], structure: Any) -> Any:
    """Replace every `Value` and `State` of nested arguments."""
    return pytree.tree_map_only((Value, State), replace, structure)


def unknown(tags: Tensor) -> Tensor:
    """Return constants of which none is known."""
    return torch.full(tags.shape, torch.nan, dtype=torch.float64)


def fixed(spec: TensorSpec) -> Value:
    """Return a value all of whose channels stay and of which nothing is known."""
    tags = torch.full((1,) * len(spec.shape), FIXED)
    return Value(spec.shape, spec.dtype, tags, unknown(tags))


def barrier_flow(call: Call, reason: str) -> Flow:
    """Return the flow of an operator nothing is known of."""
    outputs = pytree.tree_map_only(TensorSpec, fixed, call.spec)
    return Flow(outputs, keeps=[(value.tags, reason) for value in call.values()])


def broadcast_to(tensors: Sequence[Tensor], rank: int) -> list[Tensor]:
    """Give tensors leading axes of size 1 until they have `rank` axes."""
    return [tensor.reshape((1,) * (rank - tensor.dim()) + tensor.shape) for tensor in tensors]
