"""Penalties: each term is the paper's formula, and finds its gates in whatever wraps the model."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fxprune.errors import GateError
from fxprune.gating.gates import UNGATED, DepthSite, Gates, WidthSite
from fxprune.gating.optimizer_groups import parameter_groups
from fxprune.gating.owners import gates_of
from fxprune.gating.penalties import (
    Depth,
    DepthBinary,
    Penalty,
    Width,
    WidthBinary,
    paper_penalties,
    penalty,
)

# Units of the sites of three layers; layer "c" has no linearity gate, unit 2 stands at two.
UNITS = {"a": (0, 1, UNGATED), "b": (2,), "c": (3, 2)}
DEPTH = {"a": 0, "b": 1}

unit_interval = st.floats(0, 1, width=32)
widths = st.lists(unit_interval, min_size=4, max_size=4)
depths = st.lists(unit_interval, min_size=2, max_size=2)
weights = st.floats(0, 10)


class Gated(nn.Module):
    """Stands for an instrumented model: weights, gates and penalties."""

    def __init__(self, *, width: bool = True, depth: bool = True) -> None:
        super().__init__()
        self.layer, self.frozen = nn.Linear(3, 4), nn.Linear(4, 2).requires_grad_(False)
        self.tied = nn.Linear(3, 4, bias=False)
        self.tied.weight = self.layer.weight
        self.gates = Gates(
            [WidthSite(n, u, (1, len(u))) for n, u in UNITS.items()] if width else [],
            [DepthSite(name, index) for name, index in DEPTH.items()] if depth else [],
            width_init=0.75,
            linear_init=0.25,
        )
        self.penalties = paper_penalties()

    def forward(self, x: Tensor) -> Tensor:
        return self.frozen(self.layer(x))


class Wrapper(nn.Module):
    """Holds a model as DistributedDataParallel does."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


def gated(width: list[float], depth: list[float]) -> Gated:
    model = Gated().double()
    assert model.gates.width is not None and model.gates.linear is not None
    model.gates.width.data.copy_(torch.tensor(width))
    model.gates.linear.data.copy_(torch.tensor(depth))
    return model


def close(actual: Tensor, expected: float) -> None:
    torch.testing.assert_close(
        actual, torch.tensor(expected, dtype=actual.dtype), rtol=1e-9, atol=1e-9
    )


def nonlinear_units(depth: list[float]) -> set[int]:
    """Return the units of layers that are nonlinear, by going through them."""
    return {
        unit
        for name, units in UNITS.items()
        for unit in units
        if unit != UNGATED and (name not in DEPTH or depth[DEPTH[name]] < 0.5)
    }


# The terms.


@settings(deadline=None)
@given(widths, depths, weights, weights, weights, weights)
def test_the_penalty_is_the_papers_sum(
    w: list[float], d: list[float], l1: float, l2: float, l3: float, l4: float
) -> None:
    model = gated(w, d)
    model.penalties = paper_penalties(width_binary=l1, depth_binary=l2, width=l3, depth=l4)
    expected = (
        l1 * sum(v * (1 - v) for v in w)
        + l2 * sum(v * (1 - v) for v in d)
        + l3 * sum(w[unit] for unit in nonlinear_units(d))
        + l4 * sum(1 - v for v in d)
    )
    close(penalty(model), expected)


def one_by_one(model: Any) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for term in model.penalties.values():
        total = total + term(model.gates)
    return total


def test_the_terms_at_once_have_the_gradients_of_each_once_and_twice() -> None:
    weights: dict[str, Any] = {"width_binary": 0.7, "depth_binary": 0.3, "width": 0.9, "depth": 0.2}
    wanted: list[list[Tensor]] = []
    for sum_of in (penalty, one_by_one):
        model: Any = gated([0.2, 1.3, -0.4, 0.0], [0.4, 0.8]).double()
        model.penalties = paper_penalties(**weights)
        gates = list(model.gates.parameters())
        first = torch.autograd.grad(sum_of(model).exp(), gates, create_graph=True)
        loss = torch.cat([grad.flatten() for grad in first]).square().sum()
        wanted.append([*first, *torch.autograd.grad(loss, gates)])
    for at_once, each in zip(*wanted, strict=True):
        torch.testing.assert_close(at_once, each, rtol=1e-12, atol=0)
        assert at_once.any()
    assert wanted[0][0][1] == wanted[0][0][2] == 0  # not within [0, 1]


