"""Two graphs of one model, where training and evaluation run other operators.

Auxiliary heads, added noise, a loss that the forward returns: no one graph says both. Analyses and
costs are those of evaluation, which is what a model is finalised for; a gate that goes behind a
node there goes behind its twins in the graph of training, too. A gated model holds both in one
graph, one after the other, of which only that of its mode is run.
"""

import copy
import re
from collections import defaultdict
from collections.abc import Collection, Hashable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import fx, nn
from torch.fx.graph import CodeGen, PythonCode
from torch.fx.graph_module import _copy_attr
from torch.fx.node import has_side_effect, map_arg

from fxprune.errors import TraceError
from fxprune.runtime.kinds import CALLS, MADE_BY_TRACING

Flags = Mapping[str, tuple[bool, bool]]
"""What parts of a model that ask for their mode are told in training, and in evaluation."""
Twins = dict[fx.Node, list[fx.Node]]
_EVALUATION, _TRAINING = "_forward_in_evaluation", "_forward_in_training"
_NAMES = {True: "training", False: "evaluation"}


def in_either_mode(training: bool, in_evaluation: Any, in_training: Any) -> Any:
    """Return what a model gives in the mode it is in; what a graph with both modes ends with."""
    return in_training if training else in_evaluation


def other_mode(flag: bool, expected: bool, path: str) -> str:
    """Say what is wrong if a part is not in the mode that the model around it has it in."""
    if flag == expected:
        return ""
    return (
        f"{path} is in {_NAMES[flag]} instead of {_NAMES[expected]}, where train() or eval() of "
        "the whole model puts it; training runs other operators than evaluation, and a graph is "
        "one of either: call train() or eval() of the whole model"
    )


@has_side_effect
def require_mode(flag: bool, expected: bool, path: str) -> None:
    """Raise `TraceError` unless a part is in the mode that the graph around it is one of."""
    if flag != expected:
        raise TraceError(other_mode(flag, expected, path))


def find_twins(root: nn.Module, evaluation: fx.Graph, training: fx.Graph) -> Twins:
    """Return which nodes of training do what a node of evaluation does, on the same channels.

    They are one operator of one module's forward, and the same layers make what they read. Called
    as often, the first is the first's twin. Called once, all of training's are twins, if there is
    nothing else between them and those layers than in evaluation.
    """
    layers = {path for path, m in root.named_modules() if any(True for _ in m.parameters())}
    ways = _ways(evaluation, layers) | _ways(training, layers)
    there = _by_place(training, ways)
    twins: Twins = {}
    for place, nodes in _by_place(evaluation, ways).items():
        others = there.get(place, [])
        if len(nodes) == len(others):
            twins |= {node: [other] for node, other in zip(nodes, others, strict=True)}
        elif len(nodes) == 1 and all(ways[other] == ways[nodes[0]] for other in others):
            twins |= {nodes[0]: others} if others else {}
    return twins


@dataclass(frozen=True)
class _Way:
    """The parameters, and modules with parameters, that make what a node gives; and how.

    by: stands for the operators from there to the node.
    """

    makers: frozenset[str]
    by: int


def _by_place(graph: fx.Graph, ways: Mapping[fx.Node, _Way]) -> dict[Hashable, list[fx.Node]]:
    """Return a graph's operators by what they are, in whose forward, and by what they read."""
    found: defaultdict[Hashable, list[fx.Node]] = defaultdict(list)
    for node in graph.nodes:
        if node.op in CALLS:
            stack = node.meta.get("nn_module_stack") or {"": ("", None)}
            owner = list(stack.values())[-1][0]
            found[node.op, node.target, owner, ways[node].makers].append(node)
    return found


def _ways(graph: fx.Graph, layers: Collection[str]) -> dict[fx.Node, _Way]:
    ways: dict[fx.Node, _Way] = {}
    for node in graph.nodes:
        is_maker = node.op == "get_attr" or (node.op == "call_module" and node.target in layers)
        if is_maker or node.op == "placeholder":
            # torch.fx gives a constant tensor another name in every trace.
            name = str(node.target) if not str(node.target).startswith(MADE_BY_TRACING) else ""
            ways[node] = _Way(frozenset((name,)), hash(name))
            continue
        makers = frozenset[str]().union(*(ways[one].makers for one in node.all_input_nodes))
        read = map_arg((node.args, node.kwargs), lambda one: ways[one].by)
        ways[node] = _Way(makers, hash((node.op, node.target, repr(read))))
    return ways


def hold_(module: fx.GraphModule, root: nn.Module, graph: fx.Graph) -> None:
    """Let a traced module of `root` hold what another graph of it calls and reads."""
    for node in graph.nodes:
        if node.op in ("call_module", "get_attr"):
            _copy_attr(root, module, str(node.target))


def missing_part(module: fx.GraphModule, training: fx.Graph) -> str:
    """Return what a graph of training uses that the module has no more; "" if it has all."""
    used = (str(node.target) for node in training.nodes if node.op in ("call_module", "get_attr"))
    return next((path for path in used if not _has(module, path)), "")


def join(evaluation: fx.Graph, training: fx.Graph, told: Flags | None = None) -> None:
    """Put the graph of training behind that of evaluation, which has the same inputs.

    told: parts that either requires to be in its mode, as they have asked for it.
    """
    _require_modes(evaluation, training, told or {})
    end = evaluation.output_node()
    pairs = (graph.find_nodes(op="placeholder") for graph in (training, evaluation))
    known: dict[fx.Node, fx.Node] = dict(zip(*pairs, strict=True))
    with evaluation.inserting_before(end):
        flag = evaluation.create_node("get_attr", "training")  # asks no module whether it has one
        output = evaluation.graph_copy(training, known)
        result = evaluation.call_function(in_either_mode, (flag, end.args[0], output))
    end.args = (result,)


