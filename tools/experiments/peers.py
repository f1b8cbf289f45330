"""Torch-Pruning's methods in the comparison: sparse training to a point, one pruning, fine-tuning.

Each prunes globally, in many small steps, until the MACs are within the budget; the importance of
a Taylor method comes from the last batches before. It is an extra, and imported late.
"""

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxprune.costs import count_costs
from fxprune.user_models.inputs import Inputs
from tools.experiments.classifier import Method, Recipe

PRUNING_STEPS = 200
MOST_OF_A_LAYER = 0.9  # that may go: without a limit global pruning empties layers
TAYLOR_BATCHES = 20


def magnitude(tp: Any, model: nn.Module, x: Tensor, **options: Any) -> Any:
    """Prune channels of small L2 norm."""
    importance = tp.importance.GroupMagnitudeImportance(p=2)
    return tp.pruner.MagnitudePruner(model, x, importance=importance, **options)


def taylor(tp: Any, model: nn.Module, x: Tensor, **options: Any) -> Any:
    """Prune by the first-order Taylor importance of groups."""
    importance = tp.importance.GroupTaylorImportance()
    return tp.pruner.MagnitudePruner(model, x, importance=importance, **options)


def batch_norm(tp: Any, model: nn.Module, x: Tensor, **options: Any) -> Any:
    """Prune by the scales of batch norms, trained with an L1 penalty (Liu et al. 2017)."""
    importance = tp.importance.BNScaleImportance()
    return tp.pruner.BNScalePruner(model, x, importance=importance, reg=1e-4, **options)


def group_norm(tp: Any, model: nn.Module, x: Tensor, **options: Any) -> Any:
    """Prune by group norms, trained to be sparse (Fang et al. 2023)."""
    importance = tp.importance.GroupMagnitudeImportance(p=2)
    return tp.pruner.GroupNormPruner(model, x, importance=importance, reg=5e-4, **options)


SPARSE = ("tp-bn-scale", "tp-group-norm")  # trained to be sparse before they are pruned
PEERS: dict[str, Callable[..., Any]] = {
    "tp-magnitude": magnitude,
    "tp-taylor": taylor,
    "tp-bn-scale": batch_norm,
    "tp-group-norm": group_norm,
}


class Peer(Method):
    """A model pruned by Torch-Pruning when `prune_at` of the steps are done."""

    def __init__(
        self, name: str, model: nn.Module, recipe: Recipe, steps: int, x: Tensor, macs: float
    ) -> None:
        super().__init__(model, recipe, steps)
        self.inputs: Inputs = ((x,), {})
        self.target = macs * self.macs()
        self.is_sparse, self.needs_gradients = name in SPARSE, name == "tp-taylor"
        heads = [module for module in model.modules() if isinstance(module, nn.Linear)]
        self.pruner = PEERS[name](
            import_module("torch_pruning"),
            model,
            x,
            global_pruning=True,
            pruning_ratio=MOST_OF_A_LAYER,
            max_pruning_ratio=MOST_OF_A_LAYER,
            iterative_steps=PRUNING_STEPS,
            ignored_layers=heads,
        )
        self.pruned = False
        self.recent: list[tuple[Tensor, Tensor]] = []

    def macs(self) -> float:
        """Return the multiply-accumulates of one image."""
        with torch.no_grad():
            return count_costs(self.model.eval(), self.inputs).macs

    def regularize(self) -> None:
        """Let the pruner push weights towards 0, if it does."""
        if self.is_sparse and not self.pruned:
            self.pruner.regularize(self.model)

    def stepped(self, done: int, images: Tensor, labels: Tensor) -> None:
        """Prune when it is time."""
        if self.needs_gradients and not self.pruned:
            self.recent = [*self.recent, (images, labels)][-TAYLOR_BATCHES:]
        if done < round(self.recipe.prune_at * self.steps) or self.pruned:
            return
        self.pruned = True
        if self.needs_gradients:
            self._accumulate()
        for _ in range(PRUNING_STEPS):
            if self.macs() <= self.target:
                break
            self.pruner.step()
        self.optimizer = self.new_optimizer()  # its parameters are new ones

    def _accumulate(self) -> None:
        self.model.eval().zero_grad()
        for images, labels in self.recent:
            F.cross_entropy(self.model(images), labels).backward()
