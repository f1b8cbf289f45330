"""Operators that work on each element alone: activations, arithmetic, casts, dropout.

A channel of the output is the same channel of every operand that is not broadcast along a channel
axis; those operands' tags are tied. An operand broadcast along a channel axis is one channel that
all of the output's channels read. Where operands have channels along different axes (an outer
product), those along one axis stay what they are, and the others may not go. A result is constant
where all operands are; a product also where one factor is 0, a quotient where 0 is divided by what
is never 0.
"""

import operator
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.node import map_arg

from fxprune.dataflow.rules import (
    CPU,
    POINTWISE,
    Call,
    Flow,
    OpRule,
    Read,
    execute,
    key_of,
    register,
)
from fxprune.dataflow.tags import FIXED, align, varying_axes
from fxprune.dataflow.values import (
    Barrier,
    State,
    Value,
    as_value,
    broadcast_to,
    flatten,
    unknown,
    zeros_of,
)
from fxprune.ops.divisors import is_never_zero
from fxprune.runtime.randomness import drawing_alike

# What puts other numbers than 0 in the place of what it drops (Klambauer et al. 2017).
_NOISY = (nn.AlphaDropout, nn.FeatureAlphaDropout)
_NOISY_FUNCTIONS = (F.alpha_dropout, F.feature_alpha_dropout)
_ACROSS = "another operand has its channels along another axis"


def elementwise_flow(call: Call) -> Flow:
    """Tie the operands' channels and compute the constants that survive."""
    return _flow(call, _constants)


def product_flow(call: Call) -> Flow:
    """Do as `elementwise_flow`, but a constant 0 makes the product 0 whatever else comes."""
    return _flow(call, _product_constants)


def quotient_flow(call: Call) -> Flow:
    """Do as `elementwise_flow`, but of a constant 0 nothing is left, if its divisor is never 0."""
    return _flow(call, _quotient_constants)


def passing_flow(call: Call) -> Flow:
    """Pass tags and constants of the one operand on: the operator is the identity on numbers."""
    value = call.value()
    return Flow(call.output(value.tags, value.constants))


def dropout_flow(call: Call) -> Flow:
    """Pass tags and constants on; in training only 0 stays what it is, and not in alpha dropout."""
    value = call.value()
    constants = value.constants
    if call.trained:
        noisy = isinstance(call.module, _NOISY) or call.node.target in _NOISY_FUNCTIONS
        constants = torch.where((constants == 0) & (not noisy), constants, torch.nan)
    return Flow(call.output(value.tags, constants))


def prelu_flow(call: Call) -> Flow:
    """Follow max(0, x) + a·min(0, x), where a is one number or one a channel (He et al. 2015)."""
    value = call.value()
    weight = call.state("weight") if call.module is not None else call.argument(1, "weight")
    if not isinstance(weight, State):
        raise Barrier("its slope is computed")
    constants, ties = value.constants, []
    slope = weight.known()
    if slope.numel() > 1:
        along = value.along(1)
        ties += [(weight.axis(0), along.tags), *along.ties]
        slope = slope.reshape(-1, *(1,) * (len(value.shape) - 2))
    constants = torch.where(constants >= 0, constants, align(slope * constants, value.tags))
    return Flow(call.output(value.tags, constants), ties=ties)


def resize_prelu(call: Call) -> None:
    """Tell the module how many slopes it has left."""
    if isinstance(call.module, nn.PReLU):
        call.module.num_parameters = call.module.weight.numel()


def _flow(call: Call, constants: Callable[[Call, list[Value], Tensor], Tensor]) -> Flow:
    shape = call.tensor_spec().shape
    operands, ties, keeps = _along_the_same_axes(call, len(shape))
    whole, parts = _split(operands, shape)
    tags = _broadcast_tags(whole, len(shape))
    flow = Flow(call.output(tags, constants(call, operands, tags)), ties=ties, keeps=keeps)
    for operand in whole:
        flow.ties.append((broadcast_to([operand.tags], len(shape))[0], tags))
    for part in parts:
        flow.reads.append(_broadcast_read(part, tags))
        flow.ties += [(tags.narrow(axis, 0, 1), tags) for axis in _filled(part, tags, shape)]
    return flow


