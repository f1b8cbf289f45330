"""The paper's gate: y = w'·(d'·x + (1 − d')·f(x)), binary forward and straight through back."""

import copy
import io
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

import fxprune
from fxprune.errors import GateError
from fxprune.gating.gates import (
    UNGATED,
    DepthSite,
    Gates,
    WidthSite,
    binarize,
    linear_gate,
    width_gate,
)
from fxprune.gating.penalties import paper_penalties, penalty

reals = st.floats(-2, 2)
unit_interval = st.floats(0, 1)


class Gated(nn.Module):
    """A layer of four units, a gated ReLU, and a layer that reads it; the last unit has no gate."""

    def __init__(self, *, width_init: float = 0.75, linear_init: float = 0.25) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)
        self.gates = Gates(
            [WidthSite("relu", (0, 1, 2, UNGATED), (1, 4))],
            [DepthSite("relu", 0)],
            width_init=width_init,
            linear_init=linear_init,
        )
        self.penalties = paper_penalties()

    def forward(self, x: Tensor) -> Tensor:
        width, linear = self.gates()
        before = self.first(x)
        return self.second(width_gate(linear_gate(before, before.relu(), linear), width))


def set_gates(gates: Gates, width: list[float], linear: list[float]) -> None:
    with torch.no_grad():
        for parameter, values in ((gates.width, width), (gates.linear, linear)):
            if parameter is not None:
                parameter.copy_(torch.tensor(values))


def width_of(gates: Gates) -> nn.Parameter:
    assert gates.width is not None
    return gates.width


def linear_of(gates: Gates) -> nn.Parameter:
    assert gates.linear is not None
    return gates.linear


def gradient(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None
    return tensor.grad


def two_sites() -> Gates:
    """Two sites that share unit 1."""
    sites = [WidthSite("a", (0, 1), (1, 2)), WidthSite("b", (1, UNGATED, 2), (1, 3, 1, 1))]
    return Gates(sites, [], width_init=0.75, linear_init=0.25)


# What it computes.


@settings(deadline=None)
@given(st.lists(unit_interval, min_size=3, max_size=3), unit_interval, st.integers(0, 99))
def test_the_forward_pass_is_the_papers_formula_on_binary_gates(
    width: list[float], linear: float, seed: int
) -> None:
    model = Gated().double().eval()
    set_gates(model.gates, width, [linear])
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    # The gates are kept in float32, and so rounded before they are compared.
    w = torch.tensor([float(torch.tensor(v) >= 0.5) for v in width] + [1.0]).double()
    d = float(torch.tensor(linear) >= 0.5)
    before = model.first(x)
    expected = model.second(w * (d * before + (1 - d) * before.relu()))
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)


@settings(deadline=None)
@given(st.lists(st.floats(0, 1, width=32), min_size=1, max_size=8))
def test_gates_are_exactly_zero_or_one_in_the_forward_pass(values: list[float]) -> None:
    hard = binarize(torch.tensor(values))
    assert hard.tolist() == [float(value >= 0.5) for value in values]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_binary_gates_have_the_dtype_of_the_real_ones(dtype: torch.dtype) -> None:
    hard = binarize(torch.tensor([0.1, 0.7], dtype=dtype))
    assert hard.dtype == dtype
    assert hard.tolist() == [0, 1]


def test_fresh_gates_change_no_bit() -> None:
    model, x = Gated(), torch.randn(5, 3)
    assert torch.equal(model(x), model.second(model.first(x).relu()))


def test_sites_get_their_vectors_in_order_and_shape() -> None:
    gates = Gates(
        [WidthSite("a", (1, 0), (1, 2)), WidthSite("b", (2, 1, UNGATED), (1, 3, 1, 1))],
        [DepthSite("a", 0), DepthSite("c", 1)],
        width_init=0.75,
        linear_init=0.25,
    )
    set_gates(gates, [0.0, 1.0, 0.0], [0.1, 0.9])
    a, b, first, second = gates()
    assert a.tolist() == [[1, 0]]
    assert b.flatten().tolist() == [0, 1, 1]
    assert b.shape == (1, 3, 1, 1)
    assert (first.item(), second.item()) == (0, 1)
    assert first.shape == second.shape == ()


@pytest.mark.parametrize("width", [0.0, 0.3, 1.0])
def test_channels_without_a_gate_always_pass(width: float) -> None:
    gates = two_sites()
    set_gates(gates, [width] * 3, [])
    _, vector = gates()
    assert vector.flatten()[1] == 1


