"""What a forward leaves in attributes for others to read: losses of parts, attention maps.

    self.balance = load.square().mean()  # in the training loop: loss + model.experts.balance

A gated model leaves them there as well, by an operator without a result that reads what the
attribute holds. What is finalised leaves none, so that nothing is planned by them: they are set
aside meanwhile, with all that is computed for them alone.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

from torch import fx, nn
from torch.fx.node import has_side_effect

from fxprune.gating.gates import linear_gate, width_gate


class _Owner:
    """Stands in a graph for the module that runs it; its code says `self`."""

    def __repr__(self) -> str:
        return "self"

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Owner":
        return self

    def __reduce__(self) -> str:
        return "OWNER"


OWNER = _Owner()


@has_side_effect
def leave_note(owner: Any, path: str, value: Any, beside: Any = None) -> None:
    """Set an attribute of a part; an interpreter, which has no module to give, sets none.

    beside: something traced; code that is traced again would not keep a call without any.
    """
    if not isinstance(owner, nn.Module):
        return
    *way, name = path.split(".")
    for part in way:
        if not hasattr(owner, part):  # of what has no tensors nothing else is left
            setattr(owner, part, nn.Module())
        owner = getattr(owner, part)
    setattr(owner, name, value)


def notes_in(graph: fx.Graph) -> list[fx.Node]:
    """Return the nodes that set attributes."""
    return graph.find_nodes(op="call_function", target=leave_note)


def notes_behind(node: fx.Node) -> dict[fx.Node, None]:
    """Return the notes that hold a node, or what is computed from it."""
    found: dict[fx.Node, None] = {}
    waiting, met = [node], {node}
    while waiting:
        one = waiting.pop()
        if one.target is leave_note:
            found[one] = None
        waiting += (new := one.users.keys() - met)
        met |= new
    return found


def noted(graph: fx.Graph) -> set[str]:
    """Return the attributes that a graph sets, as "part.name"."""
    return {str(node.args[1]) for node in notes_in(graph)}


def leave_constant(graph: fx.Graph, path: str, value: Any) -> None:
    """Let a graph set an attribute to a plain value."""
    args: Any = (OWNER, path, value, *graph.find_nodes(op="placeholder")[:1])
    with graph.inserting_before(graph.output_node()):
        node = graph.call_function(leave_note, args)
    node.meta["is_wrapped"] = True


def forget_(graph: fx.Graph, paths: Collection[str]) -> None:
    """Let a graph set some attributes no more."""
    for node in notes_in(graph):
        if node.args[1] in paths:
            graph.erase_node(node)


@dataclass
class Aside:
    """What serves notes alone, out of its graph.

    reads: what its inputs are there. places: the node that each operator stood before.
    """

    graph: fx.Graph
    reads: dict[fx.Node, fx.Node]
    places: dict[fx.Node, fx.Node]


def set_aside(graph: fx.Graph, staying: Collection[fx.Node]) -> Aside:
    """Take out of a graph what serves notes alone, but what is `staying`, as it writes or draws."""
    alone = serving_notes(graph, staying)
    aside = Aside(fx.Graph(), {}, {})
    copies: dict[fx.Node, fx.Node] = {}
    for node in alone:
        for source in node.all_input_nodes:
            if source not in copies:
                copies[source] = aside.graph.placeholder(source.name)
                aside.reads[copies[source]] = source
        copies[node] = aside.graph.node_copy(node, lambda one: copies[one])
    anchor = graph.output_node()
    for node in reversed(graph.nodes):
        if node in alone:
            aside.places[copies[node]] = anchor
            graph.erase_node(node)
        else:
            anchor = node
    return aside


def put_back(graph: fx.Graph, aside: Aside) -> None:
    """Put into a graph what was set aside; where a gate stands by now, it reads the gate."""
    found = {inside: _gated(node) for inside, node in aside.reads.items()}
    for node in aside.graph.nodes:
        if node not in found:
            with graph.inserting_before(aside.places[node]):
                found[node] = graph.node_copy(node, lambda one: found[one])


def serving_notes(graph: fx.Graph, staying: Collection[fx.Node]) -> dict[fx.Node, None]:
    """Return the notes, and what nobody else reads, in order."""
    alone: dict[fx.Node, None] = {}
    for node in reversed(graph.nodes):
        serves = node.target is leave_note or (node.users.keys() <= alone.keys() and _is_pure(node))
        if serves and node not in staying:
            alone[node] = None
    return dict.fromkeys(reversed(alone))


def _is_pure(node: fx.Node) -> bool:
    """Tell whether a node may go if nobody reads it."""
    return node.op not in ("placeholder", "output") and not node.is_impure()


def _gated(node: fx.Node) -> fx.Node:
    """Return the last gate behind a node, the node itself if there is none."""
    gates = (width_gate, linear_gate)
    while gate := next((u for u in node.users if u.target in gates and u.args[-2] is node), None):
        node = gate
    return node


def left_in(module: nn.Module, paths: Collection[str]) -> dict[str, Any]:
    """Return what attributes hold, by "part.name"."""
    return {f"{path}.{name}".lstrip("."): value for path, name, _, value in _held(module, paths)}


def erase_notes_(module: nn.Module, paths: Collection[str]) -> None:
    """Delete attributes that a run has set."""
    for _, name, part, _ in list(_held(module, paths)):
        del vars(part)[name]


def begin_notes_(module: nn.Module, paths: set[str], model: nn.Module) -> None:
    """Delete attributes that a run has set, but for plain values that they have in a model."""
    erase_notes_(module, paths)
    for path, value in left_in(model, paths).items():
        if value is None or type(value) in (bool, int, float, str):
            leave_note(module, path, value)


def _held(module: nn.Module, paths: Collection[str]) -> Iterator[tuple[str, str, nn.Module, Any]]:
    parts = dict(module.named_modules())
    for full in sorted(paths):
        path, _, name = full.rpartition(".")
        part = parts.get(path)
        if part is not None and name in vars(part):
            yield path, name, part, vars(part)[name]
