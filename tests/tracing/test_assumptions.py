"""Python that asks for sizes: answered from the example inputs, asserted in the graph."""

import copy
import math
import pickle
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

import fxprune
from fxprune.errors import TraceError
from fxprune.programs.program import Program, capture
from fxprune.proof.verification import Verification
from fxprune.testing import close_half, error
from fxprune.tracing.assumptions import assumptions
from fxprune.user_models.inputs import same
from tests.conftest import randomise


class Model(nn.Module):
    """Calls a function between a convolution and a head; the function may ask what it likes."""

    def __init__(self, function: Callable[["Model", Tensor], Any]) -> None:
        super().__init__()
        self.function = function
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.body, self.head = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 5, 1)
        self.register_buffer("threshold", torch.tensor(0.5))
        self.position = nn.Parameter(torch.randn(1, 3, 6, 6))
        randomise(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.function(self, x)
        x = self.body(F.relu(self.norm(self.stem(x))))
        return self.head(F.relu(x)).mean((2, 3))


def _pads(model: Model, x: Tensor) -> Tensor:
    _, _, h, w = x.shape
    if h % 7:
        x = F.pad(x, (0, 0, 0, 7 - h % 7))
    if w % 7 != 0:
        x = F.pad(x, (0, 7 - w % 7))
    return x


def _asserts(model: Model, x: Tensor) -> Tensor:
    _, c, h, w = x.shape
    assert c == 3 and h == w, f"{c} {h:d} {w}"
    return x


def _loops(model: Model, x: Tensor) -> Tensor:
    return torch.stack([x[:, i] * (i + 1) for i in range(x.shape[1])], 1)


def _unpacks(model: Model, x: Tensor) -> Tensor:
    b, *rest = x.shape
    return x.view(b, *rest)


def _views(model: Model, x: Tensor) -> Tensor:
    tokens = x.flatten(2).transpose(1, 2)
    b, n, c = tokens.shape
    return tokens.reshape(b, int(math.sqrt(n)), -1, c).permute(0, 3, 1, 2)


def _adds_a_dimension(model: Model, x: Tensor) -> Tensor:
    return x.unsqueeze(0) if x.ndim == 3 else x


def _interpolates(model: Model, x: Tensor) -> Tensor:
    position = model.position
    if x.shape[-2:] != position.shape[-2:]:
        position = F.interpolate(position, size=x.size()[2:], mode="bilinear")
    return x + position


def _scripts(model: Model, x: Tensor) -> Tensor:
    jit: Any = torch.jit
    if jit.is_scripting():
        return -x
    if model.training and x.dim() != 4:
        return -x
    return x


def _checks(model: Model, x: Tensor) -> Tensor:
    torch._assert(x.shape[2] % 2 == 0, f"{x.shape[2]} is odd")
    return x


def _rounds(model: Model, x: Tensor) -> Tensor:
    size = (math.ceil(x.shape[2] / 7) * 7, round(x.shape[3] * 1.5))
    return F.interpolate(x, size=size)


def _makes(model: Model, x: Tensor) -> Tensor:
    b, _, h, w = x.shape
    rows = torch.arange(h, device=x.device, dtype=x.dtype)
    return x + rows[:, None] * torch.ones(b, 1, 1, w, device=x.device, dtype=x.dtype)


def _reshapes(model: Model, x: Tensor) -> Tensor:
    shape = x.shape
    return torch.reshape(torch.reshape(x, (shape[0], -1)), (shape[0], 3, shape[2], shape[3]))


def _zips(model: Model, x: Tensor) -> Tensor:
    return torch.cat([part * k for part, k in zip(x.chunk(3, 1), (1, 2, 3), strict=True)], 1)


def _indexes(model: Model, x: Tensor) -> Tensor:
    return [x, -x, x, x * 2, x * 3][x.shape[1]]


def _lasts(model: Model, x: Tensor) -> Tensor:
    return x[:, list(reversed(range(len(x.shape) - 1)))] if len(x) else x


def _one_by_one(model: Model, x: Tensor) -> Tensor:
    return torch.stack([x[place] for place in range(len(x))])


# What each model assumes of inputs (2, 3, 6, 6).
MODELS: dict[str, tuple[Callable[[Model, Tensor], Tensor], set[str]]] = {
    "pads": (_pads, {"x.shape[2] % 7 != 0", "x.shape[3] % 7 != 0"}),
    "asserts": (_asserts, {"x.shape[1] == 3", "x.shape[2] == x.shape[3]"}),
    "loops": (_loops, {"x.shape[1] == 3"}),
    "unpacks": (_unpacks, {"len(x.shape) == 4"}),
    "views": (_views, set()),
    "adds a dimension": (_adds_a_dimension, {"not x.ndim == 3"}),
    "interpolates": (_interpolates, {"not x.shape[-2:] != position.shape[-2:]"}),
    "scripts": (_scripts, set()),
    "checks": (_checks, set()),
    "rounds": (_rounds, set()),
    "makes": (_makes, set()),
    "reshapes": (_reshapes, set()),
    "zips": (_zips, {"len(chunk) == 3"}),
    "indexes": (_indexes, {"x.shape[1] == 3"}),
    "takes the length": (_lasts, {"len(x.shape) == 4", "x.size(0) != 0"}),
    "takes one by one": (_one_by_one, {"x.size(0) == 2"}),
}


def captured(model: nn.Module, *inputs: Any, **named: Any) -> Program:
    return capture(model, (inputs, named))


def assumed(module: Any) -> set[str]:
    found = assumptions(module.graph).values()
    return {text.removeprefix("assumes ").partition(" (at ")[0] for text in found}


def verification(module: Any) -> Verification:
    return module.report.verification


def image(*shape: int) -> Tensor:
    return torch.randn(*(shape or (2, 3, 6, 6)))


@pytest.mark.parametrize("what", MODELS)
def test_what_python_asks_is_assumed_and_nothing_else(what: str) -> None:
    function, expected = MODELS[what]
    assert assumed(captured(Model(function), image()).module) == expected


@pytest.mark.parametrize("what", MODELS)
def test_models_that_ask_for_sizes_go_all_the_way(what: str) -> None:
    function, _ = MODELS[what]
    model, x = Model(function).eval(), image()
    gated = fxprune.instrument(model, x)
    assert torch.equal(gated(x), model(x))
    assert close_half(gated) > 0
    small = fxprune.finalize(gated)
    assert verification(small).verdict == "equal"
    assert small.get_parameter("body.weight").shape[:2] == (4, 4)
    larger = image(3, 3, 6, 6)
    if "x.size(0) == 2" not in assumed(small):
        torch.testing.assert_close(small(larger), gated.eval()(larger))


def test_other_sizes_are_refused_with_what_was_assumed_and_where() -> None:
    model = Model(_pads).eval()
    small = fxprune.finalize(fxprune.instrument(model, image()))
    with pytest.raises(AssertionError, match=r"assumes x\.shape\[2\] % 7 != 0 \(at .*\.py:\d+\)"):
        small(image(2, 3, 7, 6))
    torch.testing.assert_close(small(image(2, 3, 9, 5)).shape, model(image(2, 3, 9, 5)).shape)


def test_reports_list_what_is_assumed() -> None:
    gated = fxprune.instrument(Model(_pads), image())
    small = fxprune.finalize(gated)
    for report in (gated.report, small.report):
        assert [change.what.partition(" (at")[0] for change in report.assumptions] == [
            "assumes x.shape[2] % 7 != 0",
            "assumes x.shape[3] % 7 != 0",
        ]
        assert "assumes x.shape[2] % 7 != 0" in str(report) and report.to_dict()["assumptions"]


def test_a_plain_model_is_verified_on_what_it_was_traced_for() -> None:
    small = fxprune.finalize(Model(_pads).eval(), image(2, 3, 13, 13))
    checks = {check.name: check for check in verification(small).checks}
    assert checks["batch 3"].verdict == "equal"
    small = fxprune.finalize(Model(_interpolates).eval(), image())
    checks = {check.name: check for check in verification(small).checks}
    assert checks["size +32"].verdict == "skipped"
    assert "the candidate refuses: AssertionError: this model assumes" in checks["size +32"].reason


def _twice(model: Model, x: Tensor) -> Tensor:
    for _ in range(3):
        assert x.shape[1] == 3 and x.dim() == 4
    return x


def test_nothing_is_assumed_twice() -> None:
    program = captured(Model(_twice), image())
    assert len(program.graph.find_nodes(op="call_function", target=torch._assert)) == 2


def test_an_assumption_outlives_copying_pickling_and_dead_code_elimination() -> None:
    module = captured(Model(_pads).eval(), image()).module
    vars(module).pop("function", None)
    dumped = pickle.dumps(module)
    assert b"fxprune" not in dumped
    for other in (copy.deepcopy(module), pickle.loads(dumped)):
        other.graph.eliminate_dead_code()
        other.recompile()
        assert assumed(other) == assumed(module)
        x = image(4, 3, 5, 5)
        assert torch.equal(other(x), module(x))
        with pytest.raises(AssertionError, match="this model assumes"):
            other(image(2, 3, 7, 7))


class Hidden(nn.Module):
    """Asks a hidden tensor, whose channels go, for their number."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)
        self.width = 8

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        assert x.shape[1] == self.width
        b, c, *rest = x.shape
        if c % 4 == 0 and len(rest) == 2:
            x = x * c
        return self.second(x.view(b, c, *rest)).mean((2, 3))


@pytest.mark.parametrize("fold", [True, False])
def test_what_is_assumed_of_channels_that_go_holds_and_vanishes(fold: bool) -> None:
    model, x = Hidden(), image()
    gated = fxprune.instrument(model, x)
    assert "relu.shape[1] == 8" in assumed(gated)
    assert close_half(gated) == 4
    small = fxprune.finalize(gated, fold=fold)
    assert small.get_parameter("first.weight").shape[0] == 4
    assert assumed(small) == {"len(relu.shape) == 4"}
    assert verification(small).verdict == "equal"


# What is not answered.


REFUSED: dict[str, Callable[[Model, Tensor], Any]] = {
    "a comparison": lambda m, x: x if x.sum() > 0 else -x,
    "a buffer": lambda m, x: x if m.get_buffer("threshold") > 0 else -x,
    "a number": lambda m, x: x if x.sum().item() > 0 else -x,
    "a float": lambda m, x: x * float(x.sum()),
    "an index": lambda m, x: [x, -x][(x.sum() > 0).long()],
    "a size of data": lambda m, x: x * (x[x > 0].shape[0] % 7 == 0 or 2),
    "a value in a range": lambda m, x: x * len(range(int(x.max().item()))),
    "a list": lambda m, x: x * len([x for value in x[0, 0, 0].tolist() if value > 0]),
    "equality": lambda m, x: x if torch.equal(x, x * 1) else -x,
}


@pytest.mark.parametrize("what", REFUSED)
def test_numbers_of_tensors_are_never_told(what: str) -> None:
    with pytest.raises(TraceError, match="cannot be traced"):
        captured(Model(REFUSED[what]), image())


class Ends(nn.Module):
    """Leaves its loop at a size, inside a model that cannot be traced to its end."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Conv2d(3, 3, 2, stride=2) for _ in range(4)])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            if x.shape[-1] < 4:
                break
            x = block(x)
        return x


class Both(nn.Module):
    """A part that asks for sizes, and one that asks for data after it asked for a size."""

    def __init__(self) -> None:
        super().__init__()
        self.ends, self.branches = Ends(), Model(self._branches)

    @staticmethod
    def _branches(model: Model, x: Tensor) -> Tensor:
        assert x.shape[1] == 3
        return x if x.sum() > 0 else -x

    def forward(self, x: Tensor) -> Tensor:
        y = self.ends(x)
        assert y.shape[1] == 3
        return self.branches(y)


def test_only_what_asks_for_data_is_a_leaf() -> None:
    model, x = Both().eval(), image(2, 3, 16, 16)
    program = captured(model, x)
    leaves = [node.target for node in program.graph.nodes if "leaf_because" in node.meta]
    assert leaves == ["branches"]
    conv = "ends_blocks_{}"
    found = assumed(program.module)
    assert found == {
        "not x.shape[-1] < 4",
        f"not {conv.format(0)}.shape[-1] < 4",
        f"not {conv.format(1)}.shape[-1] < 4",
        f"{conv.format(2)}.shape[-1] < 4",
        f"{conv.format(2)}.shape[1] == 3",
    }
    torch.testing.assert_close(program.module(x), model(x))


def test_an_assumption_made_in_an_attempt_that_failed_is_made_again() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.branches = Model(Both._branches)

        def forward(self, x: Tensor) -> Tensor:
            size = x.shape[1]
            y = self.branches(x)
            assert size == 3
            return y

    assert assumed(captured(Outer().eval(), image()).module) == {"x.shape[1] == 3"}


def test_asking_for_sizes_changes_nothing_of_the_model() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3), Model(_pads)).train()
    state = copy.deepcopy(model.state_dict())
    program = captured(model, image())
    for name, tensor in program.module.state_dict().items():
        assert torch.equal(tensor, state[name]), name


