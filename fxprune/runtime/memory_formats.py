"""Where the channels of images and maps lie in memory: cuts and folds leave them there.

A model in channels_last is fast because all its weights are. Strides tell, as they tell torch,
where a kernel of 1×1 or a single channel is in both formats.
"""

from collections.abc import Mapping
from itertools import chain

import torch
from torch import Tensor, nn

_OF_RANK = {4: torch.channels_last, 5: torch.channels_last_3d}
Formats = Mapping[str, torch.memory_format | None]


def channels_last(tensor: Tensor) -> torch.memory_format | None:
    """Return the format with channels last that a tensor is in; None if it is in none."""
    last = _OF_RANK.get(tensor.dim())
    if last is None or tensor.layout is not torch.strided or tensor.stride(1) != 1:
        return None
    stride, plain = tensor.stride(), torch.empty(tensor.shape, device="meta")
    return last if stride == plain.to(memory_format=last).stride() != plain.stride() else None


def like(tensor: Tensor, whole: Tensor) -> Tensor:
    """Return a part of a tensor with its channels last if those of the whole are."""
    last = channels_last(whole)
    return tensor if last is None else tensor.to(memory_format=last)


def formats_in(module: nn.Module) -> Formats:
    """Return the formats of the parameters and buffers that may have channels last, by name."""
    return {name: channels_last(tensor) for name, tensor in _maps(module).items()}


def restore_formats_(module: nn.Module, formats: Formats) -> None:
    """Put channels last where they were, and in new tensors if they were in any."""
    found = set(formats.values())
    for name, tensor in _maps(module).items():
        last = _OF_RANK[tensor.dim()]
        if formats.get(name, last) == last and last in found:
            tensor.data = tensor.detach().to(memory_format=last)


def _maps(module: nn.Module) -> dict[str, Tensor]:
    named = chain(module.named_parameters(), module.named_buffers())
    return {name: tensor for name, tensor in named if tensor.dim() in _OF_RANK}
