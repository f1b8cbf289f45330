"""Gates in Lightning: a callback for a `LightningModule` that holds an instrumented model.

    trainer = lightning.Trainer(callbacks=[fxprune.lightning.GateCallback(budget)])

Configure the optimizer by `fxprune.parameter_groups(self, …)`. The loss that is logged has no
penalty in it.
"""

from typing import Any

from fxprune.gating.optimizer_groups import require_undecayed
from fxprune.training.budget import Budget
from fxprune.training.loops import (
    add_penalty_gradients_,
    finish_step_,
    library,
    trains_gates,
    unscale_,
)

_Callback: Any = library("lightning.pytorch", "lightning").Callback


class GateCallback(_Callback):
    """Adds the penalty, clips the gates, and steps the budget, whose state the checkpoint keeps.

    budget: made for the model before it trains; its steps are those of the optimizer. Without it
    the penalties of the model count.
    """

    def __init__(self, budget: Budget | None = None) -> None:
        """Take the budget."""
        super().__init__()
        self.budget, self._stepped = budget, False

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Refuse optimizers that decay gates; follow the model to its device."""
        for optimizer in trainer.optimizers:
            require_undecayed(pl_module, optimizer)
        if self.budget is not None:
            self.budget.follow(self.budget.gated)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Add the penalty's gradients: gradients are complete now, and not yet clipped."""
        if trains_gates(optimizer, pl_module):
            unscale_(getattr(trainer.precision_plugin, "scaler", None), optimizer)
            add_penalty_gradients_(pl_module, self.budget)
            self._stepped = True

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any, **kwargs: Any) -> None:
        """Finish the step, if the batch ended with one."""
        if self._stepped:
            self._stepped = False
            finish_step_(pl_module, self.budget)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Put frozen gates back: other callbacks may have put in weights that were averaged."""
        if self.budget is not None:
            self.budget.put_back()

    def state_dict(self) -> dict[str, Any]:
        """Return the budget's state."""
        return {} if self.budget is None else {"budget": self.budget.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the budget where the checkpoint left it."""
        if self.budget is not None:
            self.budget.load_state_dict(state_dict.get("budget", {}))
