"""Tri-state gates: y = w'·(d'·x + (1 − d')·f(x)), Srinivas & Babu 2016, equation 2.

w' = [w ≥ ½] for each unit and d' = [d ≥ ½] for each depth site are what the forward pass uses; the
real w, d in [0, 1] take their gradient straight through (equation 4) and are clipped in every
training step. One flat `width` holds the w of all units of a model and one flat `linear` the d of
all its depth sites, so that a penalty, the clipping and the traffic between machines are a few
kernels whatever the depth, and sites on one residual stream share their units.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.autograd.function import FunctionCtx

from fxprune.errors import GateError, require_module
from fxprune.gating.unit_costs import UnitCosts
from fxprune.runtime.eager import is_eager
from fxprune.runtime.structure import Structured, Unchanging

UNGATED = -1
HALF = 0.5


@dataclass(frozen=True)
class WidthSite(Unchanging):
    """Where a width gate stands.

    name: the layer, for people. units: for every channel its index into `width`, or `UNGATED`.
    shape: what its gate vector is viewed as, to broadcast against the activation.
    """

    name: str
    units: tuple[int, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class DepthSite(Unchanging):
    """Where a linearity gate stands: the layer, and its index into `linear`."""

    name: str
    index: int


_OF_FEWER = (
    "the state has fewer units than this model: it is of one made smaller by fxprune.compact; load "
    "it into that, which torch.save(model) saves whole, for torch.load(…, weights_only=False)"
)
_OF_MORE = (
    "the state has more units than this model: it is of one before fxprune.compact, or of another; "
    "load it into a model that was instrumented, and not compacted since"
)


class Gates(Structured):
    """The gates of a model.

    width: float32 (units,) in [0, 1], or None; 1 keeps a unit. linear: float32 (depth sites,) in
    [0, 1], or None; 1 makes a nonlinearity the identity. Calling it clips them (in training) and
    returns one binarised vector a site, width sites first, depth sites after. costs: what the model
    would cost if it were finalised now, in its units, if that was found out. dead_calls: how often
    in a row `fxprune.compact` found each unit dead. importance: how much each unit was seen to
    matter, where somebody measures it.
    """

    _superseded = 0

    width: nn.Parameter | None
    linear: nn.Parameter | None
    costs: UnitCosts | None
    _gather: Tensor
    _layer: Tensor
    dead_calls: Tensor
    importance: Tensor

    def __init__(
        self,
        width_sites: Sequence[WidthSite],
        depth_sites: Sequence[DepthSite],
        *,
        width_init: float,
        linear_init: float,
        costs: UnitCosts | None = None,
    ) -> None:
        """Open all width gates and close all linearity gates; raise `GateError` for other inits."""
        super().__init__()
        width_init, linear_init = sound_inits(width_init, linear_init)
        self.width_sites = tuple(width_sites)
        self.depth_sites = tuple(depth_sites)
        self.costs = costs
        units = 1 + max((u for site in width_sites for u in site.units), default=-1)
        self.width = _parameter(units, width_init)
        depth = len(self.depth_sites)
        self.linear = _parameter(depth, linear_init)
        gather = [u if u != UNGATED else units for site in width_sites for u in site.units]
        self.hold("_gather", torch.tensor(gather, dtype=torch.long))
        index = {site.name: site.index for site in depth_sites}
        layer = [index.get(site.name, depth) for site in width_sites for _ in site.units]
        self.hold("_layer", torch.tensor(layer, dtype=torch.long))
        self.hold("dead_calls", torch.zeros(units, dtype=torch.long))
        self.hold("importance", torch.zeros(units, dtype=torch.float32))
        self._sizes = [len(site.units) for site in width_sites]

    def forward(self) -> tuple[Tensor, ...]:
        """Return the binarised gates of every site."""
        if self.training:
            self.clip_()
        if torch.is_grad_enabled() and is_eager():
            vectors: Any = _Vectors.apply(self.width, self.linear, self)
            return vectors
        binary = [None if gate is None else binarize(gate) for gate in (self.width, self.linear)]
        return self.vectors(*binary)

    def vectors(self, width: Tensor | None, linear: Tensor | None) -> tuple[Tensor, ...]:
        """Return binarised gates as calling it does: one vector a site."""
        found: list[Tensor] = []
        if width is not None:
            all_sites = torch.cat([width, width.new_ones(1)])[self._gather]
            parts = all_sites.split(self._sizes)
            found += [p.view(s.shape) for p, s in zip(parts, self.width_sites, strict=True)]
        if linear is not None:
            found += linear.unbind()
        return tuple(found)

    def gathered(self, vectors: Sequence[Tensor | None]) -> Tensor:
        """Return for every unit the sum of a number of all its channels, (units,).

        vectors: of the width sites; None stands for zeros.
        """
        assert self.width is not None
        pairs = zip(vectors, self._sizes, strict=True)
        numbers = [
            self.width.new_zeros(size) if vector is None else vector.reshape(-1)
            for vector, size in pairs
        ]
        return self._sum_of_channels(torch.cat(numbers))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Gates":
        """Follow the model to its device and dtype, but not to one of fewer than 32 bits.

        What a step moves a gate by would be rounded away there: near 0.75 bfloat16 knows no number
        within 0.002.
        """

        def moved(tensor: Tensor) -> Tensor:
            new = fn(tensor)
            short = new.is_floating_point() and new.element_size() < 4
            return tensor.to(new.device, torch.float32) if short else new

        return super()._apply(moved, recurse)

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Say of a state of fewer or more units, whose sizes torch lists, what it is of."""
        width = state_dict.get(f"{prefix}width")
        own, its = (0 if gates is None else gates.numel() for gates in (self.width, width))
        if width is not None and own != its:
            error_msgs.insert(0, _OF_FEWER if its < own else _OF_MORE)
        lists = missing_keys, unexpected_keys, error_msgs
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, *lists)

    def clip_(self) -> None:
        """Clip the real gates to [0, 1], as the paper does after every update.

        It goes round the version counter: the clipping of a second forward changes no number that
        the first one, or a penalty, left for its backward.
        """
        for gate in (self.width, self.linear):
            if gate is not None:
                gate.data.clamp_(0, 1)

    @property
    def superseded(self) -> bool:
        """Whether their optimizer trains others since `fxprune.compact`; copies are as new."""
        return self._superseded == id(self)

    @superseded.setter
    def superseded(self, value: bool) -> None:
        self._superseded = id(self) if value else 0

    def live(self) -> Tensor:
        """Return which units are kept, bool (units,)."""
        return torch.empty(0, dtype=torch.bool) if self.width is None else self.width >= HALF

    def linearised(self) -> Tensor:
        """Return which depth sites are linear, bool (depth sites,)."""
        return torch.empty(0, dtype=torch.bool) if self.linear is None else self.linear >= HALF

    def nonlinear(self) -> Tensor:
        """Return which units stand at a site that is not linear, bool (units,)."""
        linear = self.linearised().to(self._layer.device)
        channels = ~torch.cat([linear, linear.new_zeros(1)])[self._layer]
        return self._sum_of_channels(channels.float()) > 0

    def _sum_of_channels(self, numbers: Tensor) -> Tensor:
        """Return for every unit the sum over its channels, (units,); numbers: of all sites."""
        total = numbers.new_zeros(len(self.dead_calls) + 1)  # the last is of those without a gate
        return total.index_add(0, self._gather, numbers)[:-1]

    def kept(self, site: WidthSite) -> Tensor:
        """Return which channels of a site are kept, bool (channels,)."""
        live = torch.cat([self.live().cpu(), torch.ones(1, dtype=torch.bool)])
        return live[torch.tensor(site.units)]


