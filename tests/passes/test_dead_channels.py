"""Cutting dead channels: smaller, and the same numbers."""

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxprune
from fxprune.dataflow.rules import RULES, STRICT, OpRule
from fxprune.passes.dead_channels import eliminate_dead_channels
from fxprune.programs.program import Program, capture
from fxprune.testing import check_rewrite
from tests.conftest import Golden, randomise


@torch.fx.wrap
def _reverse(x: Tensor) -> Tensor:
    return x.index_select(1, torch.arange(x.shape[1] - 1, -1, -1))


def program(model: nn.Module, *shape: int) -> Program:
    model = randomise(model).double().eval()
    inputs = ((torch.randn(*shape, dtype=torch.float64),), {})
    return capture(model, inputs)


def at(one: Program, path: str) -> Any:
    """Return a module, whose type the test knows."""
    return one.module.get_submodule(path)


def parameters(one: Program) -> int:
    return sum(p.numel() for p in one.module.parameters())


def unread(layer: nn.Linear | nn.Conv2d, *channels: int) -> None:
    layer.weight.data[:, list(channels)] = 0


def silent(layer: nn.Linear | nn.Conv2d, *channels: int, bias: float = 0) -> None:
    layer.weight.data[list(channels)] = 0
    assert layer.bias is not None
    layer.bias.data[list(channels)] = bias


def test_unread_channels_of_a_sequence_go(golden: Golden) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3))
    before = program(model, 2, 3, 9, 9)
    unread(at(before, "3"), 1, 4)
    after = check_rewrite(eliminate_dead_channels, before)
    assert at(after, "0").weight.shape == (6, 3, 3, 3)
    assert at(after, "1").num_features == 6
    assert at(after, "3").in_channels == 6
    golden.check(after.text())


def test_a_constant_channel_goes_into_the_next_bias() -> None:
    model = nn.Sequential(nn.Linear(5, 6), nn.Sigmoid(), nn.Linear(6, 3, bias=False))
    before = program(model, 4, 5)
    silent(at(before, "0"), 2, 3, bias=0.7)
    after = check_rewrite(eliminate_dead_channels, before)
    assert at(after, "2").weight.shape == (3, 4)
    assert at(after, "2").bias is not None


def test_a_silent_channel_passes_an_average_over_a_padded_border() -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 1), nn.AvgPool2d(3, 1, 1), nn.Conv2d(6, 4, 1))
    before = program(model, 2, 3, 7, 7)
    silent(at(before, "0"), 2, 4)
    after = check_rewrite(eliminate_dead_channels, before)
    assert at(after, "2").in_channels == 4


def test_a_constant_before_a_padded_border_stays() -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 1), nn.Conv2d(6, 4, 3, padding=1))
    before = program(model, 2, 3, 7, 7)
    silent(at(before, "0"), 2, bias=0.7)
    after = before.clone()
    assert eliminate_dead_channels(after) == []
    assert parameters(after) == parameters(before)


@pytest.mark.parametrize("mode", ["circular", "replicate", "reflect"])
def test_a_constant_before_a_border_that_repeats_it_goes(mode: Any) -> None:
    padded = nn.Conv2d(6, 4, 3, padding=1, padding_mode=mode)
    before = program(nn.Sequential(nn.Conv2d(3, 6, 1), padded), 2, 3, 7, 7)
    silent(at(before, "0"), 2, bias=0.7)
    after = check_rewrite(eliminate_dead_channels, before)
    assert at(after, "1").in_channels == 5


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.branch = nn.Conv2d(6, 6, 3, padding=1)
        self.head = nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(F.relu(self.branch(x) + x))


def test_a_residual_stream_shrinks_as_one() -> None:
    before = program(Residual(), 2, 3, 6, 6)
    unread(at(before, "head"), 0, 5)
    unread(at(before, "branch"), 0, 5)
    after = check_rewrite(eliminate_dead_channels, before)
    assert at(after, "stem").weight.shape == (4, 3, 3, 3)
    assert at(after, "branch").weight.shape == (4, 4, 3, 3)


def test_a_residual_stream_one_member_reads_stays() -> None:
    before = program(Residual(), 2, 3, 6, 6)
    unread(at(before, "head"), 0, 5)
    assert eliminate_dead_channels(before) == []


class Flattened(nn.Module):
    """NHWC or NCHW flatten before a linear layer."""

    def __init__(self, last: bool) -> None:
        super().__init__()
        self.conv, self.head, self.last = nn.Conv2d(3, 5, 3), nn.Linear(5 * 16, 4), last

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        if self.last:
            x = x.permute(0, 2, 3, 1)
        return self.head(x.reshape(x.size(0), -1))


