"""Products that sum over shared axes: matrix products, einsum, attention (see `labels`).

Where channels lie along a label that operands and output share (heads), the product is one product
for each: operands and output are tied, label by label. Otherwise channels along a label that is
summed over are tied across operands, Σ_k a_k·b_k, and read by the output unless a factor is 0; and
those along a label only one operand has are the output's own. A raw parameter as operand is cut
along its axes like the weight of a layer; it has no bias, so that only zeros can be folded.
"""

import operator
from dataclasses import dataclass

import torch
from torch import Tensor

from fxprune.dataflow.rules import Call, Flow, OpRule, Read, register
from fxprune.dataflow.tags import FIXED
from fxprune.dataflow.values import Barrier, State, Value, broadcast_to, zeros_of
from fxprune.ops.labels import Contraction, Operand, read_einsum, read_product

_STAYS = "it is multiplied along an axis that stays as long as it is"
_READ = "a product reads it where no factor is 0"


def product_flow(call: Call) -> Flow:
    """Follow a matrix product."""
    found = read_product(call.argument(0, "input"), _second(call))
    return contraction_flow(call, found)


def einsum_flow(call: Call) -> Flow:
    """Follow an equation."""
    return contraction_flow(call, read_einsum(call))


def added_product_flow(call: Call) -> Flow:
    """Follow β·input + α·(a @ b): the addend's channels are those of the product."""
    names = ("mat1", "mat2") if "addmm" in _name(call) else ("batch1", "batch2")
    first, second = (call.argument(place + 1, name) for place, name in enumerate(names))
    found = read_product(first, second)
    flow = contraction_flow(call, found)
    output: Value = flow.outputs
    _add(flow, call.argument(0, "input"), output)
    flow.outputs = call.output(output.tags)
    return flow


def contraction_flow(call: Call, found: Contraction) -> Flow:
    """Say what is tied, read and kept around a contraction, and which outputs are 0."""
    flow = Flow(None)
    shared = _shared(found)
    if shared is not None:
        lead = _tie_shared(flow, found, shared)
    else:
        lead = _mix(flow, found, generic=call.generic)
    place = found.output.index(lead.label) if lead.label in found.output else 0
    shape = [1] * len(found.output)
    if shape:
        shape[place] = -1
    constants = lead.constants.reshape(shape)
    # Gates may close one by one: in general a sum is not 0 for one of its channels being so.
    if not call.generic and any(_silent(operand) for operand in found.operands):
        constants = torch.zeros_like(constants)
    flow.outputs = call.output(lead.tags.reshape(shape), constants)
    return flow


@dataclass(frozen=True)
class _Lead:
    """The channels of the output, tags and constants (size,), and the label they lie along."""

    label: str
    tags: Tensor
    constants: Tensor


def _second(call: Call) -> Value | State:
    names = ("other", "mat2", "vec", "tensor")
    return call.argument(1, next((name for name in names if name in call.kwargs), names[0]))


def _name(call: Call) -> str:
    return str(getattr(call.node.target, "__name__", call.node.target))


def _shared(found: Contraction) -> str | None:
    """Return the label, if any, along which the product falls apart into products."""
    for label in found.output:
        holders = [one for one in found.operands if label in one.labels]
        if len(holders) > 1 and any(label in one.varying() for one in holders):
            return label
    return None


def _tie_shared(flow: Flow, found: Contraction, label: str) -> _Lead:
    first = next(one for one in found.operands if label in one.varying())
    lead = first.along(label)
    zero = torch.zeros(len(lead.tags), dtype=torch.bool)
    for operand in found.operands:
        if not _led(operand, label):
            _keep(flow, operand)
            if label in operand.labels:
                flow.keeps.append((lead.tags, _STAYS))
            continue
        along = operand.along(label)
        flow.ties += [*along.ties, (along.tags, lead.tags)]
        _fix_axes(flow, operand, {label})
        zero |= along.constants == 0
    return _Lead(label, lead.tags, torch.where(zero, 0.0, torch.nan).double())


def _led(operand: Operand, label: str) -> bool:
    return label in operand.labels and (
        isinstance(operand.held, State) or label in operand.varying()
    )


def _mix(flow: Flow, found: Contraction, *, generic: bool) -> _Lead:
    """Read the summed channels; the output's own are those of one operand."""
    summed = _summed_label(found)
    free, label = _free_label(found, summed)
    own = None if free is None else free.along(label)
    outputs = torch.full((1,), FIXED) if own is None else own.tags
    for operand in found.operands:
        labels = {summed} | ({label} if operand is free else set[str]())
        others = set(operand.varying()) - labels
        if others:
            _keep(flow, operand)
        elif isinstance(operand.held, Value) and not operand.varying():
            flow.reads.append(_read_whole(operand.held, outputs))
        _fix_axes(flow, operand, labels)
    if own is not None:
        flow.ties += own.ties
    pattern = None
    if summed:
        pattern = _read_summed(flow, found, summed, outputs, free, label, generic=generic)
    constants = torch.full((len(outputs),), torch.nan, dtype=torch.float64)
    if own is not None and isinstance(free and free.held, Value):
        constants = zeros_of(own.constants)
    elif pattern is not None and free is not None:
        constants = _linear_constants(found, summed, free, label, pattern)
    return _Lead(label, outputs, constants)


