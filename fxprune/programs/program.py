"""A program: a traced module with the inputs it is known to run on.

Passes take and edit a `Program`; the public verbs clone the user's model into one first, so that
nothing the user holds is ever modified.
"""

from collections.abc import Collection, Generator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, suppress
from dataclasses import dataclass, field
from io import StringIO
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fxprune.errors import ExampleInputError, TraceError
from fxprune.runtime.kinds import LAYERS
from fxprune.runtime.memory_formats import like
from fxprune.runtime.randomness import Generators
from fxprune.tracing.assumptions import assumptions
from fxprune.tracing.both_modes import trace
from fxprune.tracing.faithful_notes import keep_faithful_notes_
from fxprune.tracing.notes import erase_notes_, left_in, noted
from fxprune.tracing.one_mode import without_fused_layers
from fxprune.tracing.signatures import bound_arguments
from fxprune.tracing.two_modes import Flags, Twins
from fxprune.user_models.deeds import Given, contents_of, written_into
from fxprune.user_models.graph_modules import without_code
from fxprune.user_models.inputs import (
    NESTED,
    Inputs,
    another,
    copied,
    describe,
    is_nested,
    same,
    to_device,
)
from fxprune.user_models.keeping import count_on_
from fxprune.user_models.modules import (
    check_parameters,
    copy_model,
    count_channels_,
    device_of,
    evaluating,
    run_alike,
    run_on,
    submodule,
)
from fxprune.user_models.naming import free_names_
from fxprune.user_models.replaced_methods import require_classes_as_written
from fxprune.user_models.size_memos import agree, find_size_memos, forgotten, may_hold_memos


@dataclass
class InTraining:
    """What a program does in training, where that is something else; it shares all parts with it.

    twins: the nodes that do what a node of evaluation does. told: parts' flags in either.
    """

    program: "Program"
    twins: Twins
    told: Flags


@dataclass
class Program:
    """A graph module and example inputs, positional and by keyword, on the module's device.

    seen: what its last run showed, kept by `observation.observe` for whoever asks next; who changes
    a shape, or how much a node computes, leaves None here. barriers: operators around which every
    channel stayed, and why. plans: how chains of layers were put together, by their names.
    cuts: what stayed of parameters and buffers that were cut, by name: axes and positions.
    in_training: the graph of training, where that of the module is of evaluation only.
    """

    module: fx.GraphModule
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict[str, Any])
    seen: Any = field(default=None, repr=False, compare=False)
    barriers: dict[str, str] = field(default_factory=dict[str, str])
    plans: dict[tuple[str, ...], Any] = field(default_factory=dict[tuple[str, ...], Any])
    cuts: dict[str, list[tuple[int, Tensor]]] = field(
        default_factory=dict[str, list[tuple[int, Tensor]]]
    )
    in_training: InTraining | None = None

    @property
    def graph(self) -> fx.Graph:
        """The graph passes edit; `check` regenerates the module's code from it."""
        return self.module.graph

    @property
    def untrained(self) -> str:
        """Say why nobody can train what was traced; "" if one can."""
        if not self.module.meta["evaluation_only"] or self.in_training is not None:
            return ""
        return self.module.meta["untrained"] or "it runs other operators in training"

    @property
    def other_mode(self) -> str:
        """Say which part is in another mode than the model around it; "" if none that matters."""
        return self.module.meta.get("other_mode", "")

    def trains(self, node: fx.Node) -> bool:
        """Tell whether training does what a node does."""
        return self.in_training is None or node in self.in_training.twins

    def clone(self) -> "Program":
        """Return an independent copy; the example inputs are shared, nothing writes to them."""
        return Program(copy_model(self.module), self.args, self.kwargs)

    def inputs(self) -> Inputs:
        """Return fresh copies of the example inputs: a model may overwrite what it is given."""
        return copied((self.args, self.kwargs))

    def run(self) -> Any:
        """Return the module's outputs for the example inputs, without gradients."""
        with torch.no_grad(), quiet():
            return run_alike(self.module, (self.args, self.kwargs))

    def check(self) -> None:
        """Raise unless the graph is well formed; regenerate the module's code."""
        self.graph.lint()
        self.module.recompile()

    def text(self) -> str:
        """Return the program as Python source, as golden tests compare it."""
        return self.graph.python_code("self").src.strip()


