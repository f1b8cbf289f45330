"""Blocks people build of contractions, norms and reductions: they really shrink, and exactly."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxprune
from fxprune.dataflow.channels import analyse
from fxprune.passes.dead_channels import eliminate_dead_channels
from fxprune.programs.program import Program, capture
from fxprune.testing import check_rewrite, close_half, error, spread
from tests.conftest import randomise


def program(model: nn.Module, *shape: int) -> Program:
    model = randomise(model).double().eval()
    inputs = ((torch.randn(*shape, dtype=torch.float64),), {})
    return capture(model, inputs)


def cut(one: Program) -> Any:
    """Return the module that is left, once it was seen to compute the same."""
    return check_rewrite(eliminate_dead_channels, one).module


class Attention(nn.Module):
    """Self-attention as in vision transformers, in one of its many spellings."""

    def __init__(self, mix: Callable[..., Tensor], size: int = 24, heads: int = 4) -> None:
        super().__init__()
        self.heads, self.scale, self.mix = heads, (size // heads) ** -0.5, mix
        self.qkv, self.proj = nn.Linear(size, 3 * size), nn.Linear(size, size)
        self.bias = nn.Parameter(torch.randn(1, heads, 5, 5))

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, size = x.shape
        parts = self.qkv(x).reshape(batch, tokens, 3, self.heads, size // self.heads)
        q, k, v = parts.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = self.mix(self, q, k, v)
        return self.proj(mixed.transpose(1, 2).reshape(batch, tokens, size))


def by_matmul(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-2, -1) * m.scale).softmax(-1) @ v


def by_size(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.matmul(q, k.transpose(2, 3)) / q.shape[-1] ** 0.5
    return torch.matmul(F.softmax(scores, dim=-1), v)


def by_einsum(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("b h i d, b h j d -> b h i j", q, k) * m.scale
    return torch.einsum("...ij,...jd->...id", (scores + m.bias).softmax(-1), v)


def by_bmm(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.bmm(q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2)) * m.scale
    return torch.bmm(scores.softmax(-1), v.flatten(0, 1)).view(-1, 4, 5, 6)


def by_function(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


def by_function_with_bias(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=m.bias)


def normed(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k = F.layer_norm(q, (6,)), F.normalize(k, dim=-1)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


SPELLINGS = (by_matmul, by_size, by_einsum, by_bmm, by_function, by_function_with_bias, normed)


@pytest.mark.parametrize("mix", SPELLINGS, ids=lambda mix: mix.__name__)
def test_masked_heads_go(mix: Callable[..., Tensor]) -> None:
    before = program(Attention(mix), 3, 5, 24)
    proj: Any = before.module.proj
    proj.weight.data[:, 6:12] = 0
    proj.weight.data[:, 20] = 0  # one channel of a head alone does not go
    after = cut(before)
    assert after.qkv.weight.shape == (54, 24)
    assert after.proj.weight.shape == (24, 18)


def test_masked_heads_go_through_finalize() -> None:
    model: Any = randomise(nn.Sequential(nn.Linear(7, 24), Attention(by_matmul), nn.Linear(24, 3)))
    model[1].proj.weight.data[:, :12] = 0
    small: Any = fxprune.finalize(model, torch.randn(2, 5, 7))
    assert small.report.verification.verdict == "equal"
    assert model[1].qkv.weight.shape == (72, 24)
    assert small.get_submodule("1.qkv").weight.shape == (36, 24)


class GroupedQueries(nn.Module):
    """Four heads of queries on two of keys and values."""

    def __init__(self, *, expand: bool) -> None:
        super().__init__()
        self.q, self.kv, self.out = nn.Linear(9, 24), nn.Linear(9, 24), nn.Linear(24, 5)
        self.expand = expand

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x).view(3, 5, 4, 6).transpose(1, 2)
        k, v = self.kv(x).view(3, 5, 2, 2, 6).permute(2, 0, 3, 1, 4).unbind(0)
        if self.expand:
            k = k.unsqueeze(2).expand(3, 2, 2, 5, 6).reshape(3, 4, 5, 6)
            v = v.unsqueeze(2).expand(3, 2, 2, 5, 6).reshape(3, 4, 5, 6)
        mixed = F.scaled_dot_product_attention(q, k, v, enable_gqa=not self.expand)
        return self.out(mixed.transpose(1, 2).reshape(3, 5, 24))


@pytest.mark.parametrize("expand", [False, True])
def test_a_group_of_heads_goes_whole(expand: bool) -> None:
    before = program(GroupedQueries(expand=expand), 3, 5, 9)
    out: Any = before.module.out
    out.weight.data[:, :18] = 0  # the second group keeps a head, and so its other
    after = cut(before)
    assert after.q.out_features == 12 and after.kv.out_features == 12
    assert after.out.in_features == 12


class SingleHead(nn.Module):
    """One head: its queries and keys may shrink, the scale may not."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(7, 8), nn.Linear(7, 8), nn.Linear(7, 6)
        self.out = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x)))


