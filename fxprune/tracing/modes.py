"""One graph for both modes: what training and evaluation do differently, read from a live flag.

torch.fx freezes `self.training` at what it was when a model was traced. Two traces, one in each
mode, show where: a flag or a rate in which they differ follows the mode, and becomes a read of the
module's flag. Any other difference means that one graph cannot serve both.
"""

import functools
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree

from fxprune.runtime.kinds import MADE_BY_TRACING
from fxprune.tracing.stand_ins import standing_in


def by_mode(training: bool, in_evaluation: Any, in_training: Any) -> Any:
    """Return what a module computes with in the mode it is in."""
    return in_training if training else in_evaluation


def follows_mode(node: fx.Node) -> bool:
    """Tell whether a node reads a module's training flag."""
    return node.op == "get_attr" and str(node.target).rpartition(".")[2] == "training"


def forget_counts(root: nn.Module, graph: fx.Graph) -> None:
    """Leave out the counting of batches in a graph of training; no output depends on it.

    Batch norms with a momentum never read the count (without one they cannot be traced into), and
    what becomes a layer of torch's own counts for itself.
    """
    for node in reversed(graph.nodes):
        held = node.args[0] if node.target == "add_" and node.args else None
        if not isinstance(held, fx.Node) or held.op != "get_attr" or node.users:
            continue
        owner, _, name = str(held.target).rpartition(".")
        if name == "num_batches_tracked" and isinstance(root.get_submodule(owner), _BatchNorm):
            graph.erase_node(node)
            if not held.users:
                graph.erase_node(held)


@contextmanager
def mode_questions() -> Generator[set[nn.Module]]:
    """Yield a set that gathers the modules of which anybody reads `training` meanwhile."""
    asked: set[nn.Module] = set()

    def read(module: nn.Module) -> bool:
        asked.add(module)
        own = vars(module)
        return bool(own["training"] if "training" in own else module.__getattr__("training"))

    with answering_modes(read):
        yield asked


@contextmanager
def answering_modes(answer: Callable[[nn.Module], Any]) -> Generator[None]:
    """Let `answer` say what whoever reads the `training` of a module meanwhile is told.

    A module keeps the flag among its own attributes; a property of the class goes before those.
    """

    def write(module: nn.Module, flag: bool) -> None:
        vars(module)["training"] = flag

    with standing_in((nn.Module, "training", property(answer, write))):
        yield


def flags_after(root: nn.Module, *, training: bool) -> dict[str, bool]:
    """Return the flag of every module after `root.train(training)`, which a class may override."""
    root.train(training)
    modules = root.named_modules(remove_duplicate=False)
    return {path: module.training for path, module in modules}


def overrides_train(root: nn.Module) -> bool:
    """Tell whether a module in `root` has a `train` of its own (norms that stay in evaluation)."""
    usual = nn.Module.train
    return any(type(m).train is not usual or "train" in vars(m) for m in root.modules())


def keep_flags_(
    traced: nn.Module, in_training: dict[str, bool], others: dict[str, bool]
) -> set[str]:
    """Let the modules of a traced model follow `train` as they did; return those that needed it.

    The flag of the model itself is read in no graph, where it is one and the same in both modes.
    in_training, others: what `flags_after` said of the model, of training and of evaluation.
    """
    deviating: set[str] = set()
    for mode, flags in ((True, in_training), (False, others)):
        found = flags_after(traced, training=mode)
        deviating |= {path for path, flag in found.items() if path and flag != flags[path]}
    for path in deviating:
        module: Any = traced.get_submodule(path)
        module.train = functools.partial(_follow, module, (others[path], in_training[path]))
    return deviating


def _follow(module: nn.Module, flags: tuple[bool, bool], mode: bool = True) -> nn.Module:
    """Stand in for `module.train`: its flag in evaluation and in training is one of `flags`."""
    for child in module.children():
        child.train(mode)
    module.training = flags[mode]
    return module


def steady_flags(after: Sequence[dict[str, bool]]) -> set[str]:
    """Return the paths of the modules whose flag is the same in training and in evaluation.

    after: what `flags_after` said of either mode, nothing if all modules follow their model.
    """
    return {path for path in after[0] if after[0][path] == after[1][path]} if after else set()


def same_structure(root: nn.Module, training: fx.Graph, evaluation: fx.Graph) -> bool:
    """Tell whether both graphs run the same operators on the same arguments, rates apart."""
    if len(training.nodes) != len(evaluation.nodes):
        return False
    twins = dict(zip(training.nodes, evaluation.nodes, strict=True))
    return all(
        yes.op == no.op
        and _same_target(root, yes, no)
        and _alike(yes.args, no.args, twins)
        and _alike(yes.kwargs, no.kwargs, twins)
        for yes, no in twins.items()
    )


