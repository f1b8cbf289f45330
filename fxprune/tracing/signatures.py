"""What a forward takes, by the names of its arguments."""

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from fxprune.errors import ExampleInputError, TraceError
from fxprune.tracing.asked_tracer import PLAIN


def in_order(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return arguments by position, `layer(input=x)` as `layer(x)`, where a signature says how."""
    try:
        bound = inspect.signature(module.forward).bind(*args, **kwargs)
    except (TypeError, ValueError):  # the call fails, or its forward is not Python
        return args, kwargs
    return bound.args, bound.kwargs


def bound_arguments(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the forward arguments that example inputs give, by name."""
    name = type(model).__name__
    try:
        signature = inspect.signature(model.forward)
    except ValueError as error:
        raise TraceError(
            f"{name}.forward is not Python ({error}); pass the model that {name} was made from"
        ) from error
    try:
        return dict(signature.bind(*args, **kwargs).arguments)
    except TypeError as error:
        raise ExampleInputError(
            f"the example inputs do not fit {name}.forward{signature}: {error}; "
            "pass example_inputs=(…) in the order of its arguments"
        ) from error


def flat_arguments(
    signature: inspect.Signature, given: Mapping[str, Any]
) -> Iterator[tuple[str, Any]]:
    """Yield name and value of every input; gathered arguments are inputs one by one."""
    for name, value in given.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            yield from ((f"{name}_{index}", part) for index, part in enumerate(value))
        elif kind is inspect.Parameter.VAR_KEYWORD:
            yield from value.items()
        else:
            yield name, value


def optional_inputs(signature: inspect.Signature, given: Mapping[str, Any]) -> set[str]:
    """Return the last inputs that may be left out: plain values that are their own defaults."""
    found: set[str] = set()
    for name, value in reversed([*given.items()]):
        default = signature.parameters[name].default if name in signature.parameters else None
        plain = isinstance(value, PLAIN) and type(value) is type(default)
        if not plain or name not in signature.parameters or value != default:
            break
        found.add(name)
    return found


def may_be_none(
    signature: inspect.Signature, given: Mapping[str, Any], *, anything: bool
) -> list[str]:
    """Return the inputs that are not None here, but could be: a forward may ask that of them.

    By default or annotation; or `anything` but the first, where nobody says.
    """
    found: list[str] = []
    for place, (name, parameter) in enumerate(signature.parameters.items()):
        told = parameter.default is None or "None" in str(parameter.annotation)
        told = told or "Optional" in str(parameter.annotation)
        if name in given and not isinstance(given[name], PLAIN) and (told or (anything and place)):
            found.append(name)
    return found
