"""The cheapest way to cut a chain, held against trying all."""

from collections.abc import Iterator

from hypothesis import given, settings
from hypothesis import strategies as st

from fxprune.chains import COSTS, cheapest, macs, parameters
from fxprune.convolutions import Geometry, Inexact, composed


def conv(inputs: int, outputs: int, kernel: int, stride: int = 1, padding: int = 0) -> Geometry:
    return Geometry(inputs, outputs, (kernel,), (stride,), (padding,), (1,))


def plans(layers: list[Geometry], start: int = 0) -> Iterator[list[tuple[int, Geometry]]]:
    """Yield every way to cut a chain: stop and geometry of every piece."""
    if start == len(layers):
        yield []
        return
    merged = layers[start]
    for stop in range(start + 1, len(layers) + 1):
        if stop > start + 1:
            try:
                merged = composed(merged, layers[stop - 1])
            except Inexact:
                return
        for rest in plans(layers, stop):
            yield [(stop, merged), *rest]


@settings(max_examples=60, deadline=None)
@given(
    widths=st.lists(st.integers(1, 9), min_size=3, max_size=7),
    kernels=st.lists(st.sampled_from([1, 1, 3]), min_size=6, max_size=6),
    strides=st.lists(st.integers(1, 2), min_size=6, max_size=6),
    padded=st.lists(st.booleans(), min_size=6, max_size=6),
    unit=st.sampled_from(sorted(COSTS)),
)
def test_no_other_plan_is_cheaper(
    widths: list[int], kernels: list[int], strides: list[int], padded: list[bool], unit: str
) -> None:
    shapes = zip(widths, widths[1:], kernels, strides, padded, strict=False)
    layers = [conv(i, o, k, s, (k // 2) * p) for i, o, k, s, p in shapes]
    places, size = [], 4096
    for layer in layers:
        size //= layer.stride[0]
        places.append(size)
    cost = COSTS[unit]
    plan = cheapest(layers, places, cost)
    assert [p.start for p in plan[1:]] == [p.stop for p in plan[:-1]]
    every = [sum(cost(g, places[stop - 1]) for stop, g in option) for option in plans(layers)]
    found = sum(piece.cost for piece in plan)
    assert found == min(every) <= sum(map(cost, layers, places))


def test_what_to_merge_depends_on_what_counts() -> None:
    layers = [conv(8, 8, 3), conv(8, 8, 2, stride=2)]
    assert len(cheapest(layers, [64, 32], macs)) == 1
    assert len(cheapest(layers, [64, 64], parameters)) == 1
    wide = [conv(8, 8, 3), conv(8, 8, 3, stride=2)]
    assert len(cheapest(wide, [64, 32], macs)) == 1
    assert len(cheapest([conv(8, 2, 1), conv(2, 8, 1)], [64, 64], parameters)) == 2
