"""The parts of a model that are programs, where the whole is none: maximal traceable submodules.

A detection model decides in Python what to compute. Its backbone and its heads do not, and whatever
replaces them there, with inputs and outputs of the same shape, leaves the model what it is. The
search goes from the root down; a module stands for a region only if every recorded call of it and
the whole model stay the same to the bit with a trace in its place. Where outside code could tell
the difference (tied tensors, methods, hooks), its children are tried instead.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from fxprune.errors import ExampleInputError, FxpruneError, NothingToDoError, TraceError
from fxprune.gating.gates import gate_owners
from fxprune.parts.recording import Call, Recording, Uses, record, uses_in
from fxprune.programs.observation import require_observable
from fxprune.programs.pipeline import Change
from fxprune.programs.program import Program, capture
from fxprune.runtime.storages import storage_of
from fxprune.tracing.two_modes import nodes_of_training
from fxprune.user_models.beside import names_said
from fxprune.user_models.inputs import Inputs, describe, same, tensors_of
from fxprune.user_models.modules import copy_model, evaluating
from fxprune.user_models.naming import renamed_in

_WITHOUT_GRADIENTS = (
    "the model calls it under torch.no_grad, where nothing says what its units are worth"
)


# What lists tensors of a module, or goes through such lists; and which.
_LISTS: dict[str, set[str]] = {
    "parameters": {
        *("parameters", "named_parameters", "state_dict"),
        *("update_parameters", "parameters_to_vector", "vector_to_parameters"),
    },
    "buffers": {"buffers", "named_buffers", "state_dict"},
}

# How many of a module's methods a reason names; models of some libraries have a hundred.
_SHOWN = 5


@dataclass(frozen=True)
class Region:
    """A submodule as a program of its own, on the inputs of one of its recorded calls."""

    path: str
    program: Program
    calls: tuple[Call, ...]

    def other_inputs(self) -> list[Inputs]:
        """Return the recorded inputs that differ from the program's, and each other, in shape."""
        example = (self.program.args, self.program.kwargs)
        found = {describe(inputs): inputs for inputs in (*(c.inputs for c in self.calls), example)}
        del found[describe(example)]
        return list(found.values())


def find_regions(
    root: nn.Module,
    inputs: Inputs,
    *,
    in_training: bool,
    treat: Callable[[Region], Any],
    within: Iterable[str] = ("",),
) -> tuple[list[Region], list[Change]]:
    """Return the regions of `root`, which stays as it is, and what was tried in vain, and why.

    within: below which submodules to search. in_training: only regions that mean the same in both
    modes; otherwise masks become permanent.
    treat: may edit a region's program; raises `NothingToDoError` where that is of no use.
    """
    return _Search(root, inputs, in_training, treat).run(within)


def recorded_region(root: nn.Module, path: str, calls: list[Call], remembered: Inputs) -> Region:
    """Return a region found before, on what it is called with now, or was when it was found."""
    args, kwargs = (_example(calls) or Call(remembered, None)).inputs
    return Region(path, Program(copy_model(root.get_submodule(path)), args, kwargs), tuple(calls))


def leaves_of(program: Program) -> list[str]:
    """Return the submodules of a program that could not be traced, each once.

    What training alone calls is not among them: it is not finalised.
    """
    graph = program.graph
    of_training = nodes_of_training(graph)
    leaves = [node for node in graph.nodes if node.meta.get("leaf_because")]
    return [*dict.fromkeys(str(node.target) for node in leaves if node not in of_training)]


def _own_names(program: Program) -> list[str]:
    """Return the leaves of a program by the names that they have in the user's module."""
    renamed = {new: old for old, new in renamed_in(program.module).items()}
    tops = [leaf.partition(".") for leaf in leaves_of(program)]
    return [f"{renamed.get(top, top)}{dot}{rest}" for top, dot, rest in tops]