def test_a_single_head_shrinks_inside() -> None:
    before = program(SingleHead(), 3, 5, 7)
    parts: Any = before.module
    parts.q.weight.data[:3] = 0
    parts.q.bias.data[:3] = 0
    parts.out.weight.data[:, :2] = 0
    parts.v.weight.data[3] = 0  # a constant, which goes through the attention into the bias
    after = cut(before)
    assert after.q.out_features == after.k.out_features == 5
    assert after.v.out_features == after.out.in_features == 3


class HandWritten(nn.Module):
    """Linear layers written as products with parameters."""

    def __init__(self, product: Callable[[Tensor, Tensor], Tensor], *, later: bool) -> None:
        super().__init__()
        self.product, self.later = product, later
        self.first, self.last = nn.Linear(7, 8), nn.Linear(6, 3)
        self.weight, self.bias = nn.Parameter(torch.randn(8, 6)), nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        x = self.product(torch.tanh(self.first(x)), self.weight) + self.bias
        return self.last(torch.relu(x))


PRODUCTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "operator": lambda x, w: x @ w,
    "matmul": lambda x, w: torch.matmul(x, other=w),
    "einsum": lambda x, w: torch.einsum("btc,cd->btd", x, w),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_a_linear_layer_by_hand_shrinks(name: str) -> None:
    before = program(HandWritten(PRODUCTS[name], later=False), 3, 5, 7)
    parts: Any = before.module
    parts.weight.data[1] = 0  # not read
    parts.first.weight.data[2:4] = 0  # silent
    parts.first.bias.data[2:4] = 0
    parts.last.weight.data[:, :2] = 0
    after = cut(before)
    assert after.weight.shape == (5, 4) and after.bias.shape == (4,)
    assert after.first.out_features == 5 and after.last.in_features == 4


class Mixer(nn.Module):
    """An MLP-Mixer block (Tolstikhin et al. 2021), with norms or without."""

    def __init__(self, *, norm: bool) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 8)
        self.norms = nn.ModuleList([nn.LayerNorm(8) if norm else nn.Identity() for _ in range(2)])
        self.tokens = nn.Sequential(nn.Linear(5, 16), nn.GELU(), nn.Linear(16, 5))
        self.channels = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.inner(x))
        x = x + self.tokens(self.norms[0](x).transpose(1, 2)).transpose(1, 2)
        x = x + self.channels(self.norms[1](x))
        return self.head(x.mean(1))


