"""Methods that one module has in the place of its class's, in its attributes.

    layer.forward = types.MethodType(forward, layer)        conv._conv_forward = partial(f, conv)

What is known of a class is not true of such a module.
"""

import functools
from types import FunctionType

from torch import nn


def replaced_methods(module: nn.Module) -> set[str]:
    """Return the names of the methods that a module has something else for than its class."""
    return vars(module).keys() & _methods(type(module))


@functools.lru_cache(maxsize=1024)
def _methods(cls: type[nn.Module]) -> frozenset[str]:
    known = (vars(kind).items() for kind in cls.__mro__)
    return frozenset(name for own in known for name, one in own if isinstance(one, FunctionType))
