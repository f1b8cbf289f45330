"""Make in-place operators leave their inputs alone.

Other passes bypass operators and put new ones between two others; that is safe only where nothing
overwrites its input. An operator whose input somebody still reads afterwards keeps its form, and
the channel analysis keeps all that shares that memory.
"""

from torch import fx

from fxprune.observation import observe
from fxprune.out_of_place import make_out_of_place
from fxprune.pipeline import Change
from fxprune.program import Program


def make_functional(program: Program) -> list[Change]:
    """Turn in-place activations and arithmetic into their ordinary forms."""
    seen = observe(program)
    order = {node: place for place, node in enumerate(program.graph.nodes)}
    members: dict[fx.Node, list[fx.Node]] = {}
    for node, group in seen.alias.items():
        members.setdefault(group, []).append(node)

    def is_read_again(writer: fx.Node) -> bool:
        shared = [node for one in seen.mutated[writer] for node in members[seen.alias[one]]]
        before = [node for node in shared if order[node] < order[writer]]
        return any(order[user] > order[writer] for node in before for user in node.users)

    needed = [writer for writer in seen.mutated if is_read_again(writer)]
    # A module has one flag for all its calls.
    stay = {node.target for node in needed if node.op == "call_module"}
    return [
        Change(writer.name, "no longer overwrites its input")
        for writer in seen.mutated
        if writer not in needed and (writer.op != "call_module" or writer.target not in stay)
        if make_out_of_place(writer, program.module)
    ]
