"""Every operator with a rule, held to it by execution.

`SAMPLES` builds an operator for every key of the registry; a key without a sample fails here.
"""

import copy
import operator
import pkgutil
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxprune.dataflow.rules import POINTWISE, RULES
from fxprune.gating.gates import linear_gate, width_gate
from fxprune.ops.gather import pick_channels
from fxprune.testing import check_rule
from tests.user_models.test_custom_functions import Applies, Swish

IMAGE = (3, 8, 6, 6)


def same(x: Any) -> Any:
    return x


def positive(x: Tensor) -> Tensor:
    return x.abs() + 0.5


def picked(x: Any) -> Any:
    """Pick channels, in the graph too: a pass puts this there, no user's code does."""
    if isinstance(x, fx.Proxy):
        return x.tracer.create_proxy("call_function", pick_channels, (x, 1), {})
    return pick_channels(x, 1)


def listed(x: Any) -> Any:
    """Take the second entry of a list that a trace sees being made."""
    entries = (x, x.relu())
    if not isinstance(x, fx.Proxy):
        return list(entries)[1]
    made: Any = x.tracer.create_proxy("call_function", list, (entries,), {})
    return made[1]


def times_being_a_tensor(x: Any) -> Any:
    """Multiply by the answer to a question that a trace sees being asked."""
    if not isinstance(x, fx.Proxy):
        return x * hasattr(x, "__torch_dispatch__")
    asked: Any = x.tracer.create_proxy("call_function", hasattr, (x, "__torch_dispatch__"), {})
    return asked * x


def is_positive(x: Tensor) -> Tensor:
    return x > 0


def is_large(x: Tensor) -> Tensor:
    return x > 3


def double(x: Tensor) -> Tensor:
    return x.double()


def beyond_one(x: Tensor) -> Tensor:
    return x.abs() + 1.5


def within_one(x: Tensor) -> Tensor:
    return torch.tanh(x) * 0.9


def log_of_positive(x: Tensor) -> Tensor:
    return torch.log(torch.relu(x))


def truth(x: Tensor) -> Tensor:
    return x > 0


def whole_numbers(x: Tensor) -> Tensor:
    return (x * 4).long()


def with_imaginary_part(x: Tensor) -> Tensor:
    return torch.complex(x, x.tanh() * 2)


@dataclass(frozen=True)
class Sample:
    """How to call an operator: what follows its tensors, how many these are, their shape.

    prepare, finish: what is done to the operands before and to the output after.
    """

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict[str, Any])
    shape: tuple[int, ...] = IMAGE
    operands: int = 1
    axis: int = 1
    out_axis: int = 1
    shrinks: bool = True
    prepare: Callable[[Any], Any] = same
    finish: Callable[[Any], Any] = same


class Function(nn.Module):
    """Call a function or method with further arguments."""

    def __init__(self, target: Any, sample: Sample) -> None:
        super().__init__()
        self.target, self.sample = target, sample

    def forward(self, x: Tensor, y: Tensor | None = None) -> Any:
        rest = self.sample.args
        if self.sample.operands == 2:
            rest = (self.sample.prepare(y), *rest)
        x = self.sample.prepare(x)
        if isinstance(self.target, str):
            return self.sample.finish(getattr(x, self.target)(*rest, **self.sample.kwargs))
        return self.sample.finish(self.target(x, *rest, **self.sample.kwargs))


class Expression(nn.Module):
    """Compute any expression of the operands."""

    def __init__(self, expression: Callable[..., Any]) -> None:
        super().__init__()
        self.expression = expression

    def forward(self, x: Tensor, y: Tensor | None = None) -> Any:
        return self.expression(x) if y is None else self.expression(x, y)


class WithParameters(nn.Module):
    """Call a functional layer with a weight and perhaps a bias of its own."""

    def __init__(self, function: Any, weight: tuple[int, ...], bias: int | None = None) -> None:
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.ones(weight))
        self.bias = None if bias is None else nn.Parameter(torch.ones(bias))

    def forward(self, x: Tensor) -> Tensor:
        if self.bias is None:
            return self.function(x, self.weight)
        return self.function(x, self.weight, self.bias)


class Embedded(nn.Module):
    """Multiply by the columns of a table, one row for every image."""

    def __init__(self, table: nn.Module) -> None:
        super().__init__()
        self.table = table
        self.tokens: Tensor
        self.register_buffer("tokens", torch.tensor([[2, 0], [1, 2], [3, 3]]))

    def forward(self, x: Tensor) -> Tensor:
        found = self.table(self.tokens).reshape(3, -1, 8).sum(1)
        return x * found[:, :, None, None]


class EmbeddingFunction(nn.Module):
    """Call F.embedding or F.embedding_bag with a table of its own."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.ones(5, 8))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.function(tokens, self.weight)


class Indexed(nn.Module):
    """Compute any expression of an operand and a constant index."""

    def __init__(self, expression: Callable[..., Any], index: list[Any]) -> None:
        super().__init__()
        self.expression = expression
        self.index: Tensor
        self.register_buffer("index", torch.tensor(index))

    def forward(self, x: Tensor) -> Any:
        return self.expression(x, self.index)


class BilinearFunction(nn.Module):
    """Call F.bilinear with parameters of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(5, 8, 8)), nn.Parameter(torch.ones(5))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.bilinear(x, y, self.weight, self.bias)


class BatchNormFunction(nn.Module):
    """Call F.batch_norm with stored statistics, of which it makes no use in training."""

    def __init__(self, *, training: bool = False) -> None:
        super().__init__()
        self.bn, self.always = nn.BatchNorm2d(8), training

    def forward(self, x: Tensor) -> Tensor:
        bn = self.bn
        held = bn.running_mean, bn.running_var, bn.weight, bn.bias
        return F.batch_norm(x, *held, self.always, 0.0)


