"""Fixtures for all tests: golden texts, and models whose every number is its own."""

import io
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxprune.dataflow.rules import STRICT

GOLDEN = Path(__file__).parent / "golden"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="rewrite the golden texts")


class Golden:
    """The text a test expects, in a file named after the test."""

    def __init__(self, path: Path, update: bool) -> None:
        self.path, self.update = path, update

    def check(self, text: str) -> None:
        if self.update:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(text + "\n", encoding="utf-8")
        assert self.path.exists(), f"no {self.path.name}: run pytest --update-golden and read it"
        assert text + "\n" == self.path.read_text(encoding="utf-8")


class Layers(nn.Module):
    """A part that does nothing but compute."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)))


def reloaded(model: nn.Module) -> Any:
    """Return a module as it is after it was saved whole, and loaded."""
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Golden:
    module = Path(str(request.path)).stem
    path = GOLDEN / f"{module}-{request.node.name}.txt"
    return Golden(path, bool(request.config.getoption("--update-golden")))


@pytest.fixture(autouse=True)
def strict() -> Iterator[None]:
    """Raise what goes wrong in a rule; users are told of a barrier."""
    token = STRICT.set(True)
    yield
    STRICT.reset(token)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
    # Beside other processes that test, a second thread only waits.
    torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)


@pytest.fixture
def without_fxprune(tmp_path: Path) -> Callable[[nn.Module, str], str]:
    """Print an expression in `m`, the saved model, where fxprune cannot be imported."""

    def run(model: nn.Module, expression: str) -> str:
        path = tmp_path / "model.pt"
        torch.save(model, path)
        script = (
            "import sys, torch; sys.modules['fxprune'] = None; "
            f"m = torch.load({str(path)!r}, weights_only=False); print({expression})"
        )
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
        assert not done.returncode, done.stderr
        return done.stdout.strip()

    return run


def randomise(model: nn.Module) -> nn.Module:
    """Give every batch norm statistics and every bias a value that hides nothing."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            if module.running_mean is not None and module.running_var is not None:
                module.running_mean.normal_(0, 0.3)
                module.running_var.uniform_(0.5, 1.5)
        for name, parameter in module.named_parameters(recurse=False):
            if name == "bias" or isinstance(module, nn.PReLU):
                parameter.data.normal_(0, 0.3)
            elif isinstance(module, nn.modules.batchnorm._BatchNorm):
                parameter.data.uniform_(0.5, 1.5)
    return model
