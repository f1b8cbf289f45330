"""Whether code that hashes or spells a traced value looks something up by it.

    scale = {224: 7}.get(x.shape[-1], 9)        if size not in self.masks: self.masks[size] = …
    head = getattr(self, f"head_{x.shape[1]}")        print(f"features of {x.shape}")

Whatever is looked up in a table has to be known; what a memo has not, is made, for any size. What
is spelled is mostly a name; where code prints, logs or asserts it may be for people.
"""

import dis
import functools
import os
from pathlib import Path
from types import CodeType, FrameType

import torch

NOT_THE_USERS = tuple(
    f"{folder}{os.sep}" for folder in (Path(torch.__file__).parent, Path(__file__).parents[1])
)
_STORING = ("STORE_SUBSCR", "setdefault")
_TELLING = frozenset(
    {"print", "_assert", "_check", "warn", "warning", "info", "debug", "error", "log", "logger"}
)


def is_lookup(frame: FrameType) -> bool:
    """Tell whether a frame is of code of the user's that stores nothing by a key."""
    code = frame.f_code
    return not code.co_filename.startswith(NOT_THE_USERS) and not _stores(code)


def is_name(frame: FrameType) -> bool:
    """Tell whether a frame is of code of the user's that tells people nothing."""
    code = frame.f_code
    return not code.co_filename.startswith(NOT_THE_USERS) and _TELLING.isdisjoint(code.co_names)


@functools.lru_cache(maxsize=4096)
def _stores(code: CodeType) -> bool:
    return any(
        one.opname in _STORING or one.argval in _STORING for one in dis.get_instructions(code)
    )
