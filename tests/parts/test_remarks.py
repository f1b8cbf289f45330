"""What reports say of a part besides what passes did to it."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxprune


class Contrastive(nn.Module):
    """Two layers, the first under a second name, and what only a loss and another method read."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.ModuleDict({"first": nn.Linear(4, 6), "spare": nn.Linear(4, 6)})
        self.gates = nn.Linear(6, 3)  # a name that is taken
        self.again = self.net["first"]
        self.scale = nn.Parameter(torch.ones(()))
        self.project = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.gates(F.relu(self.again(x)))


def test_what_no_forward_reads_is_said_to_be_left_out() -> None:
    gated = fxprune.instrument(Contrastive(), torch.randn(5, 4))
    places = [change.where for change in gated.report.refused]
    assert places == ["scale", "net.spare", "project"]
    assert not {name.partition(".")[0] for name in gated.state_dict()} & {"scale", "project"}


def test_nothing_is_left_out_of_what_is_all_read() -> None:
    gated = fxprune.instrument(
        nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)), torch.randn(5, 4)
    )
    assert gated.report.refused == []