@pytest.mark.parametrize("sum_of", [penalty, one_by_one])
def test_gates_that_were_clipped_are_pulled_at(sum_of: Callable[[Any], Tensor]) -> None:
    model: Any = gated([0.0, 1.0, 1.0, 0.5], [1.0, 0.0])
    model.penalties = paper_penalties(width_binary=1, depth_binary=2, width=4, depth=8)
    sum_of(model).backward()
    assert model.gates.width.grad.tolist() == [1, -1, 4 - 1, 4]  # 0 and 1 stand at a linear layer
    assert model.gates.linear.grad.tolist() == [-2 - 8, 2 - 8]


def test_terms_without_weight_leave_gates_a_gradient_of_zeros() -> None:
    model: Any = gated([0.2, 0.7, 0.4, 0.0], [0.4, 0.8])
    model.penalties = paper_penalties(0, 0, 0, 0)
    penalty(model).backward()
    assert all(gate.grad is not None and not gate.grad.any() for gate in model.gates.parameters())


def test_a_trained_weight_and_a_hook_keep_their_term_by_itself() -> None:
    model: Any = gated([0.2, 0.7, 0.4, 0.0], [0.4, 0.8])
    trained = nn.Parameter(torch.tensor(0.5))
    object.__setattr__(model.penalties["width"], "weight", trained)
    heard: list[Tensor] = []
    model.penalties["depth"].register_forward_hook(
        lambda term, inputs, output: heard.append(output)
    )
    penalty(model).backward()
    assert len(heard) == 1
    assert trained.grad is not None
    close(trained.grad, float(Width(1).forward(model.gates).detach()))


@settings(deadline=None)
@given(widths, depths)
def test_each_term_is_its_formula(w: list[float], d: list[float]) -> None:
    gates = gated(w, d).gates
    close(WidthBinary(2).forward(gates), 2 * sum(v * (1 - v) for v in w))
    close(DepthBinary(3).forward(gates), 3 * sum(v * (1 - v) for v in d))
    close(Width(5).forward(gates), 5 * sum(w[unit] for unit in nonlinear_units(d)))
    close(Depth(7).forward(gates), 7 * sum(1 - v for v in d))


def test_the_paper_sets_lambda_3_first_and_lambda_4_to_nothing() -> None:
    terms = paper_penalties()
    assert {name: term.weight for name, term in terms.items()} == {
        "width_binary": 1e-3,
        "depth_binary": 1e-3,
        "width": 1e-3,
        "depth": 0.0,
    }
    assert "weight=0.001" in repr(terms)


@settings(deadline=None)
@given(widths, depths)
def test_gradients_are_those_of_the_formula_with_the_indicator_constant(
    w: list[float], d: list[float]
) -> None:
    assume(all(0 < v < 1 for v in (*w, *d)))
    model = gated(w, d)
    l1, l2, l3, l4 = 0.5, 0.7, 1.1, 1.3
    model.penalties = paper_penalties(width_binary=l1, depth_binary=l2, width=l3, depth=l4)
    penalty(model).backward()
    assert model.gates.width is not None and model.gates.linear is not None
    counted = nonlinear_units(d)
    width = [l1 * (1 - 2 * v) + l3 * (unit in counted) for unit, v in enumerate(w)]
    linear = [l2 * (1 - 2 * v) - l4 for v in d]
    for gate, expected in ((model.gates.width, width), (model.gates.linear, linear)):
        assert gate.grad is not None
        torch.testing.assert_close(
            gate.grad, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-9
        )


@settings(deadline=None)
@given(st.floats(0.1, 5), st.floats(0, 0.99), st.floats(0.01, 0.99))
def test_gates_below_the_peak_drift_to_nothing_and_above_it_to_one(
    l1: float, ratio: float, w: float
) -> None:
    l3 = ratio * l1
    peak = 0.5 + l3 / (2 * l1)
    assume(abs(w - peak) > 1e-3)
    model = gated([w] * 4, [0.0, 0.0])
    model.penalties = paper_penalties(width_binary=l1, width=l3, depth_binary=0)
    penalty(model).backward()
    assert model.gates.width is not None and model.gates.width.grad is not None
    descends = model.gates.width.grad > 0
    assert descends.tolist() == [w < peak] * 4


