"""A program: a traced module with the inputs it is known to run on.

Passes take and edit a `Program`; the public verbs clone the user's model into one first, so that
nothing the user holds is ever modified.
"""

import copy
from collections import OrderedDict
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, field, fields, is_dataclass
from io import StringIO
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import prune
from torch.utils import _pytree as pytree

from fxprune.errors import ExampleInputError, ModelError, TraceError
from fxprune.tracing import bound_arguments, trace

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass
class Program:
    """A graph module and example inputs, positional and by keyword, on the module's device.

    seen: what its last run showed, kept by `observation.observe` for whoever asks next; who changes
    a shape, or how much a node computes, leaves None here. barriers: operators around which every
    channel stayed, and why. plans: how chains of layers were put together, by their names.
    cuts: what stayed of parameters and buffers that were cut, by name: axes and positions.
    """

    module: fx.GraphModule
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict[str, Any])
    seen: Any = field(default=None, repr=False, compare=False)
    barriers: dict[str, str] = field(default_factory=dict[str, str])
    plans: dict[tuple[str, ...], Any] = field(default_factory=dict[tuple[str, ...], Any])
    cuts: dict[str, list[tuple[int, Tensor]]] = field(
        default_factory=dict[str, list[tuple[int, Tensor]]]
    )

    @property
    def graph(self) -> fx.Graph:
        """The graph passes edit; `check` regenerates the module's code from it."""
        return self.module.graph

    def clone(self) -> "Program":
        """Return an independent copy; the example inputs are shared, nothing writes to them."""
        return Program(copy_model(self.module), self.args, self.kwargs)

    def inputs(self) -> Inputs:
        """Return fresh copies of the example inputs: a model may overwrite what it is given."""
        return pytree.tree_map_only(Tensor, Tensor.clone, (self.args, self.kwargs))

    def run(self) -> Any:
        """Return the module's outputs for the example inputs, without gradients."""
        args, kwargs = self.inputs()
        with torch.no_grad(), quiet():
            return self.module(*args, **kwargs)

    def check(self) -> None:
        """Raise unless the graph is well formed; regenerate the module's code."""
        self.graph.lint()
        self.module.recompile()

    def text(self) -> str:
        """Return the program as Python source, as golden tests compare it."""
        return self.graph.python_code("self").src.strip()


def capture(
    model: nn.Module, inputs: Inputs, *, make_masks_permanent: bool, check: bool = True
) -> Program:
    """Copy and trace `model`, and check that the trace computes what the model computes.

    `make_masks_permanent` writes the masks of `torch.nn.utils.prune` into the weights of the copy.
    check: run both; without it the trace is believed.
    Raises `ModelError`, `ExampleInputError` or `TraceError`.
    """
    check_parameters(model)
    root = copy_model(model)
    if make_masks_permanent:
        bake_masks(root)
    args, kwargs = to_device(inputs, device_of(model))
    given = bound_arguments(root, args, kwargs)
    program = Program(trace(root, given), args, kwargs)
    if check:
        _check_faithful(root, program)
    return program


def copy_model(model: nn.Module) -> Any:
    """Deep-copy a module, also one that holds tensors computed from its parameters (masks)."""
    memo: dict[int, Any] = {}
    try:
        for module in model.modules():
            for held in vars(module).values():
                for value in held if isinstance(held, (list, tuple)) else (held,):
                    if isinstance(value, Tensor) and not value.is_leaf:  # what a run left behind
                        memo[id(value)] = value.detach().clone()
        for module in reversed(list(model.modules())):  # parts first
            if _is_its_attributes(type(module)):
                _copy_attributes(module, memo)
        return copy.deepcopy(model, memo)
    except Exception as error:
        raise TraceError(
            f"{type(model).__name__} cannot be copied: {type(error).__name__}: {error}; "
            "detach or drop what it holds besides parameters and buffers"
        ) from error


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
    twin = memo[id(module)] = type(module).__new__(type(module))
    state: dict[str, Any] = module.__getstate__()
    for key, value in state.items():
        if type(value) in _ATOMS or (type(value) in _MAPPINGS and not value):
            twin.__dict__[key] = value if type(value) in _ATOMS else type(value)()
        else:
            twin.__dict__[key] = copy.deepcopy(value, memo)


_ATOMS = (bool, int, float, str, type(None))
_MAPPINGS = (dict, OrderedDict)


def narrowed(tensor: Tensor, kept: Sequence[tuple[int, Tensor]]) -> Tensor:
    """Return what stays of a tensor: some positions along some axes."""
    for axis, positions in kept:
        tensor = tensor.index_select(axis, positions.to(tensor.device))
    return tensor


def device_of(model: nn.Module) -> torch.device:
    """Return the device of the model's first parameter or buffer, the CPU if it has none."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")


def to_device(inputs: Inputs, device: torch.device) -> Inputs:
    """Return the inputs, detached, on `device`."""
    return pytree.tree_map_only(Tensor, lambda tensor: tensor.detach().to(device), inputs)


def widened(program: Program) -> Program | None:
    """Return a float64 copy of a program, or None if it insists on a shorter dtype."""
    if device_of(program.module).type == "mps":
        return None  # has no float64
    wide = program.clone()
    wide.module.double()
    wide.args, wide.kwargs = pytree.tree_map_only(
        Tensor, lambda t: t.double() if t.is_floating_point() else t, (wide.args, wide.kwargs)
    )
    try:
        with evaluating(wide.module):
            wide.run()
    except Exception:  # whatever the reason, its forward does not take float64
        return None
    return wide


def check_parameters(model: nn.Module) -> None:
    """Raise `ModelError` for weights no equality can be proved on."""
    for name, parameter in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(parameter):
            raise ModelError(f"{name} is not initialised yet; run the model once on real inputs")
        if parameter.is_meta:
            raise ModelError(f"{name} holds no numbers (meta device); load the weights first")
        if parameter.is_complex():
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


def memory_of(model: nn.Module) -> dict[str, Any]:
    """Return what a verb left in its result: the model's name, example inputs, regions; or {}."""
    if isinstance(model, fx.GraphModule):
        return model.meta.get("fxprune", {})
    return vars(model).get("_fxprune", {})


