"""Dicts of classes of their own, as outputs."""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxprune
from fxprune.errors import TraceError
from fxprune.testing import close_half, error
from tests.conftest import reloaded


class Result(dict[str, Any]):
    """A dict whose entries are attributes, too."""

    def __getattr__(self, name: str) -> Any:
        return self[name]


class Labelled(dict[str, Any]):
    """A dict that is not made of its entries alone."""

    def __init__(self, label: str, **entries: Any) -> None:
        super().__init__(**entries)
        self.label = label


class Hidden(nn.Module):
    """Returns what `give` makes of its layers' outputs."""

    def __init__(self, give: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.first, self.second, self.give = nn.Linear(4, 6), nn.Linear(6, 3), give

    def forward(self, x: Tensor) -> Any:
        x = self.second(F.relu(self.first(x)))
        return self.give(x, x.mean(1))


@pytest.mark.parametrize("kind", [OrderedDict, Result])
def test_outputs_stay_mappings_of_their_class(kind: type[dict[str, Tensor]]) -> None:
    model, x = Hidden(lambda x, mean: (kind(all=x, mean=mean), [kind(x=x)])), torch.randn(5, 4)
    gated: Any = fxprune.instrument(model, x)
    assert close_half(gated) == 3
    small: Any = fxprune.finalize(gated)
    assert small.report.verification.verdict == "equal" and small.second.in_features == 3
    for one in (gated, small, reloaded(small)):
        outputs, (nested,) = one(x)
        assert type(outputs) is type(nested) is kind and list(outputs) == ["all", "mean"]
        assert error(outputs["all"], gated(x)[0]["all"]) < 1e-5


def test_a_mapping_that_is_not_made_of_its_entries_alone_is_refused() -> None:
    with pytest.raises(TraceError, match="Labelled"):
        fxprune.instrument(
            Hidden(lambda x, mean: Labelled("a", all=x, mean=mean)), torch.randn(5, 4)
        )
