"""Read what was overwritten under the name it has since.

    y = x.relu_(); return x + y  →  y = x.relu_(); return y + y

Both are one tensor. But a reader of the older name seems to read what was there before, so that the
operator could not be made an ordinary one.
"""

from torch import fx

from fxprune.programs.observation import observe
from fxprune.programs.out_of_place import returns_its_input
from fxprune.programs.overwrites import Overwrites
from fxprune.programs.pipeline import Change, keeps_shapes
from fxprune.programs.program import Program


@keeps_shapes
def read_latest_names(program: Program) -> list[Change]:
    """Let whoever reads a tensor after an operator overwrote it read that operator's result."""
    seen = observe(program)
    overwrites = Overwrites(program.graph, seen)
    changes: list[Change] = []
    for writer, written in seen.mutated.items():
        source = writer.args[0] if writer.args else None
        if not isinstance(source, fx.Node) or not any(
            seen.alias[one] is seen.alias[source] for one in written
        ):
            continue
        same = (
            seen.alias[source] is seen.alias[writer] and seen.values[source] == seen.values[writer]
        )
        later = overwrites.later_readers(source, writer)
        if same and later and returns_its_input(writer, program.module):
            for user in later:
                user.replace_input_with(source, writer)
            changes.append(Change(writer.name, f"is read where {source.name} was"))
    return changes