def _filled(part: Value, tags: Tensor, shape: tuple[int, ...]) -> list[int]:
    """Return the axes with channels along which an operand without any is as long as they are.

    It stays so long; only its whole lines, along the axes where it is broadcast, may go.
    """
    (sizes,) = broadcast_to([torch.empty(part.shape, device="meta")], len(shape))
    return [axis for axis in varying_axes(tags) if sizes.shape[axis] == shape[axis]]


def _along_the_same_axes(
    call: Call, rank: int
) -> tuple[list[Value], list[tuple[Tensor, Tensor]], list[tuple[Tensor, str]]]:
    """Return the operands, with what to tie and what to keep so that all vary along common axes.

    If they do, they are returned as they are. If not, the axis with the most channels is chosen:
    operands that vary beside it too have theirs tied there, the others keep their channels.
    """
    operands = call.values()
    axes = [
        {axis + rank - len(v.shape) for axis in varying_axes(v.tags)}
        if v.tags.numel() > 1
        else set()
        for v in operands
    ]
    varying = [found for found in axes if found]
    if not varying or set.intersection(*varying):
        return operands, [], []
    chosen = _fullest_axis(call, operands, axes, rank)
    ties: list[tuple[Tensor, Tensor]] = []
    keeps: list[tuple[Tensor, str]] = []
    for place, (value, found) in enumerate(zip(operands, axes, strict=True)):
        others = {axis - rank + len(value.shape) for axis in found - {chosen}}
        if chosen in found and others:
            beside = value.beside(others, _ACROSS)
            ties += beside.ties
            operands[place] = replace(value, tags=beside.tags, constants=beside.constants)
        elif others:
            keeps.append((value.tags, _ACROSS))
            one = torch.full((1,) * len(value.shape), FIXED)
            operands[place] = replace(value, tags=one, constants=unknown(one))
    return operands, ties, keeps


def _fullest_axis(call: Call, operands: list[Value], axes: list[set[int]], rank: int) -> int:
    """Return the axis with the most channels; those of parameters, which no gate closes, last."""
    computed = [not isinstance(one, State) for one in _tensors(call)]

    def fullness(axis: int) -> tuple[bool, int, int]:
        mine = [place for place, found in enumerate(axes) if axis in found]
        count = max(operands[place].shape[axis - rank] for place in mine)
        return any(computed[place] for place in mine), count, -axis

    return max(set[int]().union(*axes), key=fullness)


def _tensors(call: Call) -> list[Value | State]:
    leaves = flatten((call.args, call.kwargs))
    return [leaf for leaf in leaves if isinstance(leaf, (Value, State))]


def _split(operands: list[Value], shape: tuple[int, ...]) -> tuple[list[Value], list[Value]]:
    """Part operands into those with channels of the output, and those broadcast along them.

    What is broadcast along some of the axes, and has channels of its own along others, leaves one
    channel along the former.
    """
    sizes = broadcast_to([torch.empty(v.shape, device="meta") for v in operands], len(shape))
    tags = broadcast_to([v.tags for v in operands], len(shape))
    axes = {axis for t in tags for axis in varying_axes(t)}
    whole = [
        v
        for v, s in zip(operands, sizes, strict=True)
        if all(s.shape[axis] == shape[axis] for axis in axes)
    ]
    if not whole:
        raise Barrier("its operands have their channels along different axes")
    chosen = {id(v) for v in whole}
    whole += [v for v in operands if id(v) not in chosen and varying_axes(v.tags)]
    chosen = {id(v) for v in whole}
    return whole, [v for v in operands if id(v) not in chosen]


def _broadcast_tags(operands: list[Value], rank: int) -> Tensor:
    """Return the output's tags; along an axis some operand does not vary on, all are one."""
    tags = broadcast_to([v.tags for v in operands], rank)
    lead = max(tags, key=Tensor.numel)
    for axis in varying_axes(lead):
        if any(other.shape[axis] == 1 for other in tags):
            lead = lead.narrow(axis, 0, 1)
    return lead


def _broadcast_read(part: Value, tags: Tensor) -> Read:
    inputs = part.tags.reshape(-1)
    return Read(
        tags.reshape(-1).unique(), inputs, None, inputs == FIXED, "it is broadcast over channels"
    )


