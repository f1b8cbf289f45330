"""What a forward is the first to import is imported as at any other time.

    from rotary import rotate        # in a forward; rotary.py begins with `from torch import cat`

A module would keep what stands in for torch's functions while a model is traced; dynamo, which
lists torch's functions by who they are, would know none of them again.
"""

import importlib.abc
import sys
import threading
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch

from fxprune.tracing.stand_ins import all_aside


@contextmanager
def imported_unchanged() -> Generator[None]:
    """Let modules that are imported meanwhile find nothing that stands in for something else."""
    # torch.fx asks for torch's own list of its functions, which is made once.
    torch.overrides.is_tensor_method_or_property(torch.add)
    finder = _Finder()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds what the others find, and has it loaded with everything else aside.

    Other threads import as they please: the one that traces needs its stand-ins.
    """

    def __init__(self) -> None:
        self.thread, self.loading = threading.get_ident(), False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if self.loading or threading.get_ident() != self.thread:
            return None
        with self.aside():
            found = (
                finder.find_spec(fullname, path, target)
                for finder in sys.meta_path
                if finder is not self
            )
            spec = next((one for one in found if one is not None), None)
        if spec is not None and hasattr(spec.loader, "exec_module"):
            spec.loader = _Loader(spec.loader, self)
        return spec

    @contextmanager
    def aside(self) -> Generator[None]:
        self.loading = True
        try:
            with all_aside():
                yield
        finally:
            self.loading = False


class _Loader(importlib.abc.Loader):
    """Loads a module, which then has its own loader."""

    def __init__(self, loader: Any, finder: _Finder) -> None:
        self.loader, self.finder = loader, finder

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        with self.finder.aside():
            return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        with self.finder.aside():
            self.loader.exec_module(module)
