"""A user's module: checked, copied, run."""

import copy
from collections import OrderedDict
from collections.abc import Generator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fxprune.errors import ModelError, TraceError
from fxprune.runtime.garbage import uncollected
from fxprune.runtime.randomness import drawing_alike
from fxprune.user_models.inputs import Inputs, copied
from fxprune.user_models.keeping import values_in


def check_parameters(model: nn.Module) -> None:
    """Raise `ModelError` for weights no equality can be proved on, and for compiled parts."""
    for path, module in model.named_modules():
        if type(module).__name__ == "OptimizedModule":
            raise ModelError(
                f"{path or 'the model'} is compiled; pass what it was made from, its _orig_mod, "
                "and compile the result"
            )
    for name, parameter in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(parameter):
            raise ModelError(f"{name} is not initialised yet; run the model once on real inputs")
        if parameter.is_meta:
            raise ModelError(f"{name} holds no numbers (meta device); load the weights first")
        if isinstance(parameter, nn.Parameter) and parameter.is_complex():
            raise ModelError(f"{name} is complex; fxprune works on real-valued models")
        if isinstance(parameter, nn.Parameter) and not parameter.is_floating_point():
            raise ModelError(
                f"{name} is {parameter.dtype}; work on the floating-point model and quantise after"
            )
        if isinstance(parameter, nn.Parameter) and not _is_finite(parameter):
            raise ModelError(f"{name} holds NaN or infinity; restore a sound checkpoint first")


def _is_finite(tensor: Tensor) -> bool:
    """Tell whether all numbers are finite; where their sum is, one pass over them was enough."""
    values = tensor.detach()
    return bool(torch.isfinite(values.sum())) or bool(torch.isfinite(values).all())


def copy_model(model: nn.Module) -> Any:
    """Deep-copy a module, also one that holds tensors computed from its parameters (masks)."""
    memo: dict[int, Any] = {}
    with copying(model):
        put_parts_in(memo, model)
        return copy.deepcopy(model, memo)


@contextmanager
def copying(model: nn.Module) -> Generator[None]:
    """Raise `TraceError` for a model that cannot be copied."""
    try:
        with uncollected():
            yield
    except Exception as error:
        raise TraceError(
            f"{type(model).__name__} cannot be copied: {type(error).__name__}: {error}; "
            "detach or drop what it holds besides parameters and buffers"
        ) from error


def put_parts_in(memo: dict[int, Any], model: nn.Module) -> None:
    """Copy what is in a module into a memo of `deepcopy`, in a fraction of its time."""
    for module in model.modules():
        for value in values_in(vars(module)):
            if isinstance(value, Tensor) and not value.is_leaf:  # what a run left behind
                memo[id(value)] = value.detach().clone()
            elif isinstance(value, torch.jit.ScriptFunction):  # a function, as others are
                memo[id(value)] = value
    parts = [part for part in _inside_out(model) if _is_its_attributes(type(part))]
    for part in parts:  # all of them before any attribute: a part may hold the model it is in
        memo[id(part)] = type(part).__new__(type(part))
    for part in parts:  # parts first
        _copy_attributes(part, memo)


def _inside_out(model: nn.Module) -> list[nn.Module]:
    """Return the parts of a model, what is in a part before it, under whatever name it is first."""
    found: list[nn.Module] = []
    met: set[nn.Module] = set()

    def visit(part: nn.Module) -> None:
        met.add(part)
        for child in part.children():
            if child not in met:
                visit(child)
        found.append(part)

    visit(model)
    return found


def _is_its_attributes(cls: type[nn.Module]) -> bool:
    """Tell whether copying its attributes copies a module: its class has no other ideas."""
    return (
        not hasattr(cls, "__deepcopy__")
        and cls.__reduce_ex__ is object.__reduce_ex__
        and cls.__reduce__ is object.__reduce__
        and cls.__getstate__ is nn.Module.__getstate__
        and cls.__setstate__.__module__.startswith("torch.nn.")
    )


