"""What stands between linear layers: the links along which they could become one.

A layer is linked to the next where all that is between them are nonlinearities that may be gated,
batch norms, which fold into the layer before them, dropout, and what flattens a map. A sum of such
layers over one input stands for a layer too: a residual block,

    x + F(x) = (K_F + Dirac)·x + b_F
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import fx, nn

from fxprune.dataflow.flattening import flattens, moves_data, only_reader
from fxprune.folding.chains import in_order
from fxprune.folding.convolutions import Geometry, Inexact, geometry_of, pointwise, summed
from fxprune.folding.linear_layers import all_composed
from fxprune.folding.whole_maps import WholeMap
from fxprune.programs.observation import Observation
from fxprune.programs.program import Program
from fxprune.programs.sharing import sole_modules
from fxprune.runtime.kinds import DROPOUTS, NORMS, SUMS
from fxprune.user_models.modules import submodule


@dataclass
class Link:
    """What stands behind a layer, up to the next.

    passed: nonlinearities. norm: whether a batch norm does. then: the next layer; if there is none,
    reason: why not, and what the way ends at: a value that several read, or who reads others too.
    """

    passed: list[fx.Node] = field(default_factory=list[fx.Node])
    norm: bool = False
    then: fx.Node | None = None
    reason: str = ""
    value: fx.Node | None = None
    reader: fx.Node | None = None


@dataclass
class Links:
    """The layers of a program, and what is behind each; a block is known by its sum."""

    layers: dict[fx.Node, Geometry]
    links: dict[fx.Node, Link]
    seen: Observation

    def chains(self) -> list[list[fx.Node]]:
        """Return the longest runs of linked layers."""
        reached = {link.then for link in self.links.values()}
        found: list[list[fx.Node]] = []
        for node in self.links:
            if node in reached:
                continue
            chain = [node]
            while (then := self.links[chain[-1]].then) is not None:
                chain.append(then)
            found.append(chain)
        return found

    def geometries(self, chain: Sequence[fx.Node]) -> list[Geometry]:
        """Return the layers of a chain as they are with the batch norms behind them folded."""
        biased = {n: self.layers[n].bias or self.links[n].norm for n in chain}
        layers = {n: replace(self.layers[n], bias=bias) for n, bias in biased.items()}
        return in_order(chain, layers, self.seen)


def find_links(
    program: Program, usable: Collection[fx.Node], seen: Observation, *, blocks: bool = True
) -> Links:
    """Link the layers of a program, and its residual blocks if asked to.

    usable: the nonlinearities that may be between them.
    """
    sole = sole_modules(program)
    layers = {node: g for node in program.graph.nodes if (g := geometry_of(sole.get(node)))}

    def link(node: fx.Node) -> Link:
        return _follow(program, node, usable, layers, sole, seen)

    known = Links(layers, {node: link(node) for node in layers}, seen)
    heads = _blocks(program, known, seen) if blocks else {}
    known.layers |= dict(heads.values())
    known.links |= {node: link(node) for node, _ in heads.values()}
    for one in known.links.values():
        if one.value in heads:
            one.then, _ = heads[one.value]
    return known


def _follow(
    program: Program,
    node: fx.Node,
    usable: Collection[fx.Node],
    layers: dict[fx.Node, Geometry],
    sole: dict[fx.Node, nn.Module],
    seen: Observation,
) -> Link:
    """Follow a layer's only reader to the next layer."""
    link, first, moves = Link(), node, list[fx.Node]()
    while True:
        reader = only_reader(node, seen)
        if reader is None:
            link.reason, link.value = f"{node.name} has several readers", None if moves else node
            return link
        node = reader
        if node in layers:
            link.reason = _misfit(program, first, moves, node, layers, seen)
            link.then = None if link.reason else node
            return link
        if moves_data(program, node, seen):
            moves.append(node)
        elif len(node.all_input_nodes) != 1 or node.op == "output":
            link.reason = f"{node.name} comes before another layer does"
            link.reader = None if moves else node
            return link
        elif node in usable:
            link.passed.append(node)
        elif (
            not moves and first in sole and _folds(layers[first], sole.get(node), seen.values[node])
        ):
            link.norm = True
        elif not _is_dropout(program, node):
            link.reason = f"{node.name} comes before another layer does"
            return link


