"""Which line of the user's code asked for something, or failed."""

import inspect
from types import FrameType

from torch import nn

from fxprune.tracing.lookups import NOT_THE_USERS


def user_line(frame: FrameType | None) -> str | None:
    """Return the line of the user's code that led to a frame, None if none did."""
    while frame is not None:
        name = frame.f_code.co_filename
        if not name.startswith(NOT_THE_USERS) and not name.startswith("<"):
            return f"{name}:{frame.f_lineno}"
        frame = frame.f_back
    return None


def first_line_of(root: nn.Module) -> str | None:
    """Return where a forward begins, which has the inputs and returns the outputs."""
    code = getattr(inspect.unwrap(root.forward), "__code__", None)
    if code is None or code.co_filename.startswith((*NOT_THE_USERS, "<")):
        return None
    return f"{code.co_filename}:{code.co_firstlineno}"


def place_of_error(error: Exception) -> str:
    """Return the last line outside of fxprune and torch on the way to an error, "" if none is."""
    traceback, line = error.__traceback__, None
    while traceback is not None:
        name = traceback.tb_frame.f_code.co_filename
        if not name.startswith(NOT_THE_USERS):
            line = f"{name}:{traceback.tb_lineno}"
        traceback = traceback.tb_next
    return f" (at {line})" if line else ""


def first_line(error: Exception) -> str:
    """Return the first line of what an error says."""
    return str(error).strip().split("\n")[0]
