"""The table of latencies: measured once, kept, and measured anew where it is damaged."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxprune
from fxprune.folding.average_pools import Pool
from fxprune.folding.convolutions import Geometry, Sizes
from fxprune.folding.latency import Latencies, measured
from fxprune.folding.layer_costs import COSTS
from fxprune.folding.transposed_convolutions import Transposed
from fxprune.folding.whole_maps import WholeMap
from fxprune.gating.terms import LATENCY
from tests.conftest import randomise

CONV = Geometry(4, 8, (3, 3), (2, 2), (1, 1), (1, 1))


class Clock:
    """Counts what it is asked to measure: the wider the dearer."""

    def __init__(self) -> None:
        self.asked: list[tuple[Geometry, Sizes]] = []

    def __call__(self, geometry: Geometry, inputs: Sizes, threads: int) -> int:
        self.asked.append((geometry, inputs))
        return geometry.inputs * geometry.outputs


def test_a_layer_is_measured_once_on_the_inputs_it_has(tmp_path: Path) -> None:
    clock = Clock()
    tables = [Latencies(tmp_path, clock) for _ in range(2)]
    for table in (*tables, *tables):
        assert table(CONV, (1, 5, 5)) == 32
    assert clock.asked == [(CONV, (1, 9, 9))]
    tables[0](CONV, (2, 5, 5))
    assert len(clock.asked) == 2 and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("damage", ["", "{", "[1]", '{"x": "y"}', "\x00"])
def test_a_damaged_table_is_measured_anew(tmp_path: Path, damage: str) -> None:
    clock = Clock()
    Latencies(tmp_path, clock)(CONV, (1, 5, 5))
    (file,) = tmp_path.iterdir()
    file.write_text(damage)
    assert Latencies(tmp_path, clock)(CONV, (1, 5, 5)) == 32
    assert Latencies(tmp_path, clock)(CONV, (1, 5, 5)) == 32
    assert len(clock.asked) == 2


def test_tables_of_other_threads_are_others_and_no_cache_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    clock = Clock()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        Latencies(None, clock)(CONV, (1, 5, 5))
    assert len(list((tmp_path / "fxprune").iterdir())) == 2
    assert Latencies(Path(__file__) / "none", clock)(CONV, (1, 5, 5)) == 32


def test_a_layer_of_a_flattened_map_is_a_linear_one(tmp_path: Path) -> None:
    clock, whole = Clock(), WholeMap(4, 8, (5, 5), (1, 1), (0, 0), (1, 1), size=(5, 5))
    Latencies(tmp_path, clock)(whole, (3, 1, 1))
    assert clock.asked == [(Geometry(100, 8), (3,))]


def test_a_transposed_layer_has_fewer_inputs_than_outputs(tmp_path: Path) -> None:
    clock, spread = Clock(), Transposed(4, 8, (4,), (2,), (1,), (1,), beyond=(0,))
    Latencies(tmp_path, clock)(spread, (3, 18))
    assert clock.asked == [(spread, (3, 9))]


CUBE, ONES = (3, 3, 3), (1, 1, 1)
LAYERS = {
    "linear": (Geometry(6, 5), (3,)),
    "without a bias": (Geometry(6, 5, bias=False), (3,)),
    "a line": (Geometry(4, 6, (3,), (2,), (1,), (2,), 2), (1, 9)),
    "a map": (CONV, (1, 9, 9)),
    "with ones": (replace(CONV, stride=(1, 1), ones=True), (1, 7, 7)),
    "a pool": (Pool(4, 4, (3,), (2,), (1,), (1,), 4, False, divisor=3), (1, 9)),
    "transposed": (Transposed(4, 6, (3,), (2,), (1,), (1,), 2, beyond=(1,)), (1, 9)),
    "a volume": (Geometry(4, 4, CUBE, ONES, ONES, ONES, groups=4), (1, 5, 5, 5)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_of_every_kind_run(name: str) -> None:
    assert measured(*LAYERS[name], 1) >= 1


def test_layers_are_merged_where_that_is_quicker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3), nn.ReLU())
    x = torch.randn(2, 3, 9, 9)
    left: list[int] = []
    for quick in (3, 5):

        def clock(geometry: Geometry, inputs: Sizes, threads: int, quick: int = quick) -> int:
            return 10 if geometry.kernel == (quick, quick) else 100

        table = Latencies(tmp_path / str(quick), clock)
        monkeypatch.setitem(COSTS, LATENCY, table)
        small = fxprune.finalize(randomise(model).eval(), x, cost="latency")
        left.append(sum(isinstance(part, nn.Conv2d) for part in small.modules()))
        (plan,) = small.report.plans
        detail: dict[str, Any] = dict(plan.detail)
        assert plan.where == "0" and detail["cost"] == "latency" and "ns" in plan.what
        assert str(plan) in str(small.report)
    assert left == [2, 1]
