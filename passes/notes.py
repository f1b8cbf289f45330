"""Drop what sets attributes: what is finalised is a function of its inputs."""

from fxprune.notes import erase_notes_, noted, notes_in
from fxprune.pipeline import Change, keeps_shapes
from fxprune.program import Program


@keeps_shapes
def drop_notes(program: Program) -> list[Change]:
    """Erase the operators that set attributes, and what a run has left in them."""
    names = noted(program.graph)
    for node in notes_in(program.graph):
        program.graph.erase_node(node)
    erase_notes_(program.module, names)
    why = "is not set any more: let the forward return what is to be read"
    return [Change(name, why) for name in sorted(names)]
