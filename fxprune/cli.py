"""The command line: `fxprune inspect`.

A model is named as `module:name` or `path/to/file.py:name`, where name is an `nn.Module` or a
function that returns one. What the user did wrong ends in one line and exit status 2.
"""

import importlib
import importlib.util
import json
import sys
from contextlib import redirect_stdout
from importlib.metadata import version
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated, Any, NoReturn

import torch
import typer
from rich.console import Console
from torch import Tensor, nn

from fxprune.errors import FxpruneError
from fxprune.inspection import inspect

app = typer.Typer(
    add_completion=False, no_args_is_help=True, help="Model surgery over torch.fx graphs."
)


def main() -> None:
    """Run the command line."""
    for stream in (sys.stdout, sys.stderr):  # names may have letters that an encoding lacks
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        status = app(standalone_mode=False)
    except FxpruneError as error:
        _end(str(error))
    except OSError as error:  # what is printed reaches nobody
        _end(f"the output cannot be written: {error}")
    except Exception as error:
        if not hasattr(error, "format_message"):  # click's, of which typer may have a copy
            raise
        _end_usage(error)
    sys.exit(status or 0)


def _end_usage(error: Any) -> NoReturn:
    message = error.format_message()
    if message:  # else help was shown instead
        _end(f"{message} Try 'fxprune --help', or '--help' behind a command.")
    sys.exit(2)


def _end(message: str) -> NoReturn:
    print(f"fxprune: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


@app.callback()
def _about() -> None:
    """Model surgery over torch.fx graphs."""


@app.command("version")
def show_version() -> None:
    """Print the versions of fxprune and torch."""
    print(f"fxprune {version('fxprune')}, torch {torch.__version__}")


@app.command("inspect")
def inspect_model(
    model: Annotated[str, typer.Argument(help="module:name or path/to/file.py:name")],
    shape: Annotated[
        list[str] | None,
        typer.Option("--input", help="shape of an input, as 1x3x224x224; guessed if not given"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON instead of a table")] = False,
) -> None:
    """Show a model's layers: live and total width, gates, and why there is none."""
    with redirect_stdout(sys.stderr):  # what a script prints is no part of the answer
        found = load_model(model)
        inputs = tuple(example(text) for text in shape) if shape else None
        try:
            inspection = inspect(found, inputs)
        except SystemExit as error:
            raise FxpruneError(f"{model!r} ends the program when it is run: {error!r}") from error
    if as_json:
        print(json.dumps(inspection.to_dict(), indent=2))
    else:
        Console().print(inspection.table())


def load_model(spec: str) -> nn.Module:
    """Return the module a specification names; raise `FxpruneError` if it names none."""
    place, _, name = spec.rpartition(":")
    if not place or not name:
        raise FxpruneError(f"{spec!r} names no model; write module:name or path/to/file.py:name")
    try:
        found: Any = getattr(_import(place), name)
        model = found if isinstance(found, nn.Module) else found()
    except (Exception, SystemExit) as error:  # a script may end the program, as if all were well
        raise FxpruneError(f"{spec!r} cannot be loaded: {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise FxpruneError(f"{spec!r} is a {type(model).__name__}, not an nn.Module")
    return model


def example(text: str) -> Tensor:
    """Return a random input of a shape written as 1x3x224x224."""
    sizes = text.lower().split("x")
    if not all(size.strip().isdecimal() for size in sizes):
        raise FxpruneError(f"--input {text!r} is no shape; write it as 1x3x224x224")
    try:
        shape = [int(size) for size in sizes]
        return torch.randn(shape, generator=torch.Generator().manual_seed(0))
    except (ValueError, TypeError, RuntimeError, OverflowError) as error:
        raise FxpruneError(
            f"--input {text!r} is too large: it takes more memory than there is"
        ) from error


def _import(place: str) -> Any:
    if not place.endswith(".py"):
        sys.path.insert(0, str(Path.cwd()))
        return importlib.import_module(place)
    spec = importlib.util.spec_from_file_location(Path(place).stem, place)
    if spec is None or spec.loader is None or not Path(place).is_file():
        raise FileNotFoundError(f"there is no file {place}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
