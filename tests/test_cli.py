"""The command line: a table, JSON, and one line for every mistake."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from fxprune.cli import main

MODEL = """
import torch
from torch import nn
def small(): return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
model = small()
class Odd(nn.Module):
    def forward(self, x): return x if x.sum() > 0 else -x
number = 7
def talks(): print("loading"); return small()
def ends(): raise SystemExit(0)
class Named(nn.Sequential):
    def __init__(self): super().__init__(); self.add_module("größe", nn.Linear(3, 4))
class Ending(nn.Module):
    def forward(self, x): raise SystemExit(0)
"""


@dataclass(frozen=True)
class Done:
    status: int
    output: str
    errors: str


Runner = Callable[..., Done]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Runner:
    """Run the command line in this process."""

    def call(*args: str) -> Done:
        monkeypatch.setattr(sys, "argv", ["fxprune", *args])
        monkeypatch.delitem(sys.modules, "mine", raising=False)
        with pytest.raises(SystemExit) as end:
            main()
        captured = capsys.readouterr()
        return Done(int(end.value.code or 0), captured.out, captured.err)

    return call


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "mine.py").write_text(MODEL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


@pytest.mark.parametrize("spec", ["mine:small", "mine.py:model"])
def test_inspect_prints_a_table(spec: str, run: Runner) -> None:
    done = run("inspect", spec, "--input", "1x3x9x9")
    assert done.status == 0, done.errors
    assert "Conv2d" in done.output and "8/8" in done.output


def test_inspect_prints_json(run: Runner) -> None:
    done = run("inspect", "mine:small", "--json")
    layers = json.loads(done.output)["layers"]
    assert [layer["total"] for layer in layers] == [8, 4]


def test_what_a_script_prints_is_no_part_of_the_json(run: Runner) -> None:
    done = run("inspect", "mine:talks", "--json")
    assert len(json.loads(done.output)["layers"]) == 2
    assert "loading" in done.errors


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("mine:absent",), "cannot be loaded"),
        (("absent.py:x",), "no file"),
        (("mine",), "names no model"),
        (("mine:number",), "not"),
        (("mine:ends",), "cannot be loaded: SystemExit: 0"),
        (("mine:Ending", "--input", "1x3"), "ends the program when it is run"),
        (("mine:Odd", "--input", "1x3"), "cannot be traced"),
        (("mine:small", "--input", "1x3x9xy"), "no shape"),
        (("mine:small", "--input", "1x3x9x-9"), "no shape"),
        (("mine:small", "--input", "99999999x99999999"), "is too large: it takes more memory"),
        (("mine:small", "--input", "1x" + 30 * "9"), "is too large: it takes more memory"),
        (("mine:small", "--input", "1x5x9x9"), "does not run on the example inputs"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(
    args: tuple[str, ...], message: str, run: Runner
) -> None:
    done = run("inspect", *args)
    assert done.status == 2
    assert message in done.errors
    assert len(done.errors.strip().splitlines()) == 1


def test_output_that_cannot_be_written_is_one_line_and_status_2(
    run: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*given: object, **more: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fxprune.cli.json.dumps", full)
    done = run("inspect", "mine:small", "--json")
    assert done.status == 2
    assert (
        done.errors == "fxprune: the output cannot be written: [Errno 28] No space left on device\n"
    )


@pytest.mark.parametrize("options", [(), ("--json",)], ids=["table", "json"])
def test_names_are_printed_in_whatever_encoding_the_output_has(options: tuple[str, ...]) -> None:
    command = [sys.executable, "-m", "fxprune", "inspect", "mine:Named", "--input", "1x3", *options]
    ascii_only = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, capture_output=True, text=True, env=ascii_only, check=False)
    assert done.returncode == 0, done.stderr
    assert "gr\\" in done.stdout


@pytest.mark.parametrize(
    "args",
    [("inspect",), ("inspect", "mine:small", "--absent"), ("absent",), ("inspect", "a", "b")],
    ids=["no model", "an option", "a command", "two models"],
)
def test_a_command_that_is_none_is_one_line_and_status_2(
    args: tuple[str, ...], run: Runner
) -> None:
    done = run(*args)
    assert done.status == 2
    assert done.errors.startswith("fxprune: ") and "--help" in done.errors
    assert len(done.errors.strip().splitlines()) == 1


def test_without_a_command_there_is_help(run: Runner) -> None:
    done = run()
    assert "inspect" in done.output + done.errors and "Usage" in done.output + done.errors


def test_python_m_fxprune_runs() -> None:
    command = [sys.executable, "-m", "fxprune", "version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("fxprune ")
