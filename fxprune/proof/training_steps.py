"""Whether a result trains as its model does: one step of both, in float64, without dropout.

A proof in evaluation mode sees no gradients, nor what a batch norm does in training. So a step is
taken for a function, too: of inputs, to outputs, the gradients by inputs, and the buffers that the
step leaves. Gradients by parameters may well be others: one parameter may stand for what several
computed.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from fxprune.programs.program import narrowed
from fxprune.proof.precision import Run, cast_, run_all, run_nudged
from fxprune.proof.verdicts import Check, judge_step
from fxprune.runtime.dispatch import DispatchMode
from fxprune.user_models.inputs import Inputs, tensors_of
from fxprune.user_models.modules import copy_model, empty_

Cuts = Mapping[str, Sequence[tuple[int, Tensor]]]


def verify_step(
    reference: nn.Module, candidate: nn.Module, inputs: Inputs, cuts: Cuts, tolerance: float
) -> Check | None:
    """Compare a step of training of two models; None where the reference's is left to chance.

    candidate: in float64. cuts: what stayed of the reference's buffers in it.
    """
    names = _common_buffers(reference, candidate, cuts)

    def step_of_reference() -> _Step:
        wide = copy_model(reference)
        cast_(wide, torch.float64)
        return _Step(wide, names, cuts)

    with _Drawing() as drawing:
        first = _run(step_of_reference(), inputs)
    if drawing.draws:
        return None
    second = _run(_Step(copy_model(candidate), names, {}), inputs)

    def nudge(epsilon: float) -> Sequence[Run]:
        return run_nudged(step_of_reference(), inputs, 0, epsilon)

    return judge_step(inputs, (first, second), tolerance, nudge)


def _run(step: nn.Module, inputs: Inputs) -> Run:
    """Take a step, which spends it: batch norms have counted on."""
    runs = run_all([step], {"step": inputs}, [torch.float64], "proof of training, in float64")
    empty_(step)
    return runs["step"][0]


def _common_buffers(reference: nn.Module, candidate: nn.Module, cuts: Cuts) -> list[str]:
    """Return the names under which a cut left the buffers that it says."""
    after = dict(candidate.named_buffers())
    return [
        name
        for name, buffer in reference.named_buffers()
        if name in after and narrowed(buffer, cuts.get(name, [])).shape == after[name].shape
    ]


class _Step(nn.Module):
    """A step of training as a function; the buffers that it returns are cut."""

    def __init__(self, model: nn.Module, buffers: Sequence[str], cuts: Cuts) -> None:
        super().__init__()
        self.model, self.names, self.cuts = model, buffers, cuts

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        model = self.model.train()
        given = [one for one in tensors_of((args, kwargs)) if one.is_floating_point()]
        with torch.enable_grad(), _WithoutDropout():
            for one in given:
                one.requires_grad_()
            # Clones: a model may overwrite its inputs.
            own = pytree.tree_map_only(Tensor, Tensor.clone, (args, kwargs))
            outputs = model(*own[0], **own[1])
            gradients = _gradients(outputs, given)
        buffers = {
            name: narrowed(model.get_buffer(name), self.cuts.get(name, [])) for name in self.names
        }
        return {"outputs": outputs, "gradients": gradients, "buffers": buffers}


def _gradients(outputs: Any, sources: Sequence[Tensor]) -> Sequence[Tensor]:
    """Return the gradients of a sum of the outputs, each entry with a weight of its own."""
    loss = [
        (one * torch.arange(1, one.numel() + 1).to(one).cos().view(one.shape)).sum()
        for one in map(_real, tensors_of(outputs))
        if one.requires_grad
    ]
    if not loss or not sources:
        return [torch.zeros_like(source) for source in sources]
    return torch.autograd.grad(loss, sources, materialize_grads=True)


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


class _WithoutDropout(TorchFunctionMode):
    """Lets dropout drop nothing: with fewer channels it draws other numbers."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in _DROPOUTS:
            return (args[0] if args else kwargs["input"]).clone()
        if func is F.scaled_dot_product_attention and "dropout_p" in kwargs:
            kwargs["dropout_p"] = 0.0
        return func(*args, **kwargs)


_DROPOUTS = (
    *(F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout),
    *(torch.dropout, torch.alpha_dropout, torch.feature_dropout, torch.feature_alpha_dropout),
)


class _Drawing(DispatchMode):
    """Notes whether an operator draws random numbers."""

    draws = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded in getattr(func, "tags", ()):
            self.draws |= _drops(func, args, kwargs) is not False
        return func(*args, **kwargs)


def _drops(func: Any, args: Any, kwargs: Mapping[str, Any]) -> bool | None:
    """Tell whether attention drops some of its weights; None of what is no attention."""
    names = [argument.name for argument in func._schema.arguments]
    if "dropout_p" not in names:
        return None
    place = names.index("dropout_p")
    given = kwargs.get("dropout_p", args[place] if place < len(args) else 0.0)
    return bool(given)
