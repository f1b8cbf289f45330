"""Progress: a line on a terminal once it takes long, lines in a log elsewhere, nothing before."""

import io
import logging
import sys
import time

import pytest
import torch
from torch import nn

import fxprune
from fxprune import progress
from fxprune.progress import shown, stages


class Terminal(io.StringIO):
    """A stream that people look at."""

    def isatty(self) -> bool:
        return True


def on_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Put a terminal in place of the error stream; in a fixture pytest would take it away again."""
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    return stream


@shown("count")
def count(things: list[int]) -> list[int]:
    """Take a tenth of a second for each."""
    found: list[int] = []
    for thing in stages("one by one", things, len(things)):
        time.sleep(0.1)
        found.append(thing)
    return found


def test_a_moment_shows_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    terminal = on_terminal(monkeypatch)
    caplog.set_level(logging.INFO, "fxprune")
    assert count([1, 2]) == [1, 2]
    assert terminal.getvalue() == ""
    assert not caplog.records


def test_what_takes_longer_shows_a_bar_and_takes_it_away(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    terminal = on_terminal(monkeypatch)
    monkeypatch.setattr(progress, "MOMENT", 0.05)
    count([1, 2, 3, 4, 5])
    text = terminal.getvalue()
    assert "count list: one by one" in text
    assert text.endswith("\x1b[2K")  # the line is erased
    before = len(text)
    time.sleep(0.3)
    assert len(terminal.getvalue()) == before


def test_elsewhere_stages_are_lines_of_a_log(
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(progress, "MOMENT", -1.0)
    caplog.set_level(logging.INFO, "fxprune")
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    gated = fxprune.instrument(model, torch.randn(2, 4))
    fxprune.finalize(gated)
    lines = [record.getMessage() for record in caplog.records]
    assert {line.split(":")[0] for line in lines} == {
        "instrument Sequential",
        "finalize Sequential",
    }
    assert any("proof in float64, the result, after" in line for line in lines)
    assert capsys.readouterr() == ("", "")


def test_what_a_verb_calls_is_shown_as_its_own_and_nothing_stays_after_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    terminal = on_terminal(monkeypatch)
    monkeypatch.setattr(progress, "MOMENT", 0.0)

    @shown("outer")
    def fail(numbers: tuple[int, ...]) -> None:
        count([*numbers])
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        fail((1, 2, 3))
    assert "outer tuple: one by one" in terminal.getvalue()
    assert "count" not in terminal.getvalue()
    assert not progress._shown
