"""Two functions put to `verify` as modules, and ways to read what it found."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fxprune.proof.verification import Check, Verification, verify

EXACT = 1e-9


class Function(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


def compare(
    left: Callable[[Tensor], Any], right: Callable[[Tensor], Any], *shape: int, **options: Any
) -> Verification:
    inputs = torch.randn(*(shape or (2, 4)))
    return verify(Function(left), Function(right), inputs, **options)


def verdicts(found: Verification, dtype: str) -> dict[str, str]:
    return {check.name: check.verdict for check in found.checks if check.dtype == dtype}


def check_of(found: Verification, name: str, dtype: str) -> Check:
    return next(c for c in found.checks if (c.name, c.dtype) == (name, dtype))
