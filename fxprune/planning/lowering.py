"""What runs of a gated graph: gates where they cost least.

In a model's graph every gate stands behind its nonlinearity, where analyses read it. The code made
from the graph is that of its lowered form: gates are left to the layers that read them, or go
behind a pool (`gating.deferral`). A residual stream is summed without its gates where the sum is
gated again, over the same units, before anybody else reads it. Then each reader of the stream
counts once in ∂/∂w, the first-order effect of removing the unit, and not again for every further
gate that the stream passes. Sums that the model makes in place are made in place.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import fx, nn
from torch.fx.graph import CodeGen, PythonCode

from fxprune.dataflow.rules import key_of
from fxprune.gating.deferral import (
    add_to,
    applies_gates,
    defer_gate,
    pooled_axes,
    read_gated,
    swaps_with_gates,
    ungated,
)
from fxprune.gating.gates import Gates, WidthSite, linear_gate, width_gate
from fxprune.gating.remembered import memory_of
from fxprune.ops.elementwise import NONLINEARITIES
from fxprune.runtime.kinds import LAYERS, NORMS, OVERWROTE, SUMS
from fxprune.tracing.retracing import LiveTracer, TracerOfBothModes, mark_
from fxprune.tracing.two_modes import CodeGenOfBothModes, has_both_modes
from fxprune.user_models.modules import submodule


def lower_(module: fx.GraphModule) -> None:
    """Let a gated graph module, and copies of it, run in lowered form."""
    both = has_both_modes(module.graph)
    _set(module, LoweringCodeGen(), RetracingTracerOfBothModes if both else RetracingTracer)
    module.recompile()


def raise_(module: fx.GraphModule) -> None:
    """Let a graph module, once it is recompiled, run as its graph says."""
    both = has_both_modes(module.graph)
    _set(module, CodeGenOfBothModes() if both else CodeGen(), TracerOfBothModes if both else None)


def _set(module: fx.GraphModule, codegen: CodeGen, tracer: type[fx.Tracer] | None) -> None:
    module.graph.set_codegen(codegen)
    module._tracer_cls = module.graph._tracer_cls = tracer


class LoweringCodeGen(CodeGenOfBothModes):
    """Writes the code of the lowered form, made anew whenever a graph is recompiled."""

    def _gen_python_code(self, nodes: Any, root_module: str, namespace: Any, **options: Any) -> Any:
        module = nodes.graph.owning_module
        if module is None or has_both_modes(nodes.graph):
            return super()._gen_python_code(nodes, root_module, namespace, **options)
        return self.code_of(module, copy.deepcopy(nodes.graph), root_module, options)

    def code_of(self, module: Any, graph: fx.Graph, root_module: str, options: Any) -> PythonCode:
        """Write the code of a copy of a module's graph, or of a part of it."""
        code = lowered(module, graph).python_code(root_module, **options)
        return replace(code, _lineno_map={})  # its lines are those of no node of the module's graph


class RetracingTracer(LiveTracer):
    """Traces a module anew when it is unpickled, to be lowered again."""

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        """Trace as torch.fx does, to run lowered."""
        graph = super().trace(root, concrete_args)
        graph.set_codegen(LoweringCodeGen())
        mark_(graph, memory_of(root).get("marks", {}))
        return graph


class RetracingTracerOfBothModes(RetracingTracer, TracerOfBothModes):
    """The same of a module whose code is one for each mode."""


def lowered(module: fx.GraphModule, graph: fx.Graph) -> fx.Graph:
    """Let a copy of a module's graph, or of that of a mode, say what runs, and return it."""
    graph.set_codegen(CodeGen())
    gates = getattr(module, "gates", None)
    if isinstance(gates, Gates):
        for deferral in list(_deferrals(graph, module, gates)):
            _defer(graph, deferral)
        for node in graph.nodes:
            if node.meta.get(OVERWROTE) and _may_overwrite(node, module):
                node.target = add_to
                node.meta["is_wrapped"] = False
    return graph


@dataclass
class _Deferral:
    """A gate to be applied elsewhere: behind a pool, or, if it is left to them, by its readers."""

    gate: fx.Node
    pool: fx.Node | None
    readers: list[fx.Node]
    is_left: bool


def _deferrals(graph: fx.Graph, module: fx.GraphModule, gates: Gates) -> Iterator[_Deferral]:
    for gate in graph.nodes:
        site = _site(gate, gates)
        if site is None or not _is_private(gate.args[0], module):
            continue
        pool = _pool_behind(gate, site, module)
        users = list((pool or gate).users)
        readers = [user for user in users if _applies(user, site, module)]
        others = [user for user in users if user not in readers]
        if all(_is_gated_again(user, site, gates, module) for user in others):
            yield _Deferral(gate, pool, readers, is_left=True)
        elif pool is not None:
            yield _Deferral(gate, pool, [], is_left=False)


