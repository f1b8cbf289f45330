"""What layers take as their widths shrink: measured at a few widths, interpolated between them.

    t(o, i) ≈ Σ hat_k(o)·hat_l(i)·t_kl,   at 1, ¼, ½ and all of the channels made and read

that is, linear along each axis, so that it has a gradient. Layers are measured when a table is
made, on all ranks of a distributed training at once, which then go by the first one's.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import ceil
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from fxprune.gating.terms import Row
from fxprune.runtime.structure import Structured, Unchanging

PARTS = (0.0, 0.25, 0.5, 1.0)


@dataclass(frozen=True)
class Axis(Unchanging):
    """Channels of a layer: a row counts them, in units of `size` for all of them.

    step: what their number is a multiple of.
    """

    row: Row
    channels: int
    size: int
    step: int = 1

    @property
    def widths(self) -> list[int]:
        """At which numbers of channels to measure."""
        if not self.row.units:
            return [self.channels]
        return sorted({max(ceil(self.channels * p / self.step), 1) * self.step for p in PARTS})


@dataclass(frozen=True)
class Timing(Unchanging):
    """A layer of which the nanoseconds can be had: of so many channels made, and so many read."""

    made: Axis
    read: Axis
    measure: Callable[[int, int], int]

    def restricted(self, new: Mapping[Row, Row]) -> "Timing":
        """Return the timing in rows that are shorter."""
        made, read = (replace(axis, row=new[axis.row]) for axis in (self.made, self.read))
        return Timing(made, read, self.measure)


class LatencyTable(Structured):
    """Timings side by side: from the counts of rows, the nanoseconds of each."""

    _rows: Tensor
    _channels: Tensor
    _size: Tensor
    _grid: Tensor
    _nanoseconds: Tensor

    def __init__(self, timings: Sequence[Timing], place: Mapping[Row, int]) -> None:
        """Measure the layers; place: where each row's count is."""
        super().__init__()
        axes = [(timing.made, timing.read) for timing in timings]
        self._hold("_rows", [[place[axis.row] for axis in pair] for pair in axes], 2)
        self._hold("_channels", [[axis.channels for axis in pair] for pair in axes], 2)
        self._hold("_size", [[axis.size for axis in pair] for pair in axes], 2)
        self._hold("_grid", [[_padded(axis.widths) for axis in pair] for pair in axes], 2, 4)
        console = Console(stderr=True)
        with Progress(console=console, transient=True, disable=not sys.stderr.isatty()) as shown:
            tables = [_table(one) for one in shown.track(timings, description="timing layers")]
        self._hold("_nanoseconds", _agreed(tables), 16)

    def forward(self, counts: Tensor) -> Tensor:
        """Return the nanoseconds of every layer, (…, timings); counts: (…, rows)."""
        exact = counts.dtype
        width = counts[..., self._rows] * self._channels.to(exact) / self._size.to(exact)
        grid = self._grid.to(exact).expand(*width.shape, 4)
        cell = (width.detach().unsqueeze(-1) >= grid[..., 1:3]).sum(-1, keepdim=True)
        low, high = (grid.gather(-1, cell + end).squeeze(-1) for end in (0, 1))
        part = (width - low) / (high - low)
        made, read = part.unbind(-1)
        row, column = cell.squeeze(-1).unbind(-1)
        table = self._nanoseconds.to(exact).expand(*row.shape, 16)
        total = torch.zeros_like(made)
        for down, right in product((0, 1), (0, 1)):
            corner = (4 * (row + down) + column + right).unsqueeze(-1)
            weight = (made if down else 1 - made) * (read if right else 1 - read)
            total = total + weight * table.gather(-1, corner).squeeze(-1)
        return total

    def _hold(self, name: str, numbers: Sequence[object], *shape: int) -> None:
        self.hold(name, torch.tensor(numbers, dtype=torch.int64).reshape(len(numbers), *shape))


def _padded(widths: list[int]) -> list[int]:
    """Return four widths: those beyond the last are never reached."""
    return [*widths, *(widths[-1] + more for more in range(1, 5 - len(widths)))]


def _agreed(tables: list[list[int]]) -> list[list[int]]:
    """Return the first rank's measurements: all ranks have to come to the same gates."""
    if not dist.is_available() or not dist.is_initialized():
        return tables
    shared: list[Any] = [tables]
    dist.broadcast_object_list(shared)
    return shared[0]


def _table(timing: Timing) -> list[int]:
    made, read = timing.made.widths, timing.read.widths
    times = {(o, i): timing.measure(o, i) for o, i in product(made, read)}
    return [
        times[made[min(row, len(made) - 1)], read[min(column, len(read) - 1)]]
        for row, column in product(range(4), range(4))
    ]
