"""Calls of layers' functions, `F.conv2d(x, weight, bias, stride=2)`, read as torch's layers."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from fxprune.ops.mixing import CONV_FUNCTIONS, LINEAR_FUNCTIONS, TRANSPOSED_FUNCTIONS
from fxprune.programs.observation import Observation, TensorSpec, observe
from fxprune.programs.program import Program
from fxprune.runtime.kinds import CONVS, NORMS, TRANSPOSED

_CONV = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_SPREADING = (*_CONV[:5], "output_padding", "groups", "dilation")
_NORM = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
_SIGNATURES: dict[Any, tuple[str, ...]] = {
    **dict.fromkeys(CONV_FUNCTIONS, _CONV),
    **dict.fromkeys(TRANSPOSED_FUNCTIONS, _SPREADING),
    **dict.fromkeys(LINEAR_FUNCTIONS, _CONV[:3]),
    F.batch_norm: _NORM,
}
# The tensors a layer's function takes beside its input.
TENSORS = ("weight", "bias", "running_mean", "running_var")
_COUNT = "num_batches_tracked"
_NORMS: dict[int, type[nn.Module]] = {rank: NORMS[max(rank - 3, 0)] for rank in (2, 3, 4, 5)}


@dataclass(frozen=True)
class Settings:
    """A layer: its class, its arguments that are no tensors, the tensors it takes."""

    kind: type[nn.Module]
    options: dict[str, Any]
    takes: set[str]


def replace_layers(
    program: Program,
    owner_of: Callable[[fx.Node], str | None],
    layer_for: Callable[[str, list[fx.Node]], nn.Module | None],
) -> dict[str, nn.Module]:
    """Let layers' functions be calls of modules; return these by the path of what they replace.

    owner_of: the module whose tensors a node's function takes, None if it is no layer's. layer_for:
    what to put in its place for its nodes, with its tensors, None to leave them alone; it gets the
    module's parts and mode.
    """
    seen = observe(program)
    found: dict[str, list[fx.Node]] = {}
    for node in program.graph.nodes:
        owner = owner_of(node)
        if owner:
            found.setdefault(owner, []).append(node)
    layers: dict[str, nn.Module] = {}
    for owner, nodes in found.items():
        layer = layer_for(owner, nodes)
        if layer is not None:
            _call_instead(program, owner, layer, nodes)
            layers[owner] = layer
    if layers:
        seen.drop_dead_code(program.graph)
    return layers


def _call_instead(program: Program, owner: str, layer: nn.Module, nodes: list[fx.Node]) -> None:
    old = program.module.get_submodule(owner)
    for name, child in old._modules.items():
        layer.add_module(name, child)
    layer.training = old.training
    parent, _, attribute = owner.rpartition(".")
    setattr(program.module.get_submodule(parent), attribute, layer)
    for node in nodes:
        source = (arguments_of(node) or {})["input"]
        node.op, node.target, node.args, node.kwargs = "call_module", owner, (source,), {}


def common_settings(
    nodes: list[fx.Node], owner: str, seen: Observation, *, fixed: bool
) -> Settings | None:
    """Read functions that are to be one layer; None if they differ. The rest as `settings_of`."""
    first, *others = (settings_of(node, owner, seen, fixed=fixed) for node in nodes)
    return None if any(other != first for other in others) else first


def tensors_of_layer(node: fx.Node) -> dict[str, Any]:
    """Return the tensors that a layer's function takes beside its input, by name."""
    given = arguments_of(node) or {}
    return {name: given[name] for name in TENSORS if given.get(name) is not None}


def arguments_of(node: fx.Node) -> dict[str, Any] | None:
    """Return a layer function's arguments by name; None if it is no layer's function."""
    names = _SIGNATURES.get(node.target) if node.op == "call_function" else None
    if names is None or len(node.args) > len(names):
        return None
    return dict(zip(names, node.args, strict=False)) | node.kwargs


def settings_of(node: fx.Node, owner: str, seen: Observation, *, fixed: bool) -> Settings | None:
    """Read a layer's function; None if it is not certain to be the layer.

    owner: the module whose mode a batch norm follows. fixed: the model is never trained.
    """
    given = arguments_of(node) or {}
    spec = seen.values.get(given["input"]) if isinstance(given["input"], fx.Node) else None
    if not isinstance(spec, TensorSpec):
        return None
    options = {name: value for name, value in given.items() if name not in (*TENSORS, "input")}
    if node.target is F.batch_norm:
        flag = options.pop("training", False)
        follows = isinstance(flag, fx.Node) and flag.target == f"{owner}.training"
        kind = _NORMS.get(len(spec.shape))
        if kind is None or not (follows or (fixed and flag is False)):
            return None
        if options.get("momentum", 0.1) is None:
            return None  # it counts batches
    elif node.target in LINEAR_FUNCTIONS:
        kind = nn.Linear
    else:
        function: Any = node.target
        kinds = TRANSPOSED if _SIGNATURES[function] is _SPREADING else CONVS
        kind = kinds[int(function.__name__[-2]) - 1]
    if any(isinstance(part, fx.Node) for value in options.values() for part in _parts(value)):
        return None
    return Settings(kind, options, {*tensors_of_layer(node)})


def new_layer(
    settings: Settings,
    parameters: Mapping[str, nn.Parameter | None],
    buffers: Mapping[str, torch.Tensor | None],
) -> nn.Module | None:
    """Make a layer of the tensors given; None if there are others than its function takes."""
    kind, options = settings.kind, settings.options
    tensors: dict[str, Any] = {**parameters, **buffers}
    held = {name for name, tensor in tensors.items() if tensor is not None}
    if held & set(TENSORS) != settings.takes:
        return None
    sizes = _sizes(kind, options, tensors)
    if kind in NORMS:
        options = options | {"affine": "weight" in held}
    else:
        options = options | {"bias": "bias" in held}
    make: Callable[..., nn.Module] = kind
    layer = make(*sizes, **options, device="meta")
    if set(layer.state_dict()) - {_COUNT} != held - {_COUNT}:
        return None
    if _COUNT in layer._buffers:  # of batches: a functional batch norm does without
        layer.register_buffer(_COUNT, torch.zeros_like(tensors["running_mean"][0]).long())
    layer._parameters.update(parameters)
    layer._buffers.update(buffers)
    return layer


def _parts(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


def _sizes(
    kind: type[nn.Module], options: dict[str, Any], tensors: dict[str, Any]
) -> tuple[Any, ...]:
    """Return the numbers of channels a layer is made with, and a convolution's kernel."""
    if kind in NORMS:
        return (len(tensors["running_mean"]),)
    first, second, *kernel = tensors["weight"].shape
    groups = int(options.get("groups", 1))
    if kind is nn.Linear:
        return second, first
    if kind in TRANSPOSED:
        return first, second * groups, tuple(kernel)
    return second * groups, first, tuple(kernel)