def _misfit(
    program: Program,
    first: fx.Node,
    moves: list[fx.Node],
    then: fx.Node,
    layers: dict[fx.Node, Geometry],
    seen: Observation,
) -> str:
    """Say why two layers are not neighbours, with these operators between; nothing if they are."""
    if len(then.all_input_nodes) != 1:
        return f"{then.name} comes before another layer does"
    if not moves:
        alike = len(layers[first].kernel) == len(layers[then].kernel)
        return "" if alike else "the layers around it work along different axes"
    batched = len(seen.values[first].shape) == len(layers[first].kernel) + 2
    flat = layers[first].kernel and not layers[then].kernel and batched
    return "" if flat and flattens(program, moves, seen) else f"{moves[0].name} moves what it reads"


def _folds(layer: Geometry, module: nn.Module | None, spec: object) -> bool:
    """Tell whether a module is a batch norm of the layer's outputs, with stored statistics."""
    if type(module) not in NORMS or getattr(module, "running_mean", None) is None:
        return False
    return bool(layer.kernel) or len(getattr(spec, "shape", ())) == 2


def _is_dropout(program: Program, node: fx.Node) -> bool:
    if node.op != "call_module":
        return False
    return type(submodule(program.module, str(node.target))) in DROPOUTS


def _blocks(
    program: Program, known: Links, seen: Observation
) -> dict[fx.Node, tuple[fx.Node, Geometry]]:
    """Return sums of branches over one value, by that value, and the layers they could be."""
    branches: dict[fx.Node, list[list[fx.Node]]] = {}
    for chain in known.chains():
        link = known.links[chain[-1]]
        if link.reader is not None and link.reader.target in SUMS and not link.passed:
            branches.setdefault(link.reader, []).append(chain)
    found: dict[fx.Node, tuple[fx.Node, Geometry]] = {}
    for total, chains in branches.items():
        head = chains[0][0].all_input_nodes[0]
        geometry = _block(program, total, head, chains, known, seen)
        if geometry is not None:
            found[head] = (total, geometry)
    return found


def _block(
    program: Program,
    total: fx.Node,
    head: fx.Node,
    chains: list[list[fx.Node]],
    known: Links,
    seen: Observation,
) -> Geometry | None:
    """Return the layer a sum could be: no dearer, its terms branches over what no others read."""
    starts = [chain[0] for chain in chains]
    shortcut = _shortcut(program, total, head)
    around = starts if shortcut is None else [*starts, shortcut]
    if total.kwargs or len(total.args) != 2 or len(around) != 2 or set(head.users) != {*around}:
        return None
    if any(start.all_input_nodes != [head] for start in starts):
        return None
    if any(seen.values[term] != seen.values[total] for term in total.all_input_nodes):
        return None
    layers = [known.geometries(chain) for chain in chains]
    if any(isinstance(layer, WholeMap) for chain in layers for layer in chain):
        return None
    try:
        parts = [all_composed(chain) for chain in layers]
        if shortcut is not None:
            parts.append(_identity(parts[0]))
        merged = summed(parts)
    except Inexact:
        return None
    apart = sum(layer.parameters for chain in layers for layer in chain)
    return merged if merged.parameters <= apart else None


def _shortcut(program: Program, total: fx.Node, head: fx.Node) -> fx.Node | None:
    """Return who reads `head` and adds it as it is: the sum, or what does nothing before it."""
    for term in total.all_input_nodes:
        reader = total
        while term is not head and _is_dropout(program, term) and len(term.users) == 1:
            reader, term = term, term.all_input_nodes[0]
        if term is head:
            return reader
    return None


def _identity(beside: Geometry) -> Geometry:
    ones = torch.ones(beside.inputs)
    return pointwise(ones, torch.zeros_like(ones), len(beside.kernel)).geometry
