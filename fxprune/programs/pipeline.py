"""Passes and how they are run: in the order given, to a program that is checked at the end."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial, update_wrapper
from typing import Any, TypeVar

from fxprune.programs.program import Program
from fxprune.progress import stages
from fxprune.runtime.garbage import uncollected


@dataclass(frozen=True)
class Change:
    """One thing a pass did: where (node or module path), what, and the numbers that go with it."""

    where: str
    what: str
    detail: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        """Return the change as one line."""
        return f"{self.where}: {self.what}"


Pass = Callable[[Program], list[Change]]
"""Edits the program in place; what it returns is the log, and empty means it did nothing."""


_P = TypeVar("_P", bound=Callable[..., list[Change]])


def keeps_shapes(one: _P) -> _P:
    """Mark a pass that keeps `program.seen` true: what a run would show of the nodes it leaves.

    Most leave every node the shape it had; the others write down what has changed, and where they
    cannot, they forget the run.
    """
    one.__dict__["keeps_shapes"] = True
    return one


def with_options(one: Callable[..., list[Change]], **options: Any) -> Pass:
    """Return a pass with some of its arguments settled, under its own name."""
    return update_wrapper(partial(one, **options), one)


def run(
    program: Program, passes: Sequence[Pass], *, recompile: bool = True
) -> dict[str, list[Change]]:
    """Run passes in order and return their changes, by the name of the pass.

    The graph is checked, and the module's code made anew, at the end: a pass that calls the module,
    instead of observing it, recompiles it first. (`fxprune.testing` checks after every pass.)
    recompile: make the code; without it the module cannot be called before somebody else does.
    """
    with uncollected():
        done = _run(program, passes)
        if recompile:
            program.module.recompile()
    return done


def _run(program: Program, passes: Sequence[Pass]) -> dict[str, list[Change]]:
    done: dict[str, list[Change]] = {}
    for one in stages("rewriting the graph", passes, len(passes)):
        name = getattr(one, "__name__", repr(one))
        try:
            changes = one(program)
        except Exception as error:
            error.add_note(f"while running the pass {name}, after {', '.join(done) or 'none'}")
            raise
        if changes and not getattr(one, "keeps_shapes", False):
            program.seen = None
        done[name] = [*done.get(name, []), *changes]
    if any(done.values()):
        _check(program, done)
    return done


def _check(program: Program, done: dict[str, list[Change]]) -> None:
    """Raise unless the graph is well formed; say which passes edited it."""
    try:
        program.graph.lint()
    except Exception as error:
        edited = ", ".join(name for name, changes in done.items() if changes)
        error.add_note(f"after the passes {edited}")
        raise


def until_stable(passes: Sequence[Pass], limit: int = 20) -> Pass:
    """Return a pass that runs `passes` until none of them does anything."""

    def repeat(program: Program) -> list[Change]:
        changes: list[Change] = []
        for _ in range(limit):
            new = [change for log in run(program, passes).values() for change in log]
            if not new:
                return changes
            changes += new
        last = "; ".join(map(str, changes[-3:]))
        raise RuntimeError(f"the passes do not settle after {limit} rounds; last: {last}")

    repeat.__name__ = "until_stable_" + "_".join(p.__name__ for p in passes)
    return repeat
