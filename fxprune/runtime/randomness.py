"""Random numbers: those that Python draws while it is traced, and those that operators draw.

A trace would draw the former once for all. What an operator draws (`randn_like`) is part of the
graph, and drawn in every run: runs that are to be compared draw alike.
"""

import random
import sys
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def drawing_alike(device: torch.device) -> Generator[None]:
    """Let whatever runs draw the same numbers each time, and leave torch's generators alone.

    `torch.manual_seed` would also remember a stack for every device there could be, which takes
    longer than most operators.
    """
    on_gpu = device.type == "cuda"
    with torch.random.fork_rng([device] if on_gpu else []):
        torch.default_generator.manual_seed(0)
        if on_gpu:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(0)
        yield


def generator_state(device: torch.device) -> torch.Tensor:
    """Return the state of torch's generator that operators on a device draw from."""
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


class Generators:
    """The states of Python's, NumPy's and torch's own generators, as they were."""

    def __init__(self) -> None:
        self.python, self.torch = random.getstate(), torch.get_rng_state()
        numpy: Any = sys.modules.get("numpy")
        self.module = None if numpy is None else numpy.random
        self.numpy = None if self.module is None else self.module.get_state()

    def drew(self) -> str:
        """Return who drew a number since, "" if nobody did."""
        if random.getstate() != self.python:
            return "Python's random"
        if not torch.equal(torch.get_rng_state(), self.torch):
            return "torch, on no tensor of the graph"
        if self.module is not None and self.numpy is not None:
            kind, keys, *rest = self.module.get_state()
            before = self.numpy
            if (kind, *rest) != (before[0], *before[2:]) or bool((keys != before[1]).any()):
                return "numpy.random"
        return ""

    def put_back(self) -> None:
        """Let the generators go on as if nothing had been drawn."""
        random.setstate(self.python)
        torch.set_rng_state(self.torch)
        if self.module is not None:
            self.module.set_state(self.numpy)
