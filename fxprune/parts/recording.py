"""What one run of a model shows of its submodules: who is called, with what, and who reads what.

For models that are no program as a whole. All runs start from one seed, in evaluation mode and
without gradients, so that two of them can be compared to the bit.
"""

from collections.abc import Generator, Iterable
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from fxprune.errors import ExampleInputError, one_line
from fxprune.programs.program import quiet
from fxprune.runtime.randomness import drawing_alike
from fxprune.tracing.one_mode import without_fused_layers
from fxprune.user_models.inputs import Inputs, describe, tensors_of, to_device
from fxprune.user_models.modules import device_of, evaluating

# Asking a weight where it lies is no use of it.
_DESCRIPTORS: tuple[Any, ...] = (Tensor.device, Tensor.dtype, Tensor.requires_grad)
_NO_USE = {descriptor.__get__ for descriptor in _DESCRIPTORS}


@dataclass(frozen=True)
class Call:
    """One call of a submodule: copies of its arguments and of what it returned."""

    inputs: Inputs
    output: Any


@dataclass
class Recording:
    """The outputs of a run, and the calls of the submodules asked for, by path, in order."""

    outputs: Any = None
    calls: dict[str, list[Call]] = field(default_factory=dict[str, list[Call]])


@dataclass(frozen=True)
class Uses:
    """Which modules are called with tensors, and who is active whenever a tensor is used.

    inside: by the id of a parameter or buffer, the modules that were running at its every use.
    without_gradients: those that the model calls under `torch.no_grad`.
    """

    called: set[nn.Module]
    inside: dict[int, set[nn.Module]]
    without_gradients: set[nn.Module]


def record(root: nn.Module, inputs: Inputs, paths: Iterable[str]) -> Recording:
    """Run `root` once and write down every call of the submodules at `paths`.

    What is called under `torch.func.vmap` is given tensors that are none outside of it: such calls
    are not written down.
    """
    found = Recording(calls={path: [] for path in paths})
    handles: list[Any] = []
    arguments: list[Inputs] = []

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        arguments.append(copies((args, kwargs)))

    for path in found.calls:

        def after(module: nn.Module, args: Any, output: Any, path: str = path) -> None:
            call = Call(arguments.pop(), copies(output))
            if not any(map(_is_wrapped, tensors_of((call.inputs, output)))):
                found.calls[path].append(call)

        module = root.get_submodule(path)
        handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(module.register_forward_hook(after))
    with _removing(handles):
        found.outputs = _run(root, inputs, nullcontext())
    return found


def _is_wrapped(tensor: Tensor) -> bool:
    in_c: Any = torch._C
    return in_c._functorch.is_functorch_wrapped_tensor(tensor)


def uses_in(root: nn.Module, inputs: Inputs) -> Uses:
    """Run `root` once and return who is called, and whose tensors are used inside of whom."""
    stack: list[nn.Module] = []
    uses = Uses(set(), {}, set())
    watched = {id(tensor) for tensor in (*root.parameters(), *root.buffers())}

    class Watch(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
        ) -> Any:
            held = () if func in _NO_USE else tensors_of((args, kwargs))
            for key in {id(tensor) for tensor in held} & watched:
                uses.inside[key] = uses.inside.get(key, set(stack)) & set(stack)
            return func(*args, **(kwargs or {}))

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        stack.append(module)
        if tensors_of((args, kwargs)):
            uses.called.add(module)
        if not torch.is_grad_enabled():
            uses.without_gradients.add(module)

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        stack.pop()

    handles: list[Any] = []
    for module in root.modules():
        handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
        handles.append(module.register_forward_hook(leave))
    with _removing(handles), _none_wanted(root):
        _run(root, inputs, Watch(), gradients=True)
    return uses


@contextmanager
def _none_wanted(root: nn.Module) -> Generator[None]:
    """Let no parameter want a gradient: what runs under `no_grad` shows, and nothing is kept."""
    wanting = [one for one in root.parameters() if one.requires_grad]
    for parameter in wanting:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in wanting:
            parameter.requires_grad_(True)


def _run(
    root: nn.Module,
    inputs: Inputs,
    watch: AbstractContextManager[Any],
    *,
    gradients: bool = False,
) -> Any:
    device = device_of(root)
    args, kwargs = to_device(copies(inputs), device)
    try:
        with drawing_alike(device), evaluating(root), torch.set_grad_enabled(gradients), quiet():
            with without_fused_layers(), watch:
                return root(*args, **kwargs)
    except Exception as error:
        raise ExampleInputError(
            f"{type(root).__name__} does not run on the example inputs {describe(inputs)}: "
            f"{one_line(error)}; pass inputs of the shapes it was made for"
        ) from error


def copies(values: Any) -> Any:
    """Return a structure with copies of its tensors: who made it may still overwrite them."""
    return pytree.tree_map_only(Tensor, lambda tensor: tensor.detach().clone(), values)


@contextmanager
def _removing(handles: list[Any]) -> Generator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
