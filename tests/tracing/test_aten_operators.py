"""Exported programs: operators of ATen become what Python calls them, and shrink like any model."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._ops import OpOverload

import fxprune
from fxprune.testing import close_half, error
from fxprune.tracing import aten_operators
from fxprune.tracing.both_modes import trace
from tests.conftest import randomise

A: Any = torch.ops.aten
X, Y = torch.randn(2, 4, 6, 6), torch.randn(2, 4, 6, 6)
W, B, MAT = torch.randn(8, 4, 3, 3), torch.randn(8), torch.randn(5, 6)
V, M, S = torch.randn(4), torch.randn(4), torch.rand(4) + 0.5
LAST = 9223372036854775807

# What is called on X, with the arguments behind it.
ON_MAPS: dict[str, tuple[OpOverload, tuple[Any, ...], dict[str, Any]]] = {
    "conv2d": (A.conv2d.default, (W, B, [2, 2], [1, 1], [1, 1], 1), {}),
    "conv2d same": (A.conv2d.padding, (W, B, [1, 1], "same"), {}),
    "conv_transpose2d": (A.conv_transpose2d.input, (W.transpose(0, 1), B, [2, 2]), {}),
    "convolution": (
        A.convolution.default,
        (W, B, [2, 2], [1, 1], [1, 1], False, [0, 0], 1),
        {},
    ),
    "transposed convolution": (
        A.convolution.default,
        (W.transpose(0, 1), B, [2, 2], [1, 1], [1, 1], True, [1, 1], 1),
        {},
    ),
    "batch_norm": (A.batch_norm.default, (V, M, M, S, False, 0.1, 1e-3, False), {}),
    "instance_norm": (A.instance_norm.default, (V, M, None, None, True, 0.1, 1e-3, False), {}),
    "group_norm": (A.group_norm.default, (2, V, M, 1e-3, False), {}),
    "layer_norm": (A.layer_norm.default, ([6], None, None, 1e-3, False), {}),
    "relu": (A.relu.default, (), {}),
    "relu_": (A.relu_.default, (), {}),
    "gelu": (A.gelu.default, (), {"approximate": "tanh"}),
    "elu": (A.elu.default, (0.5,), {}),
    "elu_": (A.elu_.default, (0.5,), {}),
    "selu as elu": (A.elu.default, (1.6733, 1.0507, 1.0), {}),
    "hardtanh": (A.hardtanh.default, (0.0, 6.0), {}),
    "hardtanh_": (A.hardtanh_.default, (0.0, 6.0), {}),
    "leaky_relu": (A.leaky_relu.default, (0.2,), {}),
    "softplus": (A.softplus.default, (2.0, 10.0), {}),
    "prelu": (A.prelu.default, (V,), {}),
    "glu": (A.glu.default, (1,), {}),
    "softmax": (A.softmax.int, (1,), {}),
    "softmax in double": (A.softmax.int, (1, torch.float64), {}),
    "log_softmax": (A.log_softmax.int, (1,), {}),
    "max_pool2d": (A.max_pool2d.default, ([3, 3], [2, 2], [1, 1], [1, 1], True), {}),
    "avg_pool2d": (A.avg_pool2d.default, ([3, 3], [2, 2], [1, 1], False, False), {}),
    "avg_pool2d without stride": (A.avg_pool2d.default, ([2, 2], []), {}),
    "adaptive_avg_pool2d": (A.adaptive_avg_pool2d.default, ([2, 3],), {}),
    "adaptive_max_pool2d": (A.adaptive_max_pool2d.default, ([2, 3],), {}),
    "dropout": (A.dropout.default, (0.5, False), {}),
    "pad": (A.pad.default, ([1, 2, 0, 1], "reflect"), {}),
    "pad with a number": (A.pad.default, ([1, 2, 0, 1], "constant", 3.0), {}),
    "nearest": (A.upsample_nearest2d.vec, (None, [2.0, 2.0]), {}),
    "bilinear": (A.upsample_bilinear2d.vec, ([9, 5], True, None), {}),
    "bicubic": (A.upsample_bicubic2d.vec, ([9, 5], False, None), {}),
    "pixel_shuffle": (A.pixel_shuffle.default, (2,), {}),
    "add": (A.add.Tensor, (Y,), {"alpha": 2}),
    "add_": (A.add_.Tensor, (Y,), {"alpha": 2}),
    "rsub": (A.rsub.Scalar, (1.0, 3), {}),
    "div": (A.div.Tensor_mode, (Y,), {"rounding_mode": "floor"}),
    "pow of a number": (A.pow.Tensor_Scalar, (3,), {}),
    "clamp": (A.clamp.default, (-0.5,), {}),
    "where": (A.where.ScalarOther, (), {}),
    "mean": (A.mean.dim, ([2, 3], True), {}),
    "sum": (A.sum.dim_IntList, ([1],), {}),
    "amax": (A.amax.default, ([2],), {}),
    "var": (A.var.correction, ([1],), {"correction": 0, "keepdim": True}),
    "slice": (A.slice.Tensor, (1, 1, LAST), {}),
    "slice from the back": (A.slice.Tensor, (-1, -3, -1), {}),
    "slice with a step": (A.slice.Tensor, (2, 0, LAST, 2), {}),
    "select": (A.select.int, (1, 2), {}),
    "index": (A.index.Tensor, ([None, torch.tensor([2, 0])],), {}),
    "index_select": (A.index_select.default, (1, torch.tensor([2, 0])), {}),
    "split": (A.split.Tensor, (3, 1), {}),
    "split in sizes": (A.split_with_sizes.default, ([1, 3], 1), {}),
    "chunk": (A.chunk.default, (2, 1), {}),
    "unbind": (A.unbind.int, (1,), {}),
    "view": (A.view.default, ([2, -1],), {}),
    "reshape": (A.reshape.default, ([2, 2, 2, 36],), {}),
    "flatten": (A.flatten.using_ints, (1,), {}),
    "unflatten": (A.unflatten.int, (1, [2, 2]), {}),
    "permute": (A.permute.default, ([0, 2, 3, 1],), {}),
    "transpose": (A.transpose.int, (1, 2), {}),
    "movedim": (A.movedim.intlist, ([1], [3]), {}),
    "squeeze": (A.squeeze.dims, ([0, 1],), {}),
    "unsqueeze": (A.unsqueeze.default, (1,), {}),
    "expand": (A.expand.default, ([3, 2, 4, 6, 6],), {}),
    "repeat": (A.repeat.default, ([1, 2, 1, 1],), {}),
    "repeat_interleave": (A.repeat_interleave.self_int, (2, 1), {}),
    "roll": (A.roll.default, ([1], [1]), {}),
    "flip": (A.flip.default, ([1],), {}),
    "tile": (A.tile.default, ([1, 2, 1, 1],), {}),
    "topk": (A.topk.default, (2, 1), {}),
    "cumsum": (A.cumsum.default, (1,), {}),
    "clone": (A.clone.default, (), {"memory_format": torch.contiguous_format}),
    "contiguous": (A.contiguous.default, (), {}),
    "to": (A.to.dtype, (torch.float64,), {}),
    "to a place": (A.to.dtype_layout, (), {"dtype": torch.float64, "layout": torch.strided}),
    "zeros_like": (A.zeros_like.default, (), {"pin_memory": False}),
    "new_full": (A.new_full.default, ([2, 2], 3.0), {"pin_memory": False}),
    "masked_fill": (A.masked_fill.Scalar, (Y > 0, 0.5), {}),
    "gather": (A.gather.default, (1, torch.zeros(2, 3, 6, 6, dtype=torch.int64)), {}),
    "scatter": (A.scatter.value, (1, torch.ones(2, 1, 6, 6, dtype=torch.int64), 2.0), {}),
    "max": (A.max.dim, (1, True), {}),
    "sort": (A.sort.stable, (), {"stable": True, "dim": 1, "descending": True}),
    "var_mean": (A.var_mean.correction, ([1],), {"correction": 0}),
    "unfold": (A.unfold.default, (2, 3, 2), {}),
    "patches": (A.im2col.default, ([3, 2], [1, 2], [1, 0], [2, 1]), {}),
    "vector_norm": (A.linalg_vector_norm.default, (2, [1], True), {}),
    "rms_norm": (A.rms_norm.default, ([6],), {"eps": 1e-3}),
    "transposed": (A.mT.default, (), {}),
    "linear": (A.linear.default, (MAT,), {}),
    "matmul": (A.matmul.default, (MAT.t(),), {}),
    "attention": (A.scaled_dot_product_attention.default, (Y, X), {"scale": 0.3}),
}


class Calling(nn.Module):
    def __init__(self, call: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.call = call

    def forward(self, x: Tensor) -> Any:
        return self.call(x * 1)


@pytest.mark.parametrize("name", ON_MAPS)
def test_operators_are_what_python_calls_them(name: str) -> None:
    operator, args, options = ON_MAPS[name]

    def call(x: Tensor) -> Any:
        given = (x > 0, x, 2.0) if name == "where" else (x, *args)
        return operator(*given, **options)

    model = Calling(call)
    traced = trace(model, {"x": X})
    traced.recompile()
    left = [node for node in traced.graph.nodes if isinstance(node.target, OpOverload)]
    assert bool(left) == (name == "selu as elu")
    expected, actual = model(X), traced(X)
    if isinstance(expected, Tensor):
        assert expected.dtype == actual.dtype
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


DECOMPOSED: dict[str, tuple[OpOverload, tuple[Any, ...]]] = {
    "batch norm": (A._native_batch_norm_legit_no_training.default, (V, M, M, S, 0.1, 1e-3)),
    "layer norm": (A.native_layer_norm.default, ([6], None, None, 1e-3)),
    "group norm": (A.native_group_norm.default, (V, M, 2, 4, 36, 2, 1e-3)),
    "pool": (A.max_pool2d_with_indices.default, ([3, 3], [2, 2], [1, 1])),
}


@pytest.mark.parametrize("name", DECOMPOSED)
def test_what_programs_are_decomposed_into_is_joined(name: str) -> None:
    operator, args = DECOMPOSED[name]
    model = Calling(lambda x: operator(x, *args)[0])
    traced = trace(model, {"x": X})
    traced.recompile()
    assert not any(isinstance(node.target, OpOverload) for node in traced.graph.nodes)
    torch.testing.assert_close(traced(X), model(X), rtol=0, atol=0)


def test_what_is_named_where_programs_go_by_places_stays_an_operator() -> None:
    model = Calling(lambda x: A.layer_norm.default(x, [6], eps=1e-3))
    traced = trace(model, {"x": X})
    traced.recompile()
    assert any(node.target is A.layer_norm.default for node in traced.graph.nodes)
    torch.testing.assert_close(traced(X), model(X), rtol=0, atol=0)


def test_a_name_that_torch_does_not_have_would_be_seen() -> None:
    known = {*aten_operators._FUNCTIONS, *aten_operators._METHODS, *aten_operators._OTHERS}
    assert all(hasattr(A, name.partition(".")[0]) for name in known)


def test_an_embedding_takes_its_weight_second() -> None:
    weight = torch.randn(7, 3)
    model = Calling(lambda x: A.embedding.default(weight, x, 2))
    positions = torch.tensor([[1, 2, 6]])
    traced = trace(model, {"x": positions})
    traced.recompile()
    assert torch.equal(traced(positions), weight[positions])


class Network(nn.Module):
    """Convolutions, an attention to itself, sizes that are asked for, and a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.second, self.mlp = nn.Conv2d(16, 8, 1, groups=2), nn.Linear(8, 24)
        self.head = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x)).relu_()
        x = torch.nn.functional.hardswish(self.second(x)).flatten(2).mT
        x = x + torch.arange(x.shape[1], dtype=x.dtype)[None, :, None].expand(x.shape[0], -1, 8)
        return self.head(self.mlp(x).relu()).reshape(x.shape[0], -1)


