"""Hooks that a forward registers on its own model at its first call: to collect what layers return.

A note says that they are there. Whoever forgets the note alone has them registered a second time.
"""

from collections.abc import Mapping

from torch import nn

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
