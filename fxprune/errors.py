"""What fxprune raises on purpose.

Every error says what is wrong, where (node, module, the user's own source line) and what to do
about it. All of them derive from `FxpruneError`, so that a caller can catch the family and the
command line can turn any of them into one line and exit status 2.
"""

from collections.abc import Generator
from contextlib import contextmanager

from torch import fx, nn


class FxpruneError(Exception):
    """A mistake fxprune recognised: the message holds what, where and the remedy."""


class TraceError(FxpruneError):
    """The model, or a part that must be traced, cannot be turned into a graph."""


class ExampleInputError(FxpruneError):
    """The example inputs are missing, malformed, or the model does not run on them."""


class ModelError(FxpruneError):
    """The model holds something no surgery can be proved on: NaN, complex or integer weights."""


class NothingToDoError(FxpruneError):
    """No gate could be inserted anywhere; the message lists the reasons."""


class GateError(FxpruneError):
    """A gated model was expected, or its gates do not fit."""


class BudgetError(FxpruneError):
    """A budget cannot be met, or the training that should meet it went astray."""


class VerificationError(FxpruneError):
    """The rewritten model is not the same function as the one it was made from."""


class ExportError(FxpruneError):
    """The ONNX file could not be written, or onnxruntime disagrees with it."""


@contextmanager
def as_export_error(what: str, remedy: str) -> Generator[None]:
    """Turn whatever fails inside into an `ExportError` of one line, with the first cause."""
    try:
        yield
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise ExportError(f"{what}: {one_line(cause)}; {remedy}") from error


def one_line(error: BaseException) -> str:
    """Return the type of an error and the first line of its message that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    message = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    return f"{type(error).__name__}: {message}"


def require_module(model: object) -> None:
    """Raise `ModelError` for what is no module: a class, say, that was not called."""
    if isinstance(model, nn.Module):
        return
    what = f"the class {model.__name__}" if isinstance(model, type) else f"a {type(model).__name__}"
    given = "its .module()" if type(model).__name__ == "ExportedProgram" else "the model itself"
    raise ModelError(f"a model is an nn.Module, not {what}; pass {given}")


def where(node: fx.Node) -> str:
    """Return node, target and the user's source line, as errors and reports print them."""
    target = node.target if isinstance(node.target, str) else _name(node.target)
    text = f"{node.name} ({node.op} {target})"
    source = node.meta.get("source")
    return f"{text} at {source}" if source else text


def _name(target: object) -> str:
    module = getattr(target, "__module__", None)
    name = getattr(target, "__qualname__", None) or getattr(target, "__name__", repr(target))
    return f"{module}.{name}" if module and module not in ("builtins", "_operator") else name