def test_models_without_depth_sites_have_no_linear_gates() -> None:
    gates = two_sites()
    assert gates.linear is None
    assert gates.linearised().shape == (0,)
    assert [len(vector) for vector in gates()] == [1, 1]


def test_models_without_width_sites_have_no_width_gates() -> None:
    gates = Gates([], [DepthSite("a", 0)], width_init=0.75, linear_init=0.25)
    assert gates.width is None
    assert gates.live().shape == (0,)
    assert [vector.item() for vector in gates()] == [0]


# Gradients of w.


def test_the_gradient_of_w_at_a_removed_unit_is_that_of_its_activation() -> None:
    gates = two_sites()
    set_gates(gates, [0.0, 1.0, 1.0], [])
    value, weight = torch.randn(2, 5, 2), torch.randn(2, 5, 2)
    vector, _ = gates()
    output = width_gate(value, vector.view(1, 1, 2))
    assert not output[..., 0].any()
    (output * weight).sum().backward()
    expected = (weight * value)[..., 0].sum()
    torch.testing.assert_close(gradient(width_of(gates))[0], expected)


def test_the_gradient_of_w_passes_straight_through_inside_the_interval() -> None:
    gate = torch.tensor([0.0, 0.3, 0.5, 0.7, 1.0], requires_grad=True)
    weight = torch.randn(5)
    (binarize(gate) * weight).sum().backward()
    assert torch.equal(gradient(gate), weight)


def test_units_shared_by_two_sites_get_the_gradients_of_both() -> None:
    gates = two_sites()
    a, b = gates()
    left, right = torch.randn(4, 2), torch.randn(4, 3, 2, 2)
    (width_gate(left, a).sum() + width_gate(right, b).sum()).backward()
    expected = torch.stack(
        [left[:, 0].sum(), left[:, 1].sum() + right[:, 0].sum(), right[:, 2].sum()]
    )
    torch.testing.assert_close(gradient(width_of(gates)), expected)


def test_the_gradient_of_the_activation_is_gated() -> None:
    gates = two_sites()
    set_gates(gates, [0.2, 0.9, 1.0], [])
    value, weight = torch.randn(4, 2, requires_grad=True), torch.randn(4, 2)
    (width_gate(value, gates()[0]) * weight).sum().backward()
    assert torch.equal(gradient(value), weight * torch.tensor([0.0, 1.0]))


def test_a_removed_unit_comes_back_if_the_loss_wants_it() -> None:
    torch.manual_seed(3)
    teacher, x = Gated(), torch.randn(64, 3)
    target = teacher(x).detach()
    student = copy.deepcopy(teacher)
    set_gates(student.gates, [0.4, 0.75, 0.75], [0.25])
    optimizer = torch.optim.SGD([width_of(student.gates)], lr=0.5)
    before = nn.functional.mse_loss(student(x), target)
    assert before > 0
    before.backward()
    assert gradient(width_of(student.gates))[0] < 0
    for _ in range(20):
        optimizer.step()
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(student(x), target)
        loss.backward()
    assert student.gates.live()[0]
    assert torch.equal(student(x), target)


# Gradients of d.