def _require_modes(evaluation: fx.Graph, training: fx.Graph, told: Flags) -> None:
    """Let either graph refuse to run where a part is not in the mode it was traced in.

    The model's own flag says which graph runs. Where `train` leaves a part as it is, its flag
    decides nothing; nor can anyone set that of a part of which nothing was left.
    """
    root = evaluation.owning_module
    there = set[str]() if root is None else {path for path, _ in root.named_modules()}
    for path, (in_training, in_evaluation) in told.items():
        if in_training == in_evaluation or path not in there:
            continue
        for graph, expected in ((training, in_training), (evaluation, in_evaluation)):
            first = next(node for node in graph.nodes if node.op != "placeholder")
            with graph.inserting_before(first):
                flag = graph.create_node("get_attr", f"{path}.training")
                required = graph.call_function(require_mode, (flag, expected, path))
            required.meta["is_wrapped"] = True  # it asks for the flag


def drop_requirements_(graph: fx.Graph) -> None:
    """Let a graph of one mode run whatever mode its parts are in."""
    for node in graph.find_nodes(op="call_function", target=require_mode):
        flag = node.args[0]
        graph.erase_node(node)
        if isinstance(flag, fx.Node) and not flag.users:
            graph.erase_node(flag)


def _has(module: nn.Module, path: str) -> bool:
    found: Any = module
    for name in path.split("."):
        found = getattr(found, name, None)
        if found is None:
            return False
    return True


def has_both_modes(graph: fx.Graph) -> bool:
    """Tell whether a graph is one of evaluation with one of training behind it."""
    return _choice(graph) is not None


def _choice(graph: fx.Graph) -> fx.Node | None:
    end = next(iter(reversed(graph.nodes)), None)
    last: Any = end.args[0] if end is not None and end.op == "output" else None
    is_choice = isinstance(last, fx.Node) and last.target is in_either_mode
    return last if is_choice else None


def keep_mode_(graph: fx.Graph, *, training: bool) -> None:
    """Leave the graph of one mode of a graph of both."""
    choice = _choice(graph)
    if choice is None:
        return
    flag, in_evaluation, in_training = choice.args
    of_training = nodes_of_training(graph)
    kept = {"placeholder", "output"}
    graph.output_node().args = (in_training if training else in_evaluation,)
    for node in reversed(graph.nodes):
        is_other = node.op not in kept and (node in of_training) != training
        if is_other or node is choice or node is flag:
            graph.erase_node(node)


def of_mode(graph: fx.Graph, *, training: bool) -> fx.Graph:
    """Return the graph of one mode; the given one stays as it is."""
    part = copy.deepcopy(graph)
    keep_mode_(part, training=training)
    return part


def nodes_of_training(graph: fx.Graph) -> set[fx.Node]:
    """Return the nodes that run in training only, of a graph of both modes; of others none."""
    choice = _choice(graph)
    if choice is None:
        return set()
    operators = [node for node in graph.nodes if node.op not in ("placeholder", "output")]
    return set(operators[operators.index(choice.args[0]) :])


class CodeGenOfBothModes(CodeGen):
    """Writes one function for each mode, and a forward that calls that of its mode."""

    def _gen_python_code(self, nodes: Any, root_module: str, namespace: Any, **options: Any) -> Any:
        graph: fx.Graph = nodes.graph
        if not has_both_modes(graph):
            return super()._gen_python_code(nodes, root_module, namespace, **options)
        in_evaluation, in_training = (
            self.code_of(graph.owning_module, of_mode(graph, training=mode), root_module, options)
            for mode in (False, True)
        )
        return _code_of_both(graph, in_evaluation, in_training)

    def code_of(self, module: Any, graph: fx.Graph, root_module: str, options: Any) -> PythonCode:
        """Write the code of one mode."""
        graph.set_codegen(CodeGen())
        return graph.python_code(root_module, **options)


def _code_of_both(
    graph: fx.Graph, in_evaluation: PythonCode, in_training: PythonCode
) -> PythonCode:
    """Return code that runs that of the mode its module is in."""
    known, in_training = in_evaluation.globals, _renamed(in_training, in_evaluation.globals)
    others = in_training.globals
    heads: list[str] = []
    bodies: list[str] = []
    for code, name in ((in_evaluation, _EVALUATION), (in_training, _TRAINING)):
        head, line, body = code.src.partition("def forward(")
        heads.append(head)
        bodies.append(f"{line.replace('forward', name)}{body}".rstrip())
    signature, _, _ = in_evaluation.src.partition("def forward(")[2].partition("\n")
    inputs = "".join(f", {node.target}" for node in graph.find_nodes(op="placeholder"))
    forward = [
        f"def forward({signature}",
        "    if self.training:",
        f"        return {_TRAINING}(self{inputs})",
        f"    return {_EVALUATION}(self{inputs})",
    ]
    wrapped = dict.fromkeys(line for head in heads for line in head.splitlines() if line)
    source = "\n".join(["", *wrapped, "", *bodies, "", *forward, ""])
    return replace(in_evaluation, src=source, globals={**others, **known}, _lineno_map={})


def _renamed(code: PythonCode, known: Mapping[str, Any]) -> PythonCode:
    """Return code that calls nothing by a name that stands for something else (local functions)."""
    source, names = code.src, dict(code.globals)
    for name in names.keys() & known.keys():
        if known[name] is not names[name] and known[name] != names[name]:
            names[f"{name}_in_training"] = names.pop(name)
            source = re.sub(rf"(?<![.\w]){name}\b", f"{name}_in_training", source)
    return replace(code, src=source, globals=names)
