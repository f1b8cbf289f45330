"""One reading of all products of tensors that sum over shared axes: operands with labelled axes.

`matmul`, `bmm`, `addmm` and `einsum` say the same thing in different words: axes of one label run
together, and a label the output lacks is summed over.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fxprune.dataflow.rules import Call
from fxprune.dataflow.values import Along, Barrier, State, Value

BROADCAST = ""
"""The label of an axis of size 1 that is repeated along the label of another operand."""


@dataclass(frozen=True)
class Operand:
    """A tensor, and the label of each of its axes."""

    held: Value | State
    labels: tuple[str, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """The size of each axis."""
        return self.held.shape if isinstance(self.held, Value) else tuple(self.held.tensor.shape)

    def varying(self) -> list[str]:
        """Return the labels along which channels of an activation vary."""
        if isinstance(self.held, State):
            return []
        tags = self.held.tags
        return [label for label, size in zip(self.labels, tags.shape, strict=True) if size > 1]

    def along(self, label: str) -> Along:
        """Return the channels along a label; a parameter's are those of its axis."""
        axis = self.labels.index(label)
        if isinstance(self.held, Value):
            return self.held.along(axis)
        known = self.held.known().movedim(axis, 0).flatten(1) if len(self.labels) > 1 else None
        silent = (self.held.known() if known is None else known.abs().sum(1)) == 0
        return Along(self.held.axis(axis), torch.where(silent, 0.0, torch.nan).double(), [])

    def nonzero(self, first: str, second: str) -> Tensor:
        """Return where a parameter is not 0, bool by the sizes of two of its labels."""
        assert isinstance(self.held, State)
        places = (self.labels.index(first), self.labels.index(second))
        tensor = self.held.tensor.detach().cpu().movedim(places, (0, 1))
        return (tensor != 0).flatten(2).any(2) if tensor.dim() > 2 else tensor != 0


@dataclass(frozen=True)
class Contraction:
    """Operands, and the labels of the product."""

    operands: list[Operand]
    output: tuple[str, ...]


def contraction(operands: list[Operand], output: tuple[str, ...]) -> Contraction:
    """Build a contraction; axes of size 1 beside longer ones of their label are broadcast."""
    sizes: dict[str, int] = {}
    for operand in operands:
        if len(set(operand.labels)) < len(operand.labels):
            raise Barrier("it takes a diagonal")
        for label, size in zip(operand.labels, operand.shape, strict=True):
            sizes[label] = max(size, sizes.get(label, 1))
    seen: list[Operand] = []
    for operand in operands:
        pairs = zip(operand.labels, operand.shape, strict=True)
        labels = tuple(BROADCAST if n == 1 and sizes[label] > 1 else label for label, n in pairs)
        seen.append(Operand(operand.held, labels))
    return Contraction(seen, output)


def read_product(first: Any, second: Any) -> Contraction:
    """Read a matrix product; leading axes are broadcast, vectors have no row or column."""
    left, right = _tensor(first), _tensor(second)
    ranks = len(left.shape), len(right.shape)
    rows = (*_leading(ranks[0] - 2), *(("row",) if ranks[0] > 1 else ()), "sum")
    columns = (*_leading(ranks[1] - 2), "sum", *(("column",) if ranks[1] > 1 else ()))
    batch = _leading(max(*ranks, 2) - 2)
    output = (*batch, *rows[-2:-1], *columns[-1:]) if ranks[1] > 1 else (*batch, *rows[-2:-1])
    return contraction([Operand(left.held, rows), Operand(right.held, columns)], output)


def read_einsum(call: Call) -> Contraction:
    """Read an equation and its operands."""
    equation = call.argument(0, "equation")
    if not isinstance(equation, str):
        raise Barrier("its equation is no string")
    given = call.args[1:]
    raw: Any = given[0] if len(given) == 1 and isinstance(given[0], (tuple, list)) else given
    operands = [_tensor(one) for one in raw]
    terms, arrow, result = equation.replace(" ", "").partition("->")
    labels = [
        _letters(term, len(operand.shape))
        for term, operand in zip(terms.split(","), operands, strict=True)
    ]
    if not arrow:
        raise Barrier("its equation does not say what the output is")
    output = _letters(result, len(call.tensor_spec().shape))
    pairs = zip(operands, labels, strict=True)
    return contraction([Operand(one.held, names) for one, names in pairs], output)


def _tensor(argument: Any) -> Operand:
    if not isinstance(argument, (Value, State)):
        raise Barrier("an operand is no tensor")
    bare = Operand(argument, ())
    return Operand(argument, tuple(map(str, range(len(bare.shape)))))


def _leading(count: int) -> tuple[str, ...]:
    """Name leading axes, which are aligned from the right."""
    return tuple(f"batch{place}" for place in range(count, 0, -1))


def _letters(term: str, rank: int) -> tuple[str, ...]:
    before, dots, after = term.partition("...")
    hidden = _leading(rank - len(before) - len(after)) if dots else ()
    return (*before, *hidden, *after)
