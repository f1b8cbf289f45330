"""The paper's terms of one kind of gates at once: Σ g·(a − b·g), a and b from the terms' weights.

    λ1·Σ w(1 − w) + λ3·Σ n·w              a = λ1 + λ3·n, b = λ1; n is 1 for nonlinear units, else 0
    λ2·Σ d(1 − d) + λ4·Σ (1 − d)          Σ d·(a − b·d) + λ4·(depth sites), a = λ2 − λ4, b = λ2

One by one they are some seventy operators in a step, each launched on a GPU for a few numbers.
"""

from typing import Any

import torch
from torch import Tensor

from fxprune.gating.gates import clipped


def joint_term(gate: Tensor, linear: Tensor | float, square: float) -> Tensor:
    """Return Σ g·(a − b·g) of clipped gates: a scalar, differentiable in the gates any times.

    gate: real gates, (n,). linear: a, for all or (n,). square: b. The gradient is 0 where a gate is
    not within [0, 1].
    """
    total: Any = _Parabola.apply(gate, linear, square)
    return total


class _Parabola(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, linear: Tensor | float, square: float) -> Tensor:
        ctx.save_for_backward(gate)
        ctx.linear, ctx.square = linear, square
        inside = gate.clamp(0, 1)
        return torch.dot(inside, linear - square * inside)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (gate,) = ctx.saved_tensors
        (grad,) = grads
        slope = (ctx.linear - 2 * ctx.square * clipped(gate)) * grad
        return slope * ((gate >= 0) & (gate <= 1)), None, None
