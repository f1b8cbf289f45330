"""Channel tags: integers that say which channel an element of a tensor belongs to.

A value's tags are an int64 tensor broadcastable to the value's shape, of size 1 along every axis on
which the tag does not vary, so (N, C, H, W) features carry (1, C, 1, 1) tags. Tags that must live
or die together are tied; `TagTable.classes` solves all ties at once by hooking and pointer jumping,
which is vectorised and needs no recursion. Tag 0, `FIXED`, is the channel that always stays.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

FIXED = 0


class TagTable:
    """Hand out tags and remember which of them are tied."""

    def __init__(self) -> None:
        self.count = 1
        self._left: list[Tensor] = []
        self._right: list[Tensor] = []

    def fresh(self, count: int) -> Tensor:
        """Return `count` tags nobody has yet, int64 of shape (count,)."""
        tags = torch.arange(self.count, self.count + count)
        self.count += count
        return tags

    def tie(self, left: Tensor, right: Tensor) -> None:
        """Record that the tags of both tensors, broadcast against each other, share their fate."""
        if left is right:
            return
        left, right = torch.broadcast_tensors(left, right)
        self._left.append(left.reshape(-1))
        self._right.append(right.reshape(-1))

    def classes(self) -> Tensor:
        """Return the class of every tag, int64 (count,): the least tag it is tied to."""
        if self._left:
            left, right = torch.cat(self._left), torch.cat(self._right)
            different = left != right
            self._left, self._right = [left[different]], [right[different]]
            return connected_components(self.count, *self._left, *self._right)
        return torch.arange(self.count)


def connected_components(count: int, left: Tensor, right: Tensor) -> Tensor:
    """Label each of `count` vertices with the least vertex of its component.

    `left` and `right` are int64 vectors, the two ends of every edge.
    """
    label = torch.arange(count)
    while True:
        roots_left, roots_right = label[left], label[right]
        least = torch.minimum(roots_left, roots_right)
        hooked = label.clone()
        hooked.scatter_reduce_(0, roots_left, least, "amin")
        hooked.scatter_reduce_(0, roots_right, least, "amin")
        while not torch.equal(hooked, jumped := hooked[hooked]):
            hooked = jumped
        if torch.equal(hooked, label):
            return label
        label = hooked


def compress(full: Tensor) -> Tensor:
    """Shrink to size 1 every axis along which `full` does not vary."""
    for axis, size in enumerate(full.shape):
        if size < 2:
            continue
        first = full.narrow(axis, 0, 1)
        if full.stride(axis) == 0 or bool((full == first).all()):
            full = first
    return full


def align(constants: Tensor, tags: Tensor) -> Tensor:
    """Give constants the axes of their tags; where they vary within a tag they are NaN, unknown."""
    for axis, size in enumerate(tags.shape):
        if size == 1 and constants.shape[axis] > 1:
            low = constants.amin(axis, keepdim=True)
            high = constants.amax(axis, keepdim=True)
            constants = torch.where(low == high, low, torch.nan)
    return constants


def varying_axes(tags: Tensor) -> list[int]:
    """Return the axes along which tags vary."""
    return [axis for axis, size in enumerate(tags.shape) if size > 1]


def move(
    operator: Callable[[list[Tensor]], Tensor | Sequence[Tensor]],
    inputs: Sequence[Tensor],
    shapes: Sequence[Sequence[int]],
) -> list[Tensor]:
    """Run a data-movement operator on tags (or constants) blown up to full shape.

    float64 holds every tag exactly and is the one dtype all of torch's data movement accepts. The
    blowing up copies nothing, unless the operator is a view that strides of 0 do not allow.
    """
    full = [
        tensor.double().expand(tuple(shape)) for tensor, shape in zip(inputs, shapes, strict=True)
    ]
    try:
        result = operator(full)
    except RuntimeError:
        result = operator([tensor.contiguous() for tensor in full])
    return [result] if isinstance(result, Tensor) else list(result)
