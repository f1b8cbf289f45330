"""Where gradients of a loss can come from: what is detached, or a number of no fraction, gets none.

A gate there would be told by nothing what its units are worth: its penalty alone would close it.
"""

from typing import Any

from torch import fx

from fxprune.dataflow.values import flatten
from fxprune.programs.observation import Observation, TensorSpec
from fxprune.runtime.kinds import DETACHING
from fxprune.tracing.asked_tracer import PLAIN


def reached_by_gradients(graph: fx.Graph, seen: Observation) -> set[fx.Node]:
    """Return the nodes whose output some function of the model's outputs has a gradient by."""
    found: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        is_reached = any(user in found and user.target not in DETACHING for user in node.users)
        if node.op == "output" or (is_reached and _has_fractions(seen.values[node])):
            found.add(node)
    return found


def _has_fractions(spec: Any) -> bool:
    """Tell whether a node gives a tensor of real or complex numbers, among others perhaps.

    Nobody knows what is in an object (an output that is a dataclass).
    """
    return any(
        one.dtype.is_floating_point or one.dtype.is_complex
        if isinstance(one, TensorSpec)
        else not isinstance(one, PLAIN)
        for one in flatten(spec)
    )
