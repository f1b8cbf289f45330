"""Ties that leave boxes: what remains of a tensor can be stored only if it is one.

Where the classes of a tensor's tags vary along several axes, removing some of them could leave
holes. So they are tied until they vary along one axis alone, the one of most classes.
"""

import torch
from torch import Tensor

from fxprune.dataflow.tags import TagTable, varying_axes


def close_boxes(table: TagTable, tensors: list[Tensor]) -> Tensor:
    """Tie tags until every tensor's vary along one axis; return the class of every tag."""
    classes = table.classes()
    wide = [tags for tags in tensors if len(varying_axes(tags)) > 1]
    while wide:
        rest: list[Tensor] = []
        for tags in wide:
            axis = _free_axis(classes[tags])
            if axis is None:
                continue
            front = tags.movedim(axis, 0).reshape(tags.shape[axis], -1)
            table.tie(front[:, :1], front[:, 1:])
            rest.append(tags)
        if not rest:
            return classes
        wide = rest
        classes = table.classes()
    return classes


def _free_axis(classes: Tensor) -> int | None:
    """Return the axis to keep apart, the one of most classes; None if classes vary along one."""
    axes = [
        axis
        for axis in varying_axes(classes)
        if not torch.equal(classes, classes.narrow(axis, 0, 1).expand(classes.shape))
    ]
    if len(axes) < 2:
        return None
    return max(axes, key=lambda axis: classes.shape[axis])
