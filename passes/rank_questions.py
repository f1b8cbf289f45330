"""Ask a model's input for its rank, not what layers made of it.

    conv(x).dim() != 4  →  x.dim() != 4

Modules check the rank of what they are given; a layer that is asked has a reader more, and could
not be merged with the next one.
"""

from torch import fx, nn

from fxprune.dataflow.rules import rule_name
from fxprune.programs.observation import Observation, TensorSpec, observe
from fxprune.programs.pipeline import Change, keeps_shapes
from fxprune.programs.program import Program

_KEEP_RANK = {"mixing", "batch_norm", "elementwise", "identity", "pool", "prelu"}


@keeps_shapes
def ask_inputs_for_ranks(program: Program) -> list[Change]:
    """Let questions for a rank pass operators that keep it whatever it is."""
    seen = observe(program)
    modules = dict(program.module.named_modules())
    changes: list[Change] = []
    for node in program.graph.nodes:
        if not _asks_rank(node):
            continue
        source = first = node.args[0]
        while isinstance(source, fx.Node) and (before := _before(source, modules, seen)):
            source = before
        if source is not first and isinstance(first, fx.Node) and isinstance(source, fx.Node):
            node.replace_input_with(first, source)
            changes.append(Change(node.name, f"asks {source.name}, not {first.name}"))
    return changes


def _asks_rank(node: fx.Node) -> bool:
    if node.op == "call_method":
        return node.target in ("dim", "ndimension")
    return node.target is getattr and node.args[1] == "ndim"


def _before(node: fx.Node, modules: dict[str, nn.Module], seen: Observation) -> fx.Node | None:
    """Return the one activation an operator takes that keeps its rank."""
    module = modules[str(node.target)] if node.op == "call_module" else None
    rule = rule_name(node, module)
    given = [one for one in node.all_input_nodes if one.op != "get_attr"]
    if rule not in _KEEP_RANK or len(given) != 1:
        return None
    if rule == "elementwise" and len(node.all_input_nodes) > 1:
        return None  # a parameter may have more axes than it is given here
    spec, own = seen.values[given[0]], seen.values[node]
    if not isinstance(spec, TensorSpec) or not isinstance(own, TensorSpec):
        return None
    return given[0] if len(spec.shape) == len(own.shape) else None