@pytest.mark.parametrize("last", [False, True])
def test_a_flattened_map_loses_all_columns_of_a_channel(last: bool) -> None:
    before = program(Flattened(last), 2, 3, 6, 6)
    head = at(before, "head")
    columns = torch.arange(80) % 5 if last else torch.arange(80) // 16
    head.weight.data[:, (columns == 1) | (columns == 3)] = 0
    after = check_rewrite(eliminate_dead_channels, before)
    assert at(after, "head").in_features == 3 * 16


class Grouped(nn.Module):
    def __init__(self, groups: int, multiplier: int = 1) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 1)
        self.grouped = nn.Conv2d(8, 8 * multiplier, 3, padding=1, groups=groups)
        self.last = nn.Conv2d(8 * multiplier, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.relu(self.grouped(F.relu(self.first(x)))))


def test_a_depthwise_pair_goes_together() -> None:
    before = program(Grouped(8, 2), 2, 3, 6, 6)
    unread(at(before, "last"), 2, 3, 8, 9)
    after = check_rewrite(eliminate_dead_channels, before)
    assert at(after, "grouped").groups == 6
    assert at(after, "first").out_channels == 6


def test_groups_keep_equal_sizes() -> None:
    before = program(Grouped(2), 2, 3, 6, 6)
    unread(at(before, "last"), 1, 5, 6)
    after = check_rewrite(eliminate_dead_channels, before)
    assert at(after, "grouped").weight.shape == (6, 4, 3, 3)