def _constants(call: Call, operands: list[Value], tags: Tensor) -> Tensor:
    """Run the operator on the constants; a result is known where every operand is."""
    ignorance = [torch.isnan(v.constants) for v in operands]
    if any(bool(mask.all()) for mask in ignorance) or _has_dynamic_numbers(call):
        return torch.full(tags.shape, torch.nan, dtype=torch.float64)
    try:
        result = call.execute(lambda argument: _as_operand(argument).to(call.device)).cpu()
    except (RuntimeError, TypeError):  # it wants more than numbers: nothing is known then
        return torch.full(tags.shape, torch.nan, dtype=torch.float64)
    missing = torch.zeros((), dtype=torch.bool)
    for mask in ignorance:
        missing = missing | mask
    return _fit(torch.where(missing, torch.nan, _as_real(result)), tags)


def _as_real(numbers: Tensor) -> Tensor:
    """Return numbers in float64; of those with an imaginary part nothing is known."""
    if numbers.is_complex():
        numbers = torch.where(numbers.imag == 0, numbers.real, torch.nan)
    return numbers.double()


def _as_operand(argument: Any) -> Tensor:
    """Return an operand's constants in the type it has; any number stands for what is unknown."""
    value: Value = as_value(argument)
    numbers = torch.where(torch.isnan(value.constants), 1.0, value.constants)
    return numbers.bool() if value.dtype == torch.bool else numbers


def _product_constants(call: Call, operands: list[Value], tags: Tensor) -> Tensor:
    constants = _constants(call, operands, tags)
    for operand in operands:
        zero = _fit(zeros_of(operand.constants), tags)
        constants = torch.where(zero == 0, 0.0, constants)
    return constants


def _quotient_constants(call: Call, operands: list[Value], tags: Tensor) -> Tensor:
    constants = _constants(call, operands, tags)
    divided = as_value(call.args[0]) if call.args else None
    rest = call.node.args[1:]
    if not isinstance(divided, Value) or not rest or not is_never_zero(rest[0]):
        return constants
    return torch.where(_fit(zeros_of(divided.constants), tags) == 0, 0.0, constants)


def _fit(constants: Tensor, tags: Tensor) -> Tensor:
    constants = broadcast_to([constants], tags.dim())[0]
    return align(constants, tags).expand(tags.shape)


def _has_dynamic_numbers(call: Call) -> bool:
    """Tell whether a number among the arguments was computed in the graph, from sizes say."""
    numbers = [a for a in flatten((call.args, call.kwargs)) if isinstance(a, (int, float))]
    literal = [
        a for a in flatten((call.node.args, call.node.kwargs)) if isinstance(a, (int, float))
    ]
    return len(numbers) != len(literal)


def _functions(module: Any, *names: str) -> list[Any]:
    """Return the functions of a namespace among `names`, with their in-place twins."""
    twins = [name + "_" for name in names]
    return [getattr(module, name) for name in (*names, *twins) if hasattr(module, name)]


UNARY = (
    *("abs", "absolute", "exp", "exp2", "expm1", "log", "log1p", "log2", "log10", "sqrt", "rsqrt"),
    *("square", "reciprocal", "neg", "negative", "positive", "sign", "sgn", "signbit", "frac"),
    *("sin", "cos", "tan", "sinh", "cosh", "tanh", "asin", "acos", "atan", "arcsin", "arccos"),
    *("arctan", "asinh", "acosh", "atanh", "arcsinh", "arccosh", "arctanh", "deg2rad", "rad2deg"),
    *("sigmoid", "logit", "erf", "erfc", "erfinv", "lgamma", "digamma", "sinc", "i0"),
    *("floor", "ceil", "round", "trunc", "fix", "nan_to_num", "isnan", "isinf", "isfinite"),
    *("isposinf", "isneginf", "logical_not", "bitwise_not"),
    *("relu", "clamp", "clip", "clamp_min", "clamp_max"),
)
WAVES = ("sin",)  # of networks that represent fields (SIREN)
CLAMPS = ("clamp", "clip", "clamp_min")
SPECIAL = (
    *("digamma", "entr", "erf", "erfc", "erfcx", "erfinv", "exp2", "expit", "expm1", "gammaln"),
    *("i0", "i0e", "i1", "i1e", "log1p", "log_ndtr", "logit", "ndtr", "ndtri", "psi", "round"),
    *("sinc", "xlog1py", "xlogy"),
)
ACTIVATIONS = (
    *("relu", "relu6", "leaky_relu", "elu", "selu", "celu", "gelu", "silu", "mish", "hardswish"),
    *("hardtanh", "hardsigmoid", "softplus", "softsign", "tanhshrink", "logsigmoid", "softshrink"),
    *("hardshrink", "threshold", "sigmoid", "tanh", "rrelu"),
)
ACTIVATION_MODULES = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish),
    *(nn.Hardswish, nn.Hardtanh, nn.Hardsigmoid, nn.Softplus, nn.Softsign, nn.Tanhshrink),
    *(nn.LogSigmoid, nn.Softshrink, nn.Hardshrink, nn.Threshold, nn.Sigmoid, nn.Tanh, nn.RReLU),
)
BINARY = (
    *("add", "sub", "subtract", "rsub", "floor_divide", "pow"),
    *("float_power", "remainder", "fmod", "maximum", "minimum", "fmax", "fmin", "hypot", "atan2"),
    *("arctan2", "copysign", "heaviside", "xlogy", "logaddexp", "logaddexp2"),
    *("logical_and", "logical_or", "logical_xor", "bitwise_and", "bitwise_or", "bitwise_xor"),
)
COMPARISONS = (
    *("eq", "ne", "lt", "le", "gt", "ge", "not_equal", "less", "less_equal", "greater"),
    *("greater_equal", "isclose"),
)
TERNARY = ("where", "addcmul", "addcdiv", "lerp", "masked_fill")
OPERATORS = (
    *(operator.add, operator.sub, operator.floordiv, operator.mod, operator.pow),
    *(operator.neg, operator.pos, operator.abs, operator.invert),
    *(operator.and_, operator.or_, operator.xor),
    *(operator.iadd, operator.isub, operator.ifloordiv, operator.imod),
    *(operator.ipow, operator.iand, operator.ior, operator.ixor),
    *(operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge),
)
PRODUCTS = ("mul", "multiply")
QUOTIENTS = ("div", "divide", "true_divide")

