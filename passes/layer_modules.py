"""Call layers that are written as functions of a module's parameters as the modules they are.

    F.conv2d(x, m.weight, m.bias, stride=2)  →  m(x),   m an nn.Conv2d(…, stride=2)

Subclasses of torch's layers are traced into and leave such functions behind. As modules they can be
folded, take constants into a bias, and stand under their own names in the result.
"""

from torch import fx, nn

from fxprune.functional_layers import TENSORS, arguments_of, new_layer, settings_of
from fxprune.observation import Observation, observe
from fxprune.pipeline import Change, keeps_shapes
from fxprune.program import Program


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
    given = arguments_of(node)
    if given is None:
        return None
    owners: set[str] = set()
    for name in TENSORS:
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


def _replace(
    program: Program, owner: str, nodes: list[fx.Node], seen: Observation
) -> nn.Module | None:
    """Put a layer in the place of a module, and let the nodes call it; None if they differ."""
    old = program.module.get_submodule(owner)
    fixed = bool(program.module.meta.get("evaluation_only"))
    settings = [settings_of(node, owner, seen, fixed=fixed) for node in nodes]
    first = settings[0]
    if first is None or any(other != first for other in settings[1:]):
        return None
    layer = new_layer(first, old._parameters, old._buffers)
    if layer is None:
        return None
    for name, child in old._modules.items():
        layer.add_module(name, child)
    layer.training = old.training
    parent, _, attribute = owner.rpartition(".")
    setattr(program.module.get_submodule(parent), attribute, layer)
    for node in nodes:
        source = (arguments_of(node) or {})["input"]
        node.op, node.target, node.args, node.kwargs = "call_module", owner, (source,), {}
    return layer
