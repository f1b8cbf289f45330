"""Run what must pass before a commit: lint, format, types, tests.

`python -m tools.check` runs all of them, `python -m tools.check lint types` those named. Each runs
even where an earlier one failed; the last line says which failed, and so does the exit status.
"""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent

CHECKS = {
    "lint": ("ruff", "check", "."),
    "format": ("ruff", "format", "--check", "."),
    "types": ("pyright", "--pythonpath", sys.executable),
    "tests": ("pytest", "-n", "auto", "-m", "not slow and not gpu"),
}


def passes_check(name: str) -> bool:
    print(f"==> {name}: {' '.join(CHECKS[name])}", flush=True)
    return subprocess.run([sys.executable, "-m", *CHECKS[name]], cwd=ROOT).returncode == 0


def main(names: list[str]) -> int:
    unknown = [name for name in names if name not in CHECKS]
    if unknown:
        print(f"no check {', '.join(unknown)}; there are {', '.join(CHECKS)}", file=sys.stderr)
        return 2
    chosen = names or list(CHECKS)
    failed = [name for name in chosen if not passes_check(name)]
    print(f"==> failed: {', '.join(failed)}" if failed else f"==> passed: {', '.join(chosen)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
