"""Call layers whose weights are computed from one module's parameters as one layer each.

    w = m.weight - m.weight.mean((1, 2, 3), keepdim=True)
    F.conv2d(x, w * m.gain, m.bias, padding=1)               →  m(x),   m a `ComputedLayer`

Standardised weights (ResNetV2, NFNets), equalised ones (StyleGAN), masks, low-rank updates: in
training they are computed anew in every step, and the finalised model has their numbers.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg

from fxprune.folding.functional_layers import (
    arguments_of,
    common_settings,
    new_layer,
    replace_layers,
    tensors_of_layer,
)
from fxprune.programs.observation import Observation, observe
from fxprune.programs.pipeline import Change, keeps_shapes
from fxprune.programs.program import Program
from fxprune.runtime.kinds import NORMS
from fxprune.user_models.computed_layers import ComputedLayer, make_plain_
from fxprune.user_models.modules import is_hooked

_OWN = ("function", "options", "sources", "plain_layer", "computing")


@keeps_shapes
def join_computed_weights(program: Program) -> list[Change]:
    """Replace layers' functions, and what computes their weights, with calls of one module."""
    seen = observe(program)
    settled = _settled(program)
    layers = replace_layers(
        program,
        lambda node: _owner(node, settled),
        lambda owner, nodes: _joined(program, owner, nodes, seen),
    )
    kinds = {path: type(layer.plain_layer).__name__ for path, layer in layers.items()}
    return [
        Change(path, f"called as one {kind} that computes its weights")
        for path, kind in kinds.items()
    ]


@keeps_shapes
def settle_computed_weights(program: Program) -> list[Change]:
    """Give layers that compute their weights the numbers these have in evaluation."""
    paths = make_plain_(program.module)
    return [Change(path, "has the weights it computed as numbers") for path in paths]


def _settled(program: Program) -> dict[fx.Node, bool]:
    """Return the nodes that depend on parameters and buffers alone, and whether they compute."""
    tensors = {*dict(program.module.named_parameters(remove_duplicate=False))}
    tensors |= {*dict(program.module.named_buffers(remove_duplicate=False))}
    settled: dict[fx.Node, bool] = {}
    for node in program.graph.nodes:
        if node.op == "get_attr" and str(node.target) in tensors:
            settled[node] = False
        elif node.op in ("call_function", "call_method") and node.all_input_nodes:
            if all(source in settled for source in node.all_input_nodes):
                settled[node] = True
    return settled


def _owner(node: fx.Node, settled: dict[fx.Node, bool]) -> str | None:
    """Return the module of whose parameters a layer's weights are computed; None if of no one's."""
    given = arguments_of(node)
    if given is None or given["input"] in settled:
        return None
    taken = tensors_of_layer(node).values()
    if not all(one in settled for one in taken) or not any(settled[one] for one in taken):
        return None
    reads = [one for one in _sources(taken) if one.op == "get_attr"]
    owners = {str(read.target).rpartition(".")[0] for read in reads}
    return owners.pop() if len(owners) == 1 else None


def _sources(nodes: Iterable[fx.Node]) -> list[fx.Node]:
    """Return nodes and all they are computed from."""
    found: dict[fx.Node, None] = {}
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        if node not in found:
            found[node] = None
            waiting += node.all_input_nodes
    return list(found)


def _joined(
    program: Program, owner: str, nodes: list[fx.Node], seen: Observation
) -> ComputedLayer | None:
    """Return a layer that computes its weights for all its nodes; None if they may not be one."""
    old = program.module.get_submodule(owner)
    chain = set(_sources(one for node in nodes for one in tensors_of_layer(node).values()))
    if not _is_alone(program, owner, old, chain | set(nodes)) or seen.written(*chain):
        return None
    settings = common_settings(nodes, owner, seen, fixed=False)
    if settings is None or settings.kind in NORMS:
        return None
    graphs = [_computing(program, node) for node in nodes]
    if len({graph.python_code("self").src for graph, _ in graphs}) > 1:
        return None
    graph, sources = graphs[0]
    computing = fx.GraphModule(nn.Module(), graph)
    tensors = _computed(computing, [getattr(old, name) for name in sources])
    layer = None if tensors is None else new_layer(settings, tensors, {})
    if layer is None:
        return None
    function: Any = nodes[0].target
    joined = ComputedLayer(function, settings.options, layer, computing, sources)
    joined._parameters.update(old._parameters)
    joined._buffers.update(old._buffers)
    joined._non_persistent_buffers_set |= old._non_persistent_buffers_set
    return joined


def _is_alone(program: Program, owner: str, old: nn.Module, mine: set[fx.Node]) -> bool:
    """Tell whether nobody else uses a module's tensors, and nothing of it has a name we need."""
    held = (*old._parameters, *old._buffers, *old._modules)
    if is_hooked(old) or any(name in _OWN for name in held):
        return False
    twin = program.in_training
    others = () if twin is None else twin.program.graph.find_nodes(op="get_attr")
    if any(str(node.target).rpartition(".")[0] == owner for node in others):
        return False  # training computes with them by itself
    for node in program.graph.nodes:
        if node.op == "get_attr" and str(node.target).rpartition(".")[0] == owner:
            if node not in mine or not mine.issuperset(node.users):
                return False
        if node.op == "call_module" and f"{owner}.".startswith(f"{node.target}."):
            return False
    computed = (node for node in mine if node.op != "get_attr")
    ends = {node for node in mine if arguments_of(node) is not None and node.op == "call_function"}
    return all(node in ends or mine.issuperset(node.users) for node in computed)


def _computing(program: Program, node: fx.Node) -> tuple[fx.Graph, list[str]]:
    """Return a graph of what a layer's tensors are computed by, and the names of what it takes."""
    taken = tensors_of_layer(node)
    chain = set(_sources(taken.values()))
    graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    reads = sorted({str(one.target) for one in chain if one.op == "get_attr"})
    names = [read.rpartition(".")[2] for read in reads]
    inputs = {read: graph.placeholder(name) for read, name in zip(reads, names, strict=True)}
    for one in program.graph.nodes:
        if one not in chain:
            continue
        if one.op == "get_attr":
            copies[one] = inputs[str(one.target)]
        else:
            args = map_arg((one.args, one.kwargs), copies.__getitem__)
            copies[one] = graph.create_node(
                one.op, one.target, *args, name=f"step{len(graph.nodes)}"
            )
    graph.output(map_arg(taken, copies.__getitem__))
    return graph, names


def _computed(computing: fx.GraphModule, sources: list[Tensor]) -> dict[str, nn.Parameter] | None:
    """Return the tensors computed; None if they are others the next time, or not whole tensors."""
    with torch.no_grad():
        once, again = computing(*sources), computing(*sources)
    if any(not isinstance(tensor, Tensor) for tensor in once.values()):
        return None
    if not all(torch.equal(once[name], again[name]) for name in once):
        return None
    return {name: nn.Parameter(tensor.detach().clone()) for name, tensor in once.items()}
