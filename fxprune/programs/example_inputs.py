"""Guess example inputs for a model that comes without any.

A model's own `default_cfg["input_size"]` is asked first; otherwise the first layer that holds
weights tells the number of channels, and a few common sizes are tried until the model runs.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fxprune.errors import ExampleInputError
from fxprune.user_models.inputs import Inputs, to_device
from fxprune.user_models.modules import copy_model, device_of

_IMAGES = (224, 32, 28, 64, 96, 128, 299, 256)
_SEQUENCES = (128, 1000, 16000)
_VOLUMES = ((16, 112, 112), (8, 32, 32))


def infer_example_inputs(model: nn.Module) -> Inputs:
    """Return inputs, batch 2, that the model runs on; raise `ExampleInputError` if none does."""
    probe = copy_model(model).eval()
    tried: list[str] = []
    for guess in _guesses(model):
        inputs = to_device(((_as_weights(guess, model),), {}), device_of(model))
        try:
            with torch.no_grad():
                probe(*inputs[0])
        except Exception as error:  # any failure of a user's model means only: not this shape
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            tried.append(f"{list(guess.shape)}: {reason[:80]}")
            continue
        return inputs
    raise ExampleInputError(
        f"no input for {type(model).__name__} could be guessed"
        + (f" (tried {'; '.join(tried[:3])})" if tried else "")
        + "; pass example_inputs=(x,)"
    )


def _guesses(model: nn.Module) -> Iterator[Tensor]:
    config: Any = getattr(model, "default_cfg", None) or getattr(model, "pretrained_cfg", None)
    if isinstance(config, dict) and config.get("input_size"):
        yield _normal(2, *config["input_size"])
    first = next((m for m in model.modules() if isinstance(m, _FIRST)), None)
    if isinstance(first, nn.Conv1d):
        yield from (_normal(2, first.in_channels, length) for length in _SEQUENCES)
    elif isinstance(first, nn.Conv2d):
        yield from (_normal(2, first.in_channels, size, size) for size in _IMAGES)
    elif isinstance(first, nn.Conv3d):
        yield from (_normal(2, first.in_channels, *size) for size in _VOLUMES)
    elif isinstance(first, nn.Linear):
        yield _normal(2, first.in_features)
        yield _normal(2, 16, first.in_features)
    elif isinstance(first, nn.Embedding):
        generator = torch.Generator().manual_seed(0)
        yield torch.randint(first.num_embeddings, (2, 16), generator=generator)


_FIRST = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear, nn.Embedding)


def _as_weights(guess: Tensor, model: nn.Module) -> Tensor:
    """Give a floating-point guess the dtype of the model's first weights: half, double."""
    weights = (p.dtype for p in model.parameters() if p.is_floating_point())
    return guess.to(next(weights, guess.dtype)) if guess.is_floating_point() else guess


def _normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))
