"""A few random networks on every run of the tests; `make fuzz` tries as many as one likes."""

import pytest
import torch

from tools.fuzz import Tally, describe, draw, failure


@pytest.mark.filterwarnings("ignore")
def test_random_networks_come_out_equal() -> None:
    torch.set_num_threads(1)  # tensors this small only lose by a second one
    tally = Tally()
    for number in range(60):
        network, surgery = draw(number)
        error = failure(network, surgery, tally)
        assert error is None, describe(number, network, surgery, error)
    assert tally.outcomes["shrank"] >= 30
    assert tally.exchanged > 300
    assert sum(spread > 1e-6 for spread in tally.spreads) >= 25
