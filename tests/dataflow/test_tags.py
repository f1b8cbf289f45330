"""Tags: ties close to the components networkx finds, and axes shrink without a loss."""

import math

import networkx as nx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxprune.dataflow.tags import (
    FIXED,
    TagTable,
    align,
    compress,
    connected_components,
    move,
    varying_axes,
)

MANY = 100_000
UNKNOWN = math.nan

shapes = st.lists(st.integers(0, 4), min_size=1, max_size=4).map(tuple)
graphs = st.integers(1, 30).flatmap(
    lambda count: st.tuples(
        st.just(count),
        st.lists(st.tuples(st.integers(0, count - 1), st.integers(0, count - 1)), max_size=40),
    )
)


@st.composite
def broadcast_tensors(draw: st.DrawFn) -> Tensor:
    """Small integers that vary along some axes only, at full shape, copied or expanded."""
    shape = draw(shapes)
    narrow = [draw(st.sampled_from((1, size))) for size in shape]
    numel = math.prod(narrow)
    values = draw(st.lists(st.integers(0, 2), min_size=numel, max_size=numel))
    full = torch.tensor(values, dtype=torch.long).reshape(narrow).expand(shape)
    return full.clone() if draw(st.booleans()) else full


def column(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.long)


def least_of_component(count: int, edges: list[tuple[int, int]]) -> list[int]:
    graph: nx.Graph[int] = nx.Graph()
    graph.add_nodes_from(range(count))
    graph.add_edges_from(edges)
    least = {v: min(part) for part in nx.connected_components(graph) for v in part}
    return [least[vertex] for vertex in range(count)]


@settings(deadline=None)
@given(graphs)
def test_components_are_those_of_networkx(graph: tuple[int, list[tuple[int, int]]]) -> None:
    count, edges = graph
    label = connected_components(
        count, column([a for a, _ in edges]), column([b for _, b in edges])
    )
    assert label.tolist() == least_of_component(count, edges)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(0.2, 1.5))
def test_components_of_large_sparse_graphs_are_those_of_networkx(seed: int, degree: float) -> None:
    generator, count = torch.Generator().manual_seed(seed), 2000
    ends = torch.randint(count, (2, int(degree * count)), generator=generator)
    label = connected_components(count, *ends)
    assert label.tolist() == least_of_component(count, list(zip(*ends.tolist(), strict=True)))


@pytest.mark.parametrize("order", ["ascending", "descending", "shuffled"])
def test_a_long_chain_is_one_component_whatever_its_order(order: str) -> None:
    chain = {
        "ascending": torch.arange(MANY),
        "descending": torch.arange(MANY - 1, -1, -1),
        "shuffled": torch.randperm(MANY, generator=torch.Generator().manual_seed(0)),
    }[order]
    assert not connected_components(MANY, chain[:-1], chain[1:]).any()


def test_a_long_star_is_one_component_of_its_least_leaf() -> None:
    centre = torch.full((MANY - 1,), MANY - 1)
    assert not connected_components(MANY, centre, torch.arange(MANY - 1)).any()


def test_long_chains_side_by_side_stay_apart() -> None:
    evens, odds = torch.arange(0, MANY, 2), torch.arange(1, MANY, 2)
    left, right = torch.cat([evens[:-1], odds[1:]]), torch.cat([evens[1:], odds[:-1]])
    label = connected_components(MANY, left, right)
    assert torch.equal(label, torch.arange(MANY) % 2)


def test_fresh_tags_are_new_and_never_the_fixed_one() -> None:
    table = TagTable()
    tags = torch.cat([table.fresh(3), table.fresh(0), table.fresh(4)])
    assert FIXED not in tags.tolist()
    assert len(tags.unique()) == 7
    assert len(table.classes()) == 8


def test_untied_tags_are_classes_of_their_own() -> None:
    table = TagTable()
    table.fresh(4)
    assert table.classes().tolist() == [0, 1, 2, 3, 4]


def test_ties_broadcast_a_row_against_a_column() -> None:
    table = TagTable()
    channels, one = table.fresh(3), table.fresh(1)
    table.tie(channels.reshape(1, 3, 1, 1), one.reshape(1, 1, 1, 1))
    assert table.classes()[torch.cat([channels, one])].tolist() == [1, 1, 1, 1]


def test_ties_pair_channels_one_by_one() -> None:
    table = TagTable()
    left, right = table.fresh(3), table.fresh(3)
    table.tie(left.reshape(1, 3, 1), right.reshape(3, 1))
    assert torch.equal(table.classes()[left], table.classes()[right])
    assert len(table.classes()[left].unique()) == 3


def test_ties_of_shapes_that_do_not_broadcast_are_refused() -> None:
    table = TagTable()
    with pytest.raises(RuntimeError):
        table.tie(table.fresh(3), table.fresh(2))


def test_a_tie_to_the_fixed_tag_fixes_all_it_is_tied_to() -> None:
    table = TagTable()
    tags = table.fresh(3)
    table.tie(tags[:2], tags[1:])
    table.tie(tags[2], torch.tensor(FIXED))
    assert table.classes()[tags].tolist() == [FIXED] * 3


