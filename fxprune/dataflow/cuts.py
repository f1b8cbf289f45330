"""Which channels stay, and how an operator's arguments say so.

A `Cut` answers what remains of a tensor: always a box, of which one axis is shorter. An operator
answers a cut with its new `Arguments`, or with the `Literal` it is from now on.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fxprune.dataflow.tags import varying_axes
from fxprune.dataflow.values import Barrier, Value


@dataclass(frozen=True)
class Cut:
    """Which tags stay. `kept` is what remains in the tensors, `live` what somebody needs.

    gone: the nodes of which nothing remains, not even one channel.
    """

    classes: Tensor
    live: Tensor
    kept: Tensor
    gone: frozenset[fx.Node] = frozenset()

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
        if len(axes) == 1 and not bool(keep.any()):
            return axes[0], torch.empty(0, dtype=torch.int64)
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

    def shrinks(self, value: Value, axis: int) -> bool:
        """Tell whether a value gets smaller along `axis`."""
        found = self.indices(value)
        return found is not None and found[0] == axis % len(value.shape)


@dataclass(frozen=True)
class Arguments:
    """What `OpRule.rewrite` answers: the new arguments of a node, and its new function if any.

    A tensor among them becomes a buffer of the program, this node's own.
    then: what is done to the result, so that it is what it was: a function and a number.
    binds: axes of its first tensor that must be as long as in the example: along others it would
    part the channels that remain from where they belong.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    function: Callable[..., Any] | None = None
    then: tuple[Callable[..., Any], float] | None = None
    binds: tuple[int, ...] = ()


@dataclass(frozen=True)
class Scaled:
    """Among `Arguments`: of a number that the model computes from sizes, the part that remains.

    Of groups that stand among the samples, `b * groups`, as many as there are groups left.
    """

    number: fx.Node
    remaining: int
    whole: int


@dataclass(frozen=True)
class Literal:
    """What `OpRule.rewrite` answers for a node that must stay the number it was."""

    value: Any