# Arguments.


class Arguments(nn.Module):
    """Calls a function on a layer's output and on whatever else it was given."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function
        self.layer, self.other = nn.Linear(4, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)
        self.embedding = nn.Embedding(5, 4)

    def hidden(self, x: Tensor) -> Tensor:
        return F.relu(self.other(F.relu(self.layer(x))))

    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        return self.function(self, x, *args, **kwargs)


class Flagged(Arguments):
    """Arguments of all plain kinds."""

    def __init__(self) -> None:
        super().__init__(lambda: None)

    def forward(
        self,
        x: Tensor,
        flag: bool = False,
        mask: Tensor | None = None,
        mode: str = "plain",
        scale: float = 1.0,
        sizes: tuple[int, ...] = (),
    ) -> Tensor:
        y = self.hidden(x) * scale
        if flag and mode != "plain":
            y = -y
        if mask is not None:
            y = y * mask
        return self.head(y * len(sizes) if sizes else y)


@dataclass
class Pair:
    """A dataclass nobody registered."""

    left: Tensor
    right: Tensor | None = None


class Point(NamedTuple):
    """A named tuple of two tensors."""

    x: Tensor
    y: Tensor


@dataclass
class Output(OrderedDict[str, Any]):
    """An ordered dict with attributes, as transformers has them."""

    logits: Any = None
    hidden: Any = None

    def __post_init__(self) -> None:
        for name in ("logits", "hidden"):
            self[name] = getattr(self, name)


def rows(*shape: int) -> Tensor:
    return torch.randn(*(shape or (6, 4)))


ARGUMENTS: dict[str, tuple[nn.Module, tuple[Any, ...], dict[str, Any]]] = {
    "a flag": (Flagged(), (rows(), True), {}),
    "all by position": (Flagged(), (rows(), True, None, "other", 2.0, (1, 2)), {}),
    "all by keyword": (Flagged(), (), {"x": rows(), "flag": True, "mode": "b", "sizes": [1]}),
    "a tensor behind a flag": (Flagged(), (rows(), False, rows(6, 8)), {}),
    "None": (Flagged(), (rows(), False, None), {}),
    "a list": (
        Arguments(lambda m, x: m.head(m.hidden(x[0] + x[1]) * len(x))),
        ([rows(), rows()],),
        {},
    ),
    "a dict": (
        Arguments(lambda m, x: m.head(m.hidden(x["a"] + (x["b"] if "b" in x else 0)))),
        ({"a": rows(), "b": rows()},),
        {},
    ),
    "a nested dict": (
        Arguments(lambda m, x: m.head(sum(m.hidden(v) for _, v in x["a"].items()))),
        ({"a": {"b": rows(), "c": rows()}, "on": True},),
        {},
    ),
    "a dataclass": (
        Arguments(lambda m, x: m.head(m.hidden(x.left + x.right))),
        (Pair(rows(), rows()),),
        {},
    ),
    "a named tuple": (
        Arguments(lambda m, x: m.head(m.hidden(x.x + x.y))),
        (Point(rows(), rows()),),
        {},
    ),
    "zipped": (
        Arguments(
            lambda m, x: m.head(sum(k * m.hidden(f) for f, k in zip(x, (1, 2), strict=True)))
        ),
        ([rows(), rows()],),
        {},
    ),
    "gathered": (
        Arguments(lambda m, x, *r, **k: m.head(m.hidden(x + sum(r)) * (2 if k["on"] else 1))),
        (rows(), rows(), rows()),
        {"on": True},
    ),
    "integers": (
        Arguments(lambda m, x: m.head(m.hidden(m.embedding(x)))),
        (torch.arange(30).reshape(6, 5) % 5,),
        {},
    ),
}


def untraced(model: nn.Module, args: Any, kwargs: Any) -> Any:
    with torch.no_grad():
        return model(*args, **kwargs)


@pytest.mark.parametrize("what", ARGUMENTS)
def test_arguments_of_all_kinds_go_all_the_way(what: str) -> None:
    model, args, kwargs = ARGUMENTS[what]
    model.eval()
    example = (args, kwargs)
    gated = (
        fxprune.instrument(model, kwargs if not args else args) if not (args and kwargs) else None
    )
    if gated is None:
        program = captured(model, *args, **kwargs)
        assert torch.equal(program.module(*args, **kwargs), untraced(model, *example))
        return
    assert torch.equal(gated(*args, **kwargs), untraced(model, *example))
    assert close_half(gated) > 0
    small = fxprune.finalize(gated)
    # No case redraws or widens what a dataclass holds: its tensors are run as they are.
    expected = "inconclusive" if what == "a dataclass" else "equal"
    assert verification(small).verdict == expected
    assert fxprune.verify(gated.eval(), small, example).verdict == expected
    torch.testing.assert_close(small(*args, **kwargs), untraced(gated, *example))


def test_plain_arguments_have_the_example_s_value_or_are_refused() -> None:
    module = captured(Flagged(), rows(), True, None, "other").module
    x = rows()
    assert torch.equal(
        module(x, True, None, "other"), module(x, flag=True, mask=None, mode="other")
    )
    for wrong in ((False, None, "other"), (True, rows(6, 8), "other"), (True, None, "plain")):
        with pytest.raises(
            AssertionError, match=r"assumes (flag is True|mask is None|mode == 'oth)"
        ):
            module(x, *wrong)


def test_plain_arguments_that_are_their_defaults_may_be_left_out() -> None:
    module = captured(Flagged(), rows(), False, rows(6, 8), "plain", 1.0).module
    module(rows(), False, rows(6, 8))
    with pytest.raises(AssertionError, match=r"assumes scale == 1\.0"):
        module(rows(), False, rows(6, 8), scale=2.0)


def test_another_number_of_entries_is_refused() -> None:
    module = captured(Arguments(lambda m, x: sum(map(m.hidden, x))), [rows(), rows()]).module
    with pytest.raises(AssertionError, match=r"assumes len\(x\) == 2"):
        module([rows(), rows(), rows()])
    module = captured(Arguments(lambda m, x: m.hidden(x["a"])), {"a": rows()}).module
    with pytest.raises(AssertionError, match=r"assumes list\(x\) == \['a'\]"):
        module({"a": rows(), "mask": rows()})


OUTPUTS: dict[str, Callable[[Tensor], Any]] = {
    "a dict": lambda y: {"logits": y, "hidden": (y, -y)},
    "a tuple": lambda y: (y, [y, None]),
    "a named tuple": lambda y: Point(y, -y),
    "a dataclass": lambda y: Pair(y),
    "an ordered dict with attributes": lambda y: Output(y, (y, -y)),
}


@pytest.mark.parametrize("what", OUTPUTS)
def test_outputs_keep_their_type(what: str) -> None:
    model = Arguments(lambda m, x: OUTPUTS[what](m.head(m.hidden(x)))).eval()
    x = rows()
    gated = fxprune.instrument(model, x)
    assert close_half(gated) > 0
    small = fxprune.finalize(gated)
    assert verification(small).verdict == "equal"
    for module in (gated, small):
        assert type(module(x)) is type(model(x))
    if "attributes" in what:
        assert isinstance(small(x).logits, Tensor)


# Export.


@pytest.mark.parametrize("what", [w for w in MODELS if w != "takes one by one"])
def test_assumptions_go_through_the_exporter(what: str, tmp_path: Path) -> None:
    small = fxprune.finalize(Model(MODELS[what][0]).eval(), image())
    check = fxprune.export_onnx(small, tmp_path / "small.onnx")
    assert set(check.errors) == {"example on CPU", "batch 1 on CPU", "batch 3 on CPU"}


def test_an_assumption_on_the_batch_asks_for_a_fixed_one(tmp_path: Path) -> None:
    small = fxprune.finalize(Model(_one_by_one).eval(), image())
    with pytest.raises(fxprune.ExportError, match="dynamic_batch=False"):
        fxprune.export_onnx(small, tmp_path / "small.onnx")
    fxprune.export_onnx(small, tmp_path / "small.onnx", dynamic_batch=False)


def test_a_dataclass_is_no_input_of_a_file(tmp_path: Path) -> None:
    model = Arguments(lambda m, x: m.head(m.hidden(x.left + x.right))).eval()
    with pytest.raises(fxprune.ExportError, match="takes a dataclass"):
        fxprune.export_onnx(model, tmp_path / "small.onnx", (Pair(rows(), rows()),))


def test_plain_arguments_go_through_the_exporter(tmp_path: Path) -> None:
    small = fxprune.finalize(Flagged().eval(), (rows(), True, None, "other"))
    assert fxprune.export_onnx(small, tmp_path / "small.onnx").inputs == ("x",)


class Cache:
    """What a decoder keeps of the tokens before."""

    def __init__(self) -> None:
        self.kept: list[Tensor] = []

    def update(self, x: Tensor) -> Tensor:
        self.kept.append(x)
        return torch.cat(self.kept)


def test_an_object_among_the_arguments_takes_in_nothing_of_the_trace() -> None:
    def grows(m: Any, x: Any, cache: Any) -> Any:
        seen = cache.update(m.hidden(x))
        return m.head(seen if seen.shape[0] > 0 else x)

    cache = Cache()
    with pytest.raises(fxprune.FxpruneError):  # it is another with every run
        fxprune.instrument(Arguments(grows).eval(), (rows(), cache))
    assert all(type(kept) is Tensor for kept in cache.kept)


class AskingForClasses(nn.Module):
    """Asks what it is given, as code does that takes lists, too."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Any, time: Any = 0.0) -> Tensor:
        if not isinstance(x, Tensor):
            x = torch.cat(x, 1)
        if not torch.is_tensor(time):
            time = torch.tensor([time])
        if isinstance(x.shape, tuple) and isinstance(x.shape[0], int):
            x = x * 2
        parts = x.chunk(2, -1)
        if isinstance(parts, (list, tuple)) and torch.jit.isinstance(x, Tensor):
            x = torch.cat(parts[::-1], -1)
        assert not isinstance(x, nn.Parameter) and not isinstance(x, (list, str))
        return self.second(F.relu(self.first(x + time)))


