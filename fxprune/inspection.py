"""What a model consists of, to fxprune's eyes: its layers, how many units live, which have gates.

For a model without gates the table tells what `instrument` would do and which units are dead
already; for a gated one what the gates hold now.
"""

import io
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from itertools import chain
from typing import Any

import networkx as nx
import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor, fx, nn

from fxprune.compiler import gated_model, inputs_for
from fxprune.dataflow.channels import Channels, analyse
from fxprune.dataflow.cuts import Cut
from fxprune.dataflow.liveness import settle
from fxprune.dataflow.rules import rule_for
from fxprune.dataflow.values import Value
from fxprune.errors import NothingToDoError, where
from fxprune.gating.gates import (
    HALF,
    UNGATED,
    Gates,
    WidthSite,
    gate_owners,
    linear_gate,
    require_numbers,
    width_gate,
)
from fxprune.gating.owners import gates_by_name
from fxprune.gating.remembered import memory_of
from fxprune.parts.piecewise import parts_in_evaluation
from fxprune.passes.gate_removal import remove_gates
from fxprune.passes.instrumentation import insert_gates
from fxprune.passes.padding_hoisting import BORDERS
from fxprune.programs.program import Program
from fxprune.progress import shown
from fxprune.runtime.default_device import on_cpu
from fxprune.runtime.eager import uncompiled
from fxprune.runtime.turns import in_turn
from fxprune.user_models.plain_weights import with_plain_weights


@dataclass(frozen=True)
class Row:
    """A layer: its module path or node, its kind, live and total output channels, its gates.

    gate: the sites whose units its output channels are. linear: the state of the linearity gate
    behind it, or nothing. why_not: why it has no gate. border: within how many positions of the
    border its outputs are not the original model's, because padding was moved.
    """

    layer: str
    kind: str
    live: int
    total: int
    gate: str
    linear: str
    why_not: str
    border: int = 0


@dataclass(frozen=True)
class Inspection:
    """The table of a model's layers, and its program as a graph.

    graph: a `networkx.DiGraph` of operators; nodes carry `kind` and `label`, edges `channels`, the
    number of channels that flow along them.
    """

    model: str
    rows: tuple[Row, ...]
    graph: "nx.DiGraph[str]"

    def to_dict(self) -> dict[str, Any]:
        """Return the table as plain data for JSON."""
        return {"model": self.model, "layers": [asdict(row) for row in self.rows]}

    def table(self) -> Table:
        """Return the table for a rich console."""
        table = Table(title=Text(self.model))
        names = ["layer", "kind", "width", "gate", "linear", "why not"]
        moved = any(row.border for row in self.rows)
        for name in (*names, "border") if moved else names:
            numeric = name in ("width", "border")
            # Cut short, names of layers would be those of others.
            table.add_column(name, justify="right" if numeric else "left", overflow="fold")
        for row in self.rows:
            cells = [row.layer, row.kind, f"{row.live}/{row.total}", row.gate, row.linear]
            cells += [row.why_not, str(row.border or "")]
            table.add_row(*map(Text, cells[: len(table.columns)]))  # brackets are no markup
        return table

    def __str__(self) -> str:
        """Return the table as text."""
        stream = io.StringIO()
        Console(file=stream, width=140).print(self.table())
        return stream.getvalue()


@in_turn
@uncompiled
@on_cpu
@shown("inspect")
def inspect(model: nn.Module, example_inputs: Any = None) -> Inspection:
    """Return the layers of a model, how many of their units live, and where its gates are.

    model: gated or not; it is not modified. example_inputs: as in `fxprune.instrument`. Raises what
    `instrument` raises, except that a model no gate fits is no error here.
    """
    model = with_plain_weights(gated_model(model))
    rows: list[Row] = []
    graph: nx.DiGraph[str] = nx.DiGraph()
    for region in parts_in_evaluation(model, inputs_for(model, example_inputs)).regions:
        prefix = f"{region.path}." if region.path else ""
        found, drawn = _inspect(region.program)
        rows += [replace(row, layer=prefix + row.layer) for row in found]
        graph.update(nx.relabel_nodes(drawn, {name: prefix + name for name in drawn}))
    return Inspection(str(memory_of(model).get("model", type(model).__name__)), tuple(rows), graph)


def _inspect(program: Program) -> "tuple[list[Row], nx.DiGraph[str]]":
    plain = program.clone()
    if not gate_owners(program.module):
        with suppress(NothingToDoError):  # the rows say why
            insert_gates(program)
    else:
        remove_gates(plain)
    channels = analyse(program, generic=True)
    plain_channels = analyse(plain)
    rows = _rows(program, channels, plain_channels, settle(plain_channels))
    return rows, as_graph(program, channels)


def architecture(gated: nn.Module) -> dict[str, dict[str, Any]]:
    """Return, for every gated site, `live` and `total` channels and whether it is `linear`.

    Cheap: it reads the gates only, so that it can be called in every training step. Raises
    `GateError` if the model was not instrumented.
    """
    found: dict[str, dict[str, Any]] = {}
    for path, gates in gates_by_name(gated).items():
        sites = _states(gates)
        found |= {f"{path}.{name}" if path else name: state for name, state in sites.items()}
    return found


