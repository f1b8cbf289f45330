"""What the channel analysis knows of a tensor.

A `Value` carries, for every element, the tag of its channel and the constant it always is, if it is
one. A `State` is a parameter or buffer, whose axes have tags of their own. What nothing can be said
of is a `Barrier`: the channels around it stay.
"""

import zlib
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxprune.dataflow.tags import FIXED, TagTable, align, varying_axes
from fxprune.programs.observation import TensorSpec


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

    def beside(self, axes: Collection[int], reason: str) -> "Beside":
        """Return the channels that lie along other axes; `Barrier` if they lie along `axes` only.

        Where tags vary along `axes` too (branches, parts of a head), those of a channel are tied.
        """
        inside = [axis for axis in varying_axes(self.tags) if axis in axes]
        if inside and len(inside) == len(varying_axes(self.tags)):
            raise Barrier(reason)
        lead = self.tags
        for axis in inside:
            lead = lead.narrow(axis, 0, 1)
        return Beside(lead, align(self.constants, lead), [(self.tags, lead)] if inside else [])


def axes_of(dims: Iterable[int], rank: int) -> set[int]:
    """Return axes counted from the front; a number has none, though torch takes 0 and -1 for it."""
    return {dim % rank for dim in dims} if rank else set()


@dataclass(frozen=True)
class Beside:
    """A value's channels beside some axes: tags and constants of size 1 there, and ties."""

    tags: Tensor
    constants: Tensor
    ties: list[tuple[Tensor, Tensor]]


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
    frozen: bool = False
    axes: dict[int, Tensor] = field(default_factory=dict[int, Tensor])
    whole: Tensor | None = None

    def axis(self, axis: int) -> Tensor:
        """Return the tags along one axis, for an operator that knows what its axes mean."""
        if axis not in self.axes:
            if self.whole is not None:
                self.freeze()  # somebody else takes its elements one by one
            size = self.tensor.shape[axis]
            self.axes[axis] = torch.full((size,), FIXED) if self.frozen else self.table.fresh(size)
        return self.axes[axis]

    def value(self) -> Value:
        """Return the tensor as an operand like any other, with a tag for every element."""
        shape = tuple(self.tensor.shape)
        if self.whole is None:
            if self.axes:
                self.freeze()
            self.whole = self._elements(shape)
        return Value(shape, self.tensor.dtype, self.whole, align(self.known(), self.whole))

    @property
    def operand(self) -> Value | None:
        """The operand it was to some operator, None if to none."""
        return None if self.whole is None else self.value()

    def outline(self, axis: int) -> Value:
        """Return what is known of one axis once all that use it are; nothing else cuts it."""
        if self.operand is not None:
            return self.operand
        shape = tuple(self.tensor.shape)
        tags = torch.full((1,) * len(shape), FIXED)
        if axis in self.axes:
            line = [-1 if place == axis else 1 for place in range(len(shape))]
            tags = self.axes[axis].reshape(line)
        return Value(shape, self.tensor.dtype, tags, unknown(tags))

    def freeze(self) -> None:
        """Let no channel of it go."""
        self.frozen = True
        for tags in (*self.axes.values(), *([] if self.whole is None else [self.whole])):
            self.table.tie(tags, torch.zeros_like(tags))

    def _elements(self, shape: tuple[int, ...]) -> Tensor:
        if self.frozen:
            return torch.full((1,) * len(shape), FIXED)
        whole = self.table.fresh(self.tensor.numel()).reshape(shape)
        long = [axis for axis, size in enumerate(shape) if size > 1]
        if len(long) == 1:
            self.axes[long[0]] = whole.reshape(-1)
        return whole

    @property
    def learns(self) -> bool:
        """Whether training changes it: a parameter, not a buffer."""
        return isinstance(self.tensor, nn.Parameter)

    def known(self) -> Tensor:
        """Return its numbers in float64; random ones for a parameter if facts are generic."""
        if self.generic and self.learns:
            seed = torch.Generator().manual_seed(zlib.crc32(self.name.encode()))
            return torch.rand(self.tensor.shape, generator=seed, dtype=torch.float64) + 0.5
        return self.tensor.detach().cpu().double()


class Rearranged(State):
    """A parameter or buffer with its axes in another order: who cuts it cuts the one it is of.

    order: for every axis which one of the original it is, None for a new one of size 1; what is not
    among them is left out, and has size 1, which it keeps: no axis is emptied.
    """

    def __init__(self, base: State, order: Sequence[int | None]) -> None:
        super().__init__(base.name, _rearranged(base.tensor, order), base.table, base.generic)
        self.base, self.order = base, tuple(order)

    @property
    def learns(self) -> bool:
        """Whether training changes it, as in `State`."""
        return self.base.learns

    def axis(self, axis: int) -> Tensor:
        """Return the tags along one axis, as in `State`."""
        origin = self.order[axis]
        return torch.full((1,), FIXED) if origin is None else self.base.axis(origin)

    def value(self) -> Value:
        """Return the tensor as an operand like any other, as in `State`."""
        value = self.base.value()
        tags, constants = (_rearranged(t, self.order) for t in (value.tags, value.constants))
        return Value(tuple(self.tensor.shape), value.dtype, tags, constants)

    @property
    def operand(self) -> Value | None:
        """The operand it was to some operator, as in `State`."""
        return None if self.base.operand is None else self.value()

    def outline(self, axis: int) -> Value:
        """Return what is known of one axis once all that use it are, as in `State`."""
        origin, shape = self.order[axis], tuple(self.tensor.shape)
        if origin is None:
            tags = torch.full((1,) * len(shape), FIXED)
            return Value(shape, self.tensor.dtype, tags, unknown(tags))
        of_base = self.base.outline(origin)
        tags, constants = (_rearranged(t, self.order) for t in (of_base.tags, of_base.constants))
        return Value(shape, self.tensor.dtype, tags, constants)

    def freeze(self) -> None:
        """Let no channel of it go."""
        self.base.freeze()

    def known(self) -> Tensor:
        """Return its numbers in float64, as in `State`."""
        return _rearranged(self.base.known(), self.order)