LINE, VOLUME, KEPT = (3, 8, 9), (3, 8, 4, 4, 4), (3, 5, 5, 8)
CELLS = (nn.RNNCell, nn.LSTMCell, nn.GRUCell)
SEQUENCE, TOKENS = (5, 4, 9), (3, 4, 5, 6)


class Recurrent(nn.Module):
    """Call a recurrent module, or cell by cell, and return its output."""

    def __init__(self, recurrent: nn.Module) -> None:
        super().__init__()
        self.recurrent = recurrent

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.recurrent, nn.RNNCellBase):
            state = self.recurrent(x[0])
            return state[0] if isinstance(self.recurrent, nn.LSTMCell) else state
        return self.recurrent(x)[0]


class SelfAttention(nn.Module):
    """Call torch's own attention module, or the function behind it."""

    def __init__(self, *, function: bool) -> None:
        super().__init__()
        self.attention, self.function = nn.MultiheadAttention(8, 2), function

    def forward(self, x: Tensor) -> Tensor:
        if not self.function:
            return self.attention(x, x, x)[0]
        own = self.attention
        return F.multi_head_attention_forward(
            *(x, x, x, 8, 2, own.in_proj_weight, own.in_proj_bias, None, None, False, 0.0),
            *(own.out_proj.weight, own.out_proj.bias),
            need_weights=False,
        )[0]


class Unpooled(nn.Module):
    """Pool maps and undo it, by a module or a function."""

    def __init__(self, rank: int, unpool: Any = None) -> None:
        super().__init__()
        self.pool = getattr(nn, f"MaxPool{rank}d")(2, return_indices=True)
        self.unpool = unpool or getattr(F, f"max_unpool{rank}d")
        self.args = () if unpool else (2,)

    def forward(self, x: Tensor) -> Tensor:
        return self.unpool(*self.pool(x), *self.args)


