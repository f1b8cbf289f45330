"""Gates in the Trainer of Hugging Face's transformers: a callback.

    optimizer = torch.optim.AdamW(fxprune.parameter_groups(gated, lr=5e-5, gate_lr=0.01))
    trainer = Trainer(gated, args, train_dataset=…, optimizers=(optimizer, None),
                      callbacks=[fxprune.huggingface.GateCallback(budget)])

The optimizer of the Trainer's own making would train gates at the rate of the weights. The loss
that is logged has no penalty in it; gradients are clipped (`max_grad_norm`) before it is added.
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from fxprune.errors import BudgetError, one_line
from fxprune.gating.optimizer_groups import require_undecayed
from fxprune.training.budget import Budget
from fxprune.training.loops import add_penalty_gradients_, finish_step_, library, unscale_

_Callback: Any = library("transformers", "huggingface").TrainerCallback
_FILE = "fxprune_budget.pt"


class GateCallback(_Callback):
    """Adds the penalty, clips the gates, and steps the budget, whose state every checkpoint keeps.

    budget: made for the model before it trains; its steps are those of the optimizer. Without it
    the penalties of the model count.
    """

    def __init__(self, budget: Budget | None = None) -> None:
        """Take the budget."""
        self.budget = budget

    def on_train_begin(
        self, args: Any, state: Any, control: Any, *, model: nn.Module, **kwargs: Any
    ) -> None:
        """Refuse an optimizer that decays gates; take up the budget where a checkpoint left it."""
        require_undecayed(model, kwargs["optimizer"])
        if self.budget is None:
            return
        self.budget.follow(self.budget.gated)
        if state.global_step:
            file = _checkpoint(args, state) / _FILE
            if not file.exists():
                raise BudgetError(f"there is no {file}: the run that goes on had no budget")
            self.budget.load_state_dict(_read(file))

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, *, model: nn.Module, **kwargs: Any
    ) -> None:
        """Add the penalty's gradients: those of the loss are complete now."""
        accelerated = kwargs["optimizer"]
        unscale_(
            getattr(accelerated, "scaler", None), getattr(accelerated, "optimizer", accelerated)
        )
        add_penalty_gradients_(model, self.budget)

    def on_optimizer_step(
        self, args: Any, state: Any, control: Any, *, model: nn.Module, **kwargs: Any
    ) -> None:
        """Finish the step, while the gradients are still there."""
        finish_step_(model, self.budget)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Put the budget's state into the checkpoint."""
        if self.budget is not None and state.is_world_process_zero:
            torch.save(self.budget.state_dict(), _checkpoint(args, state) / _FILE)


def _read(file: Path) -> Any:
    try:
        return torch.load(file, weights_only=True)
    except Exception as error:  # torch has no one class for what is no file of its own
        raise BudgetError(
            f"{file} cannot be read: {one_line(error)}; go on from an earlier checkpoint"
        ) from error


def _checkpoint(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"
