"""A copy borrows weights while it is cut, and what a user holds stays as it is."""

import torch
from torch import Tensor, nn

import fxprune
from fxprune.testing import close_half
from fxprune.user_models.graph_modules import borrowing_copy
from tests.conftest import randomise


class Net(nn.Module):
    """Weights that are cut, folded, left alone, tied, read by the graph and written to by a run."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 4, max_norm=1.0)
        self.first, self.norm = nn.Conv1d(4, 6, 1), nn.BatchNorm1d(6)
        self.second = nn.Conv1d(6, 6, 3)
        self.head, self.tied = nn.Linear(6, 6), nn.Linear(6, 6)
        self.tied.weight = self.head.weight
        self.read = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(self.embedding(x).transpose(1, 2))).relu()
        x = self.tied(self.head(self.second(x).mean(2)).relu())
        return torch.nn.functional.linear(x, self.read.weight * 2)


def memory(model: nn.Module) -> set[int]:
    return {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}


def test_nothing_of_a_model_is_shared_or_changed() -> None:
    x = torch.randint(9, (2, 5))
    model = randomise(Net()).eval()
    gated = fxprune.instrument(model, x, check=False)
    close_half(gated)
    before = {name: tensor.clone() for name, tensor in gated.state_dict().items()}
    small = fxprune.finalize(gated, check=False)
    assert not memory(small) & memory(gated)
    assert small.get_submodule("head").weight is small.get_submodule("tied").weight
    after = gated.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    fxprune.finalize(gated)  # and it is the same function


def test_what_a_run_could_write_to_is_not_borrowed() -> None:
    gated = fxprune.instrument(Net().eval(), torch.randint(9, (2, 5)), check=False)
    copied = borrowing_copy(gated)
    held = memory(gated)
    borrowed = {n for n, p in copied.named_parameters() if p.untyped_storage().data_ptr() in held}
    layers = ("first", "norm", "second", "head")
    assert borrowed == {f"{name}.{part}" for name in layers for part in ("weight", "bias")} | {
        "tied.bias"
    }