class Sampled(nn.Module):
    """Read maps at places that are computed, or at places of a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.places: Tensor
        self.register_buffer("places", torch.linspace(-1, 1, 54).reshape(3, 3, 3, 2).sin())

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        places = self.places if y is None else y[:, :2].movedim(1, -1).tanh()
        return F.grid_sample(x, places, align_corners=False)


MODULES: dict[type[nn.Module], tuple[Callable[[], nn.Module], Sample]] = {
    nn.PReLU: (lambda: nn.PReLU(8), Sample()),
    nn.Threshold: (lambda: nn.Threshold(0.1, 0.5), Sample()),
    nn.Linear: (lambda: nn.Linear(6, 5), Sample(shape=(3, 4, 6), axis=2, out_axis=2)),
    nn.Conv1d: (lambda: nn.Conv1d(8, 6, 3), Sample(shape=(3, 8, 9))),
    nn.Conv2d: (lambda: nn.Conv2d(8, 6, 3, padding=1), Sample()),
    nn.Conv3d: (lambda: nn.Conv3d(8, 6, 2), Sample(shape=(3, 8, 4, 4, 4))),
    nn.ConvTranspose1d: (lambda: nn.ConvTranspose1d(8, 6, 3), Sample(shape=(3, 8, 9))),
    nn.ConvTranspose2d: (lambda: nn.ConvTranspose2d(8, 6, 3, stride=2), Sample()),
    nn.ConvTranspose3d: (lambda: nn.ConvTranspose3d(8, 6, 2), Sample(shape=(3, 8, 4, 4, 4))),
    nn.BatchNorm1d: (lambda: nn.BatchNorm1d(8), Sample(shape=(3, 8, 9))),
    nn.BatchNorm2d: (lambda: nn.BatchNorm2d(8), Sample()),
    nn.BatchNorm3d: (lambda: nn.BatchNorm3d(8), Sample(shape=(3, 8, 4, 4, 4))),
    nn.SyncBatchNorm: (lambda: nn.SyncBatchNorm(8), Sample()),
    nn.PixelShuffle: (lambda: nn.PixelShuffle(2), Sample()),
    nn.PixelUnshuffle: (lambda: nn.PixelUnshuffle(2), Sample()),
    nn.GLU: (lambda: nn.GLU(1), Sample()),
    nn.Upsample: (lambda: nn.Upsample(scale_factor=2, mode="bicubic"), Sample()),
    nn.UpsamplingNearest2d: (lambda: nn.UpsamplingNearest2d(scale_factor=2), Sample()),
    nn.UpsamplingBilinear2d: (lambda: nn.UpsamplingBilinear2d(scale_factor=2), Sample()),
    nn.LayerNorm: (lambda: nn.LayerNorm(8), Sample(axis=3, shape=KEPT, out_axis=3, shrinks=False)),
    nn.RMSNorm: (
        lambda: nn.RMSNorm(8, 1e-3),
        Sample(axis=3, shape=KEPT, out_axis=3, shrinks=False),
    ),
    **{
        kind: (
            lambda kind=kind: Recurrent(kind(9, 4)),
            Sample(shape=SEQUENCE, axis=2, out_axis=rank - 1, shrinks=False),
        )
        for rank, kinds in ((3, (nn.RNN, nn.LSTM, nn.GRU)), (2, CELLS))
        for kind in kinds
    },
    nn.MultiheadAttention: (
        lambda: SelfAttention(function=False),
        Sample(shape=(5, 3, 8), axis=2, out_axis=2, shrinks=False),
    ),
    nn.GroupNorm: (lambda: nn.GroupNorm(4, 8), Sample()),
    nn.LocalResponseNorm: (lambda: nn.LocalResponseNorm(2), Sample(shrinks=False)),
    nn.Softmax: (lambda: nn.Softmax(1), Sample(shrinks=False)),
    nn.LogSoftmax: (lambda: nn.LogSoftmax(1), Sample(shrinks=False)),
    nn.Softmin: (lambda: nn.Softmin(1), Sample(shrinks=False)),
    nn.Softmax2d: (nn.Softmax2d, Sample(shrinks=False)),
    **{
        norm: (
            lambda norm=norm, stats=stats: norm(8, affine=True, track_running_stats=stats),
            Sample(shape=shape),
        )
        for norm, stats, shape in (
            (nn.InstanceNorm1d, False, LINE),
            (nn.InstanceNorm2d, True, IMAGE),
            (nn.InstanceNorm3d, False, VOLUME),
        )
    },
    nn.ChannelShuffle: (lambda: nn.ChannelShuffle(2), Sample()),
    nn.Unflatten: (lambda: nn.Unflatten(1, (2, 4)), Sample(out_axis=2)),
    nn.Unfold: (lambda: nn.Unfold(2, padding=1), Sample()),
    nn.MaxUnpool1d: (lambda: Unpooled(1, nn.MaxUnpool1d(2)), Sample(shape=(3, 8, 8))),
    nn.MaxUnpool2d: (lambda: Unpooled(2, nn.MaxUnpool2d(2)), Sample()),
    nn.MaxUnpool3d: (lambda: Unpooled(3, nn.MaxUnpool3d(2)), Sample(shape=VOLUME)),
    nn.Fold: (lambda: nn.Fold((4, 4), 2), Sample(shape=(3, 8, 9))),
    nn.Embedding: (lambda: Embedded(nn.Embedding(5, 8, padding_idx=2)), Sample()),
    nn.EmbeddingBag: (lambda: Embedded(nn.EmbeddingBag(5, 8)), Sample()),
    nn.Bilinear: (
        lambda: nn.Bilinear(8, 8, 5),
        Sample(operands=2, axis=3, shape=(3, 5, 5, 8), out_axis=3),
    ),
}
POOLS: dict[str, tuple[Any, ...]] = {
    "MaxPool": (2,),
    "AvgPool": (2,),
    "AdaptiveAvgPool": (2,),
    "AdaptiveMaxPool": (2,),
    "LPPool": (2, 2),
}
BY_RANK = {1: LINE, 2: IMAGE, 3: VOLUME}

# Operators named in words, whichever of their forms is registered.
NAMED: dict[str, Sample] = {
    **dict.fromkeys(("add", "sub", "subtract", "rsub", "iadd", "isub"), Sample(operands=2)),
    **dict.fromkeys(("mul", "multiply", "imul", "maximum", "minimum"), Sample(operands=2)),
    **dict.fromkeys(("fmax", "fmin", "hypot", "atan2", "arctan2", "copysign"), Sample(operands=2)),
    **dict.fromkeys(("heaviside", "logaddexp", "logaddexp2"), Sample(operands=2)),
    **dict.fromkeys(
        ("div", "divide", "true_divide", "truediv", "itruediv", "floordiv", "ifloordiv"),
        Sample(operands=2, prepare=positive),
    ),
    **dict.fromkeys(
        ("floor_divide", "mod", "imod", "remainder", "fmod", "xlogy", "xlog1py"),
        Sample(operands=2, prepare=positive),
    ),
    "float_power": Sample((2,), prepare=double),
    "ipow": Sample((2,)),
    **dict.fromkeys(("eq", "ne", "not_equal"), Sample((1,), prepare=torch.round, finish=double)),
    "isclose": Sample(operands=2, prepare=torch.round, finish=double),
    **dict.fromkeys(
        ("lt", "le", "gt", "ge", "less", "less_equal", "greater", "greater_equal"),
        Sample((0.1,), finish=double),
    ),
    **dict.fromkeys(
        ("log", "log1p", "log2", "log10", "sqrt", "rsqrt", "reciprocal", "lgamma", "gammaln"),
        Sample(prepare=positive),
    ),
    **dict.fromkeys(("digamma", "psi", "entr"), Sample(prepare=positive)),
    **dict.fromkeys(("acosh", "arccosh"), Sample(prepare=beyond_one)),
    **dict.fromkeys(
        ("asin", "acos", "arcsin", "arccos", "atanh", "arctanh", "erfinv"),
        Sample(prepare=within_one),
    ),
    "signbit": Sample(finish=double),
    "logical_not": Sample(prepare=torch.relu, finish=double),
    "isnan": Sample(prepare=torch.log, finish=double),
    **dict.fromkeys(
        ("isinf", "isfinite", "isneginf"), Sample(prepare=log_of_positive, finish=double)
    ),
    "isposinf": Sample(prepare=lambda x: -log_of_positive(x), finish=double),
    **dict.fromkeys(
        ("logical_and", "logical_or", "logical_xor"),
        Sample(operands=2, prepare=truth, finish=double),
    ),
    **dict.fromkeys(
        ("bitwise_and", "bitwise_or", "bitwise_xor", "and", "or", "xor", "iand", "ior", "ixor"),
        Sample(operands=2, prepare=whole_numbers, finish=double),
    ),
    **dict.fromkeys(("bitwise_not", "invert"), Sample(prepare=whole_numbers, finish=double)),
    "ndtri": Sample(prepare=torch.sigmoid),
    "rrelu": Sample((0.1, 0.4)),
    **dict.fromkeys(("clamp_min", "clamp_max"), Sample((0.1,))),
    **dict.fromkeys(("clamp", "clip"), Sample((-0.5, 0.5))),
    "logit": Sample((0.01,), prepare=torch.sigmoid),
    "pow": Sample((2,)),
    "threshold": Sample((0.1, 0.5)),
    "lerp": Sample((0.3,), operands=2),
    "flatten": Sample((1,)),
    "permute": Sample(((0, 2, 3, 1),), out_axis=3),
    **dict.fromkeys(("transpose", "swapaxes", "swapdims"), Sample((1, 2), out_axis=2)),
    **dict.fromkeys(("movedim", "moveaxis"), Sample((1, -1), out_axis=3)),
    "adjoint": Sample(shape=(3, 4, 8, 6), axis=2, out_axis=3),
    **dict.fromkeys(("fliplr", "flipud", "atleast_1d", "atleast_2d", "atleast_3d"), Sample()),
    "rot90": Sample((1, (1, 2)), out_axis=2),
    "narrow": Sample((1, 2, 5)),
    "diagonal": Sample((0, 2, 3)),
    "tile": Sample(((1, 2, 1, 1),)),
    "repeat": Sample((1, 2, 1, 1)),
    "repeat_interleave": Sample((2, 1)),
    "unflatten": Sample((1, (2, 4)), out_axis=2),
    **dict.fromkeys(("tril", "triu"), Sample((1,))),
    "ravel": Sample(shape=(8,), axis=0, out_axis=0),
    "t": Sample(shape=(3, 8), out_axis=0),
    "unsqueeze": Sample((2,)),
    "squeeze": Sample((2,), shape=(3, 8, 1, 6)),
    "flip": Sample(((2,),)),
    "roll": Sample((1, 2)),
    "unbind": Sample((2,)),
    **dict.fromkeys(("expand_as", "view_as", "reshape_as"), Sample(operands=2)),
    **dict.fromkeys(("view",), Sample((3, 8, -1))),
    "reshape": Sample(((3, 8, -1),)),
    "expand": Sample((-1, 8, 6, 6)),
    "broadcast_to": Sample(((3, 8, 6, 6),)),
    "pad": Sample(((1, 2, 0, 1, 2, 3), "constant", 0.5)),
    "interpolate": Sample(kwargs={"scale_factor": 2, "mode": "bilinear"}),
    "glu": Sample((1,)),
    **dict.fromkeys(("softmax", "log_softmax", "softmin"), Sample((2,))),
    "normalize": Sample(kwargs={"dim": 2}),
    "cosine_similarity": Sample(operands=2, kwargs={"dim": 2}),
    "layer_norm": Sample(((6,),)),
    "rms_norm": Sample(((6,),)),
    "group_norm": Sample((4,)),
    "local_response_norm": Sample((2,), shrinks=False),
    **dict.fromkeys(("cumsum", "cumprod"), Sample((2,))),
    **dict.fromkeys(("cummax", "cummin"), Sample((2,), finish=operator.itemgetter(0))),
    "diff": Sample(kwargs={"dim": 2}),
    **dict.fromkeys(
        [f"fft_{kind}fft{rank}" for kind in ("", "i", "r", "ir") for rank in ("", "2")],
        Sample(finish=torch.abs),
    ),
    **dict.fromkeys(("fft_hfft", "fft_ihfft"), Sample(finish=torch.abs)),
    **dict.fromkeys(
        [f"fft_{kind}fftn" for kind in ("", "i", "r", "ir")],
        Sample(kwargs={"dim": (2, -1)}, finish=torch.abs),
    ),
    "view_as_complex": Sample(
        shape=(3, 8, 6, 2), prepare=lambda x: x.contiguous(), finish=torch.abs
    ),
    "view_as_real": Sample(prepare=with_imaginary_part),
    "complex": Sample(operands=2, finish=torch.abs),
    "polar": Sample(operands=2, finish=torch.real),
    **dict.fromkeys(
        ("real", "imag", "angle", "conj", "conj_physical", "resolve_conj"),
        Sample(prepare=with_imaginary_part, finish=torch.abs),
    ),
    "sort": Sample((2,), finish=operator.itemgetter(0)),
    "argsort": Sample((2,), finish=double),
    "topk": Sample((3, 2), finish=operator.itemgetter(0)),
    **dict.fromkeys(("argmax", "argmin"), Sample((2, True), finish=double)),
    **dict.fromkeys(("max", "min", "median"), Sample((2,), finish=operator.itemgetter(0))),
    **dict.fromkeys(("var", "std"), Sample(((2, 3),), {"correction": 0})),
    **dict.fromkeys(("var_mean", "std_mean"), Sample(((2, 3),), finish=operator.itemgetter(0))),
    "prod": Sample((3,)),
    "logsumexp": Sample((3,)),
    "all": Sample((2,), prepare=is_positive, finish=double),
    "any": Sample((2,), prepare=is_large, finish=double),
    **dict.fromkeys(("norm", "linalg_norm", "linalg_vector_norm"), Sample((2, 3))),
    "matmul": Sample(operands=2, shape=(3, 8, 5, 5)),
    "bmm": Sample(operands=2, shape=(8, 5, 5), axis=0, out_axis=0),
    "mm": Sample(operands=2, shape=(6, 6)),
    **dict.fromkeys(("chunk", "unsafe_chunk", "tensor_split"), Sample((2, 1))),
    **dict.fromkeys(("split", "unsafe_split"), Sample((4, 1))),
    "split_with_sizes": Sample(((3, 5), 1)),
    "getitem": Sample(((slice(None), slice(0, 7, 3), None, ...),), out_axis=1),
    **dict.fromkeys(("mean", "amax", "amin", "sum"), Sample(((2, 3),))),
    **dict.fromkeys(("pixel_shuffle", "pixel_unshuffle", "channel_shuffle"), Sample((2,))),
    **dict.fromkeys(("half", "bfloat16", "float"), Sample(finish=double)),
    **dict.fromkeys(
        ("byte", "int", "long", "short", "char"), Sample(prepare=positive, finish=double)
    ),
    "bool": Sample(prepare=torch.relu, finish=double),
    "detach": Sample(prepare=torch.clone),
    **dict.fromkeys(("to", "type"), Sample((torch.float32,), finish=double)),
    "type_as": Sample(operands=2),
    "fold": Sample(((4, 4), 2), shape=(3, 8, 9)),
    **dict.fromkeys(("dropout1d", "Dropout1d"), Sample(kwargs={"training": False}, shape=LINE)),
    **dict.fromkeys(("dropout3d", "Dropout3d"), Sample(kwargs={"training": False}, shape=VOLUME)),
    **dict.fromkeys(("dropout", "dropout2d", "alpha_dropout"), Sample(kwargs={"training": False})),
    "feature_alpha_dropout": Sample(kwargs={"training": False}),
}
EXPRESSIONS: dict[str, tuple[nn.Module, Sample]] = {
    "max_unpool1d": (Unpooled(1), Sample(shape=(3, 8, 8))),
    "max_unpool2d": (Unpooled(2), Sample()),
    "max_unpool3d": (Unpooled(3), Sample(shape=VOLUME)),
    "grid_sample": (Sampled(), Sample(operands=2)),
    **{
        name: (
            Expression(
                lambda x, y, make=make: F.grid_sample(
                    x,
                    make(y[:, :6, 0, 0].reshape(-1, 2, 3).tanh(), x.size(), False),
                    align_corners=False,
                )
            ),
            Sample(operands=2),
        )
        for name, make in (
            ("affine_grid", F.affine_grid),
            ("affine_grid_generator", torch.affine_grid_generator),
        )
    },
    "grid_sampler": (
        Expression(lambda x, y: torch.grid_sampler(x, y[:, :2].movedim(1, -1).tanh(), 0, 0, False)),
        Sample(operands=2),
    ),
    "unfold": (Expression(lambda x: x.unfold(2, 3, 1)), Sample()),
    "hstack": (Expression(lambda x, y: torch.hstack([x, y])), Sample(operands=2)),
    "column_stack": (Expression(lambda x, y: torch.column_stack([x, y])), Sample(operands=2)),
    "vstack": (Expression(lambda x, y: torch.vstack([x, y])), Sample(operands=2)),
    "row_stack": (Expression(lambda x, y: torch.row_stack([x, y])), Sample(operands=2)),
    "dstack": (Expression(lambda x, y: torch.dstack([x, y])), Sample(operands=2)),
    "concatenate": (Expression(lambda x, y: torch.concatenate([x, y], 1)), Sample(operands=2)),
    "index_select": (
        Indexed(lambda x, index: x.index_select(1, index), [5, 1, 1, 7, 2]),
        Sample(),
    ),
    "slice_scatter": (
        Expression(lambda x, y: x.slice_scatter(y[:, 1:4], 1, 2, 5)),
        Sample(operands=2),
    ),
    "select_scatter": (
        Expression(lambda x, y: torch.select_scatter(x, y[:, :, 1], 2, 0)),
        Sample(operands=2),
    ),
    **{
        name: (
            Expression(
                lambda x, y, name=name: getattr(torch.relu(x), name)(
                    2, torch.arange(y.shape[2]).flip(0), y
                )
            ),
            Sample(operands=2),
        )
        for name in ("index_add", "index_add_", "index_copy", "index_copy_")
    },
    **{
        name: (
            Expression(
                lambda x, y, name=name: getattr(torch.relu(x), name)(
                    2, torch.arange(y.shape[2]) // 2, y, "amax"
                )
            ),
            Sample(operands=2),
        )
        for name in ("index_reduce", "index_reduce_")
    },
    **{
        name: (
            Expression(
                lambda x, y, name=name, size=size, more=more: getattr(torch.relu(x), name)(
                    2, (torch.arange(y.shape[2]) // size).expand_as(y), y, *more
                )
            ),
            Sample(operands=2),
        )
        for name, size, more in (
            ("scatter", 1, ()),
            ("scatter_", 1, ()),
            ("scatter_add", 2, ()),
            ("scatter_add_", 2, ()),
            ("scatter_reduce", 2, ("mean",)),
            ("scatter_reduce_", 2, ("mean",)),
        )
    },
    "gather": (
        Indexed(lambda x, index: x.gather(1, index), [[4, 1, 6], [4, 1, 6], [4, 1, 6]]),
        Sample(shape=(3, 8)),
    ),
    "embedding": (Embedded(EmbeddingFunction(F.embedding)), Sample()),
    "embedding_bag": (Embedded(EmbeddingFunction(F.embedding_bag)), Sample()),
    "bilinear": (
        BilinearFunction(),
        Sample(operands=2, axis=3, shape=(3, 5, 5, 8), out_axis=3),
    ),
    "masked_fill": (Expression(lambda x: x.masked_fill(x > 0.5, 0.5)), Sample()),
    "addcdiv": (Expression(lambda x, y: torch.addcdiv(x, y, y.abs() + 0.5)), Sample(operands=2)),
    **{
        name: (Expression(expression), Sample())
        for name, expression in {
            "select": lambda x: x + x.select(1, 2).unsqueeze(1),
            "zeros_like": lambda x: torch.maximum(x, torch.zeros_like(x)),
            "ones_like": lambda x: x + torch.ones_like(x),
            "full_like": lambda x: x + torch.full_like(x, 0.5),
            "ones_like a number": lambda x: x * (torch.ones_like(x.mean()) + x.sum().sin()),
            "new_zeros": lambda x: torch.maximum(x, x.new_zeros(6)),
            "new_ones": lambda x: x + x.new_ones(6),
            "empty": lambda x: torch.where(x == x, x, torch.empty(x.shape)),
            "new_empty": lambda x: torch.where(x == x, x, x.new_empty(x.shape[1], 1, 1)),
            "empty_like": lambda x: torch.where(x == x, x, torch.empty_like(x)),
            "new_full": lambda x: x + x.new_full((6,), 0.5),
            "zeros": lambda x: torch.maximum(x, torch.zeros(x.shape[0], x.shape[1], 1, 1)),
            "ones": lambda x: x + torch.ones((x.size(1), 6, 1)),
            "full": lambda x: x * torch.full(size=(x.size(1), 1, x.size(3)), fill_value=0.5),
        }.items()
    },
    POINTWISE: (Applies(Swish), Sample()),
    "where": (Expression(lambda x, y: torch.where(x > 0, x, y)), Sample(operands=2)),
    "addcmul": (Expression(lambda x, y: torch.addcmul(x, y, y)), Sample(operands=2)),
    "cat": (Expression(lambda x, y: torch.cat([x, y], 1)), Sample(operands=2)),
    "concat": (Expression(lambda x, y: torch.concat([x, y], 1)), Sample(operands=2)),
    "stack": (Expression(lambda x, y: torch.stack([x, y], 1)), Sample(operands=2, out_axis=2)),
    "prelu": (WithParameters(F.prelu, (8,)), Sample()),
    "linear": (WithParameters(F.linear, (5, 6), 5), Sample(shape=(3, 4, 6), axis=2, out_axis=2)),
    "conv1d": (WithParameters(F.conv1d, (6, 8, 3), 6), Sample(shape=LINE)),
    "conv2d": (WithParameters(F.conv2d, (6, 8, 3, 3), 6), Sample()),
    "conv3d": (WithParameters(F.conv3d, (6, 8, 2, 2, 2), 6), Sample(shape=VOLUME)),
    "conv_transpose1d": (WithParameters(F.conv_transpose1d, (8, 6, 3), 6), Sample(shape=LINE)),
    "conv_transpose2d": (WithParameters(F.conv_transpose2d, (8, 6, 3, 3)), Sample()),
    "conv_transpose3d": (
        WithParameters(F.conv_transpose3d, (8, 6, 2, 2, 2), 6),
        Sample(shape=VOLUME),
    ),
    "einsum": (
        WithParameters(lambda x, w: torch.einsum("bchw,cd->bdhw", x, w), (8, 5)),
        Sample(),
    ),
    "addmm": (
        WithParameters(lambda x, w, b: torch.addmm(b, x, w), (6, 5), 5),
        Sample(shape=(4, 6)),
    ),
    "baddbmm": (
        Expression(lambda x, y: torch.baddbmm(x, x, y, beta=0.5)),
        Sample(operands=2, shape=(8, 5, 5), axis=0, out_axis=0),
    ),
    "scaled_dot_product_attention": (
        Expression(lambda x, y: F.scaled_dot_product_attention(x, y, y)),
        Sample(operands=2, shape=TOKENS),
    ),
    "multi_head_attention_forward": (
        SelfAttention(function=True),
        Sample(shape=(5, 3, 8), axis=2, out_axis=2, shrinks=False),
    ),
    "batch_norm": (BatchNormFunction(), Sample()),
    "instance_norm": (Expression(lambda x: F.instance_norm(x, eps=1e-3)), Sample()),
    "width_gate": (WithParameters(width_gate, (1, 8, 1, 1)), Sample(shrinks=False)),
    "pick_channels": (Expression(picked), Sample()),
    "linear_gate": (
        Expression(lambda x: linear_gate(x, x.relu(), torch.zeros(()))),
        Sample(shrinks=False),
    ),
    "getattr": (Expression(lambda x: x * x.shape[1]), Sample()),
    "size": (Expression(lambda x: x * x.size(1)), Sample()),
    **dict.fromkeys(
        ("numel", "nelement"), (Expression(lambda x: x * x.numel()), Sample(shrinks=False))
    ),
    **dict.fromkeys(("dim", "ndimension"), (Expression(lambda x: x * x.dim()), Sample())),
    "len": (Expression(lambda x: x * len(x.shape)), Sample()),
    "list": (Expression(listed), Sample()),
    "is_floating_point": (Expression(lambda x: x * x.is_floating_point()), Sample()),
    "hasattr": (Expression(times_being_a_tensor), Sample()),
}


def name_of(key: Hashable) -> str:
    return key if isinstance(key, str) else str(getattr(key, "__name__", key))


def sample_for(key: Hashable) -> tuple[nn.Module, Sample]:
    """Return an operator that calls what a key of the registry stands for."""
    if isinstance(key, type) and issubclass(key, nn.Module):
        return module_sample(key)
    if isinstance(key, str) and "." in key:
        sample = Sample((0.5, "row", False))
        return Function(pkgutil.resolve_name(key), sample), sample
    name = name_of(key).strip("_").removeprefix("special_")
    if name in EXPRESSIONS:
        return EXPRESSIONS[name]
    for rank in (1, 2, 3):
        if "pool" in name and name.removesuffix("_with_indices").endswith(f"{rank}d"):
            first = key is torch.adaptive_max_pool1d or name.endswith("_with_indices")
            finish = operator.itemgetter(0) if first else same
            args = (2, 2) if name.startswith("lp_") else (2,)
            sample = Sample(args, shape=BY_RANK[rank], finish=finish)
            return Function(key, sample), sample
    sample = NAMED.get(name, Sample())
    return Function(key, sample), sample


def module_sample(key: type[nn.Module]) -> tuple[nn.Module, Sample]:
    if key in MODULES:
        build, sample = MODULES[key]
        return build(), sample
    for rank in (1, 2, 3):
        for name, args in POOLS.items():
            if key.__name__ == f"{name}{rank}d":
                return key(*args), Sample(shape=BY_RANK[rank])
        if key.__name__.endswith(f"Pad{rank}d"):
            args = (1, 0.5) if "Constant" in key.__name__ else (1,)
            return key(*args), Sample(shape=BY_RANK[rank])
    named = NAMED.get(key.__name__, Sample())
    return key(), Sample(shape=named.shape)


def label(key: Hashable) -> str:
    kind = "method" if isinstance(key, str) else getattr(key, "__module__", "") or "torch"
    return f"{kind.split('.')[-1]}.{name_of(key)}"


def paired(x: Tensor) -> Tensor:
    """Take every second channel for an imaginary part."""
    return x.movedim(1, -1).unflatten(-1, (4, 2)).repeat_interleave(2, -2).movedim(-2, 1)


# Forms of operators beside the one their sample has.
FORMS: dict[str, tuple[nn.Module, Sample]] = {
    "statistics of the batch": (nn.BatchNorm2d(8, track_running_stats=False), Sample()),
    "statistics of the batch, no parameters": (
        Expression(lambda x: F.batch_norm(x, None, None, training=True)),
        Sample(),
    ),
    "statistics of the batch, others stored": (BatchNormFunction(training=True), Sample()),
    "zeros of a size": (
        Expression(lambda x: torch.maximum(x, x.new_zeros(x.size(1), 1, 1))),
        Sample(),
    ),
    "ones of a shape": (Expression(lambda x: x + x.new_ones((x.shape[1], 1, 6))), Sample()),
    "numbers of a size": (
        Expression(lambda x: torch.cat([x, x.new_full((3, x.size(1), 6, 2), 0.5)], 3)),
        Sample(),
    ),
    "numbers of two sizes": (
        Expression(lambda x: x.mean((2, 3))[:, :, None] * torch.ones(x.size(1), x.size(1))),
        Sample(shrinks=False),
    ),
    "outer product": (
        Expression(lambda x, y: (x[:, :, None] * y[:, None, :5]).sum(2)),
        Sample(operands=2),
    ),
    "outer product of maps": (
        Expression(lambda x, y: (x.mean((2, 3))[:, :, None] * y.mean((2, 3))[:, None]).flatten(1)),
        Sample(operands=2),
    ),
    "places of a buffer": (Sampled(), Sample()),
    "transposed attribute": (Expression(lambda x: x.mT), Sample(out_axis=1)),
    "matrix attribute": (Expression(lambda x: x.T), Sample(shape=(3, 8), out_axis=0)),
    "data": (Expression(lambda x: x.data), Sample()),
    "part of a shape": (
        Expression(lambda x, y: F.interpolate(x, y.shape[-2:])),
        Sample(operands=2),
    ),
    "maximum of two": (Expression(torch.max), Sample(operands=2)),
    "negative position": (Expression(lambda x: x + x[:, -2, None]), Sample()),
    "mask of a buffer": (Indexed(lambda x, i: x[:, i], [True, False] * 4), Sample()),
    "index behind other axes": (Indexed(lambda x, i: x[..., i, 1:, ::2], [6, 0, 3, 0]), Sample()),
    "index of rows": (Indexed(lambda x, i: x[i], [2, 0, 2, 1]), Sample()),
    "steps along all axes": (Expression(lambda x: x[:, 1::3, ::2, None]), Sample()),
    "roll of channels": (Expression(lambda x: x.roll(3, 1)), Sample()),
    "rotated channels": (Expression(lambda x: x.rot90(1, (1, 2))), Sample(out_axis=2)),
    "patches of channels": (Expression(lambda x: x.unfold(1, 2, 2)), Sample(shrinks=False)),
    "triangle of channels": (
        Expression(lambda x: x.tril()),
        Sample(axis=2, shape=(3, 4, 8, 6), shrinks=False),
    ),
    "border and channels": (Expression(lambda x: F.pad(x, (1, 1, 0, 2, 3, 1))), Sample()),
    "cropped channels": (Expression(lambda x: F.pad(x, (0, 1, 0, 0, -2, 3))), Sample()),
    "zero padding of channels": (nn.ZeroPad1d((2, 1)), Sample(axis=2, shape=(3, 4, 8), out_axis=2)),
    "reflected channels": (
        nn.ReflectionPad1d((2, 1)),
        Sample(axis=2, shape=(3, 4, 8), out_axis=2, shrinks=False),
    ),
    "masked by a tensor": (
        Expression(lambda x, y: x.masked_fill(y[:, :1] > 0, -1.0)),
        Sample(operands=2),
    ),
    "clamped by tensors": (Expression(lambda x, y: x.clamp(max=y)), Sample(operands=2)),
    "tanh approximation": (Expression(lambda x: F.gelu(x, approximate="tanh")), Sample()),
    "unknown logarithm of zero": (
        Expression(lambda x: torch.isfinite(x.relu().log()) * x),
        Sample(),
    ),
    "tied to another's size": (
        Expression(lambda x, y: x[:, : y.shape[1] // 2]),
        Sample(operands=2),
    ),
    "several axes of channels": (
        Expression(lambda x: x.unflatten(1, (4, -1)).flatten(1, 2)),
        Sample(),
    ),
    **{
        f"constants and {name}": (Expression(expression), Sample())
        for name, expression in {
            "an imaginary one": lambda x: (x + 1j).abs(),
            "an imaginary divisor": lambda x: ((x + 2) / 1j).abs(),
            "imaginary comparisons": lambda x: ((x + 3) * 1j == 0) + x,
            "an imaginary part": lambda x: torch.complex(x, x + 1).imag,
            "a root": lambda x: torch.view_as_real((x - 1 + 0j).sqrt()).sum(-1),
        }.items()
    },
    **{
        name: (Expression(expression), Sample(shrinks=shrinks))
        for name, expression, shrinks in (
            ("transform of channels", lambda x: torch.fft.fft(x, dim=1).abs(), False),
            ("transform of all axes", lambda x: torch.fft.fftn(x).abs(), False),
            ("transform of sizes", lambda x: torch.fft.ifftn(x, s=(4, 4)).abs(), True),
            (
                "transform there and back",
                lambda x: torch.fft.irfft(torch.fft.rfft(x) * 2, x.shape[1]),
                True,
            ),
            (
                "parts of a transform",
                lambda x: torch.fft.rfft2(x, norm="ortho").imag + torch.fft.rfft2(x).real,
                True,
            ),
            (
                "convolved parts",
                lambda x: torch.stack([torch.fft.fft(x).real, torch.fft.fft(x).imag], -1).sum(-1),
                True,
            ),
            ("pairs of channels", lambda x: torch.view_as_complex(paired(x)).abs(), False),
            ("difference of channels", lambda x: x[:, 1:] + x.diff(dim=1), False),
            (
                "difference behind another",
                lambda x: torch.diff(x, dim=2, prepend=x[:, :, :1] * 2),
                False,
            ),
        )
    },
    "maximum norm": (Embedded(nn.Embedding(5, 8, max_norm=1.0)), Sample(shrinks=False)),
}


@pytest.mark.parametrize("zero_inputs", [False, True], ids=["unread", "silent"])
@pytest.mark.parametrize("name", FORMS)
def test_form(name: str, zero_inputs: bool) -> None:
    check(*FORMS[name], zero_inputs)


# Statistics over channels, which their samples take over other axes.
STATISTICS: dict[str, tuple[Callable[..., Any], Sample]] = {
    **{
        f"{name} over channels": (Expression(function), Sample(shrinks=False))
        for name, function in {
            "softmax": lambda x: x.softmax(1),
            "cumsum": lambda x: x.cumsum(1),
            "argmax": lambda x: x.argmax(1, True).double(),
            "sort": lambda x: x.sort(1)[0],
            "topk": lambda x: x.topk(3, 1)[0],
            "variance": lambda x: x.var(1, keepdim=True),
            "variance less two": lambda x: x[:, :2].var(1, correction=1, keepdim=True),
            "deviation": lambda x: torch.std_mean(x, 1, keepdim=True),
            "layer norm": lambda x: F.layer_norm(x, x.shape[1:]),
            "logsumexp": lambda x: x.logsumexp(1, keepdim=True),
            "product": lambda x: x + x.prod(1, keepdim=True),
            "most": lambda x: x.max(1, keepdim=True).values,
        }.items()
    },
    **{
        f"{name} over space, of zeros": (Expression(function), Sample())
        for name, function in {
            "cumsum": lambda x: x.cumsum(2),
            "cumprod": lambda x: x.cumprod(3),
            "most": lambda x: x + x.max(3, keepdim=True).values,
            "sort": lambda x: x.sort(2)[0],
            "topk": lambda x: torch.topk(x, 3, dim=3).values,
            "variance": lambda x: x - x.var((2, 3), keepdim=True),
            "deviation": lambda x: x * torch.std(x, 2, keepdim=True),
            "biased variance": lambda x: torch.var(x, (2, 3), False, True) + x,
            "corrected": lambda x: torch.std_mean(x, 3, correction=2, keepdim=True)[0] + x,
        }.items()
    },
    **{
        f"{name} over channels, zeros apart": (Expression(function), Sample())
        for name, function in {
            "sum": lambda x: x * x.sum(1, keepdim=True),
            "mean": lambda x: x * x.mean(1, keepdim=True),
            "mean of all": lambda x: x * x.mean((1, 2, 3), keepdim=True),
            "amax": lambda x: x * x.amax((1, 2), keepdim=True),
            "amin": lambda x: x * x.amin(1, keepdim=True),
            "norm": lambda x: x * x.norm(2, 1, keepdim=True),
            "vector norm": lambda x: x * torch.linalg.vector_norm(x, 3, 1, True),
            "normalize": lambda x: F.normalize(x),
            "similarity": lambda x: x * F.cosine_similarity(x, x.tanh()).unsqueeze(1),
            "of numbers, which have no axes": lambda x: (
                x * (x.mean().sum(0) + x.mean().cumsum(-1) + x.mean().std(0, correction=0))
            ),
            "root mean square by hand": lambda x: (
                x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-3)
            ),
        }.items()
    },
}
TOKEN_LAYERS: dict[str, tuple[Callable[..., Any], Sample]] = {
    "linear over tokens": (nn.Linear(9, 5), Sample(shape=LINE)),
    "convolution over tokens": (nn.Conv1d(8, 5, 1), Sample(shape=LINE, axis=2, out_axis=2)),
    "norm over tokens": (nn.LayerNorm(9), Sample(shape=LINE)),
}


@pytest.mark.parametrize("name", TOKEN_LAYERS)
def test_a_layer_beside_the_channels_lets_them_go(name: str) -> None:
    operator, sample = TOKEN_LAYERS[name]
    check = partial(check_rule, axis=sample.axis, out_axis=sample.out_axis)
    shrunk = check(copy.deepcopy(operator), sample.shape)
    assert shrunk.after < shrunk.before
    check(operator, sample.shape, zero_inputs=True)


@pytest.mark.parametrize("form", STATISTICS)
def test_statistics(form: str) -> None:
    operator, sample = STATISTICS[form]
    silent = check_rule(operator, sample.shape, zero_inputs=True)
    check_rule(operator, sample.shape)
    if sample.shrinks:
        assert silent.after < silent.before


@pytest.mark.filterwarnings("ignore:index_reduce:UserWarning")  # is in beta, it says
@pytest.mark.parametrize("zero_inputs", [False, True], ids=["unread", "silent"])
@pytest.mark.parametrize("key", sorted(RULES, key=label), ids=label)
def test_rule(key: Hashable, zero_inputs: bool) -> None:
    check(*sample_for(key), zero_inputs)


def check(module: nn.Module, sample: Sample, zero_inputs: bool) -> None:
    shrunk = check_rule(
        copy.deepcopy(module),
        sample.shape,
        operands=sample.operands,
        axis=sample.axis,
        out_axis=sample.out_axis,
        zero_inputs=zero_inputs,
    )
    if not zero_inputs and sample.shrinks:
        assert shrunk.after < shrunk.before
