"""What every pass and every rule must pass; also for those who write their own.

`check_rewrite` holds a pass to its contract. `check_rule` holds an operator's rule to its by
execution: between two layers that mix channels, channels the operator should let go are removed,
and the outputs must not move.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxprune.dataflow.channels import analyse
from fxprune.gating.gates import HALF, UNGATED, Gates
from fxprune.gating.owners import gates_by_name
from fxprune.passes.dead_channels import eliminate_dead_channels
from fxprune.programs.pipeline import Change, Pass
from fxprune.programs.program import Program, capture
from fxprune.user_models.modules import evaluating


@dataclass(frozen=True)
class Shrunk:
    """What `check_rule` saw: parameters before and after, and the relative error of the outputs."""

    before: int
    after: int
    error: float
    changes: list[Change]


def check_rewrite(one: Pass, before: Program, tolerance: float = 1e-12) -> Program:
    """Run a pass on a copy and return the copy.

    Raises AssertionError unless the graph is valid, the numbers are the same (relative to the
    largest output), changes are reported exactly if there are any, and a second run does nothing.
    """
    after = before.clone()
    changes = one(after)
    after.check()
    with evaluating(before.module, after.module):
        assert error(before.run(), after.run()) <= tolerance, "the numbers changed"
    touched = before.text() != after.text() or _shapes(before) != _shapes(after)
    assert bool(changes) == touched, f"changes reported: {changes}, program changed: {touched}"
    text = after.text()
    again = one(after)
    after.check()
    assert not again and after.text() == text, f"a second run still finds {again}"
    return after


def check_rule(
    operator: Callable[..., Any],
    shape: tuple[int, ...],
    *,
    operands: int = 1,
    axis: int = 1,
    out_axis: int = 1,
    zero_inputs: bool = False,
    seed: int = 0,
) -> Shrunk:
    """Remove channels around an operator and compare the outputs.

    operator: takes `operands` tensors of `shape`, with channels along `axis` (along `out_axis` in
    its outputs). Half of the channels die: as what follows does not read them, or with
    `zero_inputs` as what precedes sends nothing. Raises AssertionError unless the outputs stay
    equal to 1e-10 relative, and vary.
    """
    torch.manual_seed(seed)
    model = _Sandwich(operator, shape, operands, axis, out_axis).double().eval()
    _randomise(model)
    x = torch.randn(shape, dtype=torch.float64)
    with torch.no_grad():
        (_silence_inputs(model) if zero_inputs else _silence_outputs(model, x))
        expected = model(x)
    program = capture(model, ((x,), {}))
    before = sum(p.numel() for p in program.module.parameters())
    changes = eliminate_dead_channels(program)
    program.check()
    after = sum(p.numel() for p in program.module.parameters())
    found = error(expected, program.run())
    assert found <= 1e-10, f"outputs moved by {found}"
    assert spread(expected) > 1e-6, "the outputs do not vary: nothing was tested"
    return Shrunk(before, after, found, changes)


def close_half(gated: nn.Module, seed: int = 0) -> int:
    """Close half of the width gates of every site at random; return how many units are closed.

    Units that several sites share are closed once, so that no site loses more than half.
    """
    generator = torch.Generator().manual_seed(seed)
    return sum(_close_half(gates, generator) for gates in gates_by_name(gated).values())


def _close_half(gates: Gates, generator: torch.Generator) -> int:
    if gates.width is None:
        return 0
    with torch.no_grad():
        for site in gates.width_sites:
            units = torch.tensor(sorted({unit for unit in site.units if unit != UNGATED}))
            still_open = units[gates.width[units].cpu() >= HALF]
            excess = len(still_open) - (len(units) + 1) // 2
            if excess > 0:
                order = torch.randperm(len(still_open), generator=generator)[:excess]
                gates.width[still_open[order]] = 0
    return int((gates.width < HALF).sum())


def error(expected: Any, actual: Any) -> float:
    """Return the largest difference relative to the largest expected number, over all outputs."""
    pairs = zip(_tensors(expected), _tensors(actual), strict=True)
    worst = 0.0
    for left, right in pairs:
        if left.shape != right.shape:
            return float("inf")
        if left.numel():
            scale = float(left.abs().max()) or 1.0
            worst = max(worst, float((left - right).abs().max()) / scale)
    return worst


def spread(outputs: Any) -> float:
    """Return the smallest relative standard deviation over the batch, over all outputs."""
    return min(
        float(t.std(0).mean() / t.abs().max()) if t.shape[0] > 1 else float(t.std() / t.abs().max())
        for t in _tensors(outputs)
    )


class _Sandwich(nn.Module):
    """Layers that mix channels, the operator, layers that mix channels again."""

    def __init__(
        self,
        operator: Callable[..., Any],
        shape: tuple[int, ...],
        operands: int,
        axis: int,
        out_axis: int,
    ) -> None:
        super().__init__()
        size = shape[axis]
        self.before = nn.ModuleList([nn.Linear(size, size) for _ in range(operands)])
        self.operator = operator
        self.axis, self.out_axis = axis, out_axis
        if isinstance(operator, nn.Module):
            operator.eval()
        with torch.no_grad():
            outputs = self._middle(torch.rand(shape))
        self.several = not isinstance(outputs, Tensor)
        sizes = [output.shape[out_axis] for output in _tensors(outputs)]
        self.after = nn.ModuleList([nn.Linear(size, 3) for size in sizes])

    def forward(self, x: Tensor) -> list[Tensor]:
        found = self._middle(x)
        outputs = [found[place] if self.several else found for place in range(len(self.after))]
        return [
            layer(output.movedim(self.out_axis, -1))
            for layer, output in zip(self.after, outputs, strict=True)
        ]

    def _middle(self, x: Tensor) -> Any:
        last = x.movedim(self.axis, -1)
        return self.operator(*[layer(last).movedim(-1, self.axis) for layer in self.before])


def _silence_outputs(model: _Sandwich, x: Tensor) -> None:
    """Let the layers behind the operator stop reading about half of the units the rule found.

    The analysis only proposes what to silence; whether that was right, execution decides.
    """
    channels = analyse(capture(model, ((x,), {})), generic=True)
    generator = torch.Generator().manual_seed(1)
    dead = torch.rand(len(channels.classes), generator=generator) < 0.5
    for node, call in channels.calls.items():
        if str(node.target).startswith("after."):
            tags = call.value().along(-1).tags
            layer: Any = model.get_submodule(str(node.target))
            layer.weight.data[:, dead[channels.classes[tags]]] = 0


def _silence_inputs(model: _Sandwich) -> None:
    for layer in model.before:
        assert isinstance(layer, nn.Linear) and layer.bias is not None
        layer.weight.data[1::2] = 0
        layer.bias.data[1::2] = 0


def _randomise(model: nn.Module) -> None:
    """Give every parameter and every statistic a value that is not its default."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point():
            positive = name.endswith("running_var")
            tensor.data.uniform_(0.5, 1.5) if positive else tensor.data.normal_()


def _shapes(program: Program) -> dict[str, Any]:
    return {
        name: tensor.double().sum().item() for name, tensor in program.module.state_dict().items()
    }


def _tensors(outputs: Any) -> list[Tensor]:
    return [leaf.detach() for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)]
