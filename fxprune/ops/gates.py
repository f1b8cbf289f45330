"""Gates, as inspection meets them in a model that is still being trained: they pass channels on."""

from fxprune.dataflow.cuts import Cut
from fxprune.dataflow.rules import Call, Flow, OpRule, register
from fxprune.dataflow.values import Barrier, Value, unknown
from fxprune.gating.gates import linear_gate, width_gate


def gate_flow(call: Call) -> Flow:
    """Pass the gated activation's channels on; what a gate holds now is no lasting constant."""
    value = call.value(0, "value")
    others = [arg for arg in call.args[1:-1] if isinstance(arg, Value)]
    ties = [(other.tags, value.tags) for other in others]
    return Flow(call.output(value.tags, unknown(value.tags)), ties=ties)


def refuse_to_shrink(call: Call, cut: Cut) -> None:
    """Refuse: the gates still count these channels; `remove_gates` comes before any cut."""
    if cut.indices(call.value(0, "value")) is not None:
        raise Barrier("it is a gate, which still counts these channels")


register(OpRule("gate", gate_flow, rewrite=refuse_to_shrink), width_gate)
register(OpRule("linearity gate", gate_flow), linear_gate)  # its gate counts no channels