def test_traced_values_are_of_the_class_that_they_will_be() -> None:
    model, x, time = AskingForClasses(), torch.randn(5, 4), torch.randn(1)
    for given in ((x, time), ([x[:, :1], x[:, 1:]], time), (x,)):
        gated: Any = fxprune.instrument(model, given)
        assert torch.equal(gated(*given), model(*given))
        assert close_half(gated) == 3
        small: Any = fxprune.finalize(gated)
        assert small.report.verification.verdict == "equal"


class AskingForTraces(nn.Module):
    """Looks at numbers to save work, but not where it is traced, as transformers makes masks."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        if isinstance(mask, fx.Proxy) or not bool(mask.all()):
            x = x * mask[:, None]
        return self.second(F.relu(self.first(x)))


def test_code_that_knows_of_traces_is_told_of_one() -> None:
    model, x = AskingForTraces().double(), torch.randn(5, 4, dtype=torch.float64)
    some = torch.tensor([True, False, True, True, False])
    gated: Any = fxprune.instrument(model, (x, torch.ones(5, dtype=torch.bool)))
    assert close_half(gated) == 3
    small: Any = fxprune.finalize(gated)
    for mask in (some, ~some):
        assert error(small(x, mask), gated(x, mask)) < 1e-12


class Registered(OrderedDict[str, Tensor]):
    """A class that pytree knows without keys, as the outputs of diffusers are."""


class RegisteredPair:
    """The same, which is no dict."""

    def __init__(self, first: Tensor, second: Tensor) -> None:
        self.first, self.second = first, second


pytree.register_pytree_node(
    Registered,
    lambda one: (list(one.values()), list(one)),
    lambda values, keys: Registered(zip(keys, values, strict=True)),
)
pytree.register_pytree_node(
    RegisteredPair,
    lambda one: ([one.first, one.second], None),
    lambda values, _: RegisteredPair(*values),
)


def test_outputs_of_classes_that_pytree_knows_without_keys() -> None:
    class Wrapping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Any:
            x = self.second(F.relu(self.first(x)))
            return Registered(mean=x.mean(1), all=x)

    gated: Any = fxprune.instrument(Wrapping(), torch.randn(5, 4))
    assert close_half(gated) == 3
    small: Any = fxprune.finalize(gated)
    assert small.report.verification.verdict == "equal"
    assert small.second.in_features == 3
    pair, other = RegisteredPair(torch.ones(2), torch.zeros(1)), RegisteredPair(*torch.ones(2, 2))
    assert same([pair], [pair]) and not same([pair], [other])
