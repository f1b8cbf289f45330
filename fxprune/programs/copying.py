"""Whether a copy of a model is that model: not where functions of it hold what they are part of.

    blocks[3].register_forward_hook(keep_in(activations))        model.activations = activations
    layer.forward = lambda x: 2 * F.conv2d(x, layer.weight)

Functions are not copied. What they close over, or name, is the model's, whoever calls them: a copy
has a dict of its own, and does not see what hooks write into the model's; it has weights of its
own, which nobody uses.
"""

import functools
from collections.abc import Iterator, Sequence
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree

from fxprune.errors import ModelError
from fxprune.programs.program import quiet
from fxprune.runtime.dispatch import DispatchMode
from fxprune.runtime.randomness import Generators
from fxprune.tracing.watching import OwnTensors
from fxprune.user_models.beside import names_in
from fxprune.user_models.hooks import are_all_hooked, without_hooks_of_all
from fxprune.user_models.inputs import Inputs, another, same, to_device
from fxprune.user_models.keeping import values_in
from fxprune.user_models.modules import copy_model, device_of, evaluating, is_hooked, run_alike


def require_copyable(model: nn.Module, inputs: Inputs) -> None:
    """Raise `ModelError` if a copy computes something else than a model, or by its weights.

    Models without hooks, and without functions that hold anything, are not run. Buffers that the
    run changes get their numbers back.
    """
    lazy = any(map(is_lazy, (*model.parameters(), *model.buffers())))  # is refused elsewhere
    holding = [*_holding(model)]
    hooked = any(map(is_hooked, model.modules()))
    if lazy or not (hooked or holding or are_all_hooked()):
        return
    held = [(buffer, buffer.clone()) for buffer in model.buffers()]
    given = to_device(inputs, device_of(model))
    try:
        twin = copy_model(model)
        if are_all_hooked():
            _require_same_unhooked(twin, given)
        if hooked:
            _require_same(model, twin, given)
        if holding:
            _require_its_own(model, twin, given, holding)
    finally:
        for buffer, before in held:
            buffer.copy_(before)


def _holding(model: nn.Module) -> Iterator[str]:
    """Yield functions, in the attributes of a model's parts, that may hold some of it."""
    for path, part in model.named_modules():
        for value in values_in(vars(part)):
            while isinstance(value, functools.partial | MethodType):
                value = value.func if isinstance(value, functools.partial) else value.__func__
            if isinstance(value, FunctionType) and (value.__closure__ or _names_parts(value)):
                code = value.__code__
                place = f"{code.co_filename}:{code.co_firstlineno}"
                yield f"{code.co_name} of {path or type(model).__name__} at {place}"


def _names_parts(function: FunctionType) -> bool:
    """Tell whether a function names a global that is a module or a tensor."""
    known = function.__globals__
    return any(isinstance(known.get(name), nn.Module | Tensor) for name in names_in(function))


def _require_same(model: nn.Module, twin: nn.Module, given: Inputs) -> None:
    cases = (given, pytree.tree_map_only(Tensor, another, given))
    with evaluating(model, twin), torch.no_grad(), quiet():
        for case in cases:
            try:
                expected, actual = (_drawing_the_same(one, case) for one in (model, twin))
            except Exception:  # that the example fails is said elsewhere, and by name
                continue
            if not same(expected, actual, nan=True):
                raise ModelError(
                    f"a copy of {type(model).__name__} computes something else: its hooks write "
                    "into what is no part of it (a dict of their own); let them keep what they "
                    "find in an attribute of the module they are called with, or return it"
                )


def _require_same_unhooked(twin: nn.Module, given: Inputs) -> None:
    """Raise `ModelError` if hooks of all modules change what a copy of a model computes."""
    with evaluating(twin), torch.no_grad(), quiet():
        try:
            with without_hooks_of_all():
                expected = _drawing_the_same(twin, given)
            actual = _drawing_the_same(twin, given)
        except Exception:  # that the example fails is said elsewhere, and by name
            return
    if not same(expected, actual, nan=True):
        raise ModelError(
            "a hook of all modules (register_module_forward_hook or _pre_hook of torch.nn.modules."
            f"module) changes what {type(twin).__name__} computes, and would change the gates, "
            "too: remove it, and hook the modules that it is for"
        )


def _require_its_own(
    model: nn.Module, twin: nn.Module, given: Inputs, holding: Sequence[str]
) -> None:
    """Run a copy in both modes, and raise where it computes with the model's tensors."""
    watch = _Watching(OwnTensors(model))
    for training in (False, True):
        try:
            twin.train(training)
            with torch.no_grad(), quiet(), watch:
                _drawing_the_same(twin, given)
        except Exception:  # that the example fails, or a mode, is said elsewhere, and by name
            continue
    if watch.seen:
        raise ModelError(
            f"a copy of {type(model).__name__} computes with {watch.seen!r} of the model itself: a "
            f"function in its attributes or hooks holds it ({' or '.join(holding[:3])}); make it a "
            "method, or bind it by types.MethodType, so that it takes what it needs from self"
        )


class _Watching(DispatchMode):
    """Notes the name of a tensor of a model that anything computes with."""

    def __init__(self, own: OwnTensors) -> None:
        super().__init__()
        self.own, self.seen = own, ""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        given = pytree.tree_leaves((args, kwargs))
        names = [self.own.name_of(one) for one in given if isinstance(one, Tensor)]
        self.seen = self.seen or next(filter(None, names), "")
        return func(*args, **kwargs)


def _drawing_the_same(model: nn.Module, case: Inputs) -> Any:
    """Return what a model makes of inputs; Python's generators, and NumPy's, are left as they were.

    That it draws from them is another reason to be refused.
    """
    generators = Generators()
    try:
        return run_alike(model, case)
    finally:
        generators.put_back()
