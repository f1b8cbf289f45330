"""Activations written out as products: x·σ(1.7x), ½x·(1 + tanh(…)), a·σ(b), a·b of two halves.

None of their operators is an activation with f(0) = 0, and yet their product is what a width gate
would multiply. Two halves of one tensor multiply to the only nonlinearity of some nets (the simple
gate of NAFNet, Chen et al. 2022).
"""

import operator
from collections.abc import Collection, Sequence

import torch
from torch import fx, nn

from fxprune.dataflow.rules import key_of, rule_name
from fxprune.ops.elementwise import NONLINEARITIES
from fxprune.programs.observation import Observation, TensorSpec

_BENDING = NONLINEARITIES | {torch.erf, torch.special.erf, torch.exp, "erf", "exp"}
_POINTWISE = {"elementwise", "product", "identity"}
FARTHEST = 16  # operators looked back at


def is_handwritten(
    node: fx.Node, modules: dict[str, nn.Module], seen: Observation, known: Collection[fx.Node]
) -> bool:
    """Tell whether a node multiplies two tensors of one shape, one of them bent by an activation.

    Or both parts of one tensor, as it was split.

    known: activations that can be gated themselves; as a factor one gates the product.
    """
    if rule_name(node, _module(node, modules)) != "product" or len(node.all_input_nodes) != 2:
        return False
    specs = [seen.values[factor] for factor in node.all_input_nodes]
    if not all(isinstance(spec, TensorSpec) and spec == seen.values[node] for spec in specs):
        return False
    if any(factor in known or factor.op == "get_attr" for factor in node.all_input_nodes):
        return False
    return _are_parts(node.all_input_nodes, modules) or any(
        _is_bent(factor, modules) for factor in node.all_input_nodes
    )


def _are_parts(factors: Sequence[fx.Node], modules: dict[str, nn.Module]) -> bool:
    """Tell whether factors were picked from what one tensor was split into."""
    if any(factor.target is not operator.getitem for factor in factors):
        return False
    sources = {source for factor in factors for source in factor.all_input_nodes}
    return len(sources) == 1 and all(
        rule_name(source, _module(source, modules)) == "parts" for source in sources
    )


def _is_bent(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Follow elementwise operators back to an activation."""
    pending, met = [node], set[fx.Node]()
    while pending and len(met) < FARTHEST:
        node = pending.pop()
        if node in met:
            continue
        met.add(node)
        if key_of(node, _module(node, modules)) in _BENDING:
            return True
        if rule_name(node, _module(node, modules)) in _POINTWISE:
            pending.extend(node.all_input_nodes)
    return False


def _module(node: fx.Node, modules: dict[str, nn.Module]) -> nn.Module | None:
    return modules[str(node.target)] if node.op == "call_module" else None
