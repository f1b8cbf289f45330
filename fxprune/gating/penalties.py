"""The regularisers that drive gates to 0 or 1 and the model to be small.

    λ1·Σ w(1 − w) + λ2·Σ d(1 − d) + λ3·Σ_i h_i·[layer i nonlinear] + λ4·Σ_i (1 − d_i)

with h_i = Σ_j w_ij (Srinivas & Babu 2016, equations 3 and 5; [·] counts as a constant for the
gradient of d). The first two make gates binary, the last two make them few: λ1·w(1 − w) + λ3·w
peaks at w* = ½ + λ3/(2λ1), so a gate below w* drifts to 0 and one above it to 1, unless the loss
holds it; λ3 ≥ λ1 sends every gate to 0 that the loss does not hold. The terms stand by name in
`gated.penalties`, an `nn.ModuleDict`: read, weigh, replace or add one.
"""

from typing import Any

import torch
from torch import Tensor, nn

from fxprune.errors import GateError
from fxprune.gating.gates import Gates, binarize, clipped
from fxprune.gating.joint_terms import joint_term
from fxprune.gating.optimizer_groups import require_trained
from fxprune.gating.owners import gates_of, gates_with_owners
from fxprune.gating.terms import MACS
from fxprune.gating.unit_costs import require_kind
from fxprune.runtime.eager import is_eager
from fxprune.user_models.modules import is_hooked


