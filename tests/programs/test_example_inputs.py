"""Guessed inputs: the model runs on them, or the error says what was tried."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxprune.errors import ExampleInputError
from fxprune.programs.example_inputs import infer_example_inputs
from tests.conftest import randomise


class LeNet(nn.Module):
    """Only 28 × 28 fits its first linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 6, 5), nn.Conv2d(6, 16, 5)
        self.linear = nn.Linear(16 * 4 * 4, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.conv1(x).relu(), 2)
        x = F.max_pool2d(self.conv2(x).relu(), 2)
        return self.linear(x.flatten(1))


class Picky(nn.Module):
    """Accepts one size, and complains of others without a word."""

    def __init__(self, *size: int) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 2)
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        if tuple(x.shape[1:]) != self.size:
            raise AssertionError
        return self.layer(x)


class Pooled(nn.Module):
    """Any size does."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.pool = nn.Conv2d(4, 8, 3), nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.pool(self.conv(x)).flatten(1))


def guess(model: nn.Module) -> Tensor:
    (x,), kwargs = infer_example_inputs(model)
    assert kwargs == {}
    return x


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv1d": (lambda: nn.Sequential(nn.Conv1d(3, 4, 5), nn.ReLU()), (2, 3, 128)),
    "a long conv1d": (lambda: nn.Conv1d(1, 4, 400), (2, 1, 1000)),
    "audio": (lambda: nn.Sequential(nn.Conv1d(1, 4, 2000), nn.ReLU()), (2, 1, 16000)),
    "conv2d": (Pooled, (2, 4, 224, 224)),
    "lenet": (LeNet, (2, 1, 28, 28)),
    "cifar": (
        lambda: nn.Sequential(nn.Conv2d(3, 2, 32), nn.Flatten(), nn.Linear(2, 4)),
        (2, 3, 32, 32),
    ),
    "grouped conv2d": (lambda: nn.Conv2d(6, 6, 3, groups=3), (2, 6, 224, 224)),
    "conv3d": (lambda: nn.Conv3d(3, 1, 3), (2, 3, 16, 112, 112)),
    "a small conv3d": (
        lambda: nn.Sequential(nn.Conv3d(1, 1, (8, 32, 32)), nn.Flatten(), nn.Linear(1, 2)),
        (2, 1, 8, 32, 32),
    ),
    "linear": (lambda: nn.Sequential(nn.Linear(7, 3), nn.ReLU()), (2, 7)),
    "linear behind a flatten": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(784, 3)), (2, 784)),
    "linear over a sequence": (lambda: Picky(16, 5), (2, 16, 5)),
    "no batch norm's statistics": (
        lambda: nn.Sequential(nn.BatchNorm1d(7), nn.Linear(7, 3)).train(),
        (2, 7),
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_guess_has_the_size_the_model_takes(name: str) -> None:
    make, shape = MODELS[name]
    model = make()
    x = guess(model)
    assert (x.shape, x.dtype) == (shape, torch.float32)
    model.eval()(x)


def test_tokens_are_integers_of_the_vocabulary() -> None:
    model = nn.Sequential(nn.Embedding(11, 4), nn.Linear(4, 2))
    x = guess(model)
    assert (x.shape, x.dtype) == ((2, 16), torch.int64)
    assert 0 <= int(x.min()) < int(x.max()) < 11
    assert guess(model.double()).dtype == torch.int64


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_guess_has_the_dtype_of_the_weights(dtype: torch.dtype) -> None:
    assert guess(nn.Sequential(nn.Linear(7, 3)).to(dtype)).dtype == dtype


@pytest.mark.parametrize("attribute", ["default_cfg", "pretrained_cfg"])
def test_a_models_own_size_is_asked_first(attribute: str) -> None:
    model: Any = Pooled()
    setattr(model, attribute, {"input_size": (4, 20, 24)})
    assert guess(model).shape == (2, 4, 20, 24)


@pytest.mark.parametrize(
    "config", [{"input_size": (9, 20, 24)}, {"input_size": None}, {}, "224", 3]
)
def test_a_size_that_is_wrong_or_odd_is_passed_over(config: Any) -> None:
    model: Any = Pooled()
    model.default_cfg = config
    assert guess(model).shape == (2, 4, 224, 224)


def test_the_same_model_gets_the_same_guess() -> None:
    for model in (LeNet(), nn.Embedding(9, 2)):
        assert torch.equal(guess(model), guess(copy.deepcopy(model)))


def test_guessing_draws_no_random_numbers_of_the_users() -> None:
    images, tokens = nn.Sequential(LeNet(), nn.Dropout()).train(), nn.Embedding(9, 2)
    state = torch.get_rng_state()
    guess(images)
    guess(tokens)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_model_is_as_it_was() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    randomise(model).train()
    before = copy.deepcopy(model.state_dict())
    guess(model)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_models_hooks_may_fail_as_well() -> None:
    class Odd(Exception):
        pass

    def refuse(_: nn.Module, args: Any) -> None:
        if args[0].shape[-1] > 32:
            raise Odd("too large")

    model = Pooled()
    model.register_forward_pre_hook(refuse)
    assert guess(model).shape == (2, 4, 32, 32)


def test_when_nothing_fits_the_error_says_what_was_tried() -> None:
    model = nn.Sequential(nn.Conv2d(3, 2, 3), nn.Flatten(), nn.Linear(7, 4))
    with pytest.raises(ExampleInputError) as caught:
        infer_example_inputs(model)
    message = str(caught.value)
    assert message.startswith("no input for Sequential could be guessed (tried [2, 3, 224, 224]: ")
    assert "[2, 3, 32, 32]: " in message
    assert "mat1 and mat2 shapes cannot be multiplied" in message  # in torch's words of any version
    assert message.endswith("; pass example_inputs=(x,)")


def test_an_error_without_a_word_is_named_by_its_type() -> None:
    with pytest.raises(ExampleInputError, match=r"\(tried \[2, 5\]: AssertionError; \[2, 16, 5\]"):
        infer_example_inputs(Picky(3, 3, 5))


@pytest.mark.parametrize("model", [nn.ReLU(), nn.LSTM(3, 4), nn.Bilinear(2, 3, 4)])
def test_a_model_whose_first_layer_says_nothing_is_refused(model: nn.Module) -> None:
    with pytest.raises(ExampleInputError, match=r"could be guessed; pass example_inputs=\(x,\)$"):
        infer_example_inputs(model)


def test_a_model_of_two_inputs_is_refused() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.layer(x) + y

    with pytest.raises(ExampleInputError, match="missing 1 required"):
        infer_example_inputs(Two())