def _rearranged(tensor: Tensor, order: Sequence[int | None]) -> Tensor:
    """Return a tensor with its axes in an order, as in `Rearranged`."""
    stay = [axis for axis in order if axis is not None]
    left_out = [axis for axis in range(tensor.dim()) if axis not in stay]
    moved = tensor.permute(*stay, *left_out)
    for _ in left_out:
        moved = moved.squeeze(-1)
    for place, axis in enumerate(order):
        moved = moved.unsqueeze(place) if axis is None else moved
    return moved


class ShapeOf(tuple[int, ...]):
    """The shape of a value, parameter or buffer, which knows whose shape it is."""

    held: Value | State

    def __new__(cls, held: Value | State) -> "ShapeOf":
        """Return the shape of what is held."""
        self = super().__new__(cls, held.tensor.shape if isinstance(held, State) else held.shape)
        self.held = held
        return self

    @property
    def value(self) -> Value:
        """The value it is of, for who uses all of it."""
        return as_value(self.held)

    def size(self, axis: int) -> "SizeOf":
        """Return the size along an axis."""
        return SizeOf(self.held, axis)


class OfSizes(int):
    """A number computed from sizes, which knows of which values, and along which of their axes."""

    sizes: tuple[tuple[Value | State, int], ...]

    @classmethod
    def computed(cls, number: int, sources: Iterable[Any]) -> int:
        """Return a number as what it was computed from; a plain one if that is not sizes alone."""
        numbers = list(sources)
        if not all(isinstance(one, OfSizes) for one in numbers):
            return number
        self = cls(number)
        self.sizes = tuple(size for one in numbers for size in one.sizes)
        return self

    @property
    def is_of_channels(self) -> bool:
        """Tell whether all the sizes are numbers of channels, which no input changes.

        Tokens may be told apart too, the first from the others; channels are all different. No
        input changes the size of a parameter or buffer.
        """
        return all(
            isinstance(held, State) or counts_channels(held.tags, axis) for held, axis in self.sizes
        )


def counts_channels(tags: Tensor, axis: int) -> bool:
    """Tell whether the size of an axis is a number of channels, whatever the input."""
    if varying_axes(tags) != [axis]:
        return False
    found = tags.unique()
    return len(found) == tags.numel() and FIXED not in found


class SizeOf(OfSizes):
    """The size of a value, parameter or buffer along an axis, which knows whose size it is."""

    held: Value | State
    axis: int

    def __new__(cls, held: Value | State, axis: int) -> "SizeOf":
        """Return the size of what is held along `axis`."""
        shape = held.tensor.shape if isinstance(held, State) else held.shape
        self = super().__new__(cls, shape[axis])
        self.held, self.axis = held, axis % len(shape)
        self.sizes = ((held, self.axis),)
        return self

    @property
    def value(self) -> Value:
        """The value it is of, for who makes something of that size."""
        return as_value(self.held)


def unknown(tags: Tensor) -> Tensor:
    """Return constants of which none is known."""
    return torch.full(tags.shape, torch.nan, dtype=torch.float64)


def zeros_of(constants: Tensor) -> Tensor:
    """Return the constants that are 0, where no others are known to stay what they are."""
    return torch.where(constants == 0, 0.0, torch.nan).double()


def fixed(spec: TensorSpec) -> Value:
    """Return a value all of whose channels stay and of which nothing is known."""
    tags = torch.full((1,) * len(spec.shape), FIXED)
    return Value(spec.shape, spec.dtype, tags, unknown(tags))


def as_value(argument: Any) -> Any:
    """Return a parameter or buffer as the operand it is; anything else unchanged."""
    return argument.value() if isinstance(argument, State) else argument


def flatten(structure: Any) -> list[Any]:
    """Return the leaves of nested arguments; `Value` and `State` are leaves.

    What arguments nearly always are is flattened here: pytree takes ten times as long.
    """
    leaves: list[Any] = []
    pending = [structure]
    while pending:
        part = pending.pop()
        if type(part) in (tuple, list):
            pending.extend(reversed(part))
        elif type(part) is dict:
            pending.extend(reversed(part.values()))
        elif isinstance(part, _LEAVES):
            leaves.append(part)
        else:
            leaves.extend(pytree.tree_leaves(part))
    return leaves


_LEAVES = (Value, State, ShapeOf, TensorSpec, int, float, str, slice, type(None), torch.dtype)


def map_values(replace: Callable[[Any], Any], structure: Any) -> Any:
    """Replace every `Value` and `State` of nested arguments."""
    return pytree.tree_map_only((Value, State), replace, structure)


def broadcast_to(tensors: Sequence[Tensor], rank: int) -> list[Tensor]:
    """Give tensors leading axes of size 1 until they have `rank` axes."""
    return [tensor.reshape((1,) * (rank - tensor.dim()) + tensor.shape) for tensor in tensors]