class Block(nn.Module):
    """A residual block with group norms."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.first, self.second = (nn.Conv2d(16, 16, 3, padding=1) for _ in range(2))
        self.norms = nn.ModuleList([nn.GroupNorm(4, 16) for _ in range(3)])
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norms[0](self.stem(x)))
        inner = F.relu(self.norms[1](self.first(x)))
        x = F.relu(x + self.norms[2](self.second(inner)))
        return self.head(x.mean((2, 3)))


class StateSpace(nn.Module):
    """A selective state space (Gu & Dao 2023); every token updates a state of channels × 4."""

    def __init__(self) -> None:
        super().__init__()
        self.entry, self.last = nn.Linear(6, 24), nn.Linear(12, 3)
        self.conv = nn.Conv1d(12, 12, 3, padding=2, groups=12)
        self.select, self.step = nn.Linear(12, 11), nn.Linear(3, 12)
        self.decay, self.skip = nn.Parameter(torch.rand(12, 4)), nn.Parameter(torch.rand(12))

    def forward(self, x: Tensor) -> Tensor:
        x, gate = self.entry(x).chunk(2, -1)
        x = F.silu(self.conv(x.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2))
        step, write, read = self.select(x).split([3, 4, 4], -1)
        step = F.softplus(self.step(step))
        batch, tokens, channels = x.shape
        state = torch.zeros((batch, channels, 4), dtype=x.dtype)
        seen: list[Tensor] = []
        for token in range(tokens):
            kept = torch.exp(-step[:, token, :, None] * self.decay) * state
            state = kept + (step * x)[:, token, :, None] * write[:, token, None]
            seen.append((state * read[:, token, None]).sum(-1))
        return self.last((torch.stack(seen, 1) + x * self.skip) * F.silu(gate))


class Spatial(nn.Module):
    """Something between convolutions: attention over channels, over space, over branches."""

    def __init__(self, middle: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.middle = middle
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.reduce, self.expand = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
        self.other, self.spatial = nn.Conv2d(4, 8, 1), nn.Conv2d(2, 1, 3, padding=1)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.middle(self, F.relu(self.first(x)))
        return self.head(x.mean((2, 3)))


def squeezed(m: Any, x: Tensor) -> Tensor:
    return x * m.expand(F.relu(m.reduce(x.mean((2, 3), keepdim=True)))).sigmoid()


def over_space(m: Any, x: Tensor) -> Tensor:
    x = squeezed(m, x)
    maps = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)
    return x * m.spatial(maps).sigmoid()


def selected(m: Any, x: Tensor) -> Tensor:
    branches = torch.stack([x, F.relu(m.second(x))], 1)
    pooled = F.relu(m.reduce(branches.sum(1).mean((2, 3), keepdim=True)))
    weights = torch.stack([m.expand(pooled), m.other(pooled)], 1).softmax(1)
    return (branches * weights).sum(1)


class ScaledAndShifted(nn.Module):
    """A learnt scale and shift behind an activation, as in HGNet, in front of a padded layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 6, 3, padding=1)
        self.scale, self.shift = nn.Parameter(torch.ones(1)), nn.Parameter(torch.zeros(1))
        self.last = nn.Conv2d(6, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.scale * self.first(x).relu() + self.shift
        x = 0.5 + self.second(x).relu().mul(self.scale)
        return self.last(x)


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], set[str]]] = {
    "mixer": (lambda: Mixer(norm=True), (3, 5, 6), {"tokens.0", "channels.0"}),
    "mixer without norm": (lambda: Mixer(norm=False), (3, 5, 6), {"channels.0"}),
    "scaled and shifted": (ScaledAndShifted, (3, 3, 6, 6), {"first", "second", "last"}),
    "group norm": (Block, (3, 3, 6, 6), {"stem", "first", "second", "norms.0"}),
    "squeeze and excite": (lambda: Spatial(squeezed), (3, 3, 6, 6), {"first", "reduce", "expand"}),
    "channels and space": (lambda: Spatial(over_space), (3, 3, 6, 6), {"first", "reduce"}),
    "selected kernels": (lambda: Spatial(selected), (3, 3, 6, 6), {"first", "second", "reduce"}),
    "state space": (StateSpace, (3, 5, 6), {"entry", "conv", "select", "step", "last"}),
    "encoder layer": (
        lambda: nn.Sequential(
            nn.Linear(6, 8), nn.TransformerEncoderLayer(8, 2, 16), nn.Linear(8, 3)
        ),
        (5, 3, 6),
        {"1.linear1", "1.linear2"},
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_half_of_the_gates_closed(name: str) -> None:
    build, shape, shrunk = MODELS[name]
    model = randomise(build()).eval()
    x = torch.randn(shape)
    gated = fxprune.instrument(model, x)
    with torch.no_grad():
        assert error(model(x), gated.eval()(x)) < 1e-6
        assert close_half(gated) > 0
        small: Any = fxprune.finalize(gated)
        gated, x = gated.double(), x.double()
        expected = gated(x)
        assert error(expected, small.double()(x)) < 1e-10 and spread(expected) > 1e-4
    assert small.report.verification.verdict == "equal"
    for path in shrunk:
        before, after = (sum(p.numel() for p in _parameters(m, path)) for m in (model, small))
        assert after < before, path


def _parameters(model: nn.Module, path: str) -> Iterator[nn.Parameter]:
    return model.get_submodule(path).parameters()


class Recurrence(nn.Module):
    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.first, self.recurrent = nn.Linear(4, 9), kind(9, 5)
        self.last = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        if isinstance(self.recurrent, nn.RNNCellBase):
            state = self.recurrent(x[0])
            return self.last(state[0] if isinstance(self.recurrent, nn.LSTMCell) else state)
        output, _ = self.recurrent(x)
        return self.last(output)


@pytest.mark.parametrize(
    "kind", [nn.LSTM, nn.GRU, nn.RNN, nn.LSTMCell, nn.GRUCell, nn.RNNCell], ids=lambda k: k.__name__
)
def test_what_comes_into_a_recurrence_shrinks(kind: Any) -> None:
    before = program(Recurrence(kind), 3, 4, 4)
    parts: Any = before.module
    parts.first.weight.data[:3] = 0
    parts.first.bias.data[:3] = 0
    first = next(parts.recurrent.parameters())
    first.data[:, 5] = 0
    after = cut(before)
    assert after.first.out_features == after.recurrent.input_size == 5


def test_silent_channels_leave_a_root_mean_square_norm() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.RMSNorm(8, eps=1e-2), nn.Linear(8, 3))
    before = program(model, 6, 4)
    layers: Any = before.module
    for layer in (layers.get_submodule("0"),):
        layer.weight.data[:3] = 0
        layer.bias.data[:3] = 0
    after = cut(before)
    assert after.get_submodule("1").weight.shape == (5,)
    assert after.get_submodule("2").in_features == 5


def test_a_computed_weight_of_a_norm_stays_whole() -> None:
    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Conv1d(3, 6, 1), nn.Conv1d(6, 2, 1)
            self.weight = nn.Parameter(torch.randn(5))

        def forward(self, x: Tensor) -> Tensor:
            return self.last(F.layer_norm(self.first(x), (5,), self.weight + 1))

    before = program(Shifted(), 3, 3, 5)
    last: Any = before.module.last
    last.weight.data[:, :2] = 0
    after = cut(before)
    assert after.first.out_channels == 4 and after.weight.shape == (5,)


def test_a_frozen_batch_norm_shrinks() -> None:
    operators: Any = pytest.importorskip("torchvision.ops")
    frozen: Any = operators.FrozenBatchNorm2d(8)
    frozen.running_var.uniform_(0.5, 1.5)
    frozen.running_mean.normal_()
    model = nn.Sequential(nn.Conv2d(3, 8, 3), frozen, nn.ReLU(), nn.Conv2d(8, 4, 3))
    before = program(model, 2, 3, 7, 7)
    last: Any = before.module.get_submodule("3")
    last.weight.data[:, :3] = 0
    after = cut(before)
    assert after.get_submodule("1").running_mean.shape == (5,)
    assert after.get_submodule("0").out_channels == 5


def test_a_group_of_one_constant_becomes_its_bias() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.GroupNorm(4, 8), nn.Conv2d(8, 4, 1))
    before = program(model, 2, 3, 5, 5)
    first: Any = before.module.get_submodule("0")
    first.weight.data[2:4] = 0
    first.bias.data[2:4] = 0.7
    after = cut(before)
    assert after.get_submodule("1").num_groups == 3
    assert after.get_submodule("2").in_channels == 6