def _copy_attributes(module: nn.Module, memo: dict[int, Any]) -> None:
    """Copy a module as `deepcopy` does, which takes ten times as long for its empty dicts."""
    twin = memo[id(module)]
    state: dict[str, Any] = module.__getstate__()
    for key, value in state.items():
        if type(value) in _MAPPINGS and not value:
            # What holds a hook of the module knows its empty dicts, too, by weak references.
            twin.__dict__[key] = memo[id(value)] = type(value)()
        elif _never_changes(value):
            twin.__dict__[key] = value
        else:
            twin.__dict__[key] = copy.deepcopy(value, memo)


def _never_changes(value: Any) -> bool:
    if type(value) is tuple:
        return all(type(part) in _ATOMS for part in value)
    return type(value) in _ATOMS


_ATOMS = (bool, int, float, str, type(None))
_MAPPINGS = (dict, OrderedDict)


def submodule(root: nn.Module, path: str) -> nn.Module:
    """Return the module at a path; torch's own search takes ten times as long."""
    module = root
    for name in path.split(".") if path else ():
        child = module._modules[name]
        assert child is not None
        module = child
    return module


def count_channels_(layer: Any) -> None:
    """Let a linear layer or convolution say how many channels its weight has."""
    first, second = layer.weight.shape[:2]
    if isinstance(layer, nn.Linear):
        layer.out_features, layer.in_features = first, second
    elif layer.transposed:
        layer.in_channels, layer.out_channels = first, second * layer.groups
    else:
        layer.out_channels, layer.in_channels = first, second * layer.groups


def free_name(module: nn.Module, name: str) -> str:
    """Return a name that a module does not use, `name` if it can be."""
    while hasattr(module, name):
        name += "_"
    return name


def is_hooked(module: nn.Module) -> bool:
    """Tell whether somebody listens to what a module is given, or returns."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def has_hooks(module: nn.Module) -> bool:
    """Tell whether somebody is called when a module is, forward or backward."""
    return is_hooked(module) or bool(module._backward_hooks or module._backward_pre_hooks)


def require_no_gradient_hooks(model: nn.Module, remedy: str) -> None:
    """Raise `ModelError` if a parameter calls somebody with its gradient: a copy would not."""
    for name, parameter in model.named_parameters():
        hooks: Any = (parameter._backward_hooks, parameter._post_accumulate_grad_hooks)
        if any(hooks):
            raise ModelError(
                f"{name} has gradient hooks, which a copy loses: remove them, and {remedy}"
            )


def tensors_in(module: nn.Module) -> list[Tensor]:
    """Return the parameters and buffers of a module, each once."""
    found: dict[int, Tensor] = {}
    for part in module.modules() if module._modules else (module,):
        for held in (part._parameters, part._buffers):
            found |= {id(tensor): tensor for tensor in held.values() if tensor is not None}
    return list(found.values())


def empty_(module: nn.Module) -> None:
    """Let go of the numbers of a module that is spent: in cycles, as graphs are, it lingers."""
    for tensor in tensors_in(module):
        tensor.data = tensor.new_empty(0)


def device_of(model: nn.Module) -> torch.device:
    """Return the device of the model's first parameter or buffer, the CPU if it has none."""
    first = next(chain(model.parameters(), model.buffers()), None)
    return torch.device("cpu") if first is None else first.device


def run_alike(model: nn.Module, inputs: Inputs) -> Any:
    """Return what a model makes of copies of inputs; it draws the same numbers in every run."""
    return run_on(model, copied(inputs))


def run_on(model: nn.Module, inputs: Inputs) -> Any:
    """Return what a model makes of inputs, which it may overwrite, drawing as `run_alike` does."""
    args, kwargs = inputs
    with drawing_alike(device_of(model)):
        return model(*args, **kwargs)


@contextmanager
def evaluating(*modules: nn.Module) -> Generator[None]:
    """Put modules, and all in them, into evaluation mode for a while."""
    flags = {part: part.training for module in modules for part in module.modules()}
    for part in flags:
        part.training = False
    try:
        yield
    finally:
        for part, flag in flags.items():
            part.training = flag
