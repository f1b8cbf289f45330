"""Small models, each with one thing that could go wrong: exact, or refused with a reason."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.nn.utils import prune

import fxprune
from fxprune.testing import close_half, error, spread
from tests.conftest import randomise


class Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor) -> Tensor:
        return x.flip(1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0].flip(1)


class Reversing(nn.Module):
    def forward(self, x: Tensor) -> Any:
        return Reverse.apply(x)


class Overwriting(nn.Module):
    """Write one tensor into a part of another: no tracer looks inside."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x = x.clone()
        x[:, :8] = y
        return x


class Micro(nn.Module):
    """Two convolutions with ReLUs, something in between, a head; parts for the something."""

    def __init__(self, middle: Callable[[Any, Tensor], Any], *, headless: bool) -> None:
        super().__init__()
        self.middle, self.headless = middle, headless
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.inner, self.pointwise = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.doubling, self.up = nn.Conv2d(8, 16, 1), nn.ConvTranspose2d(8, 8, 2, 2, groups=2)
        self.group_norm, self.bn = nn.GroupNorm(2, 8), nn.BatchNorm2d(8)
        self.instance_norm = nn.InstanceNorm2d(8, affine=True, track_running_stats=True)
        self.prelu, self.map = nn.PReLU(8), nn.Parameter(torch.randn(1, 8, 6, 6))
        self.vector, self.matrix = nn.Parameter(torch.randn(8)), nn.Parameter(torch.randn(8, 8))
        self.pair = nn.Parameter(torch.randn(2))
        self.reduce, self.expand = nn.Conv2d(8, 2, 1), nn.Conv2d(2, 8, 1)
        self.spatial = nn.Conv2d(2, 1, 3, padding=1)
        self.wide, self.wide_bn = nn.Conv2d(16, 8, 1), nn.BatchNorm2d(16)
        self.strided, self.average = nn.Conv2d(8, 16, 3, 2, padding=1), nn.AvgPool2d(2)
        self.flat, self.overwriting, self.reversing = nn.Linear(32, 8), Overwriting(), Reversing()
        self.order: Tensor
        self.scale: Tensor
        self.register_buffer("order", torch.randperm(8))
        self.register_buffer("scale", torch.rand(1, 8, 1, 1) + 0.5)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Any:
        x = F.relu(self.first(x))
        x = self.middle(self, x)
        return x if self.headless else self.head(x.mean((2, 3)))


def cbam(m: Any, x: Tensor) -> Tensor:
    pooled = x.mean((2, 3), keepdim=True)
    x = x * m.expand(F.relu(m.reduce(pooled))).sigmoid()
    maps = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)
    return x * m.spatial(maps).sigmoid()


def attention(m: Any, x: Tensor) -> Tensor:
    tokens = F.relu(m.doubling(x)).flatten(2).transpose(1, 2)
    query, key = tokens.chunk(2, -1)
    mixed = F.scaled_dot_product_attention(query, key, key)
    return mixed.transpose(1, 2).reshape(x.shape)


def grouped_queries(m: Any, x: Tensor) -> Tensor:
    few = F.relu(m.second(x))[:, :4]
    return x * few.repeat_interleave(2, 1)


def without_gradient(m: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        gate = F.relu(m.second(x)).sigmoid()
    return x * gate


def dead_norm(m: Any, x: Tensor) -> Tensor:
    return m.inner(F.relu(m.bn(m.second(x))))


def c2f(m: Any, x: Tensor) -> Tensor:
    a, b = F.silu(m.pointwise(x)).chunk(2, 1)
    c = F.silu(m.second(torch.cat([a, b], 1)))
    return m.wide(torch.cat([a, b, c], 1))


def roll_of_a_repeated(m: Any, x: Tensor) -> Tensor:
    return m.wide(m.wide_bn(x.repeat(1, 2, 1, 1)).roll(8, 1))


def index_shared_by_two(m: Any, x: Tensor) -> Tensor:
    return m.second(x[:, m.order]) + m.pointwise(F.relu(m.inner(x)).index_select(1, m.order))


def nhwc_flatten(m: Any, x: Tensor) -> Tensor:
    maps = F.adaptive_avg_pool2d(F.relu(m.inner(x)), 2).permute(0, 2, 3, 1)
    return x * m.flat(maps.flatten(1))[:, :, None, None]


def many_queries(m: Any, x: Tensor) -> Tensor:
    few = F.relu(m.second(x))[:, :4]
    n, c, h, w = few.shape
    many = few[:, :, None].expand(n, c, 2, h, w).reshape(n, c * 2, h, w)
    return m.inner(many)


def option_a(m: Any, x: Tensor) -> Tensor:
    shortcut = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4), "constant", 0)
    return m.wide(F.relu(shortcut + m.strided(x)))


