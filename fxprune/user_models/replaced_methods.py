"""Methods that somebody has put in the place of a class's: in one object, or for all there are.

    layer.forward = types.MethodType(forward, layer)        conv._conv_forward = partial(f, conv)
    nn.Conv2d.forward = circular

What is known of a class is not true of such a module.
"""

import functools
import inspect
from types import FunctionType

from torch import nn

from fxprune.errors import ModelError
from fxprune.runtime.kinds import LAYERS, NORMS


def replaced_methods(module: nn.Module) -> set[str]:
    """Return the names of the methods that a module has something else for than its class.

    What all modules have (`train`, what states are saved by) computes nothing, and is left out.
    """
    return vars(module).keys() & _methods(type(module))


def require_classes_as_written(model: nn.Module) -> None:
    """Raise `ModelError` if the forward of a class of torch's was replaced.

    Of those that a model is made of, and of those that a result may be made of.
    """
    for kind in {*map(type, model.modules()), *LAYERS, *NORMS}:
        function = inspect.getattr_static(kind, "forward")  # a script's is no attribute to be read
        forward = getattr(function, "__globals__", {}).get("__name__", "torch")
        if kind.__module__.startswith("torch.") and not forward.startswith(("torch", "fxprune.")):
            raise ModelError(
                f"{forward} has put a forward of its own into all of torch's {kind.__name__}, of "
                f"which nothing is known: derive a class from {kind.__name__} instead"
            )


@functools.lru_cache(maxsize=1024)
def _methods(cls: type[nn.Module]) -> frozenset[str]:
    known = (vars(kind).items() for kind in cls.__mro__ if kind is not nn.Module)
    return frozenset(name for own in known for name, one in own if isinstance(one, FunctionType))