NONLINEARITIES = frozenset(
    {
        *(nn.PReLU, F.prelu, torch.prelu, "prelu", POINTWISE, *ACTIVATION_MODULES),
        *(f for space in (torch, F) for f in _functions(space, *ACTIVATIONS, *CLAMPS, *WAVES)),
        *(
            n
            for name in (*ACTIVATIONS, *CLAMPS, *WAVES)
            for n in (name, name + "_")
            if hasattr(Tensor, n)
        ),
    }
)
"""What a gate may stand at, where f(0) = 0."""


def preserves_zero(node: fx.Node, module: nn.Module | None, dtype: torch.dtype) -> bool:
    """Tell whether an activation maps 0 to 0, by running it."""
    if key_of(node, module) in _PRELUS:
        return True  # whatever the slopes; they would want as many channels as they are
    if len(node.all_input_nodes) != 1:
        return False  # a slope or threshold is computed

    def zeros(_: fx.Node) -> Any:
        return torch.zeros(1, 1, dtype=dtype)

    with drawing_alike(CPU):
        result = execute(node, module, map_arg(node.args, zeros), map_arg(node.kwargs, zeros))
    return bool((result == 0).all())


_PRELUS = (nn.PReLU, F.prelu, torch.prelu, "prelu")


_tensor_names = {name for name in (*UNARY, *ACTIVATIONS, *BINARY, *COMPARISONS, *TERNARY)}
register(
    OpRule("elementwise", elementwise_flow),
    *(POINTWISE, *ACTIVATION_MODULES),
    *dict.fromkeys(
        [
            *_functions(torch, *_tensor_names),
            *_functions(F, *ACTIVATIONS),
            *_functions(torch.special, *SPECIAL),
            *OPERATORS,
            *(n for name in _tensor_names for n in (name, name + "_") if hasattr(Tensor, n)),
        ]
    ),
)
register(
    OpRule("product", product_flow),
    *(operator.mul, operator.imul),
    *_functions(torch, *PRODUCTS),
    *(n for name in PRODUCTS for n in (name, name + "_")),
)
register(
    OpRule("elementwise", quotient_flow),
    *(operator.truediv, operator.itruediv),
    *_functions(torch, *QUOTIENTS),
    *(n for name in QUOTIENTS for n in (name, name + "_")),
)
register(
    OpRule("identity", passing_flow),
    nn.Identity,
)
register(
    OpRule("identity", dropout_flow),
    *(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, *_NOISY),
    *(F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, *_NOISY_FUNCTIONS),
    "torchvision.ops.stochastic_depth.stochastic_depth",
)
register(
    OpRule("prelu", prelu_flow, resize=resize_prelu),
    *dict.fromkeys(_PRELUS),
)