def test_ties_after_a_question_join_those_before_it() -> None:
    table = TagTable()
    tags = table.fresh(4)
    table.tie(tags[0], tags[1])
    table.tie(tags[2], tags[3])
    assert table.classes()[tags].tolist() == [1, 1, 3, 3]
    more = table.fresh(1)
    table.tie(tags[1], more)
    table.tie(more, tags[2])
    assert table.classes().tolist() == [0, 1, 1, 1, 1, 1]


@settings(deadline=None)
@given(broadcast_tensors())
def test_compression_loses_nothing_and_leaves_only_axes_that_vary(full: Tensor) -> None:
    small = compress(full)
    assert torch.equal(small.expand(full.shape), full)
    for axis in varying_axes(small):
        assert not torch.equal(small, small.narrow(axis, 0, 1).expand(small.shape))


@settings(deadline=None)
@given(broadcast_tensors(), st.data())
def test_compression_keeps_unknowns_where_they_are(full: Tensor, data: st.DataObject) -> None:
    mask = data.draw(
        st.lists(st.booleans(), min_size=full.numel(), max_size=full.numel()), label="unknown"
    )
    unknown = torch.tensor(mask, dtype=torch.bool).reshape(full.shape)
    constants = torch.where(unknown, UNKNOWN, full.double())
    restored = compress(constants).expand(full.shape)
    assert torch.equal(restored.isnan(), unknown)
    assert torch.equal(restored.nan_to_num(), constants.nan_to_num())


def test_compression_does_not_copy_what_was_expanded() -> None:
    tags = torch.arange(3).reshape(1, 3, 1, 1)
    small = compress(tags.expand(64, 3, 224, 224))
    assert small.shape == tags.shape
    assert small.data_ptr() == tags.data_ptr()


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ([2.0, 2.0, 2.0], 2.0),
        ([2.0, 2.0, 3.0], UNKNOWN),
        ([2.0, UNKNOWN, 2.0], UNKNOWN),
        ([UNKNOWN, 2.0, 2.0], UNKNOWN),
        ([UNKNOWN, UNKNOWN, UNKNOWN], UNKNOWN),
        ([math.inf, math.inf, math.inf], math.inf),
        ([-math.inf, math.inf, 0.0], UNKNOWN),
        ([0.0, -0.0, 0.0], 0.0),
    ],
)
def test_constants_are_known_only_where_they_agree_within_a_tag(
    row: list[float], expected: float
) -> None:
    constants = torch.tensor([row, [7.0, 7.0, 7.0]], dtype=torch.float64)
    aligned = align(constants, torch.tensor([[1], [2]]))
    torch.testing.assert_close(
        aligned,
        torch.tensor([[expected], [7.0]], dtype=torch.float64),
        rtol=0,
        atol=0,
        equal_nan=True,
    )


def test_constants_of_their_tags_axes_stay_as_they_are() -> None:
    constants = torch.tensor([[1.0, UNKNOWN], [2.0, 3.0]], dtype=torch.float64)
    aligned = align(constants, torch.arange(4).reshape(2, 2))
    assert torch.equal(aligned.nan_to_num(-1), constants.nan_to_num(-1))


def test_constants_narrower_than_their_tags_stay_narrow() -> None:
    assert align(torch.zeros(1, 1), torch.arange(3).reshape(1, 3)).shape == (1, 1)


def test_varying_axes_are_the_long_ones() -> None:
    assert varying_axes(torch.zeros(1, 3, 1, 2)) == [1, 3]
    assert varying_axes(torch.zeros(())) == []


def test_movement_takes_tags_where_it_takes_elements() -> None:
    channels = torch.arange(1, 4).reshape(1, 3, 1)
    [moved] = move(lambda full: full[0].transpose(1, 2).flatten(1), [channels], [(2, 3, 2)])
    assert moved.tolist() == [[1, 2, 3, 1, 2, 3]] * 2


def test_movement_into_parts_gives_a_tensor_each() -> None:
    channels = torch.arange(1, 6)

    def split(full: list[Tensor]) -> list[Tensor]:
        return [full[0][:2], full[0][2:]]

    parts = move(split, [channels], [(5,)])
    assert [part.tolist() for part in parts] == [[1, 2], [3, 4, 5]]


def test_movement_of_several_values_keeps_their_order() -> None:
    left, right = torch.tensor([[1], [2]]), torch.tensor([[3]])
    [moved] = move(torch.cat, [left, right], [(2, 2), (1, 2)])
    assert compress(moved).long().tolist() == [[1], [2], [3]]


def test_tags_survive_movement_exactly_however_many_there_are() -> None:
    tags = torch.tensor([2**53 - 1, 2**53 - 2])
    [moved] = move(lambda full: full[0].flip(0), [tags], [(2,)])
    assert moved.long().tolist() == [2**53 - 2, 2**53 - 1]