def _states(gates: Gates) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for site in gates.width_sites:
        kept = gates.kept(site)
        found[site.name] = {"live": int(kept.sum()), "total": len(kept), "linear": False}
    linear = gates.linearised().tolist()
    for site in gates.depth_sites:
        found.setdefault(site.name, {"live": None, "total": None})["linear"] = linear[site.index]
    return found


def freeze(gated: nn.Module) -> None:
    """Fix the gates at what they decided, in place: binary, and no longer trained.

    Raises `GateError` without gates, and for gates that are NaN.
    """
    found = gates_by_name(gated).values()
    for gates in found:
        require_numbers(gates)
    parameters = [(gates.width, gates.linear) for gates in found]
    with torch.no_grad():
        for gate in chain.from_iterable(parameters):
            if gate is not None:
                gate.copy_((gate >= HALF).to(gate.dtype))
                gate.requires_grad_(False)
                gate.grad = None


def as_graph(program: Program, channels: Channels) -> "nx.DiGraph[str]":
    """Return the program as a directed graph of operators with channel counts on its edges."""
    graph: nx.DiGraph[str] = nx.DiGraph()
    for node in program.graph.nodes:
        graph.add_node(node.name, kind=_kind(program, node), label=str(node.target))
    for node in program.graph.nodes:
        for source in node.all_input_nodes:
            graph.add_edge(source.name, node.name, channels=_count(channels, source))
    return graph


def _count(channels: Channels, node: fx.Node) -> int | None:
    value = channels.values.get(node)
    return value.tags.numel() if isinstance(value, Value) else None


def _rows(program: Program, channels: Channels, plain: Channels, cut: Cut) -> list[Row]:
    sites = _sites_by_class(program, channels)
    linear = _linear_by_source(program)
    blocked = channels.blocked()
    borders: dict[str, int] = program.module.meta.get(BORDERS, {})
    widths = {node.name: value for node, value in plain.values.items()}
    rows: list[Row] = []
    for node, call in channels.calls.items():
        if not _is_layer(channels, node, call.module):
            continue
        value, outcome = channels.values[node], widths.get(node.name)
        if not isinstance(value, Value) or not isinstance(outcome, Value):
            continue
        labels = channels.classes[value.tags.reshape(-1)].tolist()
        names = list(dict.fromkeys(name for label in labels for name in sites.get(label, ())))
        reason = "" if names else _reason(channels, node, labels, blocked)
        keep = cut.keep(outcome.tags)
        total = _channels_of(value)
        live = int(keep.sum()) if outcome.tags.numel() == total else total
        rows.append(
            Row(
                str(node.target) if node.op == "call_module" else node.name,
                _kind(program, node),
                live,
                total,
                ", ".join(names),
                linear.get(node, ""),
                reason,
                borders.get(str(node.target), 0),
            )
        )
    return rows


def _channels_of(value: Value) -> int:
    """Return the number of channels: tags where they vary, else the axis channels usually have."""
    if value.tags.numel() > 1 or len(value.shape) < 2:
        return value.tags.numel()
    return value.shape[1]


def _is_layer(channels: Channels, node: fx.Node, module: nn.Module | None) -> bool:
    if node in channels.barriers:
        return True
    return rule_for(node, module).name == "mixing"


def _reason(channels: Channels, node: fx.Node, labels: list[int], blocked: dict[int, str]) -> str:
    if node in channels.barriers:
        return f"{channels.barriers[node]}: {where(node)}"
    found = (blocked.get(label) for label in dict.fromkeys(labels))
    return next((text for text in found if text), "no nonlinearity with f(0) = 0 reads it alone")


def _sites_by_class(program: Program, channels: Channels) -> dict[int, list[str]]:
    """Return, for every class of channels, the names of the width gates it has."""
    gates = getattr(program.module, "gates", None)
    if not isinstance(gates, Gates):
        return {}
    found: dict[int, list[str]] = {}
    for node in program.graph.nodes:
        if node.target is not width_gate:
            continue
        site: WidthSite = gates.width_sites[node.args[1].args[1]]
        tags: Tensor = channels.values[node].tags
        if any(have < size for have, size in zip(tags.shape, site.shape, strict=False)):
            continue  # behind what has become a barrier since (a hook): its channels are no units
        for axis, size in enumerate(site.shape):
            tags = tags.narrow(axis, 0, size)  # sub-pixels of a channel share a gate
        labels = channels.classes[tags.reshape(-1)]
        for label, unit in zip(labels.tolist(), site.units, strict=True):
            if unit != UNGATED and site.name not in found.setdefault(label, []):
                found[label].append(site.name)
    return found


def _linear_by_source(program: Program) -> dict[fx.Node, str]:
    """Return the state of the linearity gate behind each layer that has one."""
    gates = getattr(program.module, "gates", None)
    if not isinstance(gates, Gates):
        return {}
    states = gates.linearised().tolist()
    found: dict[fx.Node, str] = {}
    for node in program.graph.nodes:
        if node.target is linear_gate:
            site = gates.depth_sites[node.args[2].args[1] - len(gates.width_sites)]
            found[node.args[0]] = "linear" if states[site.index] else "gated"
    return found


def _kind(program: Program, node: fx.Node) -> str:
    if node.op == "call_module":
        return type(program.module.get_submodule(str(node.target))).__name__
    return node.op if node.op in ("placeholder", "output", "get_attr") else _name(node.target)


def _name(target: Any) -> str:
    return target if isinstance(target, str) else getattr(target, "__name__", str(target))
