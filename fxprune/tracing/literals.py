"""A number computed in a graph, replaced by what it is known to be."""

from typing import Any

from torch import fx
from torch.fx.node import map_arg


def put_literal(node: fx.Node, value: Any) -> None:
    """Let all users of a node have a literal instead, and erase it."""

    def literal(argument: fx.Node) -> Any:
        return value if argument is node else argument

    for user in list(node.users):
        user.args = map_arg(user.args, literal)
        user.kwargs = map_arg(user.kwargs, literal)
    node.graph.erase_node(node)
