"""Which channels are live: the backward half of the analysis. It asks and never edits.

A class of tags is live if something live reads it where it is not a foldable constant. `settle` is
optimistic: all are dead but what must stay, and what lives grows until nothing changes, as in
aggressive dead-code elimination. A tensor all of whose channels are dead still keeps one, unless
all that is made of it is a part of a concatenation: then it goes, with what computed it.
"""

import torch
from torch import Tensor, fx

from fxprune.dataflow.channels import Channels
from fxprune.dataflow.cuts import Cut
from fxprune.dataflow.rules import absorbs, rule_for
from fxprune.dataflow.tags import FIXED
from fxprune.dataflow.values import State, Value, flatten


def settle(channels: Channels) -> Cut:
    """Find the classes that are live, and what stays beside them so that no tensor is emptied."""
    if channels.settled is None:
        channels.settled = _settle(channels)
    return channels.settled


def _settle(channels: Channels) -> Cut:
    classes = channels.classes
    live = torch.zeros(len(classes), dtype=torch.bool)
    live[FIXED] = True
    for _, tags, _ in channels.keeps:
        live[classes[tags.reshape(-1)]] = True
    _grow(channels, live)
    gone = _superfluous(channels, live)
    while True:
        kept = live.clone()
        for tags in _emptied(_axes(channels, gone), classes, live):
            if not bool(kept[classes[tags]].any()):
                kept[classes[tags[0]]] = True
        misread = _misread(channels, live, kept)
        if bool(misread.any()):
            live |= misread
            _grow(channels, live)
            gone = _superfluous(channels, live)
            continue
        calls = [node for node in gone if node.op != "get_attr"]
        staying = {node for node in calls if _is_any(kept, channels, node)}
        if not staying:
            return Cut(classes, live, kept, frozenset(gone))
        # What a tensor that stays is tied to stays with it, and so does what it is computed from.
        gone = _superfluous(channels, live, candidates=gone - staying)


def _grow(channels: Channels, live: Tensor) -> None:
    classes = channels.classes
    reads = [
        (classes[read.outputs], classes[read.inputs], read) for _, read in reversed(channels.reads)
    ]
    seen = [-1] * len(reads)
    changed = True
    while changed:
        changed = False
        for place, (outputs, inputs, read) in enumerate(reads):
            alive = live[outputs]
            count = int(alive.sum())
            if count == seen[place]:
                continue
            seen[place] = count
            new = inputs[read.needed(alive)]
            if not bool(live[new].all()):
                live[new] = True
                changed = True


def _misread(channels: Channels, live: Tensor, kept: Tensor) -> Tensor:
    """Return the classes that stay though dead, and that something live still reads.

    A layer takes the constant in and stops reading; what does not needs the channel to be what it
    was, though what that was computed from may have been folded as well.
    """
    dead = kept & ~live
    found = torch.zeros_like(live)
    for node, read in channels.reads if bool(dead.any()) else ():
        inputs = channels.classes[read.inputs]
        if bool(dead[inputs].any()) and not absorbs(channels.calls[node]):
            taken = inputs[read.taken(live[channels.classes[read.outputs]])]
            found[taken[dead[taken]]] = True
    return found


def _superfluous(
    channels: Channels, live: Tensor, candidates: set[fx.Node] | None = None
) -> set[fx.Node]:
    """Return the nodes of which nothing is live and nothing is made but parts to be left out."""
    gone: set[fx.Node] = set()
    for node in reversed(channels.values):
        if not node.users or (candidates is not None and node not in candidates):
            continue
        if node.op != "get_attr" and not _is_dead(channels, live, node):
            continue
        staying = [user for user in node.users if user not in gone]
        if staying and node.op == "get_attr" and not _is_dead_state(channels, live, node):
            continue
        if all(_may_leave_out(channels, live, user) for user in staying):
            gone.add(node)
    return gone


def _is_dead_state(channels: Channels, live: Tensor, node: fx.Node) -> bool:
    """Tell whether no channel of a parameter is live, element by element as a part has them."""
    state = channels.values[node]
    whole = state.whole if isinstance(state, State) else None
    return whole is not None and not bool(live[channels.classes[whole]].any())


def _is_dead(channels: Channels, live: Tensor, node: fx.Node) -> bool:
    known = node in channels.calls and node not in channels.barriers
    return known and not _is_any(live, channels, node)


def _may_leave_out(channels: Channels, live: Tensor, user: fx.Node) -> bool:
    call = channels.calls.get(user)
    if call is None or user in channels.barriers:
        return False
    is_parts = rule_for(user, call.module).name == "concatenation"
    return is_parts and _is_any(live, channels, user)


def _is_any(mask: Tensor, channels: Channels, node: fx.Node) -> bool:
    """Tell whether any channel of a node's tensors is in the mask; so is what is no tensor."""
    leaves = [
        leaf.operand if isinstance(leaf, State) else leaf for leaf in flatten(channels.values[node])
    ]
    values = [leaf for leaf in leaves if isinstance(leaf, Value)]
    if not values or len(values) < len(leaves):
        return True
    return any(bool(mask[channels.classes[value.tags]].any()) for value in values)


def _axes(channels: Channels, gone: set[fx.Node]) -> list[Tensor]:
    """Return the tags of every tensor and every cut axis of a parameter: none may be emptied."""
    found = [value.tags.reshape(-1) for value in channels.tensors(gone)]
    for state in _states(channels, gone):
        found.extend(state.axes.values())
        if state.whole is not None:
            found.append(state.whole.reshape(-1))
    return [tags for tags in found if len(tags)]


def _emptied(axes: list[Tensor], classes: Tensor, live: Tensor) -> list[Tensor]:
    """Return the axes of which nothing is live."""
    if not axes:
        return []
    sizes = torch.tensor([len(tags) for tags in axes])
    owners = torch.arange(len(axes)).repeat_interleave(sizes)
    is_live = live[classes[torch.cat(axes)]]
    counts = torch.zeros(len(axes), dtype=torch.long).index_add(0, owners, is_live.long())
    return [axes[place] for place in (counts == 0).nonzero().reshape(-1).tolist()]


def _states(channels: Channels, gone: set[fx.Node]) -> list[State]:
    """Return the parameters and buffers that anything uses that stays."""
    if not gone:
        return list(channels.states.values())
    staying = {name for node, names in channels.uses.items() if node not in gone for name in names}
    return [state for state in channels.states.values() if state.name in staying]
