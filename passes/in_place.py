"""Make in-place operators leave their inputs alone.

Other passes bypass operators and put new ones between two others; that is safe only where nothing
overwrites its input. An operator whose input somebody still reads afterwards keeps its form, and
the channel analysis keeps all that shares that memory.
"""

from fxprune.observation import observe
from fxprune.pipeline import Change
from fxprune.program import Program, make_out_of_place


def make_functional(program: Program) -> list[Change]:
    """Turn in-place activations and arithmetic into their ordinary forms."""
    seen = observe(program)
    order = {node: place for place, node in enumerate(program.graph.nodes)}
    changes: list[Change] = []
    for writer, written in seen.mutated.items():
        groups = {seen.alias[node] for node in written}
        members = [node for node, group in seen.alias.items() if group in groups]
        before = [node for node in members if order[node] < order[writer]]
        if any(order[user] > order[writer] for node in before for user in node.users):
            continue
        make_out_of_place(writer, program.module)
        changes.append(Change(writer.name, "no longer overwrites its input"))
    return changes