def put_in_place(root: nn.Module, path: str, module: nn.Module) -> None:
    """Replace the submodule at `path` by `module`, under all names it has."""
    old = root.get_submodule(path)
    for name, part in list(root.named_modules(remove_duplicate=False)):
        if part is old:
            owner, _, own = name.rpartition(".")
            root.get_submodule(owner)._modules[own] = module


class _Search:
    def __init__(
        self, root: nn.Module, inputs: Inputs, in_training: bool, treat: Callable[[Region], Any]
    ) -> None:
        self.root, self.inputs = root, inputs
        self.in_training, self.treat = in_training, treat
        self.uses: Uses = uses_in(root, inputs)
        self.met: set[nn.Module] = {root}
        self.found: list[Region] = []
        self.refused: list[Change] = []

    def run(self, within: Iterable[str]) -> tuple[list[Region], list[Change]]:
        """Search level by level, as the arguments of one level fit into memory."""
        level = [below for path in within for below in self._below(path)]
        while level:
            recording = record(self.root, self.inputs, level)
            level = [below for path in level for below in self._visit(path, recording)]
        return self.found, self.refused

    def _visit(self, path: str, recording: Recording) -> Iterable[str]:
        """Make a region of the module at `path`, or return where to search instead."""
        if self.in_training and self.root.get_submodule(path) in self.uses.without_gradients:
            self.refused.append(Change(path, f"left alone: {_WITHOUT_GRADIENTS}"))
            return ()
        try:
            region = self._region(path, recording)
            useless = self._useless(region)
            if not useless:
                self._require_order(region)
                self._stand_in(region, recording)
        except FxpruneError as error:
            self.refused.append(Change(path, f"no region: {str(error).split('; ')[0]}"))
            return self._below(path)
        if useless:
            self.refused.append(Change(path, f"left alone: {useless}"))
            return self._called(f"{path}.{leaf}" for leaf in _own_names(region.program))
        self.found.append(region)
        return ()

    def _useless(self, region: Region) -> str:
        """Treat a region; say why that was of no use, or nothing."""
        try:
            self.treat(region)
        except NothingToDoError as error:
            return str(error)
        return ""

    def _require_order(self, region: Region) -> None:
        """Raise where code around a region may count on the order of its parameters.

        A graph module lists them in the order of their use, and so does every copy of it.
        """
        module = self.root.get_submodule(region.path)
        before, after = _orders(module), _orders(region.program.module)
        moved = [kind for kind in _LISTS if before[kind] != after[kind]]
        if not moved:
            return
        inside = set(module.modules())
        names = names_said([part for part in self.root.modules() if part not in inside])
        for kind in moved:
            if said := sorted(names & _LISTS[kind]):
                raise TraceError(
                    f"it would list its {kind} in the order of their use, and code around it calls "
                    f"{said[0]}, which may pair them with another's: make its layers in the order "
                    "in which forward uses them"
                )

    def _below(self, path: str) -> Iterator[str]:
        """Yield the nearest modules below `path` that are called with tensors."""
        for name, child in self.root.get_submodule(path).named_children():
            if child in self.met:
                continue
            self.met.add(child)
            below = f"{path}.{name}" if path else name
            if child in self.uses.called:
                yield below
            else:
                yield from self._below(below)

    def _called(self, paths: Iterable[str]) -> list[str]:
        return [path for path in paths if self.root.get_submodule(path) in self.uses.called]

    def _region(self, path: str, recording: Recording) -> Region:
        module, calls = self.root.get_submodule(path), recording.calls[path]
        if reason := _visible_outside(module) or self._reached_from_outside(module):
            raise TraceError(reason)
        example = _example(calls)
        if example is None:
            raise ExampleInputError("it is called with empty tensors only on the example inputs")
        program = capture(module, example.inputs, inside=True)
        require_observable(program)
        if self.in_training and program.untrained:
            raise TraceError(f"it does something else in training: {program.untrained}")
        if self.in_training and program.other_mode:
            raise TraceError(program.other_mode)
        _carry_attributes(module, program.module)
        if not all(_agrees(program.module, call) for call in calls):
            raise TraceError("its trace on one call computes something else on another")
        return Region(path, program, tuple(calls))

    def _reached_from_outside(self, module: nn.Module) -> str:
        """Say which tensor of `module` someone else holds, or uses while `module` does not run."""
        names = [*self.root.named_modules(remove_duplicate=False)]
        tops = [name for name, part in names if part is module]
        mine = {storage_of(tensor): name for name, tensor in _tensors(module)}
        for name, part in names:
            if any(name == top or name.startswith(f"{top}.") for top in tops):
                continue
            for tensor in (*part.parameters(recurse=False), *part.buffers(recurse=False)):
                if storage_of(tensor) in mine:
                    return f"its {mine[storage_of(tensor)]} is shared with {name or 'the model'}"
        for name, tensor in _tensors(module):
            if module not in self.uses.inside.get(id(tensor), {module}):
                return f"its {name} is used from outside of it"
        return ""

    def _stand_in(self, region: Region, recording: Recording) -> None:
        """Raise unless the model with a region in place of its module is the same to the bit."""
        path = region.path
        module = self.root.get_submodule(path)
        put_in_place(self.root, path, region.program.module)
        try:
            again = record(self.root, self.inputs, [path])
        finally:
            put_in_place(self.root, path, module)
        if len(again.calls[path]) != len(recording.calls[path]):
            raise TraceError("the model calls it by other ways than its name")
        if not same(again.outputs, recording.outputs):
            raise TraceError("the model computes something else with a trace in its place")