def test_torchs_own_attention_says_why_it_stays() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(x, x, x)[0]

    (reason,) = analyse(program(Own(), 5, 2, 8)).barriers.values()
    assert "one size in this module" in reason


class Untransposed(nn.Module):
    """Layers whose weights are kept the other way round, the last one tied to the embedding."""

    def __init__(self, product: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.product = product
        self.embedding = nn.Embedding(11, 12)
        self.norm = nn.BatchNorm1d(12)
        self.inner = nn.Parameter(torch.randn(16, 12))
        self.outer = nn.Parameter(torch.randn(12, 16))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.norm(self.embedding(ids).flatten(0, 1))
        x = x + self.product(F.relu(self.product(x, self.inner)), self.outer)
        return self.product(x, self.embedding.weight)


TRANSPOSITIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "T": lambda x, w: x @ w.T,
    "t": lambda x, w: torch.matmul(x, w.t()),
    "mT": lambda x, w: x @ w.mT,
    "transpose": lambda x, w: x.matmul(w.transpose(-2, -1)),
    "permute": lambda x, w: torch.mm(x, torch.permute(w, (1, 0))),
    "twice": lambda x, w: F.linear(x, w.t().swapaxes(0, 1)),
}


@pytest.mark.parametrize("spelling", TRANSPOSITIONS)
def test_a_transposed_parameter_is_cut_like_a_weight(spelling: str) -> None:
    model: Any = randomise(Untransposed(TRANSPOSITIONS[spelling])).double().eval()
    ids = torch.randint(0, 11, (3, 5))
    with torch.no_grad():
        model.inner[::2] = 0
    small: Any = fxprune.finalize(model, ids)
    assert error(model(ids), small(ids)) < 1e-12 < spread(model(ids))
    assert small.inner.shape == (8, 12) and small.outer.shape == (12, 8)
    with torch.no_grad():  # the stream, tied to the words at both ends
        for tensor in (model.embedding.weight.T, model.norm.weight, model.norm.bias, model.outer):
            tensor[:3] = 0
    small = fxprune.finalize(model, ids)
    assert error(model(ids), small(ids)) < 1e-12 < spread(model(ids))
    assert small.get_submodule("embedding").weight.shape == (11, 9)
    assert small.inner.shape == (8, 9) and small.outer.shape == (9, 8)


