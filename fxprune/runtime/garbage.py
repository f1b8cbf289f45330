"""Python's collector of cycles, kept from looking while graphs are made.

Graphs are cycles, and thousands of new objects make the collector search all there are, again and
again: to no avail, as they are in use.
"""

import gc
from collections.abc import Generator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Generator[None]:
    """Let no cycles be searched for; those that are left are found afterwards."""
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
