"""A dispatch mode: Python that sees every operator torch runs, below its public functions."""

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class DispatchMode(TorchDispatchMode):
    """What ours have in common: no operator is refused, and none costs an import.

    A mode defines `__torch_dispatch__(self, func, types, args=(), kwargs=None)`.
    """

    supports_higher_order_operators = True

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # to skip it, torch would import it, which takes seconds

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operator."""
        return func(*args, **kwargs or {})
