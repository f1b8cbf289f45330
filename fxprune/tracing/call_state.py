"""Questions for what surrounds a call: mixed precision, gradients, inference mode.

    if torch.is_autocast_enabled(): x = x.half()        if torch.is_grad_enabled() and …:

They are answered otherwise in training than in evaluation, or as the user's loop pleases, and no
graph asks. Mostly no answer matters; whether one does, traces with other answers tell.
"""

import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import combinations
from types import ModuleType
from typing import Any

import torch

from fxprune.errors import TraceError
from fxprune.tracing.lookups import NOT_THE_USERS
from fxprune.tracing.stand_ins import standing_in

_QUESTIONS = (
    *("is_autocast_enabled", "is_autocast_cpu_enabled", "is_grad_enabled"),
    *("is_inference_mode_enabled", "get_autocast_dtype"),
    *("get_autocast_gpu_dtype", "get_autocast_cpu_dtype"),
)
# Of so many questions not all answers are tried.
_MANY = 3


@dataclass
class CallState:
    """How traced code is answered, and what it asked.

    otherwise: the questions that are answered otherwise than now. refused: none is answered.
    """

    otherwise: frozenset[str] = frozenset()
    refused: bool = False
    asked: set[str] = field(default_factory=set[str])

    def answer(self, name: str, value: Any) -> Any:
        """Answer a question, whose answer is `value` while the model is traced."""
        self.asked.add(name)
        if self.refused:
            raise TraceError(
                f"it asks torch.{name}, and goes by an answer that may be another in training or "
                "under autocast, which no graph asks"
            )
        if name not in self.otherwise:
            return value
        other = torch.float16 if value == torch.bfloat16 else torch.bfloat16
        return not value if isinstance(value, bool) else other


def answers_matter(asked: set[str], is_same: Callable[[CallState], bool]) -> bool:
    """Tell whether other answers to what was asked give another graph, alone or together.

    is_same: traces once more, and tells whether the graph is the same. An answer may lead to more
    questions, which count as asked.
    """
    asked, tried = set(asked), set[frozenset[str]]()
    while waiting := {frozenset(one) for one in _subsets(asked)} - tried:
        if len(asked) > _MANY:
            return True
        state = CallState(min(waiting, key=sorted))
        tried.add(state.otherwise)
        if not is_same(state):
            return True
        asked |= state.asked
    return False


def _subsets(names: set[str]) -> Iterator[tuple[str, ...]]:
    for size in range(1, len(names) + 1):
        yield from combinations(sorted(names), size)


@contextmanager
def asked_of(state: CallState, users: Sequence[ModuleType], tracer: Any) -> Generator[None]:
    """Let traced code of the user's ask `state`, whether by torch's names or by its modules' own.

    tracer: says whether it is `answering`, when code runs that is not traced.
    """
    torchs: dict[str, Any] = {name: getattr(torch, name, None) for name in _QUESTIONS}
    asked = {name: _Asking(name, function, state, tracer) for name, function in torchs.items()}
    names = [
        (owner, name, asked[name])
        for owner in (torch, *users)
        for name in torchs.keys() & vars(owner).keys()
        if torchs[name] is not None and vars(owner)[name] is torchs[name]
    ]
    try:
        with standing_in(*names):
            yield
    finally:
        for one in asked.values():
            one.is_over = True


class _Asking:
    """A function of torch's that asks `state`; who keeps it (an import) has torch's own later."""

    def __init__(self, name: str, function: Callable[..., Any], state: CallState, tracer: Any):
        self.name, self.function, self.state, self.tracer = name, function, state, tracer
        self.is_over = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        value = self.function(*args, **kwargs)
        ours = sys._getframe(1).f_code.co_filename.startswith(NOT_THE_USERS)
        unasked = ours or self.is_over or self.tracer.answering
        return value if unasked else self.state.answer(self.name, value)

    def __eq__(self, other: object) -> bool:
        return other is self.function or other is self

    def __hash__(self) -> int:
        return hash(self.function)