@pytest.mark.parametrize("w", [0.01, 0.5, 0.99])
def test_every_gate_drifts_to_nothing_once_lambda_3_is_lambda_1(w: float) -> None:
    model = gated([w] * 4, [0.0, 0.0])
    model.penalties = paper_penalties(width_binary=1, width=1)
    penalty(model).backward()
    assert model.gates.width is not None and model.gates.width.grad is not None
    assert (model.gates.width.grad > 0).all()


def test_units_of_linear_layers_are_free_of_lambda_3() -> None:
    model = gated([1.0] * 4, [1.0, 1.0])
    # Units 2 and 3 stand at layer c, which no gate makes linear.
    assert Width(1)(model.gates) == 2
    assert gated([1.0] * 4, [1.0, 0.0]).gates.nonlinear().tolist() == [False, False, True, True]


def test_gates_an_optimizer_took_out_of_the_interval_count_as_clipped() -> None:
    model = gated([-0.25, 1.5, 0.0, 1.0], [-0.5, 1.5])
    close(WidthBinary(1).forward(model.gates), 0.0)
    close(Width(1).forward(model.gates), 2.0)
    close(Depth(1).forward(model.gates), 1.0)


@pytest.mark.parametrize(("width", "depth"), [(True, False), (False, True)])
def test_models_with_gates_of_one_kind_have_penalties(width: bool, depth: bool) -> None:
    model = Gated(width=width, depth=depth)
    model.penalties = paper_penalties(1, 1, 1, 1)
    expected = (4 * 0.75 * 0.25 + 4 * 0.75) if width else (2 * 0.75 * 0.25 + 2 * 0.75)
    total = penalty(model)
    torch.testing.assert_close(total, torch.tensor(expected))
    total.backward()
    assert all(p.grad is not None and p.grad.any() for p in model.gates.parameters())


# The terms are the user's.


class Square(Penalty):
    """A term of a user's own, with a parameter."""

    def __init__(self, weight: float) -> None:
        super().__init__(weight)
        self.shift = nn.Parameter(torch.zeros(()))

    def term(self, gates: Gates) -> Tensor:
        assert gates.width is not None
        return (gates.width - self.shift).square().sum()


def test_a_term_can_be_weighed_replaced_added_and_dropped() -> None:
    model = gated([0.5] * 4, [0.0, 0.0])
    model.penalties = paper_penalties(1, 0, 0, 0)
    close(penalty(model), 1.0)
    term: Any = model.penalties["width_binary"]
    term.weight = 3.0
    close(penalty(model), 3.0)
    model.penalties["width_binary"] = Width(1.0)
    close(penalty(model), 2.0)
    model.penalties["square"] = Square(2.0)
    close(penalty(model), 4.0)
    del model.penalties["width_binary"]
    close(penalty(model), 2.0)


def test_no_terms_at_all_are_no_penalty() -> None:
    model = gated([0.5] * 4, [0.0, 0.0])
    model.penalties = nn.ModuleDict()
    close(penalty(model), 0.0)


def test_a_penalty_without_a_term_says_so() -> None:
    with pytest.raises(NotImplementedError):
        Penalty(1.0)(Gated().gates)


class Returns(nn.Module):
    def __init__(self, value: Any) -> None:
        super().__init__()
        self.value = value

    def forward(self, gates: Gates) -> Any:
        return self.value


@pytest.mark.parametrize("value", [None, 3, "a", torch.ones(3)], ids=str)
def test_a_term_that_is_no_scalar_is_refused(value: Any) -> None:
    model = Gated()
    model.penalties["odd"] = Returns(value)
    with pytest.raises(GateError, match=r"the penalty Returns returned .*; return a tensor"):
        penalty(model)


# Finding the gates.