def _summed_label(found: Contraction) -> str:
    """Return the label that is summed over and along which channels lie; none is ""."""
    for operand in found.operands:
        for label in operand.varying():
            if label and label not in found.output:
                return label
    return ""


def _free_label(found: Contraction, summed: str) -> tuple[Operand | None, str]:
    """Return whose channels the output carries, and along which label; activations come first."""
    for operand in found.operands:
        labels = [label for label in operand.varying() if label in found.output]
        if labels and summed in operand.varying():
            raise Barrier("an operand has channels along several axes")
        if labels:
            return operand, labels[0]
    for operand in found.operands:
        if isinstance(operand.held, Value):
            continue
        others = {name for one in found.operands if one is not operand for name in one.labels}
        pairs = zip(operand.labels, operand.shape, strict=True)
        for label, size in pairs:
            if size > 1 and label in found.output and label not in others:
                return operand, label
    return None, ""


def _read_summed(
    flow: Flow,
    found: Contraction,
    summed: str,
    outputs: Tensor,
    free: Operand | None,
    label: str,
    *,
    generic: bool,
) -> Tensor | None:
    """Tie the channels that are summed over; return which of them each output reads, if known."""
    holders = [one for one in found.operands if summed in one.labels]
    led = [one for one in holders if _led(one, summed)]
    alongs = [one.along(summed) for one in led]
    lead = alongs[0].tags
    zero = torch.zeros(len(lead), dtype=torch.bool)
    for along in alongs:
        flow.ties += [*along.ties, (along.tags, lead)]
        zero |= along.constants == 0
    if len(led) < len(holders):
        flow.keeps.append((lead, _STAYS))
    pattern = None
    if free is not None and isinstance(free.held, State) and free in led and not generic:
        pattern = free.nonzero(label, summed)
    flow.reads.append(Read(outputs, lead, pattern, zero, _READ))
    return pattern


def _linear_constants(
    found: Contraction, summed: str, free: Operand, label: str, pattern: Tensor
) -> Tensor:
    """Return W·c for a matrix and one activation, where no unknown enters."""
    nothing = torch.full((len(pattern),), torch.nan, dtype=torch.float64)
    others = [one for one in found.operands if one is not free]
    names = {name for one in found.operands for name in one.labels if name not in found.output}
    if len(others) != 1 or names != {summed} or set(free.labels) != {label, summed}:
        return nothing
    assert isinstance(free.held, State)
    matrix = free.held.known()
    matrix = matrix if free.labels.index(label) == 0 else matrix.T
    inputs = others[0].along(summed).constants
    unknown = (pattern & torch.isnan(inputs)).any(1)
    return torch.where(unknown, torch.nan, matrix @ torch.nan_to_num(inputs))


def _read_whole(value: Value, outputs: Tensor) -> Read:
    """Return how every output reads an activation that is one channel all over."""
    inputs = value.tags.reshape(-1)
    return Read(outputs, inputs, None, inputs == FIXED, _READ)


def _keep(flow: Flow, operand: Operand) -> None:
    if isinstance(operand.held, State):
        operand.held.freeze()
    else:
        flow.keeps.append((operand.held.tags, _STAYS))


def _fix_axes(flow: Flow, operand: Operand, free: set[str]) -> None:
    """Let no other user of a parameter cut the axes this product has no say on."""
    if isinstance(operand.held, State):
        for axis, label in enumerate(operand.labels):
            if label not in free:
                tags = operand.held.axis(axis)
                flow.ties.append((tags, torch.zeros_like(tags)))


def _silent(operand: Operand) -> bool:
    return isinstance(operand.held, Value) and bool((operand.held.constants == 0).all())


def _add(flow: Flow, addend: Value | State, output: Value) -> None:
    """Tie what is added to the product; what does not follow its channels keeps them."""
    rank, axes = len(output.shape), [a for a, n in enumerate(output.tags.shape) if n > 1]
    if not axes:
        _keep(flow, Operand(addend, ()))
        return
    (axis,) = axes
    if isinstance(addend, State):
        own = axis - rank + addend.tensor.dim()
        if own >= 0 and addend.tensor.shape[own] > 1:
            flow.ties.append((addend.axis(own), output.tags.reshape(-1)))
            labels = tuple(map(str, range(addend.tensor.dim())))
            _fix_axes(flow, Operand(addend, labels), {str(own)})
        else:
            addend.freeze()
        return
    tags = broadcast_to([addend.tags], rank)[0]
    size = broadcast_to([torch.empty(addend.shape, device="meta")], rank)[0].shape[axis]
    if tags.shape[axis] > 1:
        flow.ties.append((tags, output.tags))
        return
    flow.keeps.append((addend.tags, _STAYS))
    if size > 1:
        flow.keeps.append((output.tags, _STAYS))


register(
    OpRule("matrix product", product_flow),
    *(operator.matmul, torch.matmul, torch.bmm, torch.mm, "matmul", "bmm", "mm"),
)
register(
    OpRule("added product", added_product_flow),
    *(torch.addmm, torch.baddbmm, "addmm", "baddbmm"),
)
register(OpRule("einsum", einsum_flow), torch.einsum)