def test_a_transposed_parameter_is_gated() -> None:
    gated = fxprune.instrument(Untransposed(TRANSPOSITIONS["T"]), torch.randint(0, 11, (3, 5)))
    close_half(gated)
    small: Any = fxprune.finalize(gated)
    assert small.report.verification.verdict == "equal"
    assert small.inner.shape[0] < 16


class Rowwise(nn.Module):
    """A layer, then a convolution that scales and shifts rows by `weight`, then a layer."""

    def __init__(self, shape: tuple[int, ...], convolve: Callable[[Tensor, Any], Tensor]) -> None:
        super().__init__()
        self.first, self.second = nn.Conv1d(4, 12, 1), nn.Conv1d(12, 5, 1)
        self.weight, self.bias = nn.Parameter(torch.randn(shape)), nn.Parameter(torch.randn(12))
        self.convolve = convolve

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.silu(self.convolve(self.first(x), self)))


def causal(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Convolve every row with its own kernel (rows, 1, size), as selective state spaces do."""
    y = F.conv1d(x, weight, bias, padding=weight.shape[-1] - 1, groups=x.shape[1])
    return y[:, :, : x.shape[-1]]


ARRANGED: dict[str, tuple[tuple[int, ...], Callable[[Tensor, Any], Tensor]]] = {
    "unsqueeze": ((12, 3), lambda x, m: causal(x, m.weight.unsqueeze(1), m.bias)),
    "function": ((12, 3), lambda x, m: causal(x, torch.unsqueeze(m.weight, dim=-2), m.bias)),
    "None": ((12, 3), lambda x, m: causal(x, m.weight[:, None], m.bias)),
    "turned": ((12, 1), lambda x, m: causal(x, m.weight[None].transpose(0, 1), m.bias)),
    "dots": ((12, 3), lambda x, m: causal(x, m.weight[..., None].mT, m.bias)),
    "dots between": ((12, 3), lambda x, m: causal(x, m.weight[:, None, ..., :], m.bias[...])),
    "and back": ((12, 1, 3), lambda x, m: causal(x, m.weight.squeeze(1).unsqueeze(1), m.bias)),
    "bias too": ((12, 3), lambda x, m: causal(x, m.weight[:, None], m.bias[None].squeeze(0))),
    "linear": (
        (12, 12, 1),
        lambda x, m: F.linear(x.mT, m.weight.squeeze(-1), m.bias).transpose(1, 2),
    ),
    "sizes asked": (
        (12, 3),
        lambda x, m: causal(x, m.weight.unsqueeze(1), m.bias) * (m.weight.size(1) / 3),
    ),
}


@pytest.mark.parametrize("spelling", ARRANGED)
def test_a_parameter_with_axes_of_size_1_more_or_fewer_is_cut_like_a_weight(spelling: str) -> None:
    shape, convolve = ARRANGED[spelling]
    model, x = randomise(Rowwise(shape, convolve)).double(), torch.randn(3, 4, 7).double()
    gated: Any = fxprune.instrument(model, x)
    with torch.no_grad():
        gated.gates.width[:5] = 0
    for fold in (True, False):
        small: Any = fxprune.finalize(gated, fold=fold)
        others = torch.randn(5, 4, 9).double()
        assert error(small(others), gated.eval()(others)) < 1e-12 < spread(gated(others))
        assert small.second.in_channels == 7
        weights = [p for p in small.parameters() if p.shape[0] == 7]
        assert any(p.dim() == len(shape) for p in weights) or fold


class Messages(nn.Module):
    """A graph network: nodes gather what edges carry from others."""

    def __init__(self, gather: Callable[[Tensor, Tensor], Tensor], *, in_place: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 12), nn.Linear(12, 8)
        self.edge, self.third = nn.Linear(8, 8), nn.Linear(8, 3)
        self.gather, self.in_place = gather, in_place

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        source, target = edges[0], edges[1]
        x = self.second(self.pass_on(self.first(x).relu(), source, target)).relu()
        return self.third(x + self.pass_on(self.edge(x), source, target).relu())

    def pass_on(self, x: Tensor, source: Tensor, target: Tensor) -> Tensor:
        sent, sums = self.gather(x, source), torch.zeros_like(x)
        if self.in_place:
            sums.index_add_(0, target, sent)
            return sums
        return sums.index_add(0, target, sent)


GATHERS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "brackets": lambda x, index: x[index],
    "more brackets": lambda x, index: x[index, :],
    "index_select": lambda x, index: x.index_select(0, index),
}


@pytest.mark.parametrize("name", GATHERS)
@pytest.mark.parametrize("in_place", [False, True])
def test_a_graph_network_shrinks(name: str, in_place: bool) -> None:
    model: Any = randomise(Messages(GATHERS[name], in_place=in_place)).double()
    x, edges = torch.randn(7, 6, dtype=torch.float64), torch.randint(0, 7, (2, 12))
    gated: Any = fxprune.instrument(model, (x, edges))
    close_half(gated)
    small: Any = fxprune.finalize(gated)
    assert small.report.verification.verdict == "equal"
    assert (small.second.in_features, small.third.in_features) == (6, 4)
    x, edges = torch.randn(9, 6, dtype=torch.float64), torch.randint(0, 9, (2, 20))
    assert error(gated(x, edges), small(x, edges)) < 1e-12


PICKS: dict[str, Callable[[Tensor], Tensor]] = {
    "one": lambda x: x[:, x[:, 0].argsort()[0]],
    "a mask": lambda x: x.flatten()[x.flatten() > 0].sum(),
    "gather": lambda x: x.gather(1, x.argsort(1)[:, :4]),
    "index_select": lambda x: x.index_select(1, x[0].argsort()[:4]),
    "index_add": lambda x: torch.zeros_like(x).index_add(1, x[0].argsort(), x),
    "across": lambda x: (x[:, None] * torch.ones(1, 5, 1)).index_add(
        0, torch.arange(5), (x[:, :5, None] + torch.zeros(8))
    ),
}


class Picking(nn.Module):
    def __init__(self, pick: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(3, 8), nn.Linear(3, 8), nn.Linear(8, 2)
        self.pick = pick

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.third(self.second(x).relu()), self.pick(self.first(x).relu())


@pytest.mark.parametrize("name", PICKS)
def test_an_index_computed_over_channels_keeps_them(name: str) -> None:
    model: Any = randomise(Picking(PICKS[name])).double()
    gated: Any = fxprune.instrument(model, torch.randn(5, 3, dtype=torch.float64))
    assert close_half(gated) == 4
    small: Any = fxprune.finalize(gated)
    assert small.report.verification.verdict == "equal"
    assert (small.first.out_features, small.second.out_features) == (8, 4)


class ClassToken(nn.Module):
    """A token of its own stands in front of others, which a norm has made alike."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.before, self.norm = nn.Linear(3, 6), nn.LayerNorm(6), nn.LayerNorm(6)
        self.token = nn.Parameter(torch.randn(1, 1, 6))
        self.up, self.down, self.head = nn.Linear(6, 16), nn.Linear(16, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(self.first(x))
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1)
        x = x + self.down(self.up(self.norm(x)).relu())
        return self.head(x[:, 0] + x.mean(1))


def test_tokens_told_apart_are_no_channels() -> None:
    model: Any = randomise(ClassToken()).double()
    gated: Any = fxprune.instrument(model, torch.randn(2, 5, 3, dtype=torch.float64))
    assert close_half(gated) == 8
    small: Any = fxprune.finalize(gated)
    assert small.report.verification.verdict == "equal"
    assert (small.up.out_features, small.down.in_features) == (8, 8)


def test_instance_norms_without_parameters_follow() -> None:
    norms = [nn.InstanceNorm2d(8), nn.InstanceNorm2d(6, eps=1e-3)]
    layers = (nn.Conv2d(3, 8, 3), norms[0], nn.ReLU(), nn.Conv2d(8, 6, 3), norms[1], nn.ReLU())
    model = randomise(nn.Sequential(*layers, nn.Conv2d(6, 2, 1))).double()
    x = torch.randn(2, 3, 9, 9, dtype=torch.float64)
    gated: Any = fxprune.instrument(model, x)
    assert close_half(gated) == 7
    small: Any = fxprune.finalize(gated)
    assert small.report.verification.verdict == "equal"
    assert (small.get_submodule("3").in_channels, small.get_submodule("6").in_channels) == (4, 3)
    again: Any = fxprune.finalize(small, x)
    assert error(again(x), gated(x)) < 1e-12


class Latents(nn.Module):
    """Learnt tokens that attend to an input, and an MLP on them (Perceiver, Jaegle et al. 2021)."""

    def __init__(self, norm: type[nn.Module], heads: int) -> None:
        super().__init__()
        self.latents, self.heads = nn.Parameter(torch.randn(5, 8)), heads
        self.norm, self.query, self.both = norm(8), nn.Linear(8, 8, bias=False), nn.Linear(6, 16)
        self.out, self.second = nn.Linear(8, 8), norm(8)
        self.inner, self.outer, self.head = nn.Linear(8, 24), nn.Linear(12, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.latents.unsqueeze(0).expand(len(x), -1, -1)
        parts = (self.query(self.norm(tokens)), *self.both(x).chunk(2, -1))
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2).flatten(0, 1) for t in parts)
        scores = torch.einsum("bid,bjd->bij", q, k).softmax(-1)
        found = torch.einsum("bij,bjd->bid", scores, v)
        found = found.unflatten(0, (-1, self.heads)).transpose(1, 2).flatten(2)
        tokens = self.out(found) + tokens
        first, second = self.inner(self.second(tokens)).chunk(2, -1)
        return self.head(tokens + self.outer(first * F.gelu(second))).mean(1)


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
def test_what_learnt_tokens_pass_through_has_units(norm: type[nn.Module], heads: int) -> None:
    model = randomise(Latents(norm, heads)).double().eval()
    x = torch.randn(2, 7, 6, dtype=torch.float64)
    gated: Any = fxprune.instrument(model, x)
    (site,) = gated.gates.width_sites
    assert len(site.units) == 12
    close_half(gated)
    small: Any = fxprune.finalize(gated)
    for inputs in (x, torch.randn(3, 4, 6, dtype=torch.float64)):
        assert error(gated(inputs), small(inputs)) < 1e-12 < spread(gated(inputs))
    assert small.outer.in_features == 6 and small.latents.shape == (5, 8)