def capture(
    model: nn.Module,
    inputs: Inputs,
    *,
    check: bool = True,
    inside: bool = False,
) -> Program:
    """Copy and trace `model`, and check that the trace computes what the model computes.

    check: run both; without it the trace is believed, and has no code before it is recompiled.
    inside: it is a part of a model, which calls it.
    Raises `ModelError`, `ExampleInputError` or `TraceError`.
    """
    check_parameters(model)
    require_classes_as_written(model)
    if any(map(is_nested, pytree.tree_leaves(inputs))):
        raise ExampleInputError(
            f"{type(model).__name__} is called with nested tensors, {describe(inputs)}, {NESTED}"
        )
    root = copy_model(model)
    renamed = free_names_(root)
    args, kwargs = to_device(inputs, device_of(model))
    given = bound_arguments(root, args, kwargs)
    program = Program(trace(root, given, inside=inside), args, kwargs)
    _count_channels(program)
    if assumptions(program.graph) and may_hold_memos(root):
        program = _without_size_memos(root, program, given, inside=inside) or program
    if renamed:
        program.module.meta["renamed"] = renamed
    program.in_training = _in_training(program)
    if check:
        program.module.recompile()
        _check_faithful(root, program)
        if program.in_training is not None and not _is_faithful_in_training(root, program):
            program.in_training = None
            program.module.meta["untrained"] = "traced in training, it computes something else"
        _forget_unfaithful_notes(root, program)
    return program


def _count_channels(program: Program) -> None:
    """Let layers that are called say how many channels they have: who cut one may not have."""
    for node in program.graph.nodes:
        if node.op != "call_module":
            continue
        layer: Any = submodule(program.module, str(node.target))
        if type(layer) in LAYERS and layer._parameters.get("weight") is not None:
            count_channels_(layer)


def _forget_unfaithful_notes(root: nn.Module, program: Program) -> None:
    """Erase the notes that the traces do not leave as the model does."""
    training = None if program.in_training is None else program.in_training.program.module
    if training is None and not program.module.meta["evaluation_only"]:
        training = program.module
    inputs = (program.args, program.kwargs)
    if not noted(program.graph) and (training is None or not noted(training.graph)):
        return
    with without_fused_layers(), quiet():
        wrong = keep_faithful_notes_(root, program.module, training, inputs)
    meta = program.module.meta
    meta["forgotten"] = sorted({*meta["forgotten"], *wrong})
    erase_notes_(program.module, wrong)
    program.module.recompile()


def _in_training(program: Program) -> InTraining | None:
    """Return what a trace found out about training, where that is another graph."""
    found: Any = program.module.meta.pop("in_training", None)
    if found is None:
        return None
    graph, twins, told = found
    module = without_code(program.module, graph, type(program.module).__name__)
    return InTraining(Program(module, program.args, program.kwargs), twins, told)


def _is_faithful_in_training(root: nn.Module, program: Program) -> bool:
    """Tell whether a graph of training computes what the model does, as far as that runs."""
    assert program.in_training is not None
    trace = program.in_training.program.module
    example = program.args, program.kwargs
    for inputs in (example, pytree.tree_map_only(Tensor, another, example)):
        expected = trained_outputs(root, inputs)
        if expected is not None and not same(expected, trained_outputs(trace, inputs), nan=True):
            return False
    return True


def trained_outputs(
    model: nn.Module, inputs: Inputs, notes: Collection[str] = ()
) -> tuple[Any, dict[str, Any]] | None:
    """Return what a copy of a model makes of inputs in training; None if that fails (a batch of 1).

    And what it leaves in attributes, if there are `notes`. It draws the same numbers in every run,
    in Python, too.
    """
    twin, generators = copy_model(model).train(), Generators()
    if isinstance(twin, fx.GraphModule):
        twin.recompile()
    with torch.no_grad(), without_fused_layers(), quiet():
        try:
            return run_alike(twin, inputs), left_in(twin, notes)
        except Exception:
            return None
        finally:
            generators.put_back()


def _without_size_memos(
    root: nn.Module, program: Program, given: Mapping[str, Any], *, inside: bool
) -> Program | None:
    """Trace a model without what it made for sizes, if that then serves more sizes, and exactly."""
    memos = find_size_memos(root, (program.args, program.kwargs))
    if not memos.attributes:
        return None
    try:
        with forgotten(root, memos):
            module = trace(root, given, inside=inside)
    except TraceError:  # it does not run without them
        return None
    if len(assumptions(module.graph)) >= len(assumptions(program.graph)):
        return None
    module.recompile()
    exact = all(agree(root, module, others) for others in memos.others)
    return Program(module, program.args, program.kwargs) if exact else None


def narrowed(tensor: Tensor, kept: Sequence[tuple[int, Tensor]]) -> Tensor:
    """Return what stays of a tensor: some positions along some axes."""
    part = tensor
    for axis, positions in kept:
        part = part.index_select(axis, positions.to(tensor.device))
    return like(part, tensor)


