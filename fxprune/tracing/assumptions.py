"""What a graph assumes of its inputs, as Python that asked for a size was told the example's.

`if h % 7:`, `range(len(x))`, `int(math.sqrt(n))`: Python needs the number there and then, and what
it does next is true for that number only. So the answer becomes an assumption: a `torch._assert` in
the graph, which outlives all passes and refuses other inputs. Numbers of tensors are never told.
"""

import operator
from typing import Any

import torch
from torch import fx

from fxprune.tracing.expressions import expression

ASSUMES = "this model assumes "


def assume_size(before: fx.Node, tensor: fx.Node, axis: int, size: int) -> None:
    """Note, in front of a node, that a tensor is as long along an axis as on the example inputs."""
    _assume_asked(before, "size", (tensor, axis), size)


def assume_rank(before: fx.Node, tensor: fx.Node, rank: int) -> None:
    """Note, in front of a node, that a tensor has as many axes as on the example inputs."""
    _assume_asked(before, "dim", (tensor,), rank)


def _assume_asked(before: fx.Node, question: str, args: tuple[Any, ...], answer: int) -> None:
    with before.graph.inserting_before(before):
        asked = before.graph.call_method(question, args)
        condition = before.graph.call_function(operator.eq, (asked, answer))
        asked.meta["source"] = condition.meta["source"] = before.meta.get("source")
        before.graph.call_function(torch._assert, (condition, refusal(condition)))


def refusal(condition: fx.Node) -> str:
    """Return what is said where a condition does not hold."""
    return (
        f"{ASSUMES}{expression(condition)} (at {condition.meta.get('source')}), as on its example "
        "inputs; run it on inputs like these, or trace the original model on others"
    )


def assumptions(graph: fx.Graph) -> dict[fx.Node, str]:
    """Return what a traced graph assumes of its inputs, by the node that asserts it."""
    found: dict[fx.Node, str] = {}
    for node in graph.nodes:
        message = node.args[1] if node.target is torch._assert and len(node.args) > 1 else None
        if isinstance(message, str) and message.startswith(ASSUMES):
            found[node] = message.removeprefix("this model ").partition(", as on its")[0]
    return found
