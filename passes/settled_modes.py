"""Write into the graph what modules do in evaluation: their flags, and rates that follow them.

What is folded is of that mode; where a flag is still read, `train` would change a part of it.
"""

from fxprune.programs.pipeline import Change, keeps_shapes
from fxprune.programs.program import Program
from fxprune.tracing.literals import put_literal
from fxprune.tracing.modes import by_mode, follows_mode


@keeps_shapes
def settle_modes(program: Program) -> list[Change]:
    """Replace training flags by `False`, and rates by those of evaluation."""
    changes: list[Change] = []
    for flag in [node for node in program.graph.nodes if follows_mode(node)]:
        for user in list(flag.users):
            if user.target is by_mode:
                put_literal(user, user.args[1])
        put_literal(flag, False)
        changes.append(Change(str(flag.target), "read no more: the result is one of evaluation"))
    return changes
