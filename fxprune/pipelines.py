"""Which passes run, in which order, and why in that order."""

from fxprune.dataflow.channels import analyse
from fxprune.passes.affine_inputs import fold_affine_inputs
from fxprune.passes.batch_norm import fold_batch_norm
from fxprune.passes.computed_weights import join_computed_weights, settle_computed_weights
from fxprune.passes.constant_branches import remove_constant_branches
from fxprune.passes.dead_channels import eliminate_dead_channels
from fxprune.passes.early_pools import advance_pools
from fxprune.passes.gate_removal import remove_gates
from fxprune.passes.in_place import make_functional
from fxprune.passes.latest_names import read_latest_names
from fxprune.passes.layer_modules import make_layers_modules
from fxprune.passes.linear_chains import fold_linear_chains
from fxprune.passes.no_ops import (
    drop_unread_tensors,
    remove_no_ops,
    remove_products_with_ones,
    tensors_read,
)
from fxprune.passes.notes import drop_notes
from fxprune.passes.parallel_branches import fold_parallel_branches
from fxprune.passes.rank_questions import ask_inputs_for_ranks
from fxprune.passes.settled_modes import settle_modes
from fxprune.passes.size_unpacking import unpack_sizes
from fxprune.passes.stream_gathers import insert_gathers, remove_unsettled_gathers
from fxprune.programs.pipeline import Change, Pass, keeps_shapes, with_options
from fxprune.programs.program import Program

READABLE: tuple[Pass, ...] = (
    # What is read under an older name seems to be read as it was.
    read_latest_names,
    # A size inside a computed tuple could not follow the channels it counts.
    unpack_sizes,
    # A layer whose rank is asked for has a reader too many to be merged.
    ask_inputs_for_ranks,
    # What computes a layer's weights is known to the analysis as a part of the layer only.
    join_computed_weights,
    # Layers written as functions could neither fold nor take constants in.
    make_layers_modules,
)

PLAIN: tuple[Pass, ...] = (
    # What only attributes hold is read by nobody.
    drop_notes,
    # What the gates decided becomes zeros, which all later passes understand.
    remove_gates,
    read_latest_names,
    # Bypassing operators is safe once none of them overwrites its input.
    make_functional,
    *READABLE,
    # Numbers can be cut.
    settle_computed_weights,
)


@keeps_shapes
def remove_dead_units(program: Program, *, trained: bool = False) -> list[Change]:
    """Remove constant branches, then dead channels: one analysis serves all that change nothing.

    A branch that nothing is left of would keep a unit, and the stream it joins from shrinking.
    trained: the result is trained on, so that a constant is what training mode computes, too.
    """
    read = tensors_read(program)
    known = analyse(program, trained=trained)
    changes = remove_constant_branches(program, known, trained=trained)
    known = analyse(program, trained=trained) if changes else known
    gathers = insert_gathers(program, known)
    changes += gathers + eliminate_dead_channels(
        program, None if gathers else known, trained=trained
    )
    remove_unsettled_gathers(program)
    drop_unread_tensors(program, read)  # an optimizer would go on decaying them
    return changes


CUT: tuple[Pass, ...] = (
    # Units go before anything is folded: a merged layer no longer has them.
    remove_dead_units,
    # Gates that kept all they still have are products with ones by now.
    remove_products_with_ones,
)

CUT_TO_BE_TRAINED: tuple[Pass, ...] = (
    # What parameters alone compute is another constant after the next step.
    with_options(remove_dead_units, trained=True),
    remove_products_with_ones,
)


def folding(cost: str = "parameters") -> tuple[Pass, ...]:
    """Return the passes that fold; what is merged never costs more than it did apart."""

    @keeps_shapes
    def fold_layers(program: Program) -> list[Change]:
        """Merge chains and sums in turns: a branch becomes one layer first, then its sum does."""
        changes: list[Change] = []
        while True:
            new = fold_linear_chains(program, cost=cost)
            new += fold_parallel_branches(program, cost=cost)
            if not new:
                return changes
            changes += new

    return (
        # Only now: a model that is not folded may be trained on, with its dropout.
        settle_modes,
        remove_no_ops,
        # Gates that stood in the way are gone.
        ask_inputs_for_ranks,
        # A batch norm between two layers would keep them apart.
        fold_batch_norm,
        # What is left stands behind no layer of its own; the one behind it may take it in.
        fold_affine_inputs,
        fold_layers,
        # Where a 1×1 was one with the layer before it, there is no 1×1 any more.
        advance_pools,
        # A pool between two layers does not keep them apart, but is better left alone.
        with_options(fold_linear_chains, cost=cost, pools=True),
        # Folding leaves modules behind that nobody calls.
        remove_no_ops,
    )
