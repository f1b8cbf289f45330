"""One recipe for every method that is compared: the same images, in the same order, the same rates.

A method takes part by three deeds: what it adds to the loss, what it does to gradients, and what it
does after a step; it may replace the model. It sees neither the test set nor the schedule.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

from tools.training import Data, cosine

WARM_UP = 0.03  # of the steps, in which the rate rises


@dataclass(frozen=True)
class Recipe:
    """How long and how fast to train.

    prune_at: the part of the steps after which nothing goes. bfloat16: whether to train under
    autocast, which is slow where the processor has no instructions for it.
    """

    epochs: int = 10
    batch: int = 128
    lr: float = 0.1
    weight_decay: float = 5e-4
    momentum: float = 0.9
    prune_at: float = 0.5
    seed: int = 0
    bfloat16: bool = True


class Method:
    """A plain model, trained; the others change some of this."""

    def __init__(self, model: nn.Module, recipe: Recipe, steps: int) -> None:
        self.model, self.recipe, self.steps = model, recipe, steps
        self.optimizer = self.new_optimizer()

    def new_optimizer(self) -> torch.optim.Optimizer:
        """Return an optimizer of the model as it is now; its first group follows the schedule."""
        decay, momentum = self.recipe.weight_decay, self.recipe.momentum
        parameters = self.model.parameters()
        return torch.optim.SGD(parameters, self.recipe.lr, momentum, weight_decay=decay)

    def penalty(self) -> Tensor | float:
        """Return what is added to the loss."""
        return 0.0

    def regularize(self) -> None:
        """Change gradients, before the optimizer's step."""

    def stepped(self, done: int, images: Tensor, labels: Tensor) -> None:
        """Do what there is to do after the step."""

    def finished(self) -> nn.Module:
        """Return the model to be judged, in evaluation mode."""
        return self.model.eval()


def train(
    start: Callable[[int], Method], data: Data, recipe: Recipe, console: Console
) -> tuple[Method, float]:
    """Train by a method, and return it with the seconds this took: processor time on the CPU."""
    images, labels = data
    device = images.device
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    steps = recipe.epochs * math.ceil(len(images) / recipe.batch)
    method, done = start(steps), 0
    order = torch.Generator().manual_seed(recipe.seed)
    started = clock()
    for epoch in range(recipe.epochs):
        loss = torch.zeros(())
        for picked in torch.randperm(len(images), generator=order).split(recipe.batch):
            method.model.train()
            picked = picked.to(device)
            x, y = images[picked], labels[picked]
            method.optimizer.param_groups[0]["lr"] = _rate(recipe.lr, done / steps)
            with torch.autocast(device.type, torch.bfloat16, enabled=recipe.bfloat16):
                loss = F.cross_entropy(method.model(x), y)
            method.optimizer.zero_grad()
            (loss + method.penalty()).backward()
            method.regularize()
            method.optimizer.step()
            done += 1
            method.stepped(done, x, y)
        seconds = clock() - started
        console.print(f"epoch {epoch + 1}/{recipe.epochs} {seconds:.0f} s loss {loss.item():.3f}")
    return method, clock() - started


def _rate(lr: float, part: float) -> float:
    """Return the rate after a part of the steps: a short rise, then a cosine."""
    return lr * part / WARM_UP if part < WARM_UP else cosine(lr, (part - WARM_UP) / (1 - WARM_UP))