def _parameter(count: int, start: float) -> nn.Parameter | None:
    """Return gates, whatever dtype new tensors have: steps would be rounded away in a short one."""
    return nn.Parameter(torch.full((count,), start, dtype=torch.float32)) if count else None


def sound_inits(width_init: Any, linear_init: Any) -> tuple[float, float]:
    """Return where gates start; raise `GateError` for no numbers, and what would change a model."""
    try:
        width, linear = float(width_init), float(linear_init)
    except (TypeError, ValueError) as error:
        raise GateError(
            f"width_init={width_init!r} or linear_init={linear_init!r} is no number; take "
            "½ ≤ width_init ≤ 1 and 0 ≤ linear_init < ½"
        ) from error
    if not HALF <= width <= 1 or not 0 <= linear < HALF:
        raise GateError(
            f"width_init={width_init} and linear_init={linear_init} would change the model; "
            "take ½ ≤ width_init ≤ 1 and 0 ≤ linear_init < ½"
        )
    return width, linear


def require_numbers(gates: Gates) -> None:
    """Raise `GateError` for gates that are NaN: they say nothing, and would count as shut."""
    if any(bool(gate.isnan().any()) for gate in gates.parameters()):
        raise GateError(
            "gates are NaN; take up the last checkpoint with a lower learning rate, of gates or "
            "weights, or clip gradients"
        )


