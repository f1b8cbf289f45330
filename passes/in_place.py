"""Make in-place operators leave their inputs alone.

Other passes bypass operators and put new ones between two others; that is safe only where nothing
overwrites its input. An operator whose input somebody still reads afterwards keeps its form, and
the channel analysis keeps all that shares that memory.
"""

from typing import Any

from fxprune.programs.observation import observe
from fxprune.programs.out_of_place import make_out_of_place
from fxprune.programs.overwrites import Overwrites
from fxprune.programs.pipeline import Change, keeps_shapes
from fxprune.programs.program import Program


@keeps_shapes
def make_functional(program: Program) -> list[Change]:
    """Turn in-place activations and arithmetic into their ordinary forms."""
    seen = observe(program)
    overwrites = Overwrites(program.graph, seen)
    needed = [writer for writer in seen.mutated if overwrites.read_again(writer)]
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
