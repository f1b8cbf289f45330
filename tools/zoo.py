"""Put every torchvision model through fxprune, each in a process of its own.

    python -m tools.zoo [--only PATTERN] [--names A,B,timm/C] [--minutes 15] [--table FILE]

A model that was done with the same versions is not done again, so that an interrupted run resumes.
"""

import fnmatch
import json
import signal
import subprocess
import sys
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from torchvision.models import list_models

Result = dict[str, Any]
VERSIONS = {name: version(name) for name in ("fxprune", "torch", "torchvision", "onnxruntime")}
LEGEND = (
    "Permutation: how far outputs move, in float64, when units change places with their weights.",
    "Errors are relative to the largest output, and the largest of those checks that decided; in",
    "an undecided check rounding moves the gated model itself as far. Spread is the standard",
    "deviation of outputs over inputs, relative too. In onnxruntime, *nor the original* is said",
    "where torch's exporter refuses the untouched model as well, or onnxruntime disagrees on it.",
)
COLUMNS = {
    "model": "name",
    "traced": "traced",
    "permutation": "permutation",
    "sites": "sites",
    "gates": "units",
    "closed": "closed",
    "bit-exact": "bit_exact",
    "float64 error": "float64",
    "float32 error": "float32",
    "spread": "spread",
    "undecided checks": "undecided",
    "onnxruntime": "onnx",
    "parameters": "parameters",
    "seconds": "seconds",
    "verdict": "verdict",
}


def zoo(
    only: Annotated[str, typer.Option(help="a shell pattern of model names")] = "*",
    given: Annotated[str, typer.Option("--names", help="these instead; timm/NAME is timm's")] = "",
    minutes: Annotated[float, typer.Option(help="the most one model may take")] = 15,
    results: Annotated[Path, typer.Option(help="JSON lines, one a model")] = Path("out/zoo.jsonl"),
    table: Annotated[Path, typer.Option(help="the Markdown table")] = Path("out/zoo.md"),
    again: Annotated[bool, typer.Option(help="do finished models again")] = False,
) -> None:
    """Run the zoo; exit with 1 if any model came out wrong."""
    console = Console()
    names = [n for n in list_models() if fnmatch.fnmatch(n, only) and "quantized" not in n]
    names = given.split(",") if given else names
    done = {} if again else finished(results)
    results.parent.mkdir(parents=True, exist_ok=True)
    for place, name in enumerate(names, 1):
        if name not in done:
            done[name] = one(name, minutes * 60)
            with results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(done[name]) + "\n")
        found = done[name]
        console.print(f"[{place}/{len(names)}] {name}: {found['verdict']}", markup=False)
    write(table, [done[name] for name in names])
    wrong = [name for name in names if _is_wrong(done[name])]
    console.print(f"{len(names)} models, {len(wrong)} wrong: {', '.join(wrong) or 'none'}; {table}")
    sys.exit(bool(wrong))


def finished(results: Path) -> dict[str, Result]:
    """Return the results there are from the same versions."""
    if not results.exists():
        return {}
    found = [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines() if line]
    return {result["name"]: result for result in found if result["versions"] == VERSIONS}


def one(name: str, seconds: float) -> Result:
    """Run one model in a process of its own."""
    command = [sys.executable, "-m", "tools.zoo_model", name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return {"name": name, "versions": VERSIONS, "verdict": f"stopped after {seconds:.0f} s"}
    lines = done.stdout.strip().splitlines()
    if done.returncode == -signal.SIGKILL:
        verdict = "killed: it needs more memory than there is"
        return {"name": name, "versions": VERSIONS, "verdict": verdict}
    if done.returncode or not lines:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        return {"name": name, "versions": VERSIONS, "verdict": f"CRASHED: {last[:200]}"}
    return {**json.loads(lines[-1]), "versions": VERSIONS}


def _is_wrong(result: Result) -> bool:
    return any(str(result.get(key, "")).startswith("WRONG") for key in ("verdict", "permutation"))


def write(table: Path, results: list[Result]) -> None:
    """Write the Markdown table, beside and then renamed."""
    versions = ", ".join(f"{name} {number}" for name, number in VERSIONS.items())
    lines = [
        "# The zoo",
        "",
        f"Every model below was instrumented, half the gates of every site closed at random, "
        f"finalised and compared with the gated model; {date.today()}, {versions}.",
        "",
        *LEGEND,
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|" + "---|" * len(COLUMNS),
    ]
    for result in results:
        cells = [_cell(result.get(key)) for key in COLUMNS.values()]
        lines.append("| " + " | ".join(cells) + " |")
    table.parent.mkdir(parents=True, exist_ok=True)
    draft = table.with_name(table.name + ".part")
    draft.write_text("\n".join(lines) + "\n", encoding="utf-8")
    draft.replace(table)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.1e}"
    if isinstance(value, list):
        return " → ".join(f"{part:,}" for part in value)
    return "" if value is None else str(value).replace("|", "/")


if __name__ == "__main__":
    typer.run(zoo)