def gate_owners(model: nn.Module) -> dict[Gates, nn.Module]:
    """Return the gates in a model, each with the module that holds them.

    Raises `ModelError` for what is no module.
    """
    require_module(model)
    found: dict[Gates, nn.Module] = {}
    for module in model.modules():
        # A wrapper may pass on the attributes of what it wraps; a script has no dict of its parts.
        parts = module._modules
        gates = parts["gates"] if "gates" in parts else None
        if isinstance(gates, Gates):
            found.setdefault(gates, module)
    return found


def clipped(gate: Tensor) -> Tensor:
    """Return gates within [0, 1], where clipping leaves them; at 0 and 1 too the gradient passes.

    That of torch's clamp did so in version 2.11, and does not in 2.14: what pulls at gates would
    let go of those at 1.
    """
    return torch.where((gate >= 0) & (gate <= 1), gate, gate.detach().clamp(0, 1))


def binarize(gate: Tensor) -> Tensor:
    """Return [gate ≥ ½] in the gate's dtype; its gradient passes straight through (equation 4)."""
    return (gate >= HALF).to(gate.dtype) + (gate - gate.detach())


def width_gate(value: Tensor, gate: Tensor) -> Tensor:
    """Return w'·value; ∂/∂w' = value, so that a removed unit can come back."""
    if isinstance(value, fx.Proxy):
        return _whole(value, width_gate, value, gate)
    # In ResNets an autograd function that reuses memory, or batch norm's kernels, take longer.
    return value * gate.to(value.dtype)


def linear_gate(value: Tensor, activated: Tensor, gate: Tensor) -> Tensor:
    """Return d'·value + (1 − d')·activated, exactly one of the two; ∂/∂d' = Σ value − activated."""
    if isinstance(value, fx.Proxy):
        return _whole(value, linear_gate, value, activated, gate)
    result: Any = _Select.apply(value, activated, gate)
    return result


def _whole(proxy: fx.Proxy, gate: Callable[..., Tensor], *args: Any) -> Any:
    """Put a gate into a graph as one node: torch.fx traces a model again when it is unpickled."""
    return proxy.tracer.create_proxy("call_function", gate, args, {})


class _Vectors(torch.autograd.Function):
    """The vectors of all sites, with one node in the backward instead of some for every site."""

    @staticmethod
    def forward(
        ctx: Any, width: Tensor | None, linear: Tensor | None, gates: Gates
    ) -> tuple[Tensor, ...]:
        ctx.gates = gates
        ctx.set_materialize_grads(False)
        binary = [None if gate is None else (gate >= HALF).to(gate) for gate in (width, linear)]
        return gates.vectors(*binary)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        gates, sites = ctx.gates, len(ctx.gates.width_sites)
        to_width, to_linear = None, None
        if ctx.needs_input_grad[0]:
            to_width = gates.gathered(grads[:sites])
        if ctx.needs_input_grad[1]:
            zero = gates.linear.new_zeros(())
            to_linear = torch.stack([zero if grad is None else grad for grad in grads[sites:]])
        return to_width, to_linear, None


class _Select(torch.autograd.Function):
    """Selection instead of arithmetic: infinities and signed zeros of the other branch stay out."""

    @staticmethod
    def forward(ctx: FunctionCtx, value: Tensor, activated: Tensor, gate: Tensor) -> Tensor:
        ctx.save_for_backward(value, activated, gate)
        return torch.where(gate >= HALF, value, activated)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        value, activated, gate = ctx.saved_tensors
        grad = grads[0]
        to_value = grad * (gate >= HALF).to(grad.dtype)  # half the time of a selection
        to_gate = (grad * (value - activated)).sum(dtype=gate.dtype)
        return to_value, grad - to_value, to_gate
