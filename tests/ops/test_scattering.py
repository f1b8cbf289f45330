"""Graph networks as people write them: messages scattered, graphs pooled, edges masked."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.errors import FxpruneError, NothingToDoError
from fxprune.testing import close_half, error, spread
from tests.conftest import randomise

Scatter = Callable[[Tensor, Tensor, int], Tensor]
DIM = -2  # of the nodes


def added(x: Tensor, index: Tensor, count: int) -> Tensor:
    zeros = torch.zeros(count, x.shape[1], dtype=x.dtype)
    return zeros.scatter_add(0, index.unsqueeze(-1).expand(-1, x.shape[1]), x)


def added_in_place(x: Tensor, index: Tensor, count: int) -> Tensor:
    sums = x.new_zeros(count, x.size(-1))
    sums.scatter_add_(0, index.view(-1, 1).expand_as(x), x)
    return sums


def averaged(x: Tensor, index: Tensor, count: int) -> Tensor:
    sums = added_in_place(x, index, count)
    counts = x.new_zeros(count).scatter_add_(0, index, torch.ones_like(index, dtype=x.dtype))
    return sums / counts.clamp(min=1).view(-1, 1).expand_as(sums)


def averaged_by_torch(x: Tensor, index: Tensor, count: int) -> Tensor:
    zeros = x.new_zeros(count, x.shape[1])
    return zeros.scatter_reduce(0, index[:, None].expand_as(x), x, "mean", include_self=False)


def largest(x: Tensor, index: Tensor, count: int) -> Tensor:
    zeros = x.new_zeros(count, x.shape[1])
    return zeros.index_reduce(0, index, x, "amax", include_self=False)


def sized_by_its_rank(x: Tensor, index: Tensor, count: int) -> Tensor:
    dim = x.dim() + DIM
    size = x.size()[:dim] + (count,) + x.size()[dim + 1 :]  # noqa: RUF005
    shape = (1,) * dim + (-1,) + (1,) * (x.dim() - dim - 1)
    return x.new_zeros(size).scatter_add_(dim, index.view(shape).expand_as(x), x)


SCATTERS = [added, added_in_place, averaged, averaged_by_torch, largest, sized_by_its_rank]


class GraphNet(nn.Module):
    """Two rounds of messages over the edges, but for loops, and a mean for each graph."""

    def __init__(self, scatter: Scatter) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(6, 12), nn.Linear(12, 8), nn.Linear(8, 8)
        self.head, self.scatter = nn.Linear(8, 3), scatter

    def forward(self, x: Tensor, edges: Tensor, graphs: Tensor) -> Tensor:
        edges = edges[:, edges[0] != edges[1]]
        if edges.numel() == 0:
            return self.head(self.third(self.second(self.first(x))))
        source, target = edges
        for layer in (self.first, self.second, self.third):
            x = layer(x).relu()
            x = x + self.scatter(x[source], target, x.shape[0])
        graph_count = int(graphs.max()) + 1
        return self.head(added(x, graphs, graph_count))


@pytest.mark.filterwarnings("ignore:index_reduce:UserWarning")
@pytest.mark.parametrize("scatter", SCATTERS)
def test_channels_beside_the_nodes_go(scatter: Scatter) -> None:
    model: Any = randomise(GraphNet(scatter)).double()
    gated: Any = fxprune.instrument(model, (*graphs(0),))
    assert close_half(gated) == 14
    small: Any = fxprune.finalize(gated)
    assert small.report.verification.verdict == "equal"
    shapes = [layer.out_features for layer in (small.first, small.second, small.third)]
    assert (*shapes, small.head.in_features) == (6, 4, 4, 4)
    for seed in (1, 2, 3):
        inputs = graphs(seed)
        assert error(gated(*inputs), small(*inputs)) < 1e-12 < spread(gated(*inputs))


def graphs(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return nodes, edges with loops among them, and the graph of every node."""
    chance = torch.Generator().manual_seed(seed)
    nodes, count = 7 + 2 * seed, 2 + seed
    edges = torch.randint(0, nodes, (2, 12 + 5 * seed), generator=chance)
    edges[:, 0] = 1
    x = torch.randn(nodes, 6, generator=chance, dtype=torch.float64)
    return x, edges, torch.arange(nodes) % count


def test_a_trace_says_that_what_data_decide_was_not_empty() -> None:
    model: Any = randomise(GraphNet(added)).double()
    gated = fxprune.instrument(model, graphs(0))
    assert "numel() == 0" in str(gated.report.assumptions)
    x, edges, of = graphs(0)
    with pytest.raises(AssertionError, match="assumes not"):
        gated(x, edges[:, :1], of)  # a loop, and nothing else


def unclamped(x: Tensor, index: Tensor, count: int) -> Tensor:
    counts = x.new_zeros(count).scatter_add_(0, index, torch.ones_like(x[:, 0]))
    return added_in_place(x, index, count) / counts[:, None]


def along_channels(x: Tensor, index: Tensor, count: int) -> Tensor:
    order = torch.arange(x.shape[1] - 1, -1, -1).expand_as(x)
    return added_in_place(torch.zeros_like(x).scatter_add(1, order, x), index, count)


def of_one_width(x: Tensor, index: Tensor, count: int) -> Tensor:
    narrow = index[:, None]
    return x.new_zeros(count, x.shape[1]).scatter_add(0, narrow, x) + x.new_zeros(count, 1)


def ones(x: Tensor, index: Tensor, count: int) -> Tensor:
    marks = x.new_zeros(count, x.shape[1]).scatter(0, index[:, None].expand_as(x), 1.0)
    return marks + added_in_place(x, index, count)


def of_a_fixed_width(x: Tensor, index: Tensor, count: int) -> Tensor:
    width = int(x.shape[1])
    wide = index[:, None].repeat(1, width)
    return torch.zeros(count, width, dtype=x.dtype).scatter_add(0, wide, x)


def one_channel_for_all(x: Tensor, index: Tensor, count: int) -> Tensor:
    return added_in_place(x[:, 3:4].expand(-1, x.shape[1]) * x, index, count)


ODD = [along_channels, of_one_width, ones, of_a_fixed_width, one_channel_for_all]


@pytest.mark.parametrize("scatter", ODD)
def test_what_does_not_follow_keeps_its_channels(scatter: Scatter) -> None:
    model: Any = randomise(GraphNet(scatter)).double()
    try:
        gated: Any = fxprune.instrument(model, graphs(0))
    except FxpruneError:
        return
    assert all(torch.equal(gated(*graphs(n)), model(*graphs(n))) for n in (0, 1, 2))
    close_half(gated)
    small: Any = fxprune.finalize(gated)
    assert small.report.verification.verdict == "equal"
    for seed in (1, 2, 3):
        inputs = graphs(seed)
        assert error(gated(*inputs), small(*inputs)) < 1e-12


def test_a_divisor_that_may_be_zero_leaves_nothing_zero() -> None:
    model: Any = randomise(GraphNet(unclamped)).double()
    around = torch.stack([torch.arange(7), torch.arange(7).roll(1)])
    x, _, of = graphs(0)
    with pytest.raises(NothingToDoError):
        fxprune.instrument(model, (x, around, of))