def cropped(m: Any, x: Tensor) -> Tensor:
    return m.inner(F.pad(F.relu(m.doubling(x)), (0, 0, 0, 0, -3, -5)))


def numpy_names(m: Any, x: Any) -> Tensor:
    mean = x.mean(axis=(2, 3), keepdims=True)
    return m.second(x * (mean + x.sum(axis=3).mean(dim=[1, 2]).view(-1, 1, 1, 1)))


def by_keyword(m: Any, x: Tensor) -> Tensor:
    x = F.relu_(input=m.bn(input=m.inner(input=x)))
    x = F.relu(input=m.pointwise(input=m.average(input=torch.add(input=x, other=x))))
    x = m.doubling(input=m.average(input=x))
    x = torch.flatten(input=torch.cat(tensors=[x, x], dim=1), start_dim=1)
    return m.flat(input=x)[:, :, None, None]


CASES: dict[str, Callable[[Any, Tensor], Any]] = {
    "called by keyword": by_keyword,
    "clamped": lambda m, x: m.second(torch.clamp(m.inner(x.clamp(max=0.5)), min=0.0, max=6.0)),
    "flip": lambda m, x: m.second(x.flip(1)),
    "roll": lambda m, x: m.second(x.roll(3, 1)),
    "roll over space": lambda m, x: m.second(x.roll(2, 2)),
    "channel shuffle": lambda m, x: m.second(F.channel_shuffle(x, 2)),
    "channel shuffle by views": lambda m, x: m.second(
        x.view(x.size(0), 2, 4, 6, 6).transpose(1, 2).flatten(1, 2)
    ),
    "channels last": lambda m, x: m.second(F.relu(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)),
    "custom function": lambda m, x: m.second(m.reversing(x)),
    "detached skip": lambda m, x: F.relu(m.second(x)) + x.detach(),
    "sort": lambda m, x: m.second(x.sort(1)[0]),
    "cumsum": lambda m, x: m.second(x.cumsum(1)),
    "softmax": lambda m, x: m.second(x.softmax(1)),
    "mean subtracted": lambda m, x: m.second(x - x.mean(1, keepdim=True)),
    "group norm": lambda m, x: m.second(F.relu(m.group_norm(x))),
    "instance norm with statistics": lambda m, x: m.second(F.relu(m.instance_norm(m.inner(x)))),
    "attention": attention,
    "permuted by a buffer": lambda m, x: m.second(x.index_select(1, m.order)),
    "indexed by a buffer": lambda m, x: m.second(x[:, m.order]),
    "scaled by a buffer": lambda m, x: m.second(x * m.scale),
    "scaled by a vector": lambda m, x: m.second(F.relu(x * m.vector.view(1, -1, 1, 1))),
    "slice": lambda m, x: m.second(F.relu(m.doubling(x))[:, :8]),
    "slice with a step": lambda m, x: m.second(F.relu(m.doubling(x))[:, ::2]),
    "einsum": lambda m, x: F.relu(torch.einsum("bchw,cd->bdhw", x, m.matrix)),
    "grouped transposed": lambda m, x: F.relu(m.up(x)),
    "grouped queries": grouped_queries,
    "without gradient": without_gradient,
    "padded shortcut": lambda m, x: m.wide(
        F.relu(F.pad(x, (0, 0, 0, 0, 4, 4)) + F.relu(m.doubling(x)))
    ),
    "pixel shuffle": lambda m, x: m.expand(F.relu(F.pixel_shuffle(m.pointwise(x), 2))),
    "sub-pixels gated and scaled": lambda m, x: m.expand(
        F.relu(F.relu(F.pixel_shuffle(m.pointwise(x), 2)) * m.pair.view(1, -1, 1, 1))
    ),
    "attention over channels and space": cbam,
    "glu": lambda m, x: m.second(F.glu(F.relu(m.doubling(x)), 1)),
    "a map as parameter": lambda m, x: m.second(F.relu(x + m.map)),
    "prelu": lambda m, x: m.second(m.prelu(m.inner(x))),
    "dead norm": dead_norm,
    "computed weight": lambda m, x: F.relu(
        F.conv2d(x, m.second.weight * m.scale.view(8, 1, 1, 1), None, padding=1)
    ),
    "two outputs": lambda m, x: (m.second(x).mean((2, 3)), {"map": m.pointwise(x)}),
    "an output on the way": lambda m, x: [x, m.second(x)],
    "block of chunks": c2f,
    "summed to a number": lambda m, x: x * x.sum((1, 2, 3), keepdim=True).tanh(),
    "scaled by its size": lambda m, x: m.second(x / x.shape[1] ** 0.5),
    "means named after NumPy": numpy_names,
    "where": lambda m, x: m.second(torch.where(x > 0.3, x, torch.zeros_like(x))),
    "chunks the other way round": lambda m, x: m.second(torch.cat(x.chunk(2, 1)[::-1], 1)),
    "max over channels": lambda m, x: x * x.amax(1, keepdim=True).sigmoid(),
    "roll of a repeated": roll_of_a_repeated,
    "index shared by two": index_shared_by_two,
    "overwritten part": lambda m, x: m.wide(m.overwriting(F.relu(m.doubling(x)), x)),
    "channels last and flattened": nhwc_flatten,
    "grouped queries by expand": many_queries,
    "shortcut of option A": option_a,
    "cropped": cropped,
    "slice backwards": lambda m, x: m.second(x.flip(1)[:, 1::2].repeat_interleave(2, 1)),
    "picked by a list": lambda m, x: m.second(F.relu(m.doubling(x))[:, [3, 1, 9, 4, 8, 15, 2, 5]]),
    "picked by numbers": lambda m, x: m.second(x * x[:, 3, None]),
    "filled like another": lambda m, x: m.second(torch.where(x > 0.1, x, torch.ones_like(x))),
    "outer product": lambda m, x: m.second(
        F.relu(x.mean((2, 3)).unsqueeze(2) * m.vector).mean(2)[:, :, None, None] * x
    ),
}


