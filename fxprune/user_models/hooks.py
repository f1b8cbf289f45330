"""Hooks that a forward registers on its own model at its first call: to collect what layers return.

A note says that they are there. Whoever forgets the note alone has them registered a second time.
And hooks of all modules there are, which those that take a module's place are given, too.
"""

from collections.abc import Generator, Mapping
from contextlib import contextmanager

from torch import nn
from torch.nn.modules import module as torchs

_KINDS = (
    *("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    *("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"),
    *("_backward_hooks", "_backward_pre_hooks"),
)


def hooks_of(module: nn.Module) -> dict[str, set[int]]:
    """Return the numbers of a module's hooks, which those of its copies have too, by kind."""
    return {kind: set(vars(module).get(kind, ())) for kind in _KINDS}


def drop_later_hooks_(module: nn.Module, before: Mapping[str, set[int]]) -> None:
    """Leave a module no hooks but those that `hooks_of` found before."""
    for kind, known in before.items():
        hooks = vars(module).get(kind, {})
        for number in set(hooks) - known:
            del hooks[number]


def are_all_hooked() -> bool:
    """Tell whether somebody listens to all modules (`register_module_forward_hook`)."""
    return bool(torchs._global_forward_hooks or torchs._global_forward_pre_hooks)


@contextmanager
def without_hooks_of_all() -> Generator[None]:
    """Call nobody who listens to all modules, for a while."""
    kinds = (torchs._global_forward_hooks, torchs._global_forward_pre_hooks)
    before = [dict(hooks) for hooks in kinds]
    for hooks in kinds:
        hooks.clear()
    try:
        yield
    finally:
        for hooks, held in zip(kinds, before, strict=True):
            hooks.update(held)
