"""What fxprune raises on purpose.

Every error says what is wrong, where (node, module, the user's own source line) and what to do
about it. All of them derive from `FxpruneError`, so that a caller can catch the family and the
command line can turn any of them into one line and exit status 2.
"""

from torch import fx


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


class VerificationError(FxpruneError):
    """The rewritten model is not the same function as the one it was made from."""


class ExportError(FxpruneError):
    """The ONNX file could not be written, or onnxruntime disagrees with it."""


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
