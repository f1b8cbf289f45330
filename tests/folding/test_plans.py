"""The cheapest way to cut a chain, held against trying all."""

from collections.abc import Iterator
from pathlib import Path
from zlib import crc32

from hypothesis import given, settings
from hypothesis import strategies as st

from fxprune.folding.convolutions import Geometry, Inexact, Sizes, composed
from fxprune.folding.latency import Latencies
from fxprune.folding.layer_costs import COSTS, Cost, macs, parameters
from fxprune.folding.plans import cheapest
from fxprune.gating.terms import LATENCY


def conv(inputs: int, outputs: int, kernel: int, stride: int = 1, padding: int = 0) -> Geometry:
    return Geometry(inputs, outputs, (kernel,), (stride,), (padding,), (1,))


def fake(geometry: Geometry, inputs: Sizes, threads: int) -> int:
    """Return a time that has nothing to do with the numbers of a layer."""
    return 1 + crc32(repr((geometry, inputs)).encode()) % 1000


NOWHERE = Path(__file__) / "no folder"  # nothing is remembered
TABLES: dict[str, Cost] = {**COSTS, LATENCY: Latencies(NOWHERE, fake)}


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
    unit=st.sampled_from(sorted(TABLES)),
)
def test_no_other_plan_is_cheaper(
    widths: list[int], kernels: list[int], strides: list[int], padded: list[bool], unit: str
) -> None:
    shapes = zip(widths, widths[1:], kernels, strides, padded, strict=False)
    layers = [conv(i, o, k, s, (k // 2) * p) for i, o, k, s, p in shapes]
    places, size = list[Sizes](), 4096
    for layer in layers:
        size //= layer.stride[0]
        places.append((1, size))
    cost = TABLES[unit]
    plan = cheapest(layers, places, cost)
    assert [p.start for p in plan.pieces[1:]] == [p.stop for p in plan.pieces[:-1]]
    apart = sum(map(cost, layers, places))
    every = [sum(cost(g, places[stop - 1]) for stop, g in option) for option in plans(layers)]
    assert plan.cost == min(every) <= plan.apart == apart


def test_what_to_merge_depends_on_what_counts() -> None:
    layers = [conv(8, 8, 3), conv(8, 8, 2, stride=2)]
    assert len(cheapest(layers, [(1, 64), (1, 32)], macs).pieces) == 1
    assert len(cheapest(layers, [(1, 64), (1, 64)], parameters).pieces) == 1
    wide = [conv(8, 8, 3), conv(8, 8, 3, stride=2)]
    assert len(cheapest(wide, [(1, 64), (1, 32)], macs).pieces) == 1
    assert len(cheapest([conv(8, 2, 1), conv(2, 8, 1)], [(1, 64), (1, 64)], parameters).pieces) == 2


def test_a_plan_says_what_else_there_was() -> None:
    layers = [conv(8, 64, 1), conv(64, 8, 3), conv(8, 2, 1), conv(2, 8, 3, padding=1)]
    plan = cheapest(layers, [(1, 64)] * 4, parameters)
    assert plan.text("abcd", "parameters") == (
        "a·b·c | d: 2194 → 106 parameters; not one: b·c·d (zeros are padded between them)"
    )
    data = dict(plan.data("abcd", "parameters"))
    assert data["chosen"][0] == {"layers": ["a", "b", "c"], "as one": 50, "apart": 2138}
    assert {"layers": ["a", "b"], "as one": 200, "apart": 2120} in data["alternatives"]
    dear = cheapest(layers[2:], [(1, 64)] * 2, parameters)
    assert len(dear.pieces) == 2