class Twice(nn.Module):
    """One layer called twice, and a tied head."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.shared, self.last = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.last.weight = self.shared.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.last(self.shared(F.relu(self.shared(x)))).sum(-1, keepdim=True)


def test_shared_and_tied_layers_are_cut_once_and_stay_tied() -> None:
    before = program(Twice(), 3, 4)
    shared = at(before, "shared")
    shared.weight.data[:, 2] = 0
    shared.weight.data[2] = 0
    after = check_rewrite(eliminate_dead_channels, before)
    weights = [at(after, n).weight for n in ("shared", "last")]
    assert weights[0] is weights[1]


def test_concatenated_channels_go_from_the_right_place() -> None:
    class Concatenated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.head = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 6, 1), nn.Conv2d(10, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.cat([self.a(x), self.b(x).relu()], 1))

    before = program(Concatenated(), 2, 3, 5, 5)
    unread(at(before, "head"), 1, 4, 9)
    after = check_rewrite(eliminate_dead_channels, before)
    assert at(after, "a").out_channels == 3
    assert at(after, "b").out_channels == 4


def test_a_layer_dead_as_a_whole_keeps_one_channel_and_its_meaning() -> None:
    before = program(nn.Sequential(nn.Linear(4, 6), nn.Sigmoid(), nn.Linear(6, 3)), 5, 4)
    silent(at(before, "0"), *range(6), bias=0.3)
    at(before, "2").weight.data.normal_()
    expected = before.run()
    eliminate_dead_channels(before)
    before.check()
    assert torch.allclose(before.run(), expected, rtol=1e-12)
    assert at(before, "0").out_features == 1


SHAPE_READERS: dict[str, Callable[[Tensor], Tensor]] = {
    "scale by a size": lambda x: x * x.size(1) ** -0.5,
    "scale by a shape": lambda x: x / x.shape[1],
    "view with sizes": lambda x: x.view(x.size(0), x.size(1), -1).mean(2),
    "view in two groups": lambda x: x.view(x.size(0), 2, x.size(1) // 2, 16).sum(-1).flatten(1),
    "two halves": lambda x: x.chunk(2, 1)[0] * x.chunk(2, 1)[1].sigmoid(),
    "a slice": lambda x: x[:, 2:7],
    "a slice from the end": lambda x: x[:, -5:],
    "every other": lambda x: x[:, ::2],
    "reversed": lambda x: x.flip(1),
    "rolled": lambda x: x.roll(3, 1),
    "mean over channels subtracted": lambda x: x - x.mean(1, keepdim=True),
    "softmax over channels": lambda x: x.softmax(1),
    "a shuffle": lambda x: x.view(-1, 2, 4, 16).transpose(1, 2).reshape(-1, 8, 16),
    "its shape for another": lambda x: torch.ones_like(x).view(x.shape) * x,
    "broadcast over channels": lambda x: x * x.mean(1, keepdim=True).sigmoid(),
}


class Read(nn.Module):
    """Something between a convolution and a linear layer."""

    def __init__(self, reader: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.reader = nn.Conv2d(3, 8, 3), reader
        with torch.no_grad():
            size = reader(self.conv(torch.randn(2, 3, 6, 6))).flatten(1).shape[1]
        self.head = nn.Linear(size, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.reader(self.conv(x)).flatten(1))


@pytest.mark.parametrize("silence", [False, True], ids=["unread", "silent"])
@pytest.mark.parametrize("name", SHAPE_READERS)
def test_whatever_reads_the_channels_the_numbers_stay(name: str, silence: bool) -> None:
    before = program(Read(SHAPE_READERS[name]), 3, 3, 6, 6)
    if silence:
        silent(at(before, "conv"), 0, 1, 3, 4, 5)
    else:
        size = at(before, "head").in_features // 8 or 1
        at(before, "head").weight.data[:, : 4 * size] = 0
    expected = before.run()
    eliminate_dead_channels(before)
    before.check()
    assert torch.allclose(before.run(), expected, rtol=1e-10, atol=1e-12)
    assert expected.std(0).min() > 1e-6


def test_an_unknown_operator_keeps_all_channels_around_it() -> None:
    before = program(Read(lambda x: _reverse(x)), 2, 3, 6, 6)
    silent(at(before, "conv"), 1, 2)
    assert eliminate_dead_channels(before) == []
    ((place, reason),) = before.barriers.items()
    assert "_reverse" in place and "unknown operator" in reason


def test_memory_written_to_behind_a_view_is_left_alone() -> None:
    class Overwrites(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            h[:, 2:4].add_(1)
            return self.b(h)

    before = program(Overwrites(), 5, 4)
    silent(at(before, "a"), 2, 3)
    expected = before.run()
    eliminate_dead_channels(before)
    before.check()
    assert torch.allclose(before.run(), expected, rtol=1e-12)


def test_an_index_of_two_readers_becomes_two() -> None:
    class Permuted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Conv2d(3, 6, 1), nn.Conv2d(3, 6, 1)
            self.after, self.last = nn.Conv2d(6, 4, 1), nn.Conv2d(6, 4, 1)
            self.order: Tensor
            self.register_buffer("order", torch.tensor([5, 2, 0, 1, 4, 3]))

        def forward(self, x: Tensor) -> Tensor:
            y = self.right(x).index_select(1, self.order)
            return self.after(self.left(x)[:, self.order]) * self.last(y)

    before = program(Permuted(), 2, 3, 5, 5)
    unread(at(before, "after"), 0, 3)
    unread(at(before, "last"), 2)
    after = check_rewrite(eliminate_dead_channels, before)
    assert at(after, "left").weight.shape[0] == 4 and at(after, "right").weight.shape[0] == 5
    orders = {name: len(tensor) for name, tensor in after.module.named_buffers()}
    assert sorted(orders.values()) == [4, 5, 6]  # the old one may have other readers


def test_what_is_written_into_a_part_stays() -> None:
    root = nn.ModuleDict(
        {"a": nn.Conv2d(3, 6, 1), "b": nn.Conv2d(3, 6, 1), "after": nn.Conv2d(6, 4, 1)}
    )
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    a, b = graph.call_module("a", (x,)), graph.call_module("b", (x,))
    part = graph.call_function(operator.getitem, (b, (slice(None), slice(2, 5))))
    graph.call_function(operator.setitem, (a, (slice(None), slice(0, 3)), part))
    graph.output(graph.call_module("after", (a,)))
    module = torch.fx.GraphModule(randomise(root).double().eval(), graph)
    before = Program(module, (torch.randn(2, 3, 5, 5, dtype=torch.float64),))
    unread(at(before, "after"), 0, 4)
    after = check_rewrite(eliminate_dead_channels, before)
    assert at(after, "a").weight.shape[0] == 6 and at(after, "b").weight.shape[0] == 3
    assert any("setitem" in place for place in after.barriers)


def test_an_index_that_is_overwritten_stays() -> None:
    class Turning(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.before, self.after = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 4, 1)
            self.order: Tensor
            self.register_buffer("order", torch.tensor([5, 2, 0, 1, 4, 3]))

        def forward(self, x: Tensor) -> Tensor:
            y = self.after(self.before(x)[:, self.order])
            self.order.add_((x * 0).sum().long() + 1).remainder_(6)
            return y

    model = randomise(Turning()).double().eval()
    module = torch.fx.symbolic_trace(model)
    before = Program(module, (torch.randn(2, 3, 5, 5, dtype=torch.float64),))
    unread(at(before, "after"), 0, 4)
    assert not eliminate_dead_channels(before)


class Concatenated(nn.Module):
    """A layer whose bias is put together from parameters and a buffer, as in BEiT."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(5, 9)
        self.weight = nn.Parameter(torch.randn(9, 9))
        self.low, self.high = nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(3))
        self.middle: Tensor
        self.register_buffer("middle", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        bias = torch.cat((self.low, self.middle, self.high))
        return F.linear(F.relu(self.inner(x)), self.weight, bias)


def test_a_concatenated_bias_stays_whole() -> None:
    model = Concatenated().double()
    with torch.no_grad():
        model.low.zero_()
    x = torch.randn(4, 5, dtype=torch.float64)
    small: Any = fxprune.finalize(model, x)
    assert small.report.verification.verdict == "equal"
    assert small.low.shape == small.middle.shape == small.high.shape == (3,)


class Rows(nn.Module):
    """A map laid out in rows of a literal length."""

    def __init__(self, pool: nn.Module, rows: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.act, self.pool, self.rows = nn.Conv2d(3, 16, 3), nn.ReLU(), pool, rows
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rows(self.pool(self.act(self.conv(x)))))


@pytest.mark.parametrize("dead", [range(8), range(4, 12), (3,), range(0, 16, 2)], ids=str)
def test_rows_that_hold_a_sample_for_the_example_only_are_refused_elsewhere(dead: Any) -> None:
    before = program(Rows(nn.AvgPool2d(4), lambda x: x.view(-1, 16)), 3, 3, 6, 6)
    silent(at(before, "conv"), *dead)
    expected, (x,) = before.run(), before.args
    eliminate_dead_channels(before)
    before.check()
    assert torch.allclose(before.run(), expected, rtol=1e-12)
    assert at(before, "conv").out_channels == 16 - len(dead)
    before.module(torch.cat([x, x]))
    before.module(torch.cat([x, x[..., :3]], 3))  # which still is one pixel
    for longer in (F.pad(x, (0, 5)), F.pad(x, (0, 0, 0, 4)), F.pad(x, (9, 9, 9, 9))):
        with pytest.raises(AssertionError, match=r"assumes pool\.size\(\d\) == 1"):
            before.module(longer)


ONE_PIXEL: dict[str, tuple[nn.Module, Callable[[Tensor], Tensor]]] = {
    "adaptive": (nn.AdaptiveAvgPool2d(1), lambda x: x.view(-1, 16)),
    "then normed": (nn.AdaptiveMaxPool2d((1, 1)), lambda x: F.silu(x * 2).reshape(-1, 16)),
    "mean": (nn.Identity(), lambda x: x.mean((2, 3), keepdim=True).view(-1, 16)),
    "sizes": (nn.AvgPool2d(4), lambda x: x.view(x.size(0), -1)),
    "its own batch": (nn.AvgPool2d(4), lambda x: x.view(x.size(0), 16, -1).mean(-1)),
}


@pytest.mark.parametrize("name", ONE_PIXEL)
def test_where_a_row_is_a_sample_of_any_map_nothing_is_assumed(name: str) -> None:
    before = program(Rows(*ONE_PIXEL[name]), 3, 3, 6, 6)
    silent(at(before, "conv"), 1, 2, 5)
    expected = before.run()
    eliminate_dead_channels(before)
    before.check()
    assert torch.allclose(before.run(), expected, rtol=1e-12)
    assert at(before, "conv").out_channels == 13
    assert not [node for node in before.graph.nodes if node.target is torch._assert]


COMPUTED: dict[str, Callable[[Tensor], Tensor]] = {
    "by position": lambda x: F.adaptive_avg_pool2d(x, (x.shape[2] // 4, 1)),
    "by keyword": lambda x: F.adaptive_avg_pool2d(x, output_size=(x.shape[2] // 4, 1)),
    "left alone": lambda x: F.adaptive_avg_pool2d(x[:, :, ::4], output_size=(None, 1)),
}


@pytest.mark.parametrize("name", COMPUTED)
def test_a_pool_to_a_size_that_follows_the_input_fixes_none(name: str) -> None:
    pooled = COMPUTED[name]
    before = program(Rows(nn.Identity(), lambda x: pooled(x).view(-1, 16)), 3, 3, 6, 6)
    silent(at(before, "conv"), 1, 2, 5)
    (x,) = before.args
    require_equal_on([x], before)
    with pytest.raises(AssertionError, match=r"assumes \w+\.size\(2\) == 1"):
        before.module(F.pad(x, (0, 0, 0, 9)))


def require_equal_on(inputs: list[Tensor], before: Program) -> None:
    """Remove the dead channels; the outputs stay what they were on every input."""
    expected = [before.module(x) for x in inputs]
    eliminate_dead_channels(before)
    before.check()
    for x, known in zip(inputs, expected, strict=True):
        assert torch.allclose(before.module(x), known, rtol=1e-12)


class AmongSamples(nn.Module):
    """Groups of channels that stand among the samples for a while, and a scale for each."""

    def __init__(self, inside: Callable[[Tensor, int], Tensor]) -> None:
        super().__init__()
        self.conv, self.act, self.inside = nn.Conv2d(3, 8, 3), nn.ReLU(), inside
        self.scale, self.head = nn.Parameter(torch.randn(1, 4, 1, 1)), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.conv(x))
        b, c, h, w = x.shape
        groups = x.view(b * 4, -1, h, w)
        score = self.inside(groups, b).view(b, 4, h, w) * self.scale
        return self.head((groups * score.view(b * 4, 1, h, w).sigmoid()).view(b, c, h, w))


GROUPS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "sizes": lambda x, b: x.sum(1).view(b * 4, -1).sin(),
    "of itself": lambda x, b: x.sum(1).view(x.size(0), -1).sin(),
    "of both": lambda x, b: x.sum(1).view(x.shape[0] * x.shape[2], x.shape[3]).cos(),
}


@pytest.mark.parametrize("name", GROUPS)
def test_groups_among_the_samples_follow_at_every_batch(name: str) -> None:
    before = program(AmongSamples(GROUPS[name]), 2, 3, 6, 6)
    silent(at(before, "conv"), 2, 3, 6, 7)
    inputs = [torch.randn(b, 3, s, s, dtype=torch.float64) for b in (1, 2, 5) for s in (6, 9)]
    require_equal_on(inputs, before)
    assert at(before, "conv").out_channels == (4 if name == "sizes" else 8)


def test_a_shape_of_a_cut_map_that_a_model_multiplies_follows_maps_of_any_size() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x)
            b, c, h, w = x.shape
            return self.head(x.view(b, c * h * w).relu().view(b, c, h, w))

    before = program(Flat(), 2, 3, 6, 6)
    unread(at(before, "head"), 1, 4, 5)
    inputs = [torch.randn(b, 3, s, s + 1, dtype=torch.float64) for b in (1, 2, 5) for s in (6, 9)]
    require_equal_on(inputs, before)
    assert at(before, "conv").out_channels == 5


def test_rows_of_several_samples_are_refused_nowhere() -> None:
    class Pairs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(6, 6), nn.Linear(24, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(self.up(x).relu().view(3, -1))

    before = program(Pairs(), 3, 4, 6)
    silent(at(before, "up"), 1, 4)
    inputs = [torch.randn(*shape, dtype=torch.float64) for shape in ((3, 4, 6), (6, 2, 6))]
    require_equal_on(inputs, before)
    assert at(before, "up").out_features == 4


def test_a_part_of_a_number_that_is_frozen_is_a_number() -> None:
    def fields(x: Tensor) -> Tensor:
        flat = x.flatten(1)
        return flat.view(flat.size(0), flat.size(1)).relu()

    before = program(Read(fields), 2, 3, 6, 6)
    silent(at(before, "conv"), 1, 5)
    expected = before.run()
    eliminate_dead_channels(before)
    before.check()
    assert at(before, "conv").out_channels == 6
    assert torch.allclose(before.run(), expected, rtol=1e-12)


def test_what_goes_wrong_in_a_rule_is_a_barrier(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(call: Any) -> Any:
        raise KeyError("nobody thought of this")

    before = program(Read(lambda x: x.softmax(1)), 2, 3, 6, 6)
    unread(at(before, "head"), *range(16))
    rule = RULES["softmax"]
    monkeypatch.setitem(RULES, "softmax", OpRule(rule.name, broken))
    with pytest.raises(KeyError):
        eliminate_dead_channels(before)
    STRICT.set(False)
    assert eliminate_dead_channels(before) == []
    (reason,) = before.barriers.values()
    assert "a bug in fxprune: KeyError" in reason
