"""Fold two linear layers with nothing between them into one, where that is cheaper.

    W₂·(W₁·x + b₁) + b₂ = (W₂·W₁)·x + (W₂·b₁ + b₂)

always exact (Srinivas & Babu 2016: a layer with d = 1 is merged with the next). With C inputs, M in
between and O outputs it saves iff C·O < M·(C + O): a bottleneck must not be folded. Computed in
float64.
"""

from torch import fx, nn

from fxprune.pipeline import Change
from fxprune.program import Program
from fxprune.sharing import sole_modules


def fold_linear_chains(program: Program) -> list[Change]:
    """Merge neighbouring linear layers, front to back, while parameters become fewer."""
    sole = sole_modules(program)
    changes: list[Change] = []
    for node in list(program.graph.nodes):
        if len(node.all_input_nodes) != 1 or len(node.all_input_nodes[0].users) != 1:
            continue
        before = node.all_input_nodes[0]
        first, second = sole.get(before), sole.get(node)
        if type(first) is nn.Linear and type(second) is nn.Linear:
            changes.append(_consider(before, node, first, second))
    folded = [change for change in changes if dict(change.detail)["folded"]]
    if folded:
        program.seen = None
    return folded


def _consider(before: fx.Node, node: fx.Node, first: nn.Linear, second: nn.Linear) -> Change:
    apart = sum(p.numel() for layer in (first, second) for p in layer.parameters())
    together = first.in_features * second.out_features + second.out_features
    detail = (("before", apart), ("after", together))
    if together >= apart:
        what = f"kept apart from {node.target}: {apart} parameters, {together} merged"
        return Change(str(before.target), what, (*detail, ("folded", False)))
    _merge(first, second)
    node.replace_input_with(before, before.all_input_nodes[0])
    node.graph.erase_node(before)
    what = f"folded into {node.target}: {apart} → {together} parameters"
    return Change(str(before.target), what, (*detail, ("folded", True)))


def _merge(first: nn.Linear, second: nn.Linear) -> None:
    outer, dtype = second.weight.detach().double(), second.weight.dtype
    biases = [] if second.bias is None else [second.bias.detach().double()]
    if first.bias is not None:
        biases.append(outer @ first.bias.detach().double())
    second.weight = nn.Parameter((outer @ first.weight.detach().double()).to(dtype))
    second.bias = nn.Parameter(sum(biases[1:], biases[0]).to(dtype)) if biases else None
    second.in_features = first.in_features