def test_an_exported_program_is_asked_for_its_module() -> None:
    program = torch.export.export(Network().eval(), (torch.randn(4, 3, 6, 6),))
    with pytest.raises(fxprune.ModelError, match=r"pass its \.module\(\)"):
        fxprune.instrument(program, torch.randn(4, 3, 6, 6))  # pyright: ignore


def test_decomposed_programs_shrink() -> None:
    model: Any = randomise(Network()).double().eval()
    x = torch.randn(4, 3, 6, 6, dtype=torch.float64)
    exported = torch.export.export(model, (x,)).run_decompositions()
    assert counted(halved(exported.module(), x)) < 0.7 * counted(model)


@pytest.mark.parametrize("open_batch", [False, True])
def test_exported_programs_shrink_as_what_they_were_exported_from(open_batch: bool) -> None:
    model: Any = randomise(Network()).double().eval()
    x = torch.randn(4, 3, 6, 6, dtype=torch.float64)
    sizes = ({0: torch.export.Dim("batch", min=1)},) if open_batch else None
    exported: Any = torch.export.export(model, (x,), dynamic_shapes=sizes).module()
    small = [halved(one, x) for one in (model, exported)]
    assert counted(small[0]) == counted(small[1]) < 0.7 * counted(model)
    if open_batch:
        x = torch.randn(7, 3, 6, 6, dtype=torch.float64)
    assert error(small[1](x), small[0](x)) < 1e-12
    if not open_batch:
        with pytest.raises(AssertionError, match=r"size\(\)\[0\] == 4|x\.size\(0\) == 4"):
            small[1](x[:2])


def halved(model: Any, x: Tensor) -> Any:
    gated: Any = fxprune.instrument(model, x)
    assert torch.equal(gated(x), model(x))
    close_half(gated)
    small: Any = fxprune.finalize(gated)
    assert small.report.verification.verdict == "equal"
    return small


def counted(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
