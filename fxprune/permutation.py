"""An oracle for the channel analysis that removes nothing: units change places.

If the analysis is right about which channels of which tensors are one unit, exchanging units in all
parameters at once only renames what goes on inside the model, and its outputs stay. Classes change
places that are met in the same tensors, equally often and in the same order: what a slice tells
apart is met in different ones, as a slice is a tensor too. Classes that must stay, stay.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fxprune.dataflow.channels import Channels, analyse
from fxprune.dataflow.tags import FIXED
from fxprune.dataflow.values import State, Value
from fxprune.programs.program import Program
from fxprune.testing import error
from fxprune.user_models.modules import evaluating


@dataclass(frozen=True)
class Permutation:
    """What came of it: how many classes moved, of how many, and the outputs' relative error."""

    moved: int
    classes: int
    error: float


def exchange_units(program: Program, seed: int = 0) -> Permutation:
    """Let units of a copy change places at random, and compare outputs in evaluation mode.

    For a verdict on the analysis, and not on rounding, give it a program in float64.
    """
    channels = analyse(program, generic=True)  # zeros among the weights move like other numbers
    generator = torch.Generator().manual_seed(seed)
    places = _places(channels, generator)
    exchanged = program.clone()
    tensors = exchanged.module.state_dict(keep_vars=True)
    for name, state in channels.states.items():
        tensor = tensors.get(name)
        if tensor is not None:  # but buffers that are not persistent
            tensor.data.copy_(_permuted(state, channels.classes, places))
    with evaluating(program.module, exchanged.module):
        found = error(program.run(), exchanged.run())
    moved = int((places != torch.arange(len(places))).sum())
    return Permutation(moved, len(channels.classes.unique()), found)


def _places(channels: Channels, generator: torch.Generator) -> Tensor:
    """Return for every class whose place it takes, int64 (classes,)."""
    signatures = _signatures(channels, generator)
    _, group = signatures.unique(return_inverse=True)
    shuffled = torch.randperm(len(group), generator=generator)
    places = torch.arange(len(group))
    places[group.argsort(stable=True)] = shuffled[group[shuffled].argsort(stable=True)]
    return places


def _signatures(channels: Channels, generator: torch.Generator) -> Tensor:
    """Return a number for every class, the same for those met alike.

    It is a sum of products of numbers drawn for the tensor, for the tag's place in its class, and
    for how far from the class's first place in the tensor it is met: a rolled map has torn some.
    """
    classes = channels.classes

    def draw(count: int) -> Tensor:
        return torch.randint(-(2**62), 2**62, (count,), generator=generator)

    signatures = draw(len(classes))  # for those that are met nowhere: tags that were tied to others
    signatures[classes] = 0
    met = [value.tags for value in channels.tensors()]
    for state in channels.states.values():
        met += [*state.axes.values(), *([] if state.whole is None else [state.whole])]
    longest = max(map(torch.numel, met), default=0)
    by_tag, by_distance = draw(len(classes))[_ranks(classes)], draw(longest)
    for tags in met:
        labels = classes[tags.reshape(-1)]
        numbers = draw(1) * by_tag[tags.reshape(-1)] * by_distance[_distances(labels)]
        signatures.index_add_(0, labels, numbers)
    kept = [classes[tags.reshape(-1)] for _, tags, _ in channels.keeps]
    alone = torch.cat([*kept, *_torn(channels), torch.tensor([FIXED])]).unique()
    signatures[alone] = draw(len(alone))
    return signatures


def _torn(channels: Channels) -> Iterator[Tensor]:
    """Yield the classes met twice in what was rolled: which of the two came first, no tag tells."""
    for node, value in channels.values.items():
        if node.target in (torch.roll, "roll") and isinstance(value, Value):
            labels, times = channels.classes[value.tags.reshape(-1)].unique(return_counts=True)
            yield labels[times > 1]


def _ranks(labels: Tensor) -> Tensor:
    """Return for every element how many of its label stand before it."""
    order = labels.argsort(stable=True)
    ascending = labels[order]
    ranks = torch.empty_like(labels)
    ranks[order] = torch.arange(len(labels)) - torch.searchsorted(ascending, ascending)
    return ranks


def _distances(labels: Tensor) -> Tensor:
    """Return for every element how far behind the first of its label it stands."""
    order = labels.argsort(stable=True)
    ascending = labels[order]
    first = order[torch.searchsorted(ascending, ascending)]
    distances = torch.empty_like(labels)
    distances[order] = order - first
    return distances


def _permuted(state: State, classes: Tensor, places: Tensor) -> Tensor:
    """Return a parameter with its channels in their new places, in order within a class."""
    tensor = state.tensor.detach().cpu()
    if state.whole is not None:
        if state.whole.shape != tensor.shape:
            return tensor
        return tensor.flatten()[_order(classes[state.whole.flatten()], places)].view_as(tensor)
    for axis, tags in state.axes.items():
        tensor = tensor.index_select(axis, _order(classes[tags], places))
    return tensor


def _order(labels: Tensor, places: Tensor) -> Tensor:
    order = torch.empty_like(labels)
    order[places[labels].argsort(stable=True)] = labels.argsort(stable=True)
    return order
