"""A model traced in one mode: again, and watched, where its forward draws, writes or asks.

A forward that draws random numbers by itself, writes into what lies beside the model, or answers by
whether gradients are wanted, is traced once more, by a tracer that keeps the submodules that do so
whole. What remains of it in the model itself is refused.
"""

import functools
import keyword
from collections.abc import Callable, Collection, Generator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn

from fxprune.errors import TraceError
from fxprune.runtime.randomness import Generators
from fxprune.tracing.aten_operators import called_in_python
from fxprune.tracing.caches import uncached
from fxprune.tracing.call_state import CallState, answers_matter, asked_of
from fxprune.tracing.checkpoints import computed_once
from fxprune.tracing.classes import modules_of, of_their_classes
from fxprune.tracing.dtype_limits import asking_for_limits
from fxprune.tracing.einops_backend import teach_einops
from fxprune.tracing.imports import imported_unchanged
from fxprune.tracing.model_tracer import ModelTracer, require_drawn_nothing, require_unwritten
from fxprune.tracing.modes import differ_in_constants, forget_counts, same_structure
from fxprune.tracing.own_hooks import HOOKED
from fxprune.tracing.retracing import wrap_functions_
from fxprune.tracing.scripts import inlined
from fxprune.tracing.source_lines import first_line, place_of_error
from fxprune.tracing.tables import sliced_by_name, spread_by_size
from fxprune.tracing.watching import OwnTensors, left_alone
from fxprune.tracing.whole_numbers import kept_whole
from fxprune.user_models.beside import Beside
from fxprune.user_models.deeds import place_of, written_into
from fxprune.user_models.keeping import Held, Parts
from fxprune.user_models.modules import has_hooks


def trace_in_mode(
    root: nn.Module,
    given: Mapping[str, Any],
    *,
    training: bool,
    inside: bool,
    whole: Collection[str] = (),
    drawing: bool = False,
) -> tuple[fx.Graph, ModelTracer]:
    """Trace in one mode; drawing: let it draw random numbers of its own, which tells `drew`."""
    root.train(training)
    generators, beside, state = Generators(), Beside(root), CallState()
    in_mode = functools.partial(_traced, root, given, whole, inside=inside, beside=beside)
    try:
        tracer, graph = in_mode(state=state)
        if answers_matter(state.asked, functools.partial(_is_same, root, in_mode, graph)):
            state = CallState(refused=True)
        drew, wrote = bool(generators.drew()), beside.written()
        if drew:
            generators.put_back()
        watching = drew and not drawing
        if watching or wrote or state.refused:
            beside.put_back()
            tracer, graph = in_mode(watching=watching, refusing_writes=True, state=state)
            require_unwritten(beside)
        if watching:
            require_drawn_nothing(generators)
        elif drew:
            generators.put_back()
        tracer.drew = drew and drawing
    except Exception as error:
        raise TraceError(
            f"{type(root).__name__} cannot be traced: {type(error).__name__}: {first_line(error)}"
            f"{place_of_error(error)}; move the data-dependent Python of its forward into a "
            "submodule of its own (a submodule that cannot be traced is kept whole), or "
            "instrument its parts"
        ) from error
    finally:
        beside.put_back()
    if training:
        forget_counts(root, graph)
    for node in graph.nodes:
        if node.op in ("call_module", "get_attr"):
            _require_sayable(root, str(node.target))
    wrap_functions_(graph)
    # Unpickling a graph module calls its tracer's class; torch.fx's own has all that takes.
    graph._tracer_cls = None
    return graph, tracer


def _is_same(
    root: nn.Module,
    in_mode: Callable[..., tuple[ModelTracer, fx.Graph]],
    graph: fx.Graph,
    state: CallState,
) -> bool:
    """Tell whether a model has the same graph where its questions are answered by `state`."""
    try:
        _, other = in_mode(state=state)
    except Exception:
        return False
    return same_structure(root, other, graph) and not differ_in_constants(other, graph)


def _traced(
    root: nn.Module,
    given: Mapping[str, Any],
    whole: Collection[str],
    *,
    inside: bool,
    beside: Beside,
    watching: bool = False,
    refusing_writes: bool = False,
    state: CallState,
) -> tuple[ModelTracer, fx.Graph]:
    """Trace once.

    watching: for modules that draw random numbers, which are then kept whole. refusing_writes:
    modules that write into what is beside are kept whole, too. state: answers questions for
    gradients and autocast.
    """
    if has_hooks(root):
        raise TraceError(HOOKED)
    teach_einops()
    tracer, held = ModelTracer(given, whole, inside=inside), Held(root)
    tracer.watching, tracer.own = watching, OwnTensors(root)
    tracer.beside, tracer.packages = beside if refusing_writes else None, beside.packages
    parts, users = Parts(root), modules_of(root)
    try:
        with (
            torch.enable_grad(),
            imported_unchanged(),
            left_alone(tracer.own, tracer),
            without_fused_layers(),
            tracer.refusing_autocast(),
            tracer.noting_functions(),
            computed_once(tracer),
            sliced_by_name(root, tracer),
            spread_by_size(tracer),
            of_their_classes(users, tracer),
            asked_of(state, users, tracer),
            kept_whole(users, tracer),
            inlined(tracer),
            uncached(beside, tracer),
            asking_for_limits(),
            called_in_python(tracer),
        ):
            graph = tracer.trace(root)
            tracer.require_fresh()
            tracer.leave_notes(held)
    finally:
        tracer.put_back()
        written = held.put_back()
        shared = parts.shared()
    if shared:
        raise TraceError(
            f"its forward keeps a tensor in {shared}, which all models of the class share; keep it "
            "in a buffer"
        )
    tracer.note(written)
    replaced = parts.replaced()
    if replaced:
        raise TraceError(
            f"its forward replaces or adds {replaced!r}, a tensor or part of it, which no graph "
            "does; make it in __init__, and write into tensors (copy_)"
        )
    if name := tracer.arguments.written():
        raise TraceError(written_into(name, place_of([type(root).forward], name)))
    others = sorted(parts.changed() - tracer.written)
    if others:
        raise TraceError(
            f"its forward sets {others[0]!r}, an attribute of a part, which a trace would do once "
            "for all; do so in the training loop"
        )
    return tracer, graph


def _require_sayable(root: nn.Module, path: str) -> None:
    """Raise `TraceError` for a name that Python code cannot say."""
    word = next((part for part in path.split(".") if keyword.iskeyword(part)), None)
    if word is not None:
        raise TraceError(
            f"{type(root).__name__} cannot be traced: {path} has a part named {word!r}, a keyword "
            "of Python; give it another name"
        )


@contextmanager
def without_fused_layers() -> Generator[None]:
    """Let torch's transformer layers run their operators, not one that has them all."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
