"""Which channels are live: the backward half of the analysis. It asks and never edits.

A class of tags is live if something live reads it where it is not a foldable constant. `settle` is
optimistic: all are dead but what must stay, and what lives grows until nothing changes, as in
aggressive dead-code elimination. A tensor all of whose channels are dead still keeps one.
"""

import torch
from torch import Tensor

from fxprune.channels import Channels
from fxprune.cuts import Cut
from fxprune.tags import FIXED


def settle(channels: Channels) -> Cut:
    """Find the classes that are live, and what stays beside them so that no tensor is emptied."""
    classes = channels.classes
    live = torch.zeros(len(classes), dtype=torch.bool)
    live[FIXED] = True
    for _, tags, _ in channels.keeps:
        live[classes[tags.reshape(-1)]] = True
    _grow(channels, live)
    kept = live.clone()
    for tags in _axes(channels):
        if not bool(kept[classes[tags]].any()):
            kept[classes[tags[0]]] = True
    return Cut(classes, live, kept)


def _grow(channels: Channels, live: Tensor) -> None:
    classes = channels.classes
    reads = [
        (classes[read.outputs], classes[read.inputs], read.pattern, ~read.foldable)
        for _, read in reversed(channels.reads)
    ]
    seen = [-1] * len(reads)
    changed = True
    while changed:
        changed = False
        for place, (outputs, inputs, pattern, solid) in enumerate(reads):
            alive = live[outputs]
            count = int(alive.sum())
            if count == seen[place]:
                continue
            seen[place] = count
            if count == 0:
                continue
            needed = solid if pattern is None else solid & pattern[alive].any(0)
            new = inputs[needed]
            if not bool(live[new].all()):
                live[new] = True
                changed = True


def _axes(channels: Channels) -> list[Tensor]:
    """Return the tags of every tensor and every cut axis of a parameter: none may be emptied."""
    found = [value.tags.reshape(-1) for value in channels.tensors()]
    for state in channels.states.values():
        found.extend(state.axes.values())
        if state.whole is not None:
            found.append(state.whole.reshape(-1))
    return [tags for tags in found if len(tags)]
