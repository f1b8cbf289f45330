"""Fourier transforms over axes beside the channels, and complex numbers as pairs of real ones.

A transform mixes what lies along its axes and leaves the channels beside them apart; of constants
only 0 has 0 for its transform. Of complex constants only those without an imaginary part are known.
"""

from collections.abc import Sequence
from typing import Any

import torch

from fxprune.dataflow.rules import Call, Flow, OpRule, register
from fxprune.dataflow.values import Barrier, zeros_of
from fxprune.ops.elementwise import elementwise_flow

_ALONG = "it transforms along channels"
_PAIRS = "it takes channels for real and imaginary parts"


def transform_flow(call: Call) -> Flow:
    """Pass on channels beside the axes that are transformed."""
    value = call.value()
    beside = value.beside(_axes(call, len(value.shape)), _ALONG)
    return Flow(call.output(beside.tags, zeros_of(beside.constants)), ties=beside.ties)


def pairs_flow(call: Call) -> Flow:
    """Take the two numbers along the last axis for one."""
    value = call.value()
    beside = value.beside({len(value.shape) - 1}, _PAIRS)
    constants = zeros_of(beside.constants).squeeze(-1)
    return Flow(call.output(beside.tags.squeeze(-1), constants), ties=beside.ties)


def parts_flow(call: Call) -> Flow:
    """Lay the two parts of a complex number along a new last axis."""
    value = call.value()
    return Flow(call.output(value.tags.unsqueeze(-1), zeros_of(value.constants).unsqueeze(-1)))


def _axes(call: Call, rank: int) -> set[int]:
    """Return the axes that are transformed; with sizes alone given they are the last ones."""
    name = str(getattr(call.node.target, "__name__", ""))
    default: Any = None if name.endswith("n") else (-2, -1) if name.endswith("2") else -1
    given = call.argument(2, "dim", default)
    if given is None:
        sizes = call.argument(1, "s")
        given = range(-len(sizes), 0) if isinstance(sizes, Sequence) else range(rank)
    dims: Any = (given,) if isinstance(given, int) else given
    if not isinstance(dims, Sequence) or not all(isinstance(dim, int) for dim in dims):
        raise Barrier("the axes it transforms are computed")
    return {dim % rank for dim in dims}


register(
    OpRule("transform", transform_flow),
    *(torch.fft.fft, torch.fft.ifft, torch.fft.rfft, torch.fft.irfft, torch.fft.hfft),
    *(torch.fft.ihfft, torch.fft.fft2, torch.fft.ifft2, torch.fft.rfft2, torch.fft.irfft2),
    *(torch.fft.fftn, torch.fft.ifftn, torch.fft.rfftn, torch.fft.irfftn),
)
register(OpRule("pairs", pairs_flow), torch.view_as_complex)
register(OpRule("parts of complex numbers", parts_flow), torch.view_as_real)
register(
    OpRule("complex", elementwise_flow),
    *(torch.complex, torch.polar, torch.real, torch.imag, torch.angle, torch.conj),
    *(torch.conj_physical, torch.resolve_conj, "angle", "conj", "conj_physical", "resolve_conj"),
)
