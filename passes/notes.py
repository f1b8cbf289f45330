"""Drop what sets attributes: what is finalised is a function of its inputs.

In a gated model goes what is overwritten under another name after it was put there:

    self.first = y[:, :2]        y = F.relu(y, inplace=True)

as operators with a gate overwrite nothing.
"""

from torch import fx

from fxprune.programs.observation import observe
from fxprune.programs.overwrites import Overwrites
from fxprune.programs.pipeline import Change, keeps_shapes
from fxprune.programs.program import Program
from fxprune.tracing.notes import erase_notes_, noted, notes_behind, notes_in, serving_notes


@keeps_shapes
def drop_notes(program: Program) -> list[Change]:
    """Erase the operators that set attributes, and what a run has left in them."""
    names = noted(program.graph)
    for node in notes_in(program.graph):
        program.graph.erase_node(node)
    erase_notes_(program.module, names)
    why = "is not set any more: let the forward return what is to be read"
    return [Change(name, why) for name in sorted(names)]


@keeps_shapes
def drop_overwritten_notes(program: Program) -> list[Change]:
    """Erase the notes of what is read by an older name after an operator overwrote it."""
    if not noted(program.graph):
        return []
    stale = dict.fromkeys(
        note for reader in _late_readers(program) for note in notes_behind(reader)
    )
    for note in stale:
        program.graph.erase_node(note)
    why = "is not set: what it holds is overwritten after it was put there; put a clone there"
    return [Change(str(note.args[1]), why) for note in stale]


def _late_readers(program: Program) -> list[fx.Node]:
    seen = observe(program)
    overwrites = Overwrites(program.graph, seen)
    serving = serving_notes(program.graph, {*seen.mutated, *seen.draws})
    return [
        reader
        for writer, written in seen.mutated.items()
        for group in {seen.alias[one] for one in written}
        for node in overwrites.members[group]
        if overwrites.order[node] < overwrites.order[writer]
        for reader in overwrites.later_readers(node, writer)
        if reader in serving and seen.reads(reader, node, writer)
    ]