# The layers that must have lost parameters, where channels could go.
SHRINKS: dict[str, tuple[str, ...]] = {
    "called by keyword": ("first", "inner", "pointwise"),
    "clamped": ("first", "inner", "second"),
    "roll": ("first", "second"),
    "slice with a step": ("doubling", "second"),
    "slice": ("doubling", "second"),
    "indexed by a buffer": ("first", "second"),
    "permuted by a buffer": ("first", "second"),
    "index shared by two": ("first", "second", "inner", "pointwise"),
    "roll of a repeated": ("first", "wide"),
    "padded shortcut": ("first", "doubling", "wide"),
    "shortcut of option A": ("first", "strided", "wide"),
    "pixel shuffle": ("first", "pointwise"),
    "sub-pixels gated and scaled": ("first", "pointwise", "expand"),
    "block of chunks": ("first", "pointwise", "second", "wide"),
    "grouped queries": ("second",),
    "grouped queries by expand": ("second", "inner"),
    "channels last and flattened": ("inner", "flat"),
    "a map as parameter": ("first", "second", "map"),
    "cropped": ("doubling", "inner"),
    "picked by a list": ("doubling", "second"),
    "slice backwards": ("first", "second"),
    "filled like another": ("first", "second"),
}


@pytest.mark.parametrize("name", CASES)
def test_exact_or_refused(name: str) -> None:
    model: Any = randomise(Micro(CASES[name], headless="output" in name)).eval()
    if name == "dead norm":
        model.bn.weight.data[2:6] = 0
    x = torch.randn(3, 3, 6, 6)
    try:
        gated = fxprune.instrument(model, x)
    except fxprune.NothingToDoError as refusal:
        assert ":" in str(refusal) and "test_micro.py" in str(refusal)
        return
    with torch.no_grad():
        assert torch.equal(_first(gated.eval()(x)), _first(model(x)))
        assert close_half(gated) > 0
        small = fxprune.finalize(gated)
        expected = gated(x)
        assert error(expected, small(x)) < 2e-5
        assert spread(expected) > 1e-4
    assert small.report.verification is not None
    assert small.report.verification.verdict == "equal"
    assert small.report.after is not None and small.report.before is not None
    assert small.report.after.parameters < small.report.before.parameters
    for layer in SHRINKS.get(name, ()):
        assert _size(small, layer) < _size(model, layer), f"{layer} has not shrunk"


def test_gates_behind_a_pixel_shuffle_fit_maps_of_other_sizes() -> None:
    model: Any = randomise(Micro(CASES["sub-pixels gated and scaled"], headless=False)).eval()
    gated = fxprune.instrument(model, torch.randn(2, 3, 6, 6))
    assert close_half(gated) > 0
    small, other = fxprune.finalize(gated), torch.randn(2, 3, 10, 7)
    assert error(gated(other), small(other)) < 2e-5
    assert "relu" in str(fxprune.inspect(gated))


def test_a_map_unflattened_by_its_own_sizes_may_have_others() -> None:
    def fold(m: Any, x: Tensor) -> Tensor:
        y = F.relu(m.second(x)).flatten(-2)
        return m.inner(y.unflatten(-1, (x.shape[2], x.shape[3])))

    gated = fxprune.instrument(randomise(Micro(fold, headless=True)), torch.randn(2, 3, 6, 6))
    assert close_half(gated) > 0
    small, other = fxprune.finalize(gated), torch.randn(2, 3, 10, 7)
    assert error(gated.eval()(other), small(other)) < 2e-5


