"""What a forward is the first to import has torch's own functions, then as later."""

import importlib
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxprune
from tests.conftest import Layers

ROOT = Path(__file__).parents[2]
_FIRST = """
from math import *
from torch import Tensor, cat, finfo, is_autocast_enabled, is_grad_enabled, is_tensor, nn
from torch.nn.functional import relu
from kept_below import floor, isinstance_of_torch

class Own(nn.Module):
    train, call, read = nn.Module.train, nn.Module.__call__, nn.Module.__getattr__
"""
_BELOW = "from math import floor\nimport torch\nisinstance_of_torch = torch.jit.isinstance\n"


class Importing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = Layers()

    def forward(self, x: Tensor) -> Tensor:
        import kept_first  # pyright: ignore[reportMissingImports]

        return self.layers(x) + kept_first.cat([x, x]).sum() * kept_first.floor(1.5)


@pytest.fixture
def first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Return a module that nobody has imported yet."""
    (tmp_path / "kept_first.py").write_text(_FIRST)
    (tmp_path / "kept_below.py").write_text(_BELOW)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    yield tmp_path / "kept_first.py"
    for name in ("kept_first", "kept_below"):
        sys.modules.pop(name, None)


def test_a_module_that_a_forward_imports_keeps_nothing_of_a_trace(first: Path) -> None:
    model, x, finders = Importing(), torch.randn(3, 8), list(sys.meta_path)
    gated: Any = fxprune.instrument(model, x)
    assert torch.equal(gated(x), model(x)) and not gated.report.refused
    assert sys.meta_path == finders
    kept: Any = sys.modules["kept_first"]
    functions = "cat", "finfo", "is_autocast_enabled", "is_grad_enabled", "is_tensor"
    assert all(getattr(kept, name) is getattr(torch, name) for name in functions)
    assert kept.relu is F.relu and kept.sqrt is math.sqrt and kept.floor is math.floor
    assert kept.isinstance_of_torch is torch.jit.isinstance  # pyright: ignore[reportPrivateImportUsage]
    assert kept.Own.train is nn.Module.train and kept.Own.read is nn.Module.__getattr__
    assert kept.Own.call is nn.Module.__call__
    assert kept.__spec__.loader is kept.__loader__ and kept.__file__ == str(first)
    assert type(kept.__loader__) is type(fxprune.__loader__)


def test_an_import_that_fails_says_so(first: Path) -> None:
    first.write_text("from torch import is_no_function")
    with pytest.raises(fxprune.FxpruneError, match="cannot import name 'is_no_function'"):
        fxprune.instrument(Importing(), torch.randn(3, 8))
    assert "kept_first" not in sys.modules


_MAKING = """
import sys, torch, fxprune
from torch import nn
from tests.conftest import Layers

class Making(Layers):
    def forward(self, x):
        {statement}
        return super().forward(x) * torch.linspace(0.5, 1, 8)

model, x = Making(), torch.randn(3, 8)
gated = fxprune.instrument(model, x)
print("torch._dynamo" in sys.modules, torch.overrides.resolve_name(torch.cat))
if {compiled}:
    print(torch.allclose(torch.compile(gated, backend="eager", fullgraph=True)(x), model(x)))
"""


@pytest.mark.parametrize(
    ("statement", "compiled", "said"),
    [("", False, "False torch.cat"), ("import torch._dynamo", True, "True torch.cat\nTrue")],
)
def test_torch_knows_its_functions_again(statement: str, compiled: bool, said: str) -> None:
    """In a process where nobody compiled, or listed torch's functions, before."""
    script = _MAKING.format(statement=statement, compiled=compiled)
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.stdout.strip() == said, done.stderr
