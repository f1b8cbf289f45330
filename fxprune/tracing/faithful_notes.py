"""Notes that a trace leaves as its model does; the others are forgotten, and said to be.

What an attribute is set to may come from an earlier call (`self.seen = self.seen + [x]`), which no
graph knows. And what one mode sets, the other may set back:

    self.auxiliary = head(x) if self.training else None

So model and trace are run, one after the other and twice, in either mode.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fxprune.runtime.randomness import Generators
from fxprune.tracing.notes import forget_, leave_constant, left_in, noted
from fxprune.user_models.inputs import Inputs, another, same
from fxprune.user_models.modules import copy_model, run_alike

_PLAIN = (bool, int, float, str, type(None))
_UNTOUCHED = object()


def keep_faithful_notes_(
    model: nn.Module, evaluation: fx.GraphModule, training: fx.GraphModule | None, inputs: Inputs
) -> set[str]:
    """Erase the notes that traces do not leave as the model does, and return their names.

    What is left in one mode only, the trace of the other sets back if the model does. training:
    the trace of training, if it is known, which may be that of evaluation.
    """
    traces = {False: evaluation} | ({} if training is None else {True: training})
    wrong = {
        name
        for mode, trace in traces.items()
        for name in _unlike(model, trace, inputs, training=mode)
    }
    if training is not None and training is not evaluation:
        names = noted(training.graph) ^ noted(evaluation.graph)
        wrong |= _set_back_(model, traces, names - wrong, inputs)
    for trace in traces.values():
        forget_(trace.graph, wrong)
    return wrong


def _unlike(
    model: nn.Module, trace: fx.GraphModule, inputs: Inputs, *, training: bool
) -> Iterator[str]:
    """Yield the attributes that a trace sets to something else than the model, in either run."""
    names = noted(trace.graph)
    runs = (_runs(copy_model(one), inputs, training=training) for one in (model, trace))
    for (one, expected), (other, actual) in zip(*runs, strict=False) if names else ():
        if not same(expected, actual, nan=True):
            return  # it draws otherwise, which others judge
        left, found = left_in(one, names), left_in(other, names)
        for name in names:
            here = name in left and name in found
            if not here or not same(left[name], found[name], nan=True):
                yield name


def _runs(twin: nn.Module, inputs: Inputs, *, training: bool) -> Iterator[tuple[nn.Module, Any]]:
    """Run a module on inputs, then on others, as far as it runs; yield it with its outputs."""
    twin.train(training)
    if isinstance(twin, fx.GraphModule):
        twin.recompile()
    for case in (inputs, pytree.tree_map_only(Tensor, another, inputs)):
        generators = Generators()
        try:
            with torch.no_grad():
                output = run_alike(twin, case)
        except Exception:  # a batch of one in training, inputs like no example
            return
        finally:
            generators.put_back()
        yield twin, output


def _set_back_(
    model: nn.Module, traces: dict[bool, fx.GraphModule], names: set[str], inputs: Inputs
) -> set[str]:
    """Let either trace set back what the other leaves, and return what that cannot be done for."""
    unknown: set[str] = set()
    for mode, trace in traces.items():
        for name in sorted(names - noted(trace.graph)):
            values = list(_set_to(model, name, inputs, training=mode))
            if not values or not all(_is_alike(one, values[0]) for one in values):
                unknown.add(name)
            elif values[0] is not _UNTOUCHED:
                leave_constant(trace.graph, name, values[0])
    return unknown


def _set_to(model: nn.Module, name: str, inputs: Inputs, *, training: bool) -> Iterator[Any]:
    """Yield what runs in one mode set an attribute to, `_UNTOUCHED` where they leave it alone."""
    twin = copy_model(model)
    path, _, own = name.rpartition(".")
    held = vars(twin.get_submodule(path))
    held[own] = _UNTOUCHED
    for _ in _runs(twin, inputs, training=training):
        yield held.get(own)
        held[own] = _UNTOUCHED


def _is_alike(value: Any, first: Any) -> bool:
    """Tell whether a value is the first one again: untouched, or plain numbers and structures."""
    if value is _UNTOUCHED or first is _UNTOUCHED:
        return value is first
    leaves = pytree.tree_leaves((value, first))
    return all(type(leaf) in _PLAIN for leaf in leaves) and value == first
