"""What a verb is doing, shown once it takes longer than a moment.

On a terminal that is a line with a bar, which goes when the verb is done; anywhere else the stages
are lines of the log "fxprune", at the level INFO.
"""

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from functools import wraps
from typing import ParamSpec, TypeVar

import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

MOMENT = 2.0  # seconds

_log = logging.getLogger("fxprune")
_shown: list["_Display"] = []  # one at most: what a verb calls shows its stages there
_P = ParamSpec("_P")
_R = TypeVar("_R")
_T = TypeVar("_T")


class _Display:
    """The line of a verb: its title, the stage it is in, and how much of that is done."""

    def __init__(self, title: str) -> None:
        self.title, self.started = title, time.monotonic()
        self.text, self.total, self.done = title, 0, 0
        self.bar: Progress | None = None
        self.lock = threading.Lock()
        self.timer: threading.Timer | None = None
        if sys.stderr.isatty() and not _is_other_rank():
            self.timer = threading.Timer(MOMENT, self._appear)
            self.timer.daemon = True
            self.timer.start()

    def stage(self, text: str, total: int) -> None:
        """Begin a stage of so many steps."""
        seconds = time.monotonic() - self.started
        if seconds > MOMENT:
            _log.info("%s: %s, after %.0f s", self.title, text, seconds)
        self.text, self.total, self.done = f"{self.title}: {text}", total, 0
        self._update()

    def advance(self) -> None:
        """Note that a step is done."""
        self.done += 1
        self._update()

    def close(self) -> None:
        """Take the line away; it may be about to appear."""
        if self.timer is None:
            return
        self.timer.cancel()
        self.timer.join()
        if self.bar is not None:
            self.bar.stop()

    def _appear(self) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
        bar = Progress(*columns, console=Console(stderr=True), transient=True)
        with self.lock:
            bar.add_task(self.text, total=self.total or None, completed=self.done)
            bar.tasks[0].start_time = self.started
            self.bar = bar
        bar.start()

    def _update(self) -> None:
        with self.lock:
            if self.bar is not None:
                (task,) = self.bar.task_ids
                self.bar.update(
                    task, description=self.text, total=self.total or None, completed=self.done
                )


def shown(verb: str) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """Let a verb show its stages under its name and its first argument's class.

    Of a verb that another one calls, the stages are shown as that one's.
    """

    def decorate(function: Callable[_P, _R]) -> Callable[_P, _R]:
        @wraps(function)
        def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
            if _shown:
                return function(*args, **kwargs)
            subject = next(iter((*args, *kwargs.values())), None)
            display = _Display(f"{verb} {type(subject).__name__}")
            _shown.append(display)
            try:
                return function(*args, **kwargs)
            finally:
                _shown.remove(display)
                display.close()

        return call

    return decorate


def stages(text: str, steps: Iterable[_T], total: int) -> Iterator[_T]:
    """Yield the steps of a stage, and show how many are done."""
    display = _shown[-1] if _shown else None
    if display is not None:
        display.stage(text, total)
    for step in steps:
        yield step
        if display is not None:
            display.advance()


def _is_other_rank() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_rank() > 0
