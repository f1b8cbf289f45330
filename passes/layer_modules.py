"""Call layers that are written as functions of a module's parameters as the modules they are.

    F.conv2d(x, m.weight, m.bias, stride=2)  →  m(x),   m an nn.Conv2d(…, stride=2)

Subclasses of torch's layers are traced into and leave such functions behind. As modules they can be
folded, take constants into a bias, and stand under their own names in the result.
"""

from torch import fx, nn

from fxprune.folding.functional_layers import (
    common_settings,
    new_layer,
    replace_layers,
    tensors_of_layer,
)
from fxprune.programs.observation import observe
from fxprune.programs.pipeline import Change, keeps_shapes
from fxprune.programs.program import Program


@keeps_shapes
def make_layers_modules(program: Program) -> list[Change]:
    """Replace functions that compute what a torch layer does with one module's parameters."""
    seen = observe(program)
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_module"}
    fixed = bool(program.module.meta.get("evaluation_only"))

    def layer_for(owner: str, nodes: list[fx.Node]) -> nn.Module | None:
        settings = common_settings(nodes, owner, seen, fixed=fixed)
        old = program.module.get_submodule(owner)
        return settings and new_layer(settings, old._parameters, old._buffers)

    layers = replace_layers(program, lambda node: _owner(node, called), layer_for)
    return [Change(path, f"called as {type(layer).__name__}") for path, layer in layers.items()]


def _owner(node: fx.Node, called: set[str]) -> str | None:
    """Return the module whose parameters, under their usual names, a layer's function takes."""
    owners: set[str] = set()
    for name, tensor in tensors_of_layer(node).items():
        if not isinstance(tensor, fx.Node) or tensor.op != "get_attr":
            return None
        owner, _, attribute = str(tensor.target).rpartition(".")
        if attribute != name:
            return None
        owners.add(owner)
    owner = owners.pop() if len(owners) == 1 else ""
    parts = owner.split(".")
    inside = any(".".join(parts[:depth]) in called for depth in range(1, len(parts) + 1))
    return None if not owner or inside else owner
