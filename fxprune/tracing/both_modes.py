"""From any module to a `torch.fx.GraphModule` that means the same in training and evaluation.

Three rungs of a ladder: symbolic tracing; where Python asks for a size, the example inputs' (see
`asked_tracer`); and, where a submodule cannot be traced, that submodule as a leaf (`model_tracer`).
A model that asks for its mode is traced once in training and once in evaluation mode: a flag that
torch.fx would have frozen (`F.dropout(x, training=self.training)`) becomes a read of the live flag
instead.
"""

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from torch import fx, nn

from fxprune.errors import TraceError
from fxprune.runtime.garbage import uncollected
from fxprune.runtime.kinds import PASSES
from fxprune.tracing.model_tracer import ModelTracer
from fxprune.tracing.modes import (
    copy_alike,
    differ_in_constants,
    flags_after,
    keep_flags_,
    mode_questions,
    overrides_train,
    same_structure,
    steady_flags,
    thaw_modes,
)
from fxprune.tracing.notes import noted
from fxprune.tracing.one_mode import trace_in_mode
from fxprune.tracing.two_modes import Flags, find_twins, hold_, other_mode
from fxprune.user_models.frozen_attributes import note_
from fxprune.user_models.graph_modules import without_code
from fxprune.user_models.keeping import Parts, count_on_

_CHANGES = (
    "what it computes in training changes from call to call, as it counts, draws or keeps "
    "something in Python, which a trace would do once for all; pass such numbers as arguments"
)


def trace(root: nn.Module, given: Mapping[str, Any], *, inside: bool = False) -> fx.GraphModule:
    """Trace `root`; its forward arguments in `given` are inputs, all others keep their defaults.

    inside: it is called by a model, not by a user who sees what it takes.

    The graph module shares the parameters of `root`, and has no code yet. Where the two modes run
    different operators (auxiliary heads), it is the graph of evaluation and
    `meta["evaluation_only"]` says so; `meta["in_training"]` is then the graph of training, and the
    twins in it of the other's nodes, and what parts are told of the mode, if that can be traced as
    well. Raises `TraceError`.
    """
    flags, parts = {module: module.training for module in root.modules()}, Parts(root)
    try:
        training, evaluation, tracer = _trace_in_both_modes(
            root, given, inside=inside, trained=root.training
        )
        modes = (True, False) if overrides_train(root) else ()
        after = [flags_after(root, training=mode) for mode in modes]
    finally:
        for module, flag in flags.items():
            module.training = flag
        parts.put_back()
    same_in_both_modes = training is evaluation or same_structure(root, training, evaluation)
    if same_in_both_modes and training is not evaluation:
        thaw_modes(training, evaluation, steady_flags(after))
    evaluation_only = tracer.evaluation_only or not same_in_both_modes
    told = _told(root, tracer, after) if evaluation_only else {}
    module = without_code(root, evaluation, type(root).__name__)
    module.meta["written"] = sorted(tracer.written)
    tracers = [tracer] if tracer.other is None else [tracer, tracer.other]
    set_by_calls = {name for one in tracers for name in noted(one.graph)}
    module.meta["forgotten"] = sorted({n for one in tracers for n in one.written} - set_by_calls)
    note_(module, root, but=set_by_calls)
    if after:
        module.meta["modes"] = {path: after[0][path] for path in keep_flags_(module, *after)}
    module.meta["evaluation_only"] = evaluation_only
    module.meta["untrained"] = tracer.untrained
    module.meta["other_mode"] = _other_mode(root, told)
    module.meta["backward"] = tracer.backward
    if tracer.other is not None:
        hold_(module, root, training)
        module.meta["in_training"] = training, find_twins(root, evaluation, training), told
        _say_why_whole(training, tracer.other)
    for name, part in module.named_modules():
        part.training = flags[root.get_submodule(name)]
    _say_why_whole(module.graph, tracer)
    return module


def _told(root: nn.Module, tracer: ModelTracer, after: Sequence[dict[str, bool]]) -> Flags:
    """Return what the traced modules in `root` that ask for their mode are told in either.

    In training, and in evaluation. after: what `flags_after` said of both, if they do not follow.
    """
    leaves = [*tracer.leaves, *tracer.whole, *(tracer.other.leaves if tracer.other else ())]
    paths = [
        path
        for path, module in root.named_modules()
        if path and module in tracer.asked and not _is_inside(path, leaves)
    ]
    return {path: (after[0][path], after[1][path]) if after else (True, False) for path in paths}


def _is_inside(path: str, others: Collection[str]) -> bool:
    return any(f"{path}.".startswith(f"{other}.") for other in others)


def _other_mode(root: nn.Module, told: Flags) -> str:
    """Say which part is in another mode than the model has it in, nothing if none is."""
    for path, (in_training, in_evaluation) in told.items():
        expected = in_training if root.training else in_evaluation
        if text := other_mode(root.get_submodule(path).training, expected, path):
            return text
    return ""


