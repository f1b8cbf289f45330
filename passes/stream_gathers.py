"""Let a reader of a stream have its own channels of it, where copying those pays.

    conv(relu(bn(x)))  →  conv'(relu(bn'(x[:, i])))

In a stream that is read many times (DenseNet, pre-activation ResNets) a channel stays as long as
one reader needs it, and all others compute with it in vain. Where what a layer multiplies in vain
is worth more than copying what it needs, it gets an `index_select`, or a slice, which copies
nothing (the channel selection of Network Slimming, Liu et al. 2017).
"""

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from fxprune.dataflow.channels import Channels, analyse
from fxprune.dataflow.cuts import Cut
from fxprune.dataflow.liveness import settle
from fxprune.dataflow.rules import Read
from fxprune.dataflow.tags import varying_axes
from fxprune.dataflow.values import Value
from fxprune.ops.gather import pick_channels
from fxprune.ops.rewriting import positions_that_remain
from fxprune.programs.observation import Observation, observe
from fxprune.programs.pipeline import Change
from fxprune.programs.program import Program

COPY = 32  # multiply-accumulates a core does while it copies one number


@dataclass(frozen=True)
class _Edge:
    """Where a stream is read: by whom, along which axis, and what is needed of what it keeps."""

    source: fx.Node
    user: fx.Node
    axis: int
    needed: Tensor
    kept: Tensor


def insert_gathers(program: Program, known: Channels | None = None) -> list[Change]:
    """Propose picks of channels where they pay; removing dead channels makes them what they are.

    known: the analysis of the program as it is, if there is one already.
    """
    seen = observe(program)
    channels = known or analyse(program, observation=seen)
    cut = settle(channels)
    changes: list[Change] = []
    for node, read in channels.reads:
        edge = _edge(channels, cut, seen, node, read)
        if edge is None or not _pays(edge, read, cut, seen.macs.get(node, 0), seen):
            continue
        _insert(program, seen, edge)
        counts = int(edge.needed.sum()), int(edge.kept.sum())
        changes.append(
            Change(
                node.name,
                f"picks {counts[0]} of {counts[1]} channels of {edge.source.name}",
                (("needed", counts[0]), ("kept", counts[1])),
            )
        )
    return changes


def remove_unsettled_gathers(program: Program) -> None:
    """Bypass the picks that became nothing, as the channels around them had to stay."""
    for node in list(program.graph.nodes):
        if node.target is pick_channels:
            node.replace_all_uses_with(node.args[0])
            program.graph.erase_node(node)


def _edge(
    channels: Channels, cut: Cut, seen: Observation, node: fx.Node, read: Read
) -> _Edge | None:
    """Return the edge to pick channels on; None if the reader needs all there are, or none."""
    needed = read.needed(cut.alive(read.outputs))
    if not bool(needed.any()) or bool((needed | ~cut.keep(read.inputs)).all()):
        return None
    source = _only_input(channels, node)
    if source is None:
        return None
    user, labels = node, _labels(channels, source)
    while labels is not None and len(source.users) == 1:
        before = _only_input(channels, source)
        same = None if before is None else _labels(channels, before)
        if before is None or same is None or not torch.equal(same, labels):
            break
        source, user = before, source
    value = channels.values[source]
    if labels is None or seen.written(source) or source.op == "placeholder":
        return None
    wanted = torch.zeros(len(cut.classes), dtype=torch.bool)
    wanted[channels.classes[read.inputs[needed]]] = True
    (axis,) = varying_axes(value.tags)
    kept = cut.keep(value.tags.reshape(-1))
    return _Edge(source, user, axis, wanted[labels] & kept, kept)


def _only_input(channels: Channels, node: fx.Node) -> fx.Node | None:
    """Return the one computed tensor an operator takes; None if there are more, or others."""
    if node in channels.barriers or node not in channels.calls:
        return None
    inputs = [one for one in node.all_input_nodes if one.op != "get_attr"]
    return inputs[0] if len(inputs) == 1 else None


def _labels(channels: Channels, node: fx.Node) -> Tensor | None:
    """Return the classes of a tensor whose channels lie along one axis, each once."""
    value = channels.values.get(node)
    if not isinstance(value, Value) or len(varying_axes(value.tags)) != 1:
        return None
    labels = channels.classes[value.tags.reshape(-1)]
    return labels if len(labels.unique()) == len(labels) else None


def _pays(edge: _Edge, read: Read, cut: Cut, macs: int, seen: Observation) -> bool:
    """Compare what is multiplied in vain with what would be copied."""
    needed, kept = int(edge.needed.sum()), int(edge.kept.sum())
    chosen = positions_that_remain(
        edge.needed.nonzero().reshape(-1), edge.kept.nonzero().reshape(-1), len(edge.kept)
    )
    if needed == kept or isinstance(chosen, slice):
        return needed < kept
    shape = seen.values[edge.source].shape
    outputs = float(cut.keep(read.outputs).double().mean())
    in_vain = macs * outputs * (kept - needed) / len(edge.kept)
    return in_vain > COPY * needed * torch.Size(shape).numel() / shape[edge.axis]


def _insert(program: Program, seen: Observation, edge: _Edge) -> None:
    with program.graph.inserting_before(edge.user):
        pick = program.graph.call_function(pick_channels, (edge.source, edge.axis))
    pick.meta["source"] = edge.user.meta.get("source")
    edge.user.replace_input_with(edge.source, pick)
    seen.values[pick] = seen.values[edge.source]
    seen.alias[pick] = seen.alias[edge.source]
