"""Functions that remember what they returned, traced as if they did not.

    @functools.lru_cache
    def grid(height, width, device): …        grid(*x.shape[2:], x.device)

They look a traced size up in what they remember. It is found if it is the example's, and then the
graph is one for this size, and a different one once the function was called before.
"""

import functools
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from fxprune.tracing.stand_ins import is_given_traced
from fxprune.user_models.beside import Beside


@contextmanager
def uncached(beside: Beside, tracer: Any) -> Generator[None]:
    """Let functions that remember run anew where they are called with traced values.

    tracer: while it is `answering`, they do what they do. What they remember of a trace, as one may
    have read a parameter, is forgotten afterwards.
    """

    def forgetting(remembering: Any) -> Any:
        @functools.wraps(remembering)
        def call(*args: Any, **kwargs: Any) -> Any:
            anew = is_given_traced(args, kwargs) and not tracer.answering
            return (remembering.__wrapped__ if anew else remembering)(*args, **kwargs)

        said: Any = call
        said.cache_info, said.cache_clear = remembering.cache_info, remembering.cache_clear
        return call

    try:
        with beside.remembering_as(forgetting):
            yield
    finally:
        beside.forget_traced()
