"""Who reads memory after an operator wrote into it.

    y = self.layer(x); y.view(-1).relu_(); return y

The last line reads y by a name older than the overwriting. Such operators keep their form, and what
shares that memory its channels. A graph of both modes runs one of them: they do not meet.
"""

from collections import defaultdict

from torch import fx

from fxprune.programs.observation import Observation
from fxprune.tracing.two_modes import in_either_mode, nodes_of_training


class Overwrites:
    """What one run of a graph showed of overwriting, beside the order of the graph's nodes."""

    def __init__(self, graph: fx.Graph, seen: Observation) -> None:
        self.seen = seen
        self.order = {node: place for place, node in enumerate(graph.nodes)}
        self.of_training = nodes_of_training(graph)
        self.members: defaultdict[fx.Node, list[fx.Node]] = defaultdict(list)
        for node, group in seen.alias.items():
            self.members[group].append(node)

    def read_again(self, writer: fx.Node) -> set[fx.Node]:
        """Return the representatives of the memory a node writes into that is read afterwards.

        Under older names, that is; and buffers, which are read when the model runs again.
        """
        written = {self.seen.alias[node] for node in self.seen.mutated[writer]}
        return {group for group in written if self._is_read_again(writer, group)}

    def later_readers(self, node: fx.Node, writer: fx.Node) -> list[fx.Node]:
        """Return who reads a node after another one ran, in the same mode."""
        return [
            user
            for user in node.users
            if self.order[user] > self.order[writer] and self._meet(user, writer)
        ]

    def _is_read_again(self, writer: fx.Node, group: fx.Node) -> bool:
        return any(
            node.op == "get_attr"
            or (
                self.order[node] < self.order[writer]
                and any(
                    self.seen.reads(user, node, writer) for user in self.later_readers(node, writer)
                )
            )
            for node in self.members[group]
        )

    def _meet(self, user: fx.Node, writer: fx.Node) -> bool:
        """Tell whether two nodes run in one mode; what either mode returns is of both."""
        if user.target is in_either_mode:
            return True
        return (user in self.of_training) == (writer in self.of_training)