class Coordinates(nn.Module):
    """A table of coordinates that two layers turn into a bias (Swin v2, NeRF on a grid)."""

    def __init__(self) -> None:
        super().__init__()
        self.table: Tensor
        self.register_buffer("table", torch.randn(7, 2))
        self.first, self.second, self.head = nn.Linear(2, 9), nn.Linear(9, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(x + self.second(F.relu(self.first(self.table)))))


def test_layers_on_a_buffer_are_gated() -> None:
    model = randomise(Coordinates()).eval()
    gated = fxprune.instrument(model, torch.randn(2, 7, 5))
    assert close_half(gated) > 0
    small: Any = fxprune.finalize(gated)
    assert small.report.verification.verdict == "equal"
    assert small.report.after.parameters < small.report.before.parameters


def _size(model: Any, name: str) -> int:
    """Return how many numbers a layer or parameter holds."""
    found = getattr(model, name)
    if isinstance(found, nn.Module):
        return sum(parameter.numel() for parameter in found.parameters())
    return found.numel()


def _first(outputs: Any) -> Tensor:
    return outputs if isinstance(outputs, Tensor) else outputs[0]


class Shortcut(nn.Module):
    """The parameter-free shortcut of ResNets on CIFAR (He et al. 2016, option A)."""

    def __init__(self, pad: int) -> None:
        super().__init__()
        self.pad = pad

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.pad, self.pad), "constant", 0)


class Block(nn.Module):
    """A basic block of ResNets on CIFAR."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        wider = outputs > inputs
        self.conv1 = nn.Conv2d(inputs, outputs, 3, 2 if wider else 1, padding=1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)
        self.shortcut = Shortcut((outputs - inputs) // 2) if wider else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


def test_a_resnet_with_padded_shortcuts_shrinks_everywhere() -> None:
    model = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
        *(Block(8, 8), Block(8, 16), Block(16, 32)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)),
    )
    randomise(model).eval()
    gated = fxprune.instrument(model, torch.randn(2, 3, 16, 16))
    assert close_half(gated) > 0
    small: Any = fxprune.finalize(gated)
    assert small.report.verification.verdict == "equal"
    layers = {name: m for name, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    kept = {name: small.get_submodule(name).out_channels for name in layers}
    assert all(kept[name] < layer.out_channels for name, layer in layers.items()), kept


class Language(nn.Module):
    """An embedding whose weight is the head's too, with a hidden layer in between."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(20, 8), nn.Linear(8, 20, bias=False)
        self.head.weight = self.embedding.weight
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        return self.head(x + self.down(F.gelu(self.up(x))))


def test_a_tied_embedding_stays_tied() -> None:
    model = randomise(Language())
    gated = fxprune.instrument(model, torch.randint(20, (2, 5)))
    assert close_half(gated) == 8
    small: Any = fxprune.finalize(gated)
    assert small.up.out_features == 8
    assert small.head.weight is small.embedding.weight
    assert small.report.verification.verdict == "equal"


def test_the_mask_of_a_head_leaves_the_embedding_it_is_tied_to_alone() -> None:
    model: Any = randomise(Language())
    prune.ln_structured(model.head, "weight", 0.4, n=2, dim=0)
    prune.ln_structured(model.up, "weight", 0.4, n=2, dim=0)
    tokens = torch.arange(20).reshape(4, 5)
    small: Any = fxprune.finalize(model, tokens)
    assert error(model(tokens).detach(), small(tokens).detach()) < 1e-5
    assert small.up.out_features < 16


class TwiceOnConstants(nn.Module):
    """A layer without bias, called twice on constants, which the next one absorbs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 4), nn.Linear(4, 4)
        self.twice, self.head = nn.Linear(4, 4, bias=False), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.second(self.first(x).relu())
        return torch.cat([self.head(self.twice(self.twice(hidden))), x], 1)


def test_what_a_shared_layer_cannot_absorb_is_not_absorbed() -> None:
    model: Any = randomise(TwiceOnConstants())
    model.first.weight.data.zero_()
    model.first.bias.data.fill_(-1)
    small: Any = fxprune.finalize(model, torch.randn(3, 5))
    assert small.report.verification.verdict == "equal"


class Cropped(nn.Module):
    """A flattened map of which the first numbers count."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Conv2d(3, 4, 1), nn.Linear(72, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.split(self.first(x).relu().flatten(1), 72, 1)[0])


def test_positions_in_a_flattened_map_are_not_frozen() -> None:
    model: Any = randomise(Cropped()).double()
    model.head.weight.data[:, 36:] = 0
    small: Any = fxprune.finalize(model, torch.randn(3, 3, 6, 6, dtype=torch.float64))
    larger = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    assert error(model(larger), small(larger)) < 1e-12
