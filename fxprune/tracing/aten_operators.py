"""Operators of ATen, as exported programs call them, in the words that Python has for them.

    torch.ops.aten.batch_norm.default(x, weight, bias, mean, variance, …)    →    F.batch_norm(x, …)
    torch.ops.aten.slice.Tensor(x, 1, 0, 8)                                  →    x[:, 0:8]

Most take their arguments as the function of the same name does; the others are listed one by one.
So are those that programs are decomposed into, whose results beside the first nobody reads. What is
not listed stays what it is, an operator that nothing is known of.
"""

import inspect
import sys
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch._ops import OpOverload

from fxprune.tracing.stand_ins import is_given_traced, standing_in

_OF_TORCH = (
    "abs add addcdiv addcmul addmm amax amin arange argmax argmin argsort atan baddbmm "
    "bitwise_and bitwise_not bitwise_or bmm cat ceil chunk clamp clamp_max clamp_min clone "
    "concat cos cosh cross cumprod cumsum detach diag diagonal diff div dot einsum eq erf exp "
    "expm1 flatten flip floor floor_divide fmod frac full gather ge gt index_add index_select "
    "isfinite isinf isnan le lerp log log1p log2 log_softmax logical_and logical_not logical_or "
    "logsumexp lt masked_fill matmul max maximum mean min minimum mm movedim mul mv nan_to_num "
    "ne neg ones ones_like outer permute pow prod reciprocal remainder round rsqrt rsub scatter "
    "scatter_add sgn sigmoid sign sin sinh softmax sort sqrt square squeeze stack std std_mean "
    "sub sum swapaxes t tan tanh transpose tril triu true_divide trunc unbind unsqueeze var "
    "var_mean where zeros zeros_like"
)
_OF_FUNCTIONS = (
    "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d avg_pool1d avg_pool2d "
    "avg_pool3d bilinear celu conv1d conv2d conv3d conv_transpose1d conv_transpose2d "
    "conv_transpose3d dropout gelu glu hardsigmoid hardswish hardtanh leaky_relu linear "
    "max_pool1d max_pool2d max_pool3d mish pad pixel_shuffle pixel_unshuffle prelu relu relu6 "
    "rms_norm scaled_dot_product_attention selu silu softplus softshrink"
)
_OF_TENSORS = (
    "contiguous expand expand_as narrow new_full new_ones new_zeros repeat repeat_interleave "
    "reshape roll select split tile topk type_as unflatten unfold view view_as"
)


@contextmanager
def called_in_python(tracer: Any) -> Generator[None]:
    """Let operators of ATen be called by their public names where they are given what is traced.

    By themselves they would ask a traced size, in a list of sizes, which number it is. tracer: says
    whether it is `answering`, when code runs that is not traced.
    """
    call: Any = OpOverload.__call__

    def spoken(operator: OpOverload, /, *args: Any, **kwargs: Any) -> Any:
        if not tracer.answering and is_given_traced(args, kwargs):
            made = _in_python(tracer, operator, args, kwargs)
            if made is not NotImplemented:
                return made
        return call(operator, *args, **kwargs)

    with standing_in((OpOverload, "__call__", spoken)):
        yield


