"""Make in-place operators leave their inputs alone.

Other passes bypass operators and put new ones between two others; that is safe only where nothing
overwrites its input. An operator whose input somebody still reads afterwards keeps its form, and
the channel analysis keeps all that shares that memory.
"""

from typing import Any

from torch import fx

from fxprune.observation import observe
from fxprune.out_of_place import make_out_of_place
from fxprune.pipeline import Change, keeps_shapes
from fxprune.program import Program
from fxprune.two_modes import nodes_of_training


@keeps_shapes
def make_functional(program: Program) -> list[Change]:
    """Turn in-place activations and arithmetic into their ordinary forms."""
    seen = observe(program)
    order = {node: place for place, node in enumerate(program.graph.nodes)}
    of_training = nodes_of_training(program.graph)
    members: dict[fx.Node, list[fx.Node]] = {}
    for node, group in seen.alias.items():
        members.setdefault(group, []).append(node)

    def is_read_again(writer: fx.Node) -> bool:
        shared = [node for one in seen.mutated[writer] for node in members[seen.alias[one]]]
        before = [node for node in shared if order[node] < order[writer]]
        if any(node.op == "get_attr" for node in shared):
            return True  # a buffer, when the model is called again
        return any(
            order[user] > order[writer] and seen.reads(user, node, writer)
            for node in before
            for user in node.users
            if (user in of_training) == (writer in of_training)  # the modes do not meet
        )

    needed = [writer for writer in seen.mutated if is_read_again(writer)]
    # A module has one flag for all its calls.
    stay = {node.target for node in needed if node.op == "call_module"}
    changes: list[Change] = []
    turned: set[Any] = set()
    for writer in list(seen.mutated):
        if writer in needed or (writer.op == "call_module" and writer.target in stay):
            continue
        if make_out_of_place(writer, program.module):
            changes.append(Change(writer.name, "no longer overwrites its input"))
            turned.add(writer.target if writer.op == "call_module" else writer)
        if writer in turned or writer.target in turned:
            del seen.mutated[writer]
    return changes