def _say_why_whole(graph: fx.Graph, tracer: ModelTracer) -> None:
    for node in graph.find_nodes(op="call_module"):
        if node.target in tracer.leaves:
            node.meta["leaf_because"] = tracer.leaves[node.target]
        if node.target in tracer.idle:
            node.meta[PASSES] = True


def _trace_in_both_modes(
    root: nn.Module, given: Mapping[str, Any], *, inside: bool, trained: bool
) -> tuple[fx.Graph, fx.Graph, ModelTracer]:
    """Return the graphs of training and evaluation, which is one where nobody asks for the mode.

    A module that does something in training only (stochastic depth) is kept whole if then the
    graphs have one structure; in a model that is `trained`, also one without parameters that does
    something else then (in evaluation its graph would do). Otherwise the model has two graphs, or,
    where that of training is none to train by, modules with parameters are kept whole, too.
    """
    in_mode = functools.partial(trace_in_mode, root, given, inside=inside)
    with uncollected(), mode_questions() as asked:
        evaluation, tracer = in_mode(training=False, drawing=True)
    if tracer.drew:
        evaluation, tracer = in_mode(training=False)
    if not asked:
        return evaluation, evaluation, tracer
    tracer.asked = asked
    try:
        with uncollected(), mode_questions() as asked_in_training:
            training, other = in_mode(training=True)
    except TraceError as error:
        if trained:
            raise
        tracer.evaluation_only, tracer.untrained = True, f"in training {error}"
        return evaluation, evaluation, tracer
    tracer.asked = asked | asked_in_training
    idle = {path for path, passes in tracer.passes.items() if passes}
    idle -= {path for path, passes in other.passes.items() if passes}
    copy_alike(training, evaluation)
    if same_structure(root, training, evaluation):
        if not _repeats(root, in_mode, training, other.written):
            if trained:
                raise TraceError(_CHANGES)
            tracer.evaluation_only, tracer.untrained = True, _CHANGES
            return evaluation, evaluation, tracer
        tracer.written |= other.written
        return training, evaluation, tracer

    if idle and (one_graph := _with_leaves(root, in_mode, idle)):
        return one_graph
    busy = _innermost(root, asked | asked_in_training) - idle if trained else set[str]()
    plain = {path for path in busy if not any(True for _ in root.get_submodule(path).parameters())}
    if plain and (one_graph := _with_leaves(root, in_mode, idle, plain)):
        return one_graph
    tracer.untrained = _why_untrained(tracer, other)
    if not tracer.untrained and not _repeats(root, in_mode, training, other.written):
        tracer.untrained = _CHANGES
    if not tracer.untrained:
        tracer.other = other
    elif busy - plain:
        return _with_leaves(root, in_mode, idle, busy) or (training, evaluation, tracer)
    return training, evaluation, tracer


def _with_leaves(
    root: nn.Module,
    in_mode: Callable[..., tuple[fx.Graph, ModelTracer]],
    idle: set[str],
    busy: Collection[str] = (),
) -> tuple[fx.Graph, fx.Graph, ModelTracer] | None:
    """Trace with some modules kept whole; None if that makes no graph for both modes."""
    whole = idle.union(busy)
    with uncollected():
        evaluation, tracer = in_mode(training=False, whole=whole)
        training, other = in_mode(training=True, whole=whole)
    if not same_structure(root, training, evaluation):
        return None
    tracer.written |= other.written
    tracer.idle = idle
    tracer.leaves |= dict.fromkeys(busy, "it runs other operators in training")
    return training, evaluation, tracer


def _why_untrained(tracer: ModelTracer, other: ModelTracer) -> str:
    """Return why a graph of training is none to train by, nothing if it may be one.

    tracer, other: those of evaluation and of training.
    """
    if other.untrained:
        return other.untrained
    if kept := sorted(other.written - tracer.written - noted(other.graph)):
        return f"its forward sets {kept[0]} in training only, which a graph forgets"
    for one, twin in ((other, tracer), (tracer, other)):
        used = {
            str(node.target) for node in twin.graph.nodes if node.op in ("call_module", "get_attr")
        }
        for path in one.leaves:
            if any(name.startswith(f"{path}.") for name in used):
                mode = "training" if one is other else "evaluation"
                return f"in {mode} alone {path} cannot be traced into: {one.leaves[path]}"
    return ""


def _repeats(
    root: nn.Module,
    in_mode: Callable[..., tuple[fx.Graph, ModelTracer]],
    training: fx.Graph,
    written: Collection[str],
) -> bool:
    """Tell whether a later call in training does what the first did: nobody counts, or draws."""
    count_on_(root, written)
    with uncollected():
        again, _ = in_mode(training=True)
    copy_alike(again, training)
    return same_structure(root, again, training) and not differ_in_constants(again, training)


def _innermost(root: nn.Module, asked: Collection[nn.Module]) -> set[str]:
    """Return the paths of the modules that asked for the mode, but for those around others."""
    paths = {path for path, module in root.named_modules() if path and module in asked}
    around = {path.rpartition(".")[0] for path in paths}
    while parents := {path.rpartition(".")[0] for path in around} - around:
        around |= parents
    return paths - around