def widened(program: Program) -> Program | None:
    """Return a program in float64, None if it insists on a shorter dtype.

    It takes the module over, as there may be no memory for two: the program given is spent.
    """
    if device_of(program.module).type == "mps":
        return None  # has no float64
    args, kwargs = pytree.tree_map_only(
        Tensor, lambda t: t.double() if t.is_floating_point() else t, (program.args, program.kwargs)
    )
    wide = Program(program.module.double(), args, kwargs)
    try:
        with evaluating(wide.module):
            wide.run()
    except Exception:  # whatever the reason, its forward does not take float64
        return None
    return wide


@contextmanager
def quiet() -> Generator[None]:
    """Keep torch.fx from printing the code around an error, which says all there is to say."""
    with redirect_stderr(StringIO()):
        yield


def _run_second(model: nn.Module, inputs: Inputs) -> Any:
    """Return what a model makes of inputs once it has seen others."""
    with evaluating(model):
        with suppress(Exception):  # it may not take any others
            run_alike(model, pytree.tree_map_only(Tensor, another, inputs))
        return run_alike(model, inputs)


def _run_late(model: nn.Module, inputs: Inputs, written: Sequence[str]) -> Any:
    """Return what a model makes of inputs once what it counts is far on."""
    count_on_(model, written)
    with evaluating(model):
        return run_alike(model, inputs)


def _check_on_others(root: nn.Module, program: Program) -> None:
    """Run model and trace on other inputs too, if both take them.

    What an earlier run left where the trace found it (in a dict that hooks fill, in a module that
    is called again) is right for the example alone. The model, whose parts the trace shares, sees
    the example last.
    """
    example = program.args, program.kwargs
    others = pytree.tree_map_only(Tensor, another, example)
    with evaluating(root, program.module), torch.no_grad(), without_fused_layers(), quiet():
        try:
            expected, _ = (run_alike(root, case) for case in (others, example))
            actual = run_alike(program.module, others)
        except Exception:  # one of them may refuse what is like no example
            return
    if not same(expected, actual, nan=True):
        raise TraceError(
            f"{type(root).__name__} computes something else when traced, on other inputs than the "
            "example's: its forward reads what an earlier call left (in a dict that hooks fill, in "
            "a global, in a module that is called again); let it pass such tensors on as values"
        )


def _run_and_look(root: nn.Module, program: Program, inputs: Inputs) -> Any:
    """Return what a model makes of inputs; note which it overwrites, and let it add to none."""
    own = copied(inputs)
    given = bound_arguments(root, *own)
    looked = Given(given, bound_arguments(root, *inputs), contents_of(given))
    try:
        output = run_on(root, own)
        name = looked.contents.written()
    finally:
        looked.contents.put_back()
    if name:
        raise TraceError(f"{type(root).__name__} cannot be traced: {written_into(name)}")
    program.module.meta["overwrites"] = looked.overwritten()
    return output


def _check_faithful(root: nn.Module, program: Program) -> None:
    """Run model and trace on the example inputs in evaluation mode: they must agree to the bit.

    torch's transformer layers run the operators that a trace has; fused, they round otherwise.
    """
    written: list[str] = program.module.meta["written"]
    twin: nn.Module | None = copy_model(root) if written else None
    inputs = (program.args, program.kwargs)
    with evaluating(root, program.module), torch.no_grad(), without_fused_layers():
        try:
            expected = _run_and_look(root, program, inputs)
        except TraceError:
            raise
        except Exception as error:
            raise ExampleInputError(
                f"{type(root).__name__} does not run on the example inputs "
                f"{describe(inputs)}: {type(error).__name__}: "
                f"{str(error).strip()}"
            ) from error
        try:
            actual = program.run()
        except Exception as error:
            raise TraceError(
                f"{type(root).__name__} does not run when traced: {type(error).__name__}: "
                f"{str(error).strip()}; leave arguments out of example_inputs that are not tensors"
            ) from error
        if twin is not None and not (
            same(expected, run_alike(root, inputs))
            and same(expected, _run_second(twin, inputs))
            and same(expected, _run_late(twin, inputs, written))
        ):
            raise TraceError(
                f"{type(root).__name__} computes something else when it was run before: its "
                f"forward keeps something in self.{written[0]}; a trace forgets that, so pass what "
                "is kept as an argument, and return it"
            )
    _check_on_others(root, program)
    if not same(expected, actual):
        if same(expected, actual, nan=True):
            raise ExampleInputError(
                f"{type(root).__name__} returns NaN on the example inputs {describe(inputs)}, of "
                "which nothing can be proved; give others"
            )
        raise TraceError(
            f"{type(root).__name__} computes something else when traced (random numbers or global "
            "state in its forward, `x += y` where x has a second name, hooks of its own?); "
            "its outputs on the same inputs differ"
        )
