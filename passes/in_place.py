"""Make in-place operators leave their inputs alone.

Other passes bypass operators and put new ones between two others; that is safe only where nothing
overwrites its input. An operator whose input somebody still reads afterwards keeps its form, as
does one that would give numbers of another type, and the channel analysis keeps all that shares
that memory.
"""

from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from fxprune.programs.observation import Observation, TensorSpec, observe
from fxprune.programs.out_of_place import make_out_of_place, ordinary_call
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
        if not _keeps_type(writer, seen):
            continue
        if make_out_of_place(writer, program.module):
            changes.append(Change(writer.name, "no longer overwrites its input"))
            turned.add(writer.target if writer.op == "call_module" else writer)
        if writer in turned or writer.target in turned:
            del seen.mutated[writer]
    return changes


def _keeps_type(node: fx.Node, seen: Observation) -> bool:
    """Tell whether the ordinary form gives the type that is overwritten, by running it on sizes.

    `x.gt_(y)` writes numbers where `x.gt(y)` is truth values, and `x.add_(y)` numbers of x's type
    where those of y may have more bits.
    """
    ordinary, spec = ordinary_call(node), seen.values[node]
    if ordinary is None or not isinstance(spec, TensorSpec):
        return True

    def sized(argument: fx.Node) -> Any:
        return pytree.tree_map_only(TensorSpec, _on_meta, seen.values[argument])

    args, kwargs = map_arg((node.args, node.kwargs), sized)
    try:
        found = ordinary(*args, **kwargs)
    except (RuntimeError, TypeError, NotImplementedError):
        return True  # it wants numbers: what is made of it is proved like all else
    return not isinstance(found, Tensor) or found.dtype == spec.dtype


def _on_meta(spec: TensorSpec) -> Tensor:
    return torch.empty(spec.shape, dtype=spec.dtype, device="meta")