def _orders(module: nn.Module) -> dict[str, list[str]]:
    """Return the names of parameters and of buffers in their order, but for those of gates."""
    added = ("gates.", "penalties.") if gate_owners(module) else ()
    lists = {"parameters": module.named_parameters(), "buffers": module.named_buffers()}
    return {
        kind: [name for name, _ in tensors if not name.startswith(added)]
        for kind, tensors in lists.items()
    }


def _agrees(trace: fx.GraphModule, call: Call) -> bool:
    try:
        with evaluating(trace):
            return same(call.output, Program(trace, *call.inputs).run())
    except Exception:  # it does not even take what the module took
        return False


def _visible_outside(module: nn.Module) -> str:
    """Say what callers of a module could ask it for besides a call."""
    if any((module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)):
        return "it has hooks"
    methods = sorted(
        name
        for kind in _own_classes(module)
        for name, value in vars(kind).items()
        if not name.startswith("_") and name != "forward" and not _is_plain(value)
    )
    shown = [*methods[:_SHOWN], *(["…"] if len(methods) > _SHOWN else [])]
    return f"others may call its {', '.join(shown)}" if methods else ""


def _own_classes(module: nn.Module) -> list[type]:
    """Return the classes of a module that torch does not bring."""
    kinds = [kind for kind in type(module).__mro__ if issubclass(kind, nn.Module)]
    return [kind for kind in kinds if not kind.__module__.startswith("torch.")]


def _carry_attributes(module: nn.Module, trace: fx.GraphModule) -> None:
    """Give a trace the plain attributes of its module, which outside code may read."""
    known = dir(trace)
    given = [*(vars(kind) for kind in reversed(_own_classes(module))), vars(module)]
    plain = {
        name: value
        for attributes in given
        for name, value in attributes.items()
        if not name.startswith("_") and name != "training" and _is_plain(value)
    }
    for name, value in plain.items():
        if name in known and getattr(trace, name) is value:
            continue  # torch's own, of a module that was a graph module before
        if name in known:
            raise TraceError(f"its attribute {name} means something else in a graph module")
        setattr(trace, name, value)
    # A deep copy of a graph module keeps these only.
    trace.meta["_user_preserved_attributes"] = plain


def _is_plain(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        members: Iterable[Any] = value
        return all(map(_is_plain, members))
    return value is None or isinstance(value, (bool, int, float, str))


def _example(calls: list[Call]) -> Call | None:
    """Return the first call with something in every tensor."""
    return next((c for c in calls if all(t.numel() for t in tensors_of(c.inputs))), None)


def _tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [*module.named_parameters(), *module.named_buffers()]