def _defer(graph: fx.Graph, deferral: _Deferral) -> None:
    gate, pool = deferral.gate, deferral.pool
    last = gate if pool is None else pool
    with graph.inserting_before(last):
        args = (*gate.args, deferral.is_left)
        args = args if pool is None else (*args, graph.get_attr(str(pool.target)))
        deferred = graph.call_function(defer_gate, args)
        value = graph.call_function(ungated, (deferred,))
    for reader in deferral.readers:
        with graph.inserting_before(reader):
            layer = graph.get_attr(str(reader.target))
        reader.op, reader.target, reader.args = "call_function", read_gated, (layer, deferred)
    last.replace_all_uses_with(value)
    if not value.users:
        graph.erase_node(value)
    for node in (gate,) if pool is None else (pool, gate):
        graph.erase_node(node)


def _site(node: fx.Node, gates: Gates) -> WidthSite | None:
    """Return what a node gates, None if it is no width gate."""
    vector = node.args[1] if node.target is width_gate and len(node.args) == 2 else None
    place = vector.args[1] if isinstance(vector, fx.Node) and len(vector.args) == 2 else None
    return gates.width_sites[place] if isinstance(place, int) else None


def _pool_behind(gate: fx.Node, site: WidthSite, module: fx.GraphModule) -> fx.Node | None:
    """Return the only reader of a gate if it is a pool, none of whose axes the gate varies on."""
    user = next(iter(gate.users), None)
    pool = _called(user, module)
    if user is None or pool is None or len(gate.users) > 1 or not swaps_with_gates(pool):
        return None
    rank, axes = len(site.shape), pooled_axes(pool)
    flat = rank > axes and all(size == 1 for size in site.shape[rank - axes :])
    return user if flat and _reads_only(user) else None


def _applies(user: fx.Node, site: WidthSite, module: fx.GraphModule) -> bool:
    """Tell whether a user is a layer whose input channels are a gate's."""
    layer: Any = _called(user, module)
    if layer is None or not applies_gates(layer) or not _reads_only(user):
        return False
    channels = len(site.units)
    if isinstance(layer, nn.Linear):
        return site.shape[-1] == channels == layer.in_features
    shape = (1, channels, *(1,) * (layer.weight.dim() - 2))
    return site.shape == shape and channels == layer.in_channels


def _reads_only(user: fx.Node) -> bool:
    return len(user.args) == 1 and not user.kwargs


def _is_gated_again(user: fx.Node, site: WidthSite, gates: Gates, module: fx.GraphModule) -> bool:
    """Tell whether all ways through sums and nonlinearities end at gates over the same units.

    A sum comes first: what it returns may be overwritten, what it was given is not.
    """
    pending, met = [user], {user}
    while pending:
        node = pending.pop()
        end = _site(node, gates)
        if end is not None:
            if (end.units, end.shape) != (site.units, site.shape):
                return False
        elif _is_sum(node) or (node is not user and _is_nonlinearity(node, module)):
            pending += node.users.keys() - met
            met |= node.users.keys()
        else:
            return False
    return True


def _is_private(value: Any, module: fx.GraphModule) -> bool:
    """Tell whether nobody but its gate reads an activation, or what it was computed in."""
    while len(value.users) == 1:
        if _is_sum(value) or type(_called(value, module)) in (*LAYERS, *NORMS):
            return True
        if not _is_nonlinearity(value, module):
            return False
        (value,) = value.all_input_nodes
    return False


def _may_overwrite(node: fx.Node, module: fx.GraphModule) -> bool:
    """Tell whether a node is a sum, and the only reader of what a layer made and does not keep."""
    first: Any = node.args[0] if _is_sum(node) else None
    if not isinstance(first, fx.Node) or list(first.users) != [node]:
        return False
    return first.target is read_gated or type(_called(first, module)) in (*LAYERS, *NORMS)


def _is_sum(node: fx.Node) -> bool:
    """Tell whether a node combines tensors, element by element, in a new one."""
    called = node.op in ("call_function", "call_method")
    return called and node.target in (*SUMS, linear_gate) and not node.kwargs


def _is_nonlinearity(node: fx.Node, module: fx.GraphModule) -> bool:
    known = key_of(node, _called(node, module)) in NONLINEARITIES
    return known and len(node.all_input_nodes) == 1


def _called(node: fx.Node | None, module: fx.GraphModule) -> nn.Module | None:
    if node is None or node.op != "call_module":
        return None
    return submodule(module, str(node.target))
