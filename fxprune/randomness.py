"""Random numbers that Python draws while a forward is traced: a trace would draw them once for all.

What an operator draws (dropout, `rand_like`) is part of the graph, and is not meant.
"""

import random
import sys
from typing import Any

import torch


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