class Penalty(nn.Module):
    """A term λ·g(gates); `weight` is λ, a float that may be changed at any time."""

    def __init__(self, weight: float) -> None:
        """Take λ."""
        super().__init__()
        self.weight = weight

    def forward(self, gates: Gates) -> Tensor:
        """Return the weighted term, a scalar on the gates' device."""
        return self.weight * self.term(gates)

    def term(self, gates: Gates) -> Tensor:
        """Return the term without its weight."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        """Show λ."""
        return f"weight={self.weight:g}"


class WidthBinary(Penalty):
    """λ1·Σ w(1 − w)."""

    def term(self, gates: Gates) -> Tensor:
        """Return Σ w(1 − w)."""
        return _parabola(gates.width, gates)


class DepthBinary(Penalty):
    """λ2·Σ d(1 − d)."""

    def term(self, gates: Gates) -> Tensor:
        """Return Σ d(1 − d)."""
        return _parabola(gates.linear, gates)


class Width(Penalty):
    """λ3·Σ w over the units of layers that are still nonlinear; a shared unit counts once."""

    def term(self, gates: Gates) -> Tensor:
        """Return Σ_i h_i·[d_i < ½]."""
        if gates.width is None:
            return _zero(gates)
        return (clipped(gates.width) * self.nonlinear(gates)).sum()

    def nonlinear(self, gates: Gates) -> Tensor:
        """Return, for every unit, 1 if a site it stands at is nonlinear, else 0; no gradient."""
        return gates.nonlinear().to(next(gates.parameters()).dtype)


class Depth(Penalty):
    """λ4·Σ (1 − d)."""

    def term(self, gates: Gates) -> Tensor:
        """Return Σ (1 − d)."""
        if gates.linear is None:
            return _zero(gates)
        return (1 - clipped(gates.linear)).sum()


class Cost(Penalty):
    """λ·cost, of the model `finalize` would return now, folded.

    of: "parameters", "macs" (a sample's), "neurons" (units) or "latency": the nanoseconds of its
    layers, each by itself, on one sample in onnxruntime here. They are measured at up to 16 widths
    when first asked for, which takes long for a large model, kept in the user's cache, and
    interpolated; what is no layer does not count. The value is that of the binary
    gates and exact, but for the rounding of the gates' dtype and what `planning.accounts` leaves
    out, while no tensor is left without channels: one that is, such as a part of a `chunk` all of
    whose units are dead, keeps a channel when finalised, which is not counted. `Budget` and
    `compact` keep a unit of every set in `gated.gates.costs.groups()`, so that there is none.
    Its gradient is each unit's marginal cost given the other units, and for a linearity gate what
    its other state would cost more. To weigh as λ3 does take λ = λ3·units/cost. In a model
    instrumented region by region it counts the regions. Raises `GateError` if the gates were made
    without costs, or onnxruntime cannot run a layer.
    """

    def __init__(self, weight: float, of: str = MACS) -> None:
        """Take λ and the kind of cost."""
        super().__init__(weight)
        require_kind(of)
        self.of = of

    def term(self, gates: Gates) -> Tensor:
        """Return the cost."""
        return cost_of(gates, self.of).to(next(gates.parameters()).dtype)

    def extra_repr(self) -> str:
        """Show λ and the kind of cost."""
        return f"{super().extra_repr()}, of={self.of!r}"


def cost_of(gates: Gates, kind: str, width: Tensor | None = None) -> Tensor:
    """Return what a model would cost finalised now: a scalar, float64, differentiable.

    width: other real gates than those it has.
    """
    if gates.costs is None:
        raise GateError("these gates know of no costs; instrument the model again")
    width = gates.width if width is None else width
    live, linear = (_exact(gate, gates) for gate in (width, gates.linear))
    return gates.costs(kind, live, linear)


def cost_and_prices(gates: Gates, kind: str, width: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return a model's cost, a scalar, and what each unit adds to it, given the others, (units,).

    width: gates of 0 and 1; all are open if not given.
    """
    assert gates.width is not None
    with torch.enable_grad():
        chosen = torch.ones_like(gates.width) if width is None else width.detach().clone()
        cost = cost_of(gates, kind, chosen.requires_grad_())
        (prices,) = torch.autograd.grad(cost, chosen)
    return cost.detach(), prices.clamp_min(0)


_PAPER: tuple[type[nn.Module], ...] = (WidthBinary, DepthBinary, Width, Depth)


def paper_penalties(
    width_binary: float = 1e-3,
    depth_binary: float = 1e-3,
    width: float = 1e-3,
    depth: float = 0.0,
) -> nn.ModuleDict:
    """Return the paper's four terms; the arguments are its λ1, λ2, λ3 and λ4.

    The paper sets λ3 first, from the number of units and the size of the loss (k times more units:
    λ3/k), then λ1 relative to λ3. The defaults suit a few hundred to a few thousand units and a
    cross-entropy loss; λ4 = 0 leaves depth to the loss.
    """
    return nn.ModuleDict(
        {
            "width_binary": WidthBinary(width_binary),
            "depth_binary": DepthBinary(depth_binary),
            "width": Width(width),
            "depth": Depth(depth),
        }
    )


def require_terms(penalties: Any) -> None:
    """Raise `GateError` for what is no `nn.ModuleDict` of terms: modules that take gates."""
    if not hasattr(penalties, "items"):
        raise GateError(f"penalties={penalties!r} are no nn.ModuleDict of named terms")
    for name, term in penalties.items():
        if _is_torchs(term):
            raise GateError(
                f"penalties[{name!r}] is a {type(term).__name__}, which computes nothing of gates; "
                "a term is a module whose forward takes them and returns a scalar "
                "(fxprune.Penalty with a term of its own)"
            )


def _is_torchs(term: Any) -> bool:
    """Tell whether what a term computes is torch's idea: no layer of its takes gates."""
    if isinstance(term, nn.Sequential) and len(term):
        return _is_torchs(term[0])
    forward = vars(term).get("forward", type(term).forward)
    return str(getattr(forward, "__module__", "")).startswith("torch.nn.")


def penalty(gated: nn.Module) -> Tensor:
    """Return the sum of the model's penalties: a scalar, differentiable, on the gates' device.

    Of several instrumented models in one, all count. Raises `GateError` if there is none, if its
    optimizer was handed over to what `fxprune.compact` returned, or if a term is no number.
    """
    totals: list[Tensor] = []
    for gates, owner in gates_with_owners(gated).items():
        require_trained(gates, "take that model, `gated = fxprune.compact(gated, optimizer)`")
        terms: Any = owner.penalties
        joint, others = _divided(list(terms.values()))
        totals += _joint_terms(joint, gates) if joint else []
        totals += [_value(term, gates) for term in others]
    first = totals[0] if totals else _zero(gates_of(gated))
    return sum((total.to(first.device) for total in totals[1:]), first)


def _value(term: nn.Module, gates: Gates) -> Tensor:
    found: Any = term(gates)
    if not isinstance(found, Tensor) or found.numel() != 1:
        given = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise GateError(
            f"the penalty {type(term).__name__} returned {given}; return a tensor that is a scalar"
        )
    return found.reshape(())


def _divided(terms: list[nn.Module]) -> tuple[dict[type, float], list[nn.Module]]:
    """Return the weights of the paper's terms that can be computed at once, and the other terms."""
    weights, others = dict[type, float](), list[nn.Module]()
    for term in terms:
        weight: Any = getattr(term, "weight", None)
        is_plain = type(term) in _PAPER and isinstance(weight, int | float)
        if is_plain and is_eager() and not is_hooked(term):
            weights[type(term)] = weights.get(type(term), 0.0) + weight
        else:
            others.append(term)
    return weights, others


def _joint_terms(weights: dict[type, float], gates: Gates) -> list[Tensor]:
    """Return the terms of the width gates and of the linearity gates."""
    found: list[Tensor] = []
    if gates.width is not None:
        binary, few = weights.get(WidthBinary, 0.0), weights.get(Width, 0.0)
        nonlinear = gates.nonlinear().to(gates.width.dtype) if few and gates.depth_sites else 1.0
        found.append(joint_term(gates.width, few * nonlinear + binary, binary))
    if gates.linear is not None:
        binary, few = weights.get(DepthBinary, 0.0), weights.get(Depth, 0.0)
        term = joint_term(gates.linear, binary - few, binary)
        found.append(term + few * len(gates.linear) if few else term)
    return found


def _parabola(gate: Tensor | None, gates: Gates) -> Tensor:
    if gate is None:
        return _zero(gates)
    inside = clipped(gate)
    return (inside * (1 - inside)).sum()


def _exact(gate: Tensor | None, gates: Gates) -> Tensor:
    """Return binarised gates, of which there may be none, in as many bits as there are."""
    if gate is None:
        return _exact(_zero(gates).detach().expand(0), gates)
    return binarize(gate if gate.device.type == "mps" else gate.double())  # mps has no float64


def _zero(gates: Gates) -> Tensor:
    return next(gates.parameters()).new_zeros(())