WRAPPERS: dict[str, Callable[[nn.Module], Any]] = {
    "a sequence": lambda model: nn.Sequential(nn.Flatten(), model),
    "a wrapper": Wrapper,
    "two wrappers": lambda model: Wrapper(Wrapper(model)),
    "DataParallel": nn.DataParallel,
    "torch.compile": torch.compile,
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_gates_are_found_inside_a_wrapper_and_counted_once(name: str) -> None:
    model = gated([0.6] * 4, [0.2, 0.3])
    wrapped = WRAPPERS[name](model)
    assert gates_of(wrapped) is model.gates
    assert torch.equal(penalty(wrapped), penalty(model))
    ours = {id(p) for p in model.gates.parameters()}
    assert {id(p) for p in parameter_groups(wrapped, lr=1)[1]["params"]} == ours


def test_several_gated_models_in_one_all_count() -> None:
    first, second = gated([0.6] * 4, [0.2, 0.3]), gated([0.7] * 4, [0.1, 0.1])
    both = nn.ModuleDict({"generator": first, "critic": second})
    torch.testing.assert_close(penalty(both), penalty(first) + penalty(second))
    decayed, gates = parameter_groups(both, lr=1, weight_decay=0.1)
    ours = {id(p) for model in (first, second) for p in model.gates.parameters()}
    assert {id(p) for p in gates["params"]} == ours
    assert not ours & {id(p) for p in decayed["params"]}


def test_an_attribute_called_gates_need_not_be_ours() -> None:
    class Mixture(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gates, self.expert = nn.Linear(2, 2), gated([0.6] * 4, [0.2, 0.3])

    model = Mixture()
    assert gates_of(model) is model.expert.gates


@pytest.mark.parametrize("ask", [penalty, gates_of, partial(parameter_groups, lr=1)])
def test_a_plain_model_is_refused_with_the_remedy(ask: Callable[[nn.Module], Any]) -> None:
    with pytest.raises(GateError, match=r"^Linear has no gates; call fxprune\.instrument"):
        ask(nn.Linear(2, 2))


def test_a_penalty_is_a_scalar_on_the_gates_device_whatever_holds_the_weights() -> None:
    model = Gated()
    model.layer.to("meta")
    total = penalty(model)
    assert (total.shape, total.device.type, total.dtype) == ((), "cpu", torch.float32)


# Groups.


def test_groups_hold_every_trained_parameter_exactly_once() -> None:
    model = Gated()
    model.penalties["square"] = Square(1.0)
    groups = parameter_groups(model, lr=0.1, weight_decay=0.01)
    grouped = [id(p) for group in groups for p in group["params"]]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == {id(p) for p in model.parameters() if p.requires_grad}


def test_gates_are_never_decayed() -> None:
    model = Gated()
    groups = parameter_groups(model, lr=0.1, weight_decay=0.01)
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    assert decayed == {id(model.layer.weight), id(model.layer.bias)}


def test_rates_are_those_asked_for() -> None:
    default = parameter_groups(Gated(), lr=0.3)
    chosen = parameter_groups(Gated(), lr=0.3, gate_lr=0.02, weight_decay=0.5)
    assert [group["lr"] for group in default] == [0.3, 0.1]
    assert [group["lr"] for group in chosen] == [0.3, 0.02]
    assert [group["weight_decay"] for group in chosen] == [0.5, 0.0]


@pytest.mark.parametrize(
    "rates",
    [{"lr": float("nan")}, {"lr": -1}, {"gate_lr": "x"}, {"weight_decay": float("inf")}],
    ids=str,
)
def test_what_is_no_rate_is_refused(rates: dict[str, Any]) -> None:
    with pytest.raises(GateError, match=f"{next(iter(rates))}=.* is no rate"):
        parameter_groups(Gated(), **{"lr": 0.1, **rates})


def test_a_rate_may_be_a_tensor() -> None:
    rate: Any = torch.tensor(0.2)
    assert parameter_groups(Gated(), lr=rate)[0]["lr"] is rate


def test_frozen_gates_are_not_trained() -> None:
    model = Gated()
    model.gates.requires_grad_(False)
    groups = parameter_groups(model, lr=0.1)
    assert groups[1]["params"] == []
    torch.optim.SGD(groups)


def test_a_step_with_decay_alone_moves_weights_and_no_gate() -> None:
    model = Gated()
    optimizer = torch.optim.SGD(parameter_groups(model, lr=0.5, weight_decay=1.0))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    after = model.state_dict()
    assert torch.equal(after["gates.width"], before["gates.width"])
    assert torch.equal(after["gates.linear"], before["gates.linear"])
    assert torch.equal(after["frozen.weight"], before["frozen.weight"])
    torch.testing.assert_close(after["layer.weight"], before["layer.weight"] / 2)