def copy_alike(training: fx.Graph, evaluation: fx.Graph) -> None:
    """Let either graph copy (`x.contiguous()`) where the other does, if that is all they differ in.

    A copy changes no number; models make some in training only (the residual blocks of diffusers).
    """
    shorter, longer = sorted((training, evaluation), key=lambda graph: len(graph.nodes))
    twins = _twins_but_for_copies(longer, shorter)
    last: Any = None
    for node in longer.nodes if twins else ():
        if node not in twins:
            read: Any = twins[node.all_input_nodes[0]]
            with shorter.inserting_after(last):
                copy = shorter.call_method("contiguous", (read, *node.args[1:]), node.kwargs)
            copy.meta = dict(node.meta)
            for user in node.users:
                if user in twins:
                    twins[user].replace_input_with(read, copy)
            twins[node] = copy
        last = twins[node]


def _twins_but_for_copies(longer: fx.Graph, shorter: fx.Graph) -> dict[fx.Node, fx.Node]:
    """Return who is who, nothing if more differs than that the longer graph copies, or nothing."""
    if len(longer.nodes) == len(shorter.nodes):
        return {}
    twins: dict[fx.Node, fx.Node] = {}
    others = list(reversed(shorter.nodes))
    for node in longer.nodes:
        if others and _may_be_twins(node, others[-1]):
            twins[node] = others.pop()
        elif node.op != "call_method" or node.target != "contiguous":
            return {}
    return {} if others else twins


def _may_be_twins(one: fx.Node, other: fx.Node) -> bool:
    return one.op == other.op and (one.op == "get_attr" or one.target == other.target)


def _same_target(root: nn.Module, yes: fx.Node, no: fx.Node) -> bool:
    """Compare targets; torch.fx gives a constant tensor another name in every trace."""
    if yes.target == no.target:
        return True
    if yes.op != "get_attr" or not str(yes.target).startswith(MADE_BY_TRACING):
        return False
    left, right = (getattr(root, str(node.target), None) for node in (yes, no))
    if not isinstance(left, Tensor) or not isinstance(right, Tensor):
        return False
    return left.dtype == right.dtype and torch.equal(left, right)


def _alike(yes: Any, no: Any, twins: Mapping[fx.Node, fx.Node]) -> bool:
    """Compare arguments of twin nodes: equal, or flags and rates that follow the mode."""
    if isinstance(yes, fx.Node):
        return twins[yes] is no
    if isinstance(yes, slice) and isinstance(no, slice):
        return _alike((yes.start, yes.stop, yes.step), (no.start, no.stop, no.step), twins)
    if isinstance(yes, (tuple, list)) and isinstance(no, (tuple, list)):
        pairs = zip(yes, no, strict=False)
        return len(yes) == len(no) and all(_alike(a, b, twins) for a, b in pairs)
    if isinstance(yes, Mapping) and isinstance(no, Mapping):
        return yes.keys() == no.keys() and all(_alike(yes[key], no[key], twins) for key in yes)
    return _follows_mode(yes, no) or yes is no or (type(yes) is type(no) and yes == no)


def _follows_mode(yes: Any, no: Any) -> bool:
    """Tell whether two constants are a flag or a rate that differs; sizes must not."""
    types = {type(yes), type(no)}
    return (types == {bool} or (float in types and types <= {int, float})) and yes != no


def differ_in_constants(one: fx.Graph, other: fx.Graph) -> bool:
    """Tell whether two graphs of one structure have flags or rates that differ."""
    return any(
        _follows_mode(a, b)
        for left, right in zip(one.nodes, other.nodes, strict=True)
        for a, b in zip(_plain(left), _plain(right), strict=True)
    )


def _plain(node: fx.Node) -> list[Any]:
    return pytree.tree_leaves((node.args, node.kwargs))


def thaw_modes(training: fx.Graph, evaluation: fx.Graph, steady: Collection[str] = ()) -> None:
    """Turn flags and rates that differ between the modes into reads of the training flag.

    It is that of the module in whose forward they are, but of the model where that flag, one of
    `steady`, is the same in both modes: somebody else's was handed on.
    """
    for in_training, node in list(zip(training.nodes, evaluation.nodes, strict=True)):
        stack = node.meta.get("nn_module_stack") or {"": ("", None)}
        owner = list(stack.values())[-1][0]
        flag_name = f"{owner}.training" if owner and owner not in steady else "training"

        def thaw(yes: Any, no: Any, at: fx.Node = node, name: str = flag_name) -> Any:
            if _follows_mode(yes, no):
                with evaluation.inserting_before(at):
                    flag = evaluation.get_attr(name)
                    if (yes, no) != (True, False):
                        flag = evaluation.call_function(by_mode, (flag, no, yes))
                        flag.meta["is_wrapped"] = True  # it asks for the flag
                flag.meta["source"] = at.meta["source"]
                return flag
            if isinstance(no, (tuple, list)):
                return type(no)(thaw(a, b) for a, b in zip(yes, no, strict=True))
            if isinstance(no, Mapping):
                return {key: thaw(yes[key], no[key]) for key in no}
            return no

        node.args = thaw(in_training.args, node.args)
        node.kwargs = thaw(in_training.kwargs, node.kwargs)