@settings(deadline=None)
@given(st.sampled_from([0.0, 0.49, 0.5, 1.0]), st.integers(0, 99))
def test_the_gradients_of_a_linearity_gate_are_those_of_the_formula(gate: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    value, activated, weight = torch.randn(3, 4, 5, generator=generator, dtype=torch.float64)
    leaves = [
        tensor.clone().requires_grad_()
        for tensor in (value, activated, torch.tensor(gate, dtype=torch.float64))
    ]
    (linear_gate(*leaves) * weight).sum().backward()
    x, f, d = leaves
    hard = float(gate >= 0.5)
    torch.testing.assert_close(gradient(x), hard * weight)
    torch.testing.assert_close(gradient(f), (1 - hard) * weight)
    torch.testing.assert_close(gradient(d), (weight * (value - activated)).sum())


def test_the_gradient_of_d_is_the_difference_quotient_of_the_formula() -> None:
    value, activated = torch.randn(2, 4, 5, dtype=torch.float64)
    d = torch.tensor(0.0, dtype=torch.float64, requires_grad=True)
    linear_gate(value, activated, d).square().sum().backward()

    def loss(soft: float) -> Tensor:
        return (soft * value + (1 - soft) * activated).square().sum()

    step = 1e-6
    torch.testing.assert_close(
        gradient(d), (loss(step) - loss(-step)) / (2 * step), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("gate", [0.0, 1.0])
def test_a_linearity_gate_is_differentiable_twice(gate: float) -> None:
    d = torch.tensor(gate, dtype=torch.float64)

    def gated(x: Tensor) -> Tensor:
        return linear_gate(x, x.sigmoid(), d)

    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    assert gradcheck(gated, (x,))
    assert gradgradcheck(gated, (x,))


@pytest.mark.parametrize("odd", [math.inf, -math.inf, math.nan])
def test_nothing_of_the_branch_that_is_not_taken_leaks(odd: float) -> None:
    sound, unsound = torch.tensor([1.0, -2.0]), torch.tensor([odd, odd])
    assert torch.equal(linear_gate(sound, unsound, torch.tensor(0.5)), sound)
    assert torch.equal(linear_gate(unsound, sound, torch.tensor(0.4)), sound)


def test_signed_zeros_survive_a_linearity_gate() -> None:
    zero = linear_gate(torch.tensor([-0.0]), torch.tensor([0.0]), torch.tensor(1.0))
    assert math.copysign(1, zero.item()) == -1


def test_the_gradient_of_d_does_not_overflow_in_half_precision() -> None:
    value = torch.full((400,), 1000.0, dtype=torch.float16)
    d = torch.tensor(0.25, requires_grad=True)
    linear_gate(value, torch.zeros_like(value), d).backward(torch.ones_like(value))
    assert gradient(d) == 400_000


# Clipping.


def test_gates_are_clipped_by_a_training_step() -> None:
    gates = Gated().gates
    set_gates(gates, [-0.5, 1.5, 0.6], [1.5])
    gates.train()()
    torch.testing.assert_close(width_of(gates).data, torch.tensor([0.0, 1.0, 0.6]))
    assert linear_of(gates).item() == 1


def test_evaluation_moves_no_gate() -> None:
    gates = Gated().gates
    set_gates(gates, [-0.5, 1.5, 0.6], [1.5])
    state = copy.deepcopy(gates.state_dict())
    gates.eval()()
    assert all(torch.equal(state[name], tensor) for name, tensor in gates.state_dict().items())


def test_gates_beyond_the_interval_are_binary_all_the_same() -> None:
    gates = Gated().gates.eval()
    set_gates(gates, [-0.5, 1.5, 0.6], [1.5])
    width, linear = gates()
    assert width.tolist() == [[0, 1, 1, 1]]
    assert linear.item() == 1


def test_several_forward_passes_and_penalties_share_one_backward() -> None:
    model = Gated()
    batches = torch.randn(3, 4, 3)
    total = torch.zeros(())
    for batch in batches:
        total = total + model(batch).square().sum() + penalty(model)
    total.backward()
    accumulated = gradient(width_of(model.gates)).clone()
    model.zero_grad()
    for batch in batches:
        (model(batch).square().sum() + penalty(model)).backward()
    torch.testing.assert_close(gradient(width_of(model.gates)), accumulated)


# Questions.


def test_what_is_kept_and_linear_is_what_the_forward_pass_does() -> None:
    gates = Gates(
        [WidthSite("a", (0, 1), (1, 2)), WidthSite("b", (1, UNGATED), (1, 2))],
        [DepthSite("b", 0), DepthSite("c", 1)],
        width_init=0.75,
        linear_init=0.25,
    )
    set_gates(gates, [0.5, 0.4999], [0.4999, 0.5])
    assert gates.live().tolist() == [True, False]
    assert gates.linearised().tolist() == [False, True]
    vectors = gates.eval()()
    kept = [gates.kept(site).tolist() for site in gates.width_sites]
    assert kept == [[True, False], [False, True]]
    assert kept == [vector.flatten().bool().tolist() for vector in vectors[:2]]


@pytest.mark.parametrize(
    ("linear", "expected"),
    [
        ([0.0, 0.0], [True, True, True]),
        ([1.0, 0.0], [False, True, True]),
        ([0.0, 1.0], [True, True, True]),
        ([1.0, 1.0], [False, False, True]),
    ],
)
def test_a_unit_is_nonlinear_if_any_site_it_stands_at_is(
    linear: list[float], expected: list[bool]
) -> None:
    sites = [
        WidthSite("a", (0, 1, UNGATED), (3,)),
        WidthSite("b", (1, 2), (2,)),
        WidthSite("plain", (2,), (1,)),
    ]
    depth = [DepthSite("a", 0), DepthSite("b", 1)]
    for order in (sites, sites[::-1]):
        gates = Gates(order, depth, width_init=0.75, linear_init=0.25)
        set_gates(gates, [0.75] * 3, linear)
        assert gates.nonlinear().tolist() == expected


def test_units_of_a_model_without_depth_sites_are_nonlinear() -> None:
    assert two_sites().nonlinear().tolist() == [True] * 3


# Making, copying and keeping them.


BAD_WIDTHS = [(bad, 0.25) for bad in (0.49, 1.01, -1.0, math.nan)]
BAD_LINEARS = [(0.75, bad) for bad in (0.5, 1.0, -0.01, math.nan)]


@pytest.mark.parametrize(("width_init", "linear_init"), [*BAD_WIDTHS, *BAD_LINEARS])
def test_inits_that_would_change_the_model_are_refused(
    width_init: float, linear_init: float
) -> None:
    with pytest.raises(
        GateError, match=rf"width_init={width_init} .* would change the model; take"
    ):
        Gated(width_init=width_init, linear_init=linear_init)


@pytest.mark.parametrize("inits", [{"width_init": "a"}, {"linear_init": None}])
def test_inits_that_are_no_numbers_are_refused(inits: dict[str, Any]) -> None:
    with pytest.raises(GateError, match=r"init=.* is no number"):
        fxprune.instrument(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), **inits)


@pytest.mark.parametrize(("width_init", "linear_init"), [(0.5, 0.0), (1.0, 0.49)])
def test_inits_at_the_ends_of_their_intervals_change_nothing(
    width_init: float, linear_init: float
) -> None:
    model, x = Gated(width_init=width_init, linear_init=linear_init), torch.randn(5, 3)
    assert torch.equal(model(x), model.second(model.first(x).relu()))


def test_a_copy_has_gates_of_its_own() -> None:
    model, x = Gated(), torch.randn(5, 3)
    set_gates(model.gates, [0.1, 0.9, 0.9], [0.25])
    twin = copy.deepcopy(model)
    expected = model(x)
    assert torch.equal(twin(x), expected)
    set_gates(twin.gates, [0.9, 0.1, 0.9], [0.75])
    assert not torch.equal(twin(x), expected)
    assert torch.equal(model(x), expected)


def test_gates_are_saved_and_loaded_as_plain_weights() -> None:
    model, x = Gated(), torch.randn(5, 3)
    set_gates(model.gates, [0.1, 0.9, 0.6], [0.8])
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    loaded = Gated()
    loaded.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(loaded(x), model(x))
    assert torch.equal(width_of(loaded.gates), width_of(model.gates))
    assert set(model.gates.state_dict()) == {"width", "linear"}


def test_a_model_in_double_precision_is_double_throughout() -> None:
    model = Gated().double()
    output = model(torch.randn(5, 3, dtype=torch.float64))
    (output.sum() + penalty(model)).backward()
    assert output.dtype == torch.float64
    assert gradient(width_of(model.gates)).dtype == torch.float64
    assert penalty(model).dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gates_of_a_model_in_half_precision_still_move(dtype: torch.dtype) -> None:
    model = Gated().to(dtype)
    output = model(torch.randn(5, 3, dtype=dtype))
    assert output.dtype == dtype
    (output.float().sum() + penalty(model)).backward()
    before = width_of(model.gates).detach().clone()
    torch.optim.SGD([width_of(model.gates)], lr=1e-4).step()
    moved = (width_of(model.gates) - before).abs()
    assert bool(((moved > 0) & (moved < 1e-3)).all())
    assert model.gates.importance.dtype == torch.float32


def test_activations_keep_their_dtype_under_autocast() -> None:
    model, seen = Gated(), list[torch.dtype]()
    model.second.register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        output = model(torch.randn(5, 3))
        loss = output.float().square().sum() + penalty(model)
    loss.backward()
    assert seen == [torch.bfloat16]
    assert output.dtype == torch.bfloat16
    for gate in (width_of(model.gates), linear_of(model.gates)):
        assert gate.dtype == gradient(gate).dtype == torch.float32
        assert gradient(gate).isfinite().all()


def test_gates_are_captured_whole_by_the_compiler() -> None:
    model, x = Gated(), torch.randn(5, 3)
    compiled: Any = torch.compile(model, backend="eager", fullgraph=True)
    set_gates(model.gates, [0.1, 1.5, 0.6], [0.25])
    expected = copy.deepcopy(model)(x)
    (compiled(x).sum() + penalty(compiled)).backward()
    torch.testing.assert_close(compiled(x), expected)
    assert width_of(model.gates)[1] == 1
    assert gradient(width_of(model.gates))[0] != 0