def remember_(model: nn.Module, report: Any, example_inputs: Inputs, /, **memory: Any) -> None:
    """Leave a report in a result, and what the next verb asks for; a deep copy keeps both."""
    memory["example_inputs"] = pytree.tree_map_only(Tensor, Tensor.cpu, example_inputs)
    vars(model)["report"] = report
    if isinstance(model, fx.GraphModule):
        model.meta["fxprune"] = memory
        model.meta.setdefault("_user_preserved_attributes", {})["report"] = report
    else:
        vars(model)["_fxprune"] = memory


def model_inputs(example_inputs: Any) -> Inputs:
    """Normalise what users pass as example inputs: a tensor, a tuple, or a mapping of keywords."""
    if isinstance(example_inputs, Tensor):
        return (example_inputs,), {}
    if isinstance(example_inputs, Mapping):
        mapping: Mapping[Any, Any] = example_inputs
        return (), {str(key): value for key, value in mapping.items()}
    if isinstance(example_inputs, (tuple, list)):
        return tuple(example_inputs), {}
    raise ExampleInputError(
        f"example_inputs is {type(example_inputs).__name__}; pass a tensor, a tuple of arguments, "
        "or a dict of keyword arguments"
    )


def tensors_of(values: Any) -> list[Tensor]:
    """Return the tensors of a nested structure, in its order."""
    return [leaf for leaf in pytree.tree_leaves(opened(values)) if isinstance(leaf, Tensor)]


def opened(structure: Any) -> Any:
    """Return a nested structure with dicts in the place of dataclasses, which pytree sees whole."""

    def entries(leaf: Any) -> Any:
        if not is_dataclass(leaf) or isinstance(leaf, type):
            return leaf
        return opened({field.name: getattr(leaf, field.name) for field in fields(leaf)})

    return pytree.tree_map(entries, structure)


def leading_size(inputs: Any) -> int | None:
    """Return the batch size of inputs: dim 0 of their first tensor that has one."""
    return next((len(tensor) for tensor in tensors_of(inputs) if tensor.ndim), None)


def bake_masks(root: nn.Module) -> None:
    """Write the masks of `torch.nn.utils.prune` into the weights, in place."""
    for module in root.modules():
        hooks = list(module._forward_pre_hooks.values())
        for name in {h._tensor_name for h in hooks if isinstance(h, prune.BasePruningMethod)}:
            prune.remove(module, name)


@contextmanager
def quiet() -> Generator[None]:
    """Keep torch.fx from printing the code around an error, which says all there is to say."""
    with redirect_stderr(StringIO()):
        yield


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


def _check_faithful(root: nn.Module, program: Program) -> None:
    """Run model and trace on the example inputs in evaluation mode: they must agree to the bit."""
    with evaluating(root, program.module), torch.no_grad():
        args, kwargs = program.inputs()
        try:
            expected = root(*args, **kwargs)
        except Exception as error:
            raise ExampleInputError(
                f"{type(root).__name__} does not run on the example inputs "
                f"{describe((program.args, program.kwargs))}: {type(error).__name__}: "
                f"{str(error).strip()}"
            ) from error
        try:
            actual = program.run()
        except Exception as error:
            raise TraceError(
                f"{type(root).__name__} does not run when traced: {type(error).__name__}: "
                f"{str(error).strip()}; leave arguments out of example_inputs that are not tensors"
            ) from error
    if not same(expected, actual):
        raise TraceError(
            f"{type(root).__name__} computes something else when traced (random numbers, global "
            "state or NaN in its forward?); its outputs on the same inputs differ"
        )


def same(left: Any, right: Any) -> bool:
    """Tell whether two output structures hold bit-equal tensors in the same places.

    Structures are compared by keys and positions: a dict may stand for an OrderedDict.
    """
    flat_left, flat_right = _leaves(left), _leaves(right)
    return (
        _dataclasses(left) == _dataclasses(right)
        and flat_left.keys() == flat_right.keys()
        and all(_same_leaf(leaf, flat_right[path]) for path, leaf in flat_left.items())
    )


def _dataclasses(structure: Any) -> list[type]:
    return [type(leaf) for leaf in pytree.tree_leaves(structure) if is_dataclass(leaf)]


def _leaves(structure: Any) -> dict[str, Any]:
    leaves = pytree.tree_flatten_with_path(opened(structure))[0]
    return {pytree.keystr(path): leaf for path, leaf in leaves}


def _same_leaf(left: Any, right: Any) -> bool:
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        return left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, Tensor) or isinstance(right, Tensor):
        return False
    return bool(left == right)


def describe(inputs: Any) -> str:
    """Return shapes and dtypes of the tensors of an input structure, for messages."""
    leaves = pytree.tree_leaves(inputs)
    parts = [
        f"{str(leaf.dtype).removeprefix('torch.')}{list(leaf.shape)}"
        if isinstance(leaf, Tensor)
        else repr(leaf)
        for leaf in leaves
    ]
    return "(" + ", ".join(parts) + ")"
