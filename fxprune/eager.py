"""Whether operators run as they are called, so that several may be done at once by a function."""

from typing import Any

import torch


def is_eager() -> bool:
    """Tell whether nothing compiles or traces operators, or maps them over samples.

    A compiler fuses by itself, and `torch.func` and what traces should see plain operators.
    """
    tracing: Any = torch.jit.is_tracing  # pyright: ignore[reportPrivateImportUsage]
    transforms: Any = torch._C._are_functorch_transforms_active  # pyright: ignore[reportPrivateUsage]
    return not torch.compiler.is_compiling() and not transforms() and not tracing()
