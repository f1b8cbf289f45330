"""Call layers that are written as functions of a module's parameters as the modules they are.

    F.conv2d(x, m.weight, m.bias, stride=2)  →  m(x),   m an nn.Conv2d(…, stride=2)

Subclasses of torch's layers are traced into and leave such functions behind. As modules they can be
folded, take constants into a bias, and stand under their own names in the result.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from fxprune.kinds import CONVS, NORMS, TRANSPOSED
from fxprune.observation import Observation, TensorSpec, observe
from fxprune.ops.mixing import CONV_FUNCTIONS, LINEAR_FUNCTIONS, TRANSPOSED_FUNCTIONS
from fxprune.pipeline import Change, keeps_shapes
from fxprune.program import Program

_CONV = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_SPREADING = (*_CONV[:5], "output_padding", "groups", "dilation")
_NORM = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
_SIGNATURES: dict[Any, tuple[str, ...]] = {
    **dict.fromkeys(CONV_FUNCTIONS, _CONV),
    **dict.fromkeys(TRANSPOSED_FUNCTIONS, _SPREADING),
    **dict.fromkeys(LINEAR_FUNCTIONS, _CONV[:3]),
    F.batch_norm: _NORM,
}
_TENSORS = ("weight", "bias", "running_mean", "running_var")
_COUNT = "num_batches_tracked"
_NORMS: dict[int, type[nn.Module]] = {rank: NORMS[max(rank - 3, 0)] for rank in (2, 3, 4, 5)}


@keeps_shapes
def make_layers_modules(program: Program) -> list[Change]:
    """Replace functions that compute what a torch layer does with one module's parameters."""
    seen = observe(program)
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_module"}
    found: dict[str, list[fx.Node]] = {}
    for node in program.graph.nodes:
        owner = _owner(node, called)
        if owner is not None:
            found.setdefault(owner, []).append(node)
    changes = [
        Change(owner, f"called as {type(layer).__name__}")
        for owner, nodes in found.items()
        if (layer := _replace(program, owner, nodes, seen)) is not None
    ]
    if changes:
        seen.drop_dead_code(program.graph)
    return changes


def _owner(node: fx.Node, called: set[str]) -> str | None:
    """Return the module whose parameters, under their usual names, a layer's function takes."""
    given = _arguments(node)
    if given is None:
        return None
    owners: set[str] = set()
    for name in _TENSORS:
        tensor = given.get(name)
        if tensor is None:
            continue
        if not isinstance(tensor, fx.Node) or tensor.op != "get_attr":
            return None
        owner, _, attribute = str(tensor.target).rpartition(".")
        if attribute != name:
            return None
        owners.add(owner)
    owner = owners.pop() if len(owners) == 1 else ""
    inside = any(f"{owner}.".startswith(f"{path}.") for path in called)
    return None if not owner or inside else owner


def _arguments(node: fx.Node) -> dict[str, Any] | None:
    """Return a layer function's arguments by name; None if it is no layer's function."""
    names = _SIGNATURES.get(node.target) if node.op == "call_function" else None
    if names is None or len(node.args) > len(names):
        return None
    return dict(zip(names, node.args, strict=False)) | node.kwargs


def _replace(
    program: Program, owner: str, nodes: list[fx.Node], seen: Observation
) -> nn.Module | None:
    """Put a layer in the place of a module, and let the nodes call it; None if they differ."""
    old = program.module.get_submodule(owner)
    fixed = bool(program.module.meta.get("evaluation_only"))
    settings = [_settings(node, owner, seen, fixed=fixed) for node in nodes]
    first = settings[0]
    if first is None or any(other != first for other in settings[1:]):
        return None
    layer = _build(first, old)
    if layer is None:
        return None
    for name, child in old._modules.items():
        layer.add_module(name, child)
    layer.training = old.training
    parent, _, attribute = owner.rpartition(".")
    setattr(program.module.get_submodule(parent), attribute, layer)
    for node in nodes:
        source = (_arguments(node) or {})["input"]
        node.op, node.target, node.args, node.kwargs = "call_module", owner, (source,), {}
    return layer


@dataclass(frozen=True)
class _Settings:
    """A layer: its class, its arguments that are no tensors, the tensors it takes."""

    kind: type[nn.Module]
    options: dict[str, Any]
    takes: set[str]


def _settings(node: fx.Node, owner: str, seen: Observation, *, fixed: bool) -> _Settings | None:
    """Read a layer's function; None if it is not certain to be the layer. fixed: never trained."""
    given = _arguments(node) or {}
    spec = seen.values.get(given["input"]) if isinstance(given["input"], fx.Node) else None
    if not isinstance(spec, TensorSpec):
        return None
    options = {name: value for name, value in given.items() if name not in (*_TENSORS, "input")}
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
        kinds = TRANSPOSED if _SIGNATURES[node.target] is _SPREADING else CONVS
        kind = kinds[int(node.target.__name__[-2]) - 1]
    if any(isinstance(part, fx.Node) for value in options.values() for part in _parts(value)):
        return None
    takes = {name for name in _TENSORS if given.get(name) is not None}
    return _Settings(kind, options, takes)


def _parts(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


def _build(settings: _Settings, old: nn.Module) -> nn.Module | None:
    """Make a layer of a module's own tensors; None if it holds others than the function takes."""
    kind, options = settings.kind, settings.options
    tensors = {name: t for name, t in (*old._parameters.items(), *old._buffers.items())}
    held = {name for name, tensor in tensors.items() if tensor is not None}
    if held & set(_TENSORS) != settings.takes:
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
    layer._parameters.update(old._parameters)
    layer._buffers.update(old._buffers)
    return layer


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
