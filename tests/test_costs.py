"""Parameters, MACs and bytes are those counted by hand; latency is that of one call."""

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxprune.costs import Costs, count_costs, latency
from fxprune.errors import ExampleInputError
from fxprune.gating.gates import Gates, WidthSite
from fxprune.user_models.inputs import Inputs


def images(batch: int) -> Inputs:
    return (torch.randn(batch, 3, 10, 10),), {}


def test_a_convolution_and_a_linear_layer() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 8 * 8, 5))
    parameters = (3 * 9 * 8 + 8) + (512 * 5 + 5)
    macs = 3 * 9 * 8 * 64 + 512 * 5
    assert count_costs(model, images(1)) == Costs(parameters, macs, 4 * parameters)


def test_macs_are_those_of_one_sample() -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3, groups=3, padding=1), nn.AdaptiveAvgPool2d(1))
    assert count_costs(model, images(1)).macs == count_costs(model, images(7)).macs == 9 * 6 * 100


def test_attention_counts_its_products() -> None:
    class Attention(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.scaled_dot_product_attention(x, x, x)

    inputs = (torch.randn(2, 4, 10, 8),), {}
    assert count_costs(Attention(), inputs).macs == 2 * 4 * 10 * 10 * 8


RECURRENT: dict[str, nn.Module] = {
    "LSTM": nn.LSTM(9, 6),
    "two layers": nn.LSTM(9, 6, 2, batch_first=True),
    "both ways": nn.LSTM(9, 6, 2, bidirectional=True),
    "GRU": nn.GRU(9, 6, 2, bidirectional=True),
    "RNN": nn.RNN(9, 6),
}


@pytest.mark.parametrize("name", RECURRENT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_recurrent_layers_multiply_by_every_weight_at_every_step(
    name: str, dtype: torch.dtype
) -> None:
    layer = RECURRENT[name].to(dtype)  # of which float32 may run fused
    weights = sum(p.numel() for p in layer.parameters() if p.ndim == 2)
    inputs = (torch.randn(4, 4, 9, dtype=dtype),), {}
    assert count_costs(layer, inputs).macs == 4 * weights


def encoder(layers: int = 2, nested: bool = False) -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 4, 24, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, layers, enable_nested_tensor=nested)


class SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


ATTENTION = 7 * 4 * 16 * 16 + 2 * 7 * 7 * 16


@pytest.mark.parametrize(
    ("model", "macs"),
    [(SelfAttention(), ATTENTION), (encoder(), 2 * (ATTENTION + 7 * 2 * 16 * 24))],
    ids=["attention", "encoder"],
)
def test_layers_of_transformers_cost_what_their_operators_do(model: nn.Module, macs: int) -> None:
    inputs = (torch.randn(3, 7, 16),), {}  # torch runs each as one operator in evaluation
    assert count_costs(model, inputs).macs == macs


def test_of_padded_sequences_what_runs_is_counted() -> None:
    padded = torch.zeros(2, 7, dtype=torch.bool)
    padded[1, 5:] = True
    inputs = (torch.randn(2, 7, 16),), {"src_key_padding_mask": padded}
    macs = sum(n * (4 * 16 * 16 + 2 * 16 * 24) + 2 * n * n * 16 for n in (7, 5))
    with pytest.warns(UserWarning, match="nested tensors"):
        assert count_costs(encoder(1, nested=True), inputs).macs == macs // 2


class Products(nn.Module):
    def __init__(self, product: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.product = product

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x)


VECTOR, MATRICES = torch.randn(6), torch.randn(4, 6, 3)


@pytest.mark.parametrize(
    ("product", "macs"),
    [
        (lambda x: x @ VECTOR, 4 * 5 * 6),
        (lambda x: torch.addmv(torch.zeros(5), x[0], VECTOR), 5 * 6),
        (lambda x: x[0, 0] @ VECTOR, 6),
        (lambda x: torch.addbmm(torch.zeros(5, 3), x, MATRICES), 4 * 5 * 6 * 3),
        (nn.Bilinear(6, 6, 2), 4 * 5 * 6 * 6 * 2),
    ],
    ids=["matrices and a vector", "plus something", "vectors", "summed up", "bilinear"],
)
def test_other_products_are_counted(product: Any, macs: int) -> None:
    model = Products(product if not isinstance(product, nn.Module) else lambda x: product(x, x))
    assert count_costs(model, ((torch.randn(4, 5, 6),), {})).macs == macs // 4


def test_inputs_are_taken_as_by_other_verbs() -> None:
    layer, x = nn.Linear(4, 6), torch.randn(2, 4)
    expected = count_costs(layer, ((x,), {}))
    assert count_costs(layer, x) == count_costs(layer, (x,)) == expected
    assert count_costs(layer, {"input": x}) == expected


def test_state_is_in_bytes_whatever_its_dtype() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3))
    # Weight, bias, mean and variance in float32, and how many batches there were as int64.
    assert count_costs(model, images(2)) == Costs(6, 0, 4 * 12 + 8)
    assert (
        count_costs(model.double(), ((torch.randn(2, 3, 4, 4).double(),), {})).bytes == 8 * 12 + 8
    )


def test_a_shared_weight_counts_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(10, 4)
            self.head = nn.Linear(4, 10, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.embedding(ids))

    found = count_costs(Tied(), ((torch.zeros(2, 3, dtype=torch.long),), {}))
    assert found == Costs(40, 3 * 40, 160)


def test_gates_cost_nothing() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 6)
            site = WidthSite("layer", tuple(range(6)), (6,))
            self.gates = Gates([site], [], width_init=1.0, linear_init=0.0)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) * self.gates()[0]

    inputs = (torch.randn(2, 4),), {}
    assert (
        count_costs(Gated(), inputs) == count_costs(nn.Linear(4, 6), inputs) == Costs(30, 24, 120)
    )


def test_the_model_is_left_as_it_was() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Dropout())
    model[1].eval()
    image = torch.randn(2, 3, 4, 4)
    count_costs(model, ((image,), {}))
    assert [part.training for part in model.modules()] == [True, True, False]
    assert model[0].num_batches_tracked == 0


def test_a_model_that_does_not_run_is_an_error() -> None:
    model = nn.Linear(3, 3)
    with pytest.raises(ExampleInputError, match=r"does not run on \(float32\[2, 4\]\)"):
        count_costs(model, ((torch.randn(2, 4),), {}))
    assert model.training


def test_costs_are_json() -> None:
    assert Costs(1, 2, 3).to_dict() == {"parameters": 1, "macs": 2, "bytes": 3}


def test_latency_is_the_median_of_one_call() -> None:
    calls: list[float] = []

    def function() -> None:
        calls.append(0.05 if len(calls) == 5 else 0.002)
        time.sleep(calls[-1])

    assert 0.002 <= latency(function, seconds=0, repeats=9) < 0.02
    assert len(calls) == 9 + 3
    calls.clear()
    latency(function, seconds=0.1, repeats=1)
    assert sum(calls) < 0.3
    assert len(calls) > 5