class Weighed(nn.Module):
    """Channels in rows and columns, and a weight for each column that is no channel."""

    def __init__(self, weigh: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.weights, self.last = nn.Linear(8, 20), nn.Linear(8, 5), nn.Linear(5, 3)
        self.weigh = weigh

    def forward(self, x: Tensor) -> Tensor:
        rows = self.first(x).relu().view(-1, 4, 5) * self.weigh(self.weights(x))[:, None]
        return self.last(rows.sum(1))


WEIGHS: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda w: w.softmax(-1),
    "layer norm": lambda w: F.layer_norm(w, (5,)),
    "cumsum": lambda w: w.cumsum(-1),
    "sigmoid": torch.sigmoid,
}


@pytest.mark.parametrize("name", WEIGHS)
@pytest.mark.parametrize("seed", range(3))
def test_columns_stay_that_something_else_is_as_long_as(name: str, seed: int) -> None:
    model: Any = randomise(Weighed(WEIGHS[name])).double()
    gated: Any = fxprune.instrument(model, torch.randn(4, 8, dtype=torch.float64))
    close_half(gated, seed)
    small: Any = fxprune.finalize(gated)
    assert small.report.verification.verdict == "equal"
    x = torch.randn(7, 8, dtype=torch.float64)
    assert error(gated(x), small(x)) < 1e-12 < spread(gated(x))


def test_an_instance_norm_over_one_sample_keeps_what_it_normalises_over() -> None:
    layers = nn.Linear(5, 8), nn.InstanceNorm1d(8), nn.Linear(8, 4)
    model: Any = randomise(nn.Sequential(*layers)).double()
    with torch.no_grad():
        layers[2].weight[:, :4] = 0
    x = torch.randn(8, 5, dtype=torch.float64)
    small: Any = fxprune.finalize(model, x)
    assert small.report.verification.verdict == "equal"
    assert error(model(x), small(x)) < 1e-12
