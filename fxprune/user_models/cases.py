"""The inputs two models are compared on: chosen to tell them apart.

Random inputs like an example: at other batch sizes, which tells what a sample knows of the others;
ten times as large, which saturates activations; of a larger size, where inputs are image-like; and
longer, where they are sequences.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fxprune.user_models.inputs import Inputs, leading_size, model_inputs, tensors_of

# What the second spatial size adds: the usual total stride, so that most models accept it.
GROWTH = 32
# The factor that drives activations into saturation.
SATURATION = 10.0


def normalised_inputs(example_inputs: Any) -> Inputs:
    """Return (args, kwargs) as they are, anything else as `model_inputs` reads it."""
    if isinstance(example_inputs, tuple) and len(example_inputs) == 2:
        args, kwargs = example_inputs
        if isinstance(args, tuple) and isinstance(kwargs, dict):
            return args, kwargs
    return model_inputs(example_inputs)


def random_inputs(
    inputs: Inputs,
    seed: int,
    *,
    batch: int | None = None,
    growth: int = 0,
    scale: float = 1.0,
    length: int = 0,
) -> Inputs:
    """Draw inputs like `inputs`: floats from scale·N(0, 1), others from the example's own values.

    batch: dim 0 of all tensors that share the example's leading size. growth: what the spatial dims
    gain. length: what dim 1 gains, of all tensors that share the first sequence's. One seed gives
    the same numbers on every device.
    """
    generator = torch.Generator().manual_seed(seed)
    leading = leading_size(inputs)
    long = next((t.shape[1] for t in tensors_of(inputs) if is_sequence(t)), None)

    def draw(example: Tensor) -> Tensor:
        shape = list(example.shape)
        if batch is not None and shape and shape[0] == leading:
            shape[0] = batch
        for dim in spatial_dims(example):
            shape[dim] += growth
        if example.ndim > 1 and example.shape[1] == long:
            shape[1] += length
        return _drawn(example, shape, generator, scale)

    return pytree.tree_map_only(Tensor, draw, inputs)


def inputs_of_shapes(inputs: Inputs, shapes: Sequence[Sequence[int]], seed: int) -> Inputs:
    """Draw inputs like `inputs`, of the shapes given for its tensors in their order."""
    generator, given = torch.Generator().manual_seed(seed), iter(shapes)

    def draw(example: Tensor) -> Tensor:
        return _drawn(example, next(given), generator)

    return pytree.tree_map_only(Tensor, draw, inputs)


def _drawn(
    example: Tensor, shape: Sequence[int], generator: torch.Generator, scale: float = 1.0
) -> Tensor:
    if example.is_floating_point():
        return (torch.randn(shape, generator=generator) * scale).to(example)
    values = example.detach().flatten()
    count = math.prod(shape) if len(values) else 0
    chosen = torch.randint(max(len(values), 1), (count,), generator=generator)
    return values[chosen.to(values.device)].reshape(shape)


def random_cases(example: Inputs, batches: Sequence[int], seed: int) -> dict[str, Inputs]:
    """Return by name the random inputs that a model running on `example` is tried on."""
    tensors = tensors_of(example)
    cases: dict[str, Inputs] = {}
    if leading_size(example) is not None:
        for batch in batches:
            cases[f"batch {batch}"] = random_inputs(example, seed + len(cases), batch=batch)
    if any(tensor.is_floating_point() for tensor in tensors):
        cases[f"×{SATURATION:.0f}"] = random_inputs(example, seed + len(cases), scale=SATURATION)
    # The largest batch: there may be no other outputs of these shapes to see variation in.
    most = max(batches, default=None)
    if any(spatial_dims(tensor) for tensor in tensors):
        larger = random_inputs(example, seed + len(cases), batch=most, growth=GROWTH)
        cases[f"size +{GROWTH}"] = larger
    if any(map(is_sequence, tensors)):
        longer = random_inputs(example, seed + len(cases), batch=most, length=1)
        cases["length +1"] = longer
    return cases


def spatial_dims(tensor: Tensor) -> range:
    """Return the last dims, two at most, of an image-like input (float, 3-D or more)."""
    if not tensor.is_floating_point() or tensor.ndim < 3:
        return range(0)
    return range(max(2, tensor.ndim - 2), tensor.ndim)


def is_sequence(tensor: Tensor) -> bool:
    """Tell whether an input may be one of tokens: numbers of them (N, T), or vectors (N, T, C)."""
    return tensor.ndim == (3 if tensor.is_floating_point() else 2)