def _in_python(
    tracer: Any, operator: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Call an operator by its public name; return `NotImplemented` if it has none here."""
    if operator.namespace != "aten":
        return NotImplemented
    name = operator._schema.name.partition("::")[2]
    for one in (f"{name}.{operator._overloadname}", name):
        if one in _OTHERS and _fits(_OTHERS[one], args, kwargs):
            return _OTHERS[one](*args, **kwargs)
        if one in _FUNCTIONS:
            return tracer.create_proxy("call_function", _FUNCTIONS[one], args, kwargs)
        if one in _METHODS:
            return tracer.create_proxy("call_method", _METHODS[one], args, kwargs)
    return NotImplemented


def _fits(called: Callable[..., Any], args: Any, kwargs: Any) -> bool:
    """Tell whether a function takes arguments; a program names none that may be given by place."""
    try:
        inspect.signature(called).bind(*args, **kwargs)
    except TypeError:
        return False
    return True


def _batch_norm(
    x: Any, weight: Any, bias: Any, mean: Any, variance: Any, training: Any, *rest: Any
) -> Any:
    momentum, eps, *_ = rest
    return F.batch_norm(x, mean, variance, weight, bias, training, momentum, eps)


def _instance_norm(
    x: Any, weight: Any, bias: Any, mean: Any, variance: Any, use_input: Any, *rest: Any
) -> Any:
    momentum, eps, *_ = rest
    return F.instance_norm(x, mean, variance, weight, bias, use_input, momentum, eps)


def _layer_norm(x: Any, shape: Any, weight: Any = None, bias: Any = None, *rest: Any) -> Any:
    return F.layer_norm(x, shape, weight, bias, *rest[:1])


def _group_norm(x: Any, groups: Any, weight: Any = None, bias: Any = None, *rest: Any) -> Any:
    return F.group_norm(x, groups, weight, bias, *rest[:1])


def _elu(x: Any, alpha: Any = 1.0, *scales: Any, inplace: bool = False) -> Any:
    return NotImplemented if scales else F.elu(x, alpha, inplace)


def _convolution(
    x: Any, weight: Any, bias: Any, stride: Any, padding: Any, dilation: Any, *rest: Any
) -> Any:
    transposed, output_padding, groups = rest
    spreading, plain = _CONVOLUTIONS[len(stride)]
    if transposed:
        return spreading(x, weight, bias, stride, padding, output_padding, groups, dilation)
    return plain(x, weight, bias, stride, padding, dilation, groups)


def _settled_norm(
    x: Any, weight: Any, bias: Any, mean: Any, variance: Any, momentum: Any, eps: Any
) -> Any:
    return F.batch_norm(x, mean, variance, weight, bias, False, momentum, eps), None, None


def _native_layer_norm(x: Any, shape: Any, weight: Any, bias: Any, eps: Any) -> Any:
    return F.layer_norm(x, shape, weight, bias, eps), None, None


def _native_group_norm(x: Any, weight: Any, bias: Any, *sizes: Any) -> Any:
    *_, groups, eps = sizes
    return F.group_norm(x, groups, weight, bias, eps), None, None


def _softmax(x: Any, dim: Any, half_to_float: bool) -> Any:
    return NotImplemented if half_to_float else torch.softmax(x, dim)


def _embedding(weight: Any, positions: Any, padding: Any = -1, *_: Any) -> Any:
    return F.embedding(positions, weight, None if padding == -1 else padding)


def _slice(x: Any, dim: Any = 0, start: Any = None, end: Any = None, step: Any = 1) -> Any:
    end = None if end == sys.maxsize else end
    axis = dim + int(x.dim()) if dim < 0 else dim
    return x[(*[slice(None)] * axis, slice(start, end, step))]


def _index(x: Any, places: Sequence[Any]) -> Any:
    return x[tuple(slice(None) if place is None else place for place in places)]


def _to(x: Any, *, dtype: Any = None, device: Any = None, copy: bool = False, **_: Any) -> Any:
    told = {"dtype": dtype, "device": device}
    return x.to(**{name: value for name, value in told.items() if value is not None}, copy=copy)


def _nearest(x: Any, size: Any, factors: Any = None) -> Any:
    return F.interpolate(x, size, factors, mode="nearest")


def _smooth(mode: str) -> Callable[..., Any]:
    def resized(x: Any, size: Any, align_corners: Any, factors: Any = None) -> Any:
        return F.interpolate(x, size, factors, mode=mode, align_corners=align_corners)

    return resized


def _unchecked(*_: Any, **__: Any) -> None:
    """Leave out what checks the type of a tensor, which is the example's in whatever is traced."""


_IN_PLACE = "abs add clamp copy div exp fill masked_fill mul neg sigmoid sqrt sub tanh zero"
_INTO_ITS_INPUT = "celu dropout hardsigmoid hardswish hardtanh leaky_relu mish relu relu6 selu silu"
_CONVOLUTIONS: dict[int, tuple[Callable[..., Any], Callable[..., Any]]] = {
    1: (F.conv_transpose1d, F.conv1d),
    2: (F.conv_transpose2d, F.conv2d),
    3: (F.conv_transpose3d, F.conv3d),
}
_METHODS = {
    **{name: name for name in _OF_TENSORS.split()},
    **{f"{name}_": f"{name}_" for name in _IN_PLACE.split()},
    **{f"to.{one}": "to" for one in ("device", "dtype", "other")},
    "split_with_sizes": "split",
    "_unsafe_view": "view",
    "sym_size": "size",
}
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    **{name: getattr(torch, name) for name in _OF_TORCH.split()},
    **{name: getattr(F, name) for name in _OF_FUNCTIONS.split()},
    "__and__": torch.bitwise_and,
    "__or__": torch.bitwise_or,
    "col2im": F.fold,
    "im2col": F.unfold,
    "lift_fresh_copy": torch.clone,
    "linalg_vector_norm": torch.linalg.vector_norm,
    "log_sigmoid": F.logsigmoid,
}
_OTHERS: dict[str, Callable[..., Any]] = {
    **{f"{name}_": partial(getattr(F, name), inplace=True) for name in _INTO_ITS_INPUT.split()},
    "_assert_tensor_metadata": _unchecked,
    "_native_batch_norm_legit_no_training": _settled_norm,
    "_softmax": _softmax,
    "_to_copy": partial(_to, copy=True),
    "adaptive_max_pool1d": partial(F.adaptive_max_pool1d, return_indices=True),
    "adaptive_max_pool2d": partial(F.adaptive_max_pool2d, return_indices=True),
    "adaptive_max_pool3d": partial(F.adaptive_max_pool3d, return_indices=True),
    "alias": lambda x: x,
    "batch_norm": _batch_norm,
    "convolution": _convolution,
    "elu": _elu,
    "elu_": partial(_elu, inplace=True),
    "embedding": _embedding,
    "group_norm": _group_norm,
    "index": _index,
    "instance_norm": _instance_norm,
    "layer_norm": _layer_norm,
    "mT": lambda x: x.mT,
    "max_pool2d_with_indices": partial(F.max_pool2d, return_indices=True),
    "native_group_norm": _native_group_norm,
    "native_layer_norm": _native_layer_norm,
    "slice": _slice,
    "to.dtype_layout": _to,
    "upsample_bicubic2d.vec": _smooth("bicubic"),
    "upsample_bilinear2d.vec": _smooth("bilinear"),
    "upsample_linear1d.vec": _smooth("linear"),
    "upsample_nearest1d.vec": _nearest,
    "upsample_nearest2d.vec": _nearest,
    "upsample_nearest3d.vec": _nearest,
    "upsample_trilinear3d.vec": _smooth("trilinear"),
}
