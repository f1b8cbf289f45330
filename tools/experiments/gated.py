"""fxprune in the comparison: gates and weights trained to a budget, and compacted on the way."""

import torch
from torch import Tensor, nn

import fxprune
from fxprune.training.budget import Phases
from tools.experiments.classifier import Method, Recipe

GATE_LR = 0.1


class Gated(Method):
    """A model trained to a budget of MACs."""

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        steps: int,
        x: Tensor,
        macs: float,
        estimator: str,
    ) -> None:
        super().__init__(fxprune.instrument(model, x), recipe, steps)
        phases = _phases(estimator, recipe.prune_at)
        self.budget = fxprune.Budget(
            self.model, macs=macs, steps=steps, phases=phases, estimator=estimator
        )

    def new_optimizer(self) -> torch.optim.Optimizer:
        """Return an optimizer that does not decay the gates."""
        decay = self.recipe.weight_decay
        groups = fxprune.parameter_groups(
            self.model, lr=self.recipe.lr, gate_lr=GATE_LR, weight_decay=decay
        )
        return torch.optim.SGD(groups, momentum=self.recipe.momentum)

    def penalty(self) -> Tensor:
        """Return the budget's penalty."""
        return self.budget.penalty()

    def stepped(self, done: int, images: Tensor, labels: Tensor) -> None:
        """Move λ; once the gates are frozen drop what is dead."""
        frozen = self.budget.frozen
        self.budget.step()
        if self.budget.frozen and not frozen:
            self.model = fxprune.compact(self.model, self.optimizer)
            self.budget.follow(self.model)

    def finished(self) -> nn.Module:
        """Return the finalised model."""
        return fxprune.finalize(self.model.eval())


def _phases(estimator: str, end: float) -> Phases:
    """Return when to shrink: ranks wait for features to rank, pulled gates need time at the end."""
    if estimator == "taylor":
        return Phases(warm_up=0.4 * end, shrink=end, settle=end)
    return Phases(shrink=0.7 * end, settle=end)
