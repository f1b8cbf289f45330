"""Models that are no program as a whole: regions found, instrumented, trained, cut, proved."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune
from torchvision.models import resnet18
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN

import fxprune
from fxprune.gating.owners import gates_by_name
from fxprune.gating.remembered import memory_of
from fxprune.testing import close_half, error
from fxprune.user_models.inputs import same
from tests.conftest import randomise, reloaded


def chain(first: int, last: int) -> nn.Sequential:
    return nn.Sequential(
        *(nn.Conv2d(first, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, last, 1)),
    )


class Stem(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = chain(3, 4)
        self.out_channels = 4

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Scored(nn.Module):
    """A head with a method that others call."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = chain(4, 2)

    def score(self, x: Tensor) -> Tensor:
        return self.layers(x).sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Untraceable(nn.Module):
    """What to do with the next image depends on the one before; the head sees several sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = Stem(), Scored()
        self.tied = nn.Sequential(nn.Linear(2, 5), nn.ReLU(), nn.Linear(5, 2))
        self.other = nn.Linear(5, 2)
        last: Any = self.tied[2]
        self.other.weight = last.weight

    def forward(self, images: list[Tensor]) -> list[Tensor]:
        found: list[Tensor] = []
        for image in images:
            x = self.stem(image[None])
            assert x.shape[1] == self.stem.out_channels
            if x.mean() > 100:
                continue
            small = self.head(F.avg_pool2d(x, 2))
            pooled = self.tied(small.mean((2, 3))) + self.other(x.mean((2, 3)).repeat(1, 2)[:, :5])
            found += [self.head(x), small, pooled]
        return found


def images() -> list[Tensor]:
    return [torch.randn(3, 12, 16), torch.randn(3, 10, 10)]


@pytest.fixture
def model() -> nn.Module:
    return randomise(Untraceable())


def test_regions_are_found_top_down_and_change_nothing(model: nn.Module) -> None:
    x = images()
    gated: Any = fxprune.instrument(model, (x,))
    assert set(gated._fxprune["regions"]) == {"stem", "head.layers"}
    for mode in (True, False):
        assert same(model.train(mode)(x), gated.train(mode)(x))
    refused = {change.where: change.what for change in gated.report.refused}
    assert "score" in refused["head"] and "shared with other" in refused["tied"]
    assert gated.stem.out_channels == 4 and copy.deepcopy(gated).stem.out_channels == 4
    inserted = [str(change) for change in gated.report.passes["insert_gates"]]
    assert any(line.startswith("stem.layers.2: width gate") for line in inserted)
    assert any(line.startswith("head.layers.4: width gate") for line in inserted)


def test_half_of_all_gates_go_exactly(model: nn.Module) -> None:
    x = images()
    gated: Any = fxprune.instrument(model, (x,)).eval()
    assert close_half(gated) == 14
    assert fxprune.architecture(gated)["stem.layers.2"]["live"] == 4
    small: Any = fxprune.finalize(gated)
    assert small.stem.layers.get_submodule("0").out_channels == 4
    assert error(gated(x), small(x)) < 1e-6
    report = small.report
    assert report.verification.verdict == "equal"
    assert report.verification.error["float64"] <= 1e-9
    names = {check.name for check in report.verification.checks}
    assert {"stem: example", "head.layers: extra 0", "around the regions"} <= names
    assert report.after.parameters < 0.6 * report.before.parameters
    assert report.after.macs < report.before.macs
    rows = {row.layer: row for row in fxprune.inspect(gated).rows}
    assert (rows["stem.layers.0"].live, rows["stem.layers.0"].total) == (4, 8)
    again = copy.deepcopy(small)
    assert str(again.report) == str(report) and same(again(x), small(x))


def test_what_was_cut_by_regions_is_gated_again(model: nn.Module) -> None:
    x = images()
    gated: Any = fxprune.instrument(model, (x,)).eval()
    close_half(gated)
    small: Any = fxprune.finalize(gated, fold=False)
    again: Any = fxprune.instrument(small, (x,)).eval()
    assert same(again(x), small(x))
    assert close_half(again) > 0
    assert error(again(x), fxprune.finalize(again)(x)) < 1e-6


def test_state_survives_its_way_through_a_dict(model: nn.Module) -> None:
    x = images()
    gated: Any = fxprune.instrument(model, (x,)).eval()
    close_half(gated)
    twin = fxprune.instrument(Untraceable(), (x,)).eval()
    twin.load_state_dict(gated.state_dict())
    assert same(gated(x), twin(x)) and not same(gated(x), model.eval()(x))


def test_gates_train_freeze_and_are_penalised_in_all_regions(model: nn.Module) -> None:
    gated: Any = fxprune.instrument(model, (images(),)).train()
    groups = fxprune.parameter_groups(gated, lr=0.1, gate_lr=0.5)
    sizes = sorted(p.numel() for p in groups[1]["params"])
    assert sizes[:2] == [1, 1] and sum(sizes[2:]) == 28  # a linearity gate in each region, units
    loss = sum((out.square().mean() for out in gated(images())), fxprune.penalty(gated))
    loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in groups[1]["params"])
    fxprune.freeze(gated)
    assert not any(p.requires_grad for p in groups[1]["params"])


def test_masks_become_speed_without_gates(model: nn.Module) -> None:
    layer: Any = model.get_submodule("stem.layers.3")
    prune.ln_structured(layer, "weight", amount=0.5, n=2, dim=0)
    layer.bias.data *= layer.weight_mask[:, 0, 0, 0]
    x = images()
    small: Any = fxprune.finalize(model, (x,))
    assert small.get_submodule("stem.layers.3").out_channels == 3
    assert error(model.eval()(x), small(x)) < 1e-5


class Peeking(nn.Module):
    """Reads a weight inside its stem, and calls its body by another name."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body = Stem(), Stem()
        self.body.layers = chain(4, 4)
        self.bodies = [self.body]

    def forward(self, x: Tensor) -> Tensor:
        first: Any = self.stem.layers[0]
        x = self.stem(x) * first.weight.mean()
        return self.bodies[0](x) if x.mean() > -100 else x


def test_what_the_model_reaches_by_other_ways_is_left_alone() -> None:
    gated: Any = fxprune.instrument(randomise(Peeking()), torch.randn(2, 3, 8, 8))
    refused = {change.where: change.what for change in gated.report.refused}
    assert gated._fxprune["regions"] == ["body.layers"]
    assert refused["stem"] == "no region: its layers.0.weight is used from outside of it"
    assert refused["body"] == "no region: the model calls it by other ways than its name"


class Hopeless(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) if x.mean() > 0 else x


def test_where_no_region_is_found_the_error_says_what_was_tried() -> None:
    with pytest.raises(fxprune.TraceError, match=r"cannot be traced.*layer: left alone: no gate"):
        fxprune.instrument(Hopeless(), torch.ones(2, 4))


class ManySided(nn.Sequential):
    """A module with more methods than a reason should name."""


for letter in "abcdefgh":
    setattr(ManySided, letter, lambda self: self[0])


def test_a_reason_names_a_few_methods_only() -> None:
    model: Any = Hopeless()
    model.layer = ManySided(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
    with pytest.raises(fxprune.TraceError, match="others may call its a, b, c, d, e, …;"):
        fxprune.instrument(model, torch.ones(2, 4))


class Wrapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Untraceable()

    def forward(self, x: Tensor) -> list[Tensor]:
        return self.inner(x)


def test_regions_are_found_inside_of_a_leaf_too() -> None:
    gated: Any = fxprune.instrument(randomise(Wrapped()), torch.randn(2, 3, 8, 8))
    assert set(gated._fxprune["regions"]) == {"inner.stem", "inner.head.layers"}


def detector() -> nn.Module:
    layers = {"layer1": "0", "layer2": "1"}
    body = BackboneWithFPN(resnet18(), layers, [64, 128], 16)
    model = FasterRCNN(
        body,
        num_classes=3,
        rpn_anchor_generator=AnchorGenerator(((16,), (32,), (64,)), ((1.0,),) * 3),
        min_size=64,
        max_size=64,
        box_score_thresh=0.0,
        rpn_post_nms_top_n_test=20,
        rpn_post_nms_top_n_train=20,
    )
    return randomise(model)


def test_a_detector_is_trained_and_cut(without_fxprune: Callable[[nn.Module, str], str]) -> None:
    model = detector().eval()
    x = [torch.rand(3, 64, 64)]
    gated: Any = fxprune.instrument(model, (x,))
    assert "backbone" in gated._fxprune["regions"]
    targets = [{"boxes": torch.tensor([[4.0, 4.0, 40.0, 40.0]]), "labels": torch.tensor([1])}]
    losses = gated.train()(x, targets)
    (sum(losses.values()) + fxprune.penalty(gated)).backward()
    (width,) = [p for name, p in gated.named_parameters() if name == "backbone.gates.width"]
    assert width.grad is not None and bool(width.grad.any())
    close_half(gated)
    small: Any = fxprune.finalize(gated)
    assert small.report.verification.verdict == "equal"
    assert small.report.after.parameters < 0.8 * small.report.before.parameters
    expected, found = gated.eval()(x)[0], small(x)[0]
    assert len(expected["boxes"]) and expected["boxes"].shape == found["boxes"].shape
    assert error(expected["scores"], found["scores"]) < 1e-3
    assert without_fxprune(small, "*m([torch.rand(3, 64, 64)])[0]") == "boxes labels scores"


class Autoencoder(nn.Module):
    """Draws its code in training, and takes the mean in evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 6))
        self.decoder = nn.Sequential(nn.Linear(3, 16), nn.ReLU(), nn.Linear(16, 6))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean, spread = self.encoder(x).chunk(2, 1)
        code = mean + torch.randn_like(mean) * spread.exp() if self.training else mean
        return self.decoder(code), mean


def test_a_model_that_draws_in_training_is_gated_whole() -> None:
    model, x = randomise(Autoencoder()).train(), torch.randn(4, 6)
    gated: Any = fxprune.instrument(model, x)
    assert not gated._fxprune["regions"]
    gated.train()
    assert not torch.equal(gated(x)[0], gated(x)[0])
    assert torch.equal(gated.eval()(x)[0], model.eval()(x)[0])
    assert close_half(gated) == 16
    small: Any = fxprune.finalize(gated)
    assert small.report.verification.verdict == "equal"
    assert small.report.after.parameters < 200
    whole: Any = fxprune.instrument(model.eval(), x)
    assert "regions" not in whole._fxprune or not whole._fxprune["regions"]


class Decides(nn.Module):
    """Python that depends on data, around two parts that do not."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = chain(4, 4), chain(4, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        left = self.left(x)
        return (left * 2 if left.mean() > 100 else left), self.right(x + left)


class Around(nn.Module):
    """A program but for one submodule in its midst."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.decides = chain(3, 4), Decides()
        self.head = nn.Sequential(nn.Conv2d(7, 9, 1), nn.ReLU(), nn.Conv2d(9, 2, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.cat(self.decides(self.stem(x)), 1))


INSIDE = ["decides.left", "decides.right"]


def test_what_is_inside_of_an_untraceable_submodule_is_gated_too() -> None:
    model, x = randomise(Around()), torch.randn(2, 3, 12, 12)
    gated: Any = fxprune.instrument(model, x)
    assert gated._fxprune["regions"] == INSIDE
    for mode in (True, False):
        assert torch.equal(model.train(mode)(x), gated.train(mode)(x))
    gates = 8 + 6 + 9 + 2 * (8 + 6)
    assert sum(site["total"] for site in fxprune.architecture(gated).values()) == gates
    loss = gated.train()(x).square().mean() + fxprune.penalty(gated)
    loss.backward()
    assert all(g.grad is not None for g in fxprune.parameter_groups(gated, lr=0.1)[1]["params"])
    twin = fxprune.instrument(Around(), x)
    assert close_half(gated) == 4 + 3 + 4 + 2 * (4 + 3)
    twin.load_state_dict(gated.state_dict())
    assert torch.equal(gated.eval()(x), twin.eval()(x))


@pytest.mark.parametrize("saved", [False, True])
def test_insides_are_cut_exactly(saved: bool, tmp_path: Any) -> None:
    model, x = randomise(Around()), torch.randn(2, 3, 12, 12)
    gated: Any = fxprune.instrument(model, x).eval()
    close_half(gated)
    if saved:
        torch.save(gated, tmp_path / "gated.pt")
        gated = torch.load(tmp_path / "gated.pt", weights_only=False)
    small: Any = fxprune.finalize(gated)
    assert error(gated(x), small(x)) < 1e-6
    for path in ("stem", *INSIDE):
        assert small.get_submodule(f"{path}.0").out_channels == 4
    report = small.report
    assert report.verification.verdict == "equal"
    names = {check.name for check in report.verification.checks}
    assert {"example", "decides.left: example", "around the regions"} <= names
    assert report.after.parameters < 0.6 * report.before.parameters
    rows = {row.layer: row for row in fxprune.inspect(gated).rows}
    assert (rows["decides.left.0"].live, rows["decides.left.0"].total) == (4, 8)
    assert (rows["stem.0"].live, rows["stem.0"].total) == (4, 8)


def test_masked_channels_inside_go_too() -> None:
    model, x = randomise(Around()), torch.randn(2, 3, 12, 12)
    left: Any = model.get_submodule("decides.left.0")
    prune.ln_structured(left, "weight", 0.5, 2, 0)
    with torch.no_grad():
        left.bias[left.weight_mask[:, 0, 0, 0] == 0] = 0
        norm: Any = model.get_submodule("decides.left.1")
        norm.bias.zero_()
        norm.running_mean.zero_()
    small: Any = fxprune.finalize(model, x)
    assert small.get_submodule("decides.left.0").out_channels == 4
    assert error(model.eval()(x), small(x)) < 1e-6


def test_a_model_with_insides_is_compacted_around_them() -> None:
    model, x = randomise(Around()), torch.randn(2, 3, 12, 12)
    gated: Any = fxprune.instrument(model, x).train()
    optimizer = torch.optim.SGD(fxprune.parameter_groups(gated, lr=0.1), momentum=0.9)
    gated(x).square().mean().backward()
    optimizer.step()
    close_half(gated)
    expected = gated.eval()(x)
    fewer: Any = fxprune.compact(gated, optimizer)
    assert fewer.get_submodule("stem.0").out_channels == 4
    assert fewer.get_submodule("decides.left.0").out_channels == 8
    assert error(expected, fewer.eval()(x)) < 1e-5
    small: Any = fxprune.finalize(fewer)
    assert small.get_submodule("decides.left.0").out_channels == 4
    assert error(expected, small(x)) < 1e-5


@pytest.mark.parametrize("kind", ["parameters", "macs"])
def test_insides_are_counted_once(kind: str) -> None:
    model, x = randomise(Around()), torch.randn(2, 3, 12, 12)
    gated: Any = fxprune.instrument(model, x)
    asked: dict[str, Any] = {kind: 0.5}
    budget = fxprune.Budget(gated, steps=9, **asked)
    before = fxprune.finalize(gated, fold=False).report.after
    norms = 2 * 8 * 3 if kind == "parameters" else 0  # are folded by what is counted
    assert budget.full == getattr(before, kind) - norms
    close_half(gated)
    owned: list[Any] = [*gates_by_name(gated).values()]
    terms = [gates.costs(kind, gates.live().double()) for gates in owned]
    small: Any = fxprune.finalize(gated)
    assert sum(terms) == getattr(small.report.after, kind)


class Fixed(nn.Module):
    """A backbone without gradients, whose numbers Python asks for, before a trained head."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.head = chain(3, 4), chain(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            features = self.backbone(x)
            if float(features.max()) > 1e9:
                features = features / 2
        return self.head(features)


def test_what_runs_without_gradients_is_not_gated() -> None:
    x = torch.randn(2, 3, 8, 8)
    gated = fxprune.instrument(Fixed(), x)
    assert set(gates_by_name(gated)) == {"head"}
    reasons = [str(change) for change in gated.report.refused]
    assert any(reason.startswith("backbone: left alone: the model calls it") for reason in reasons)
    assert all(parameter.requires_grad for parameter in gated.parameters())
    close_half(gated)
    small = fxprune.finalize(gated)
    assert error(small(x), gated.eval()(x)) < 1e-5


class Encoder(nn.Module):
    """Its layers, of one shape, are used in another order than they are made in."""

    first: nn.Module
    second: nn.Module
    last: nn.Module

    def __init__(self, ordered: bool) -> None:
        super().__init__()
        names = ("first", "second", "last")
        for name in names if ordered else reversed(names):
            self.add_module(name, nn.Linear(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.relu(self.second(F.relu(self.first(x)))))


def average_into(target: nn.Module, online: nn.Module) -> None:
    for mine, other in zip(target.parameters(), online.parameters(), strict=False):
        mine.data.lerp_(other.data, 0.5)


class Teacher(nn.Module):
    """A model that no trace goes through, with an average of one of its parts beside it."""

    def __init__(self, ordered: bool) -> None:
        super().__init__()
        self.online = Encoder(ordered)
        self.target = copy.deepcopy(self.online).requires_grad_(False)
        self.predictor = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x + 1 if float(x.sum()) > 1e9 else x
        with torch.no_grad():
            target = self.target(x)
        return self.predictor(self.online(x)), target


class Updating(Teacher):
    def update(self) -> None:
        average_into(self.target, self.online)


class Counting(Teacher):
    def counts(self) -> list[Tensor]:
        return [buffer for buffer in self.target.buffers() if buffer.dim() == 0]


def test_code_that_lists_buffers_does_not_mind_the_order_of_parameters() -> None:
    gated: Any = fxprune.instrument(randomise(Counting(ordered=False)), torch.randn(4, 8))
    assert sorted(memory_of(gated)["regions"]) == ["online", "predictor"]


@pytest.mark.parametrize("kind", [Teacher, Updating])
@pytest.mark.parametrize("ordered", [True, False])
def test_code_that_pairs_parameters_finds_them_in_their_order(
    kind: type[Teacher], ordered: bool
) -> None:
    model: Any = randomise(kind(ordered))
    gated: Any = fxprune.instrument(model, torch.randn(4, 8))
    regions = ["predictor"] if kind is Updating and not ordered else ["online", "predictor"]
    assert sorted(memory_of(gated)["regions"]) == regions
    told = [change.what for change in gated.report.refused if change.where == "online"]
    assert any("in the order of their use" in what for what in told) == (len(regions) == 1)
    gates = {change.where.split(".")[0] for change in gated.report.passes["insert_gates"]}
    assert gates == set(regions)
    if kind is not Updating:
        return
    loaded = reloaded(gated)
    for one in (model, gated, loaded):
        one.update()
    for found in (gated, loaded):
        for name, parameter in model.target.named_parameters():
            assert torch.equal(found.target.get_parameter(name), parameter)


class Counted(nn.Module):
    """A model that no trace goes through, which keeps what it has seen."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.parts = Encoder(ordered=True), [nn.Identity()]
        self.seen: list[Tensor] = []
        self.by_name: dict[str, Any] = {"calls": 0}
        self.register_buffer("last", None)

    def forward(self, x: Tensor) -> Tensor:
        x = x + 1 if float(x.sum()) > 1e9 else x
        x = self.net(x)
        self.seen.append(x.detach().mean())
        self.by_name = {"calls": self.by_name["calls"] + 1}
        self.average = getattr(self, "average", 0.0) + x.detach().mean()
        self.last = x.detach().mean(0)
        return x


@pytest.mark.parametrize("ran", [True, False])
def test_nothing_is_kept_of_the_runs_that_instrument_makes(ran: bool) -> None:
    model: Any = randomise(Counted())
    x = torch.randn(4, 8)
    if ran:
        model(x)
    gated: Any = fxprune.instrument(model, x)
    assert gated.state_dict().keys() >= model.state_dict().keys()
    assert ("last" in gated.state_dict()) == ran
    for one in (model, gated):
        one(x)
    assert len(gated.seen) == len(model.seen) == 1 + ran
    assert torch.equal(torch.stack(gated.seen), torch.stack(model.seen))
    assert gated.by_name == model.by_name and torch.equal(gated.average, model.average)
    assert gated.report and fxprune.finalize(gated).report


COLLECTED: list[Tensor] = []


def collect(module: nn.Module, args: Any, output: Tensor) -> None:
    """Keep what a layer returned, for the forward that is running."""
    COLLECTED.append(output)


class Collecting(nn.Module):
    """Returns what its block did too, by a hook that its first call registers."""

    is_watched = False

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)))

    def forward(self, x: Tensor) -> list[Tensor]:
        if not self.is_watched:
            self.block.register_forward_hook(collect)
            self.is_watched = True
        COLLECTED.clear()
        return [self.block(x + 1 if x.sum() > 1e9 else x), *COLLECTED]


@pytest.mark.parametrize("ran", [True, False])
def test_hooks_that_a_first_call_registers_are_registered_once(ran: bool) -> None:
    model, x = Collecting().eval(), torch.randn(3, 4)
    if ran:
        model(x)
    gated: Any = fxprune.instrument(model, x)
    assert set(gates_by_name(gated)) == {"block.0"}
    assert len(gated.block._forward_hooks) == ran
    for one in (gated, fxprune.finalize(gated)):
        assert len(one(x)) == len(model(x)) == 2


class Nesting(nn.Module):
    """Gives a nested tensor of sequences that came one behind the other."""

    def __init__(self, layout: torch.layout) -> None:
        super().__init__()
        self.layout = layout

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        return torch.nested.nested_tensor(list(x.split(lengths.tolist())), layout=self.layout)


class Nested(nn.Module):
    """Computes on a nested tensor, and returns one: ViTs of images of any size."""

    def __init__(self, layout: torch.layout, inside: bool) -> None:
        super().__init__()
        self.nest, self.inside = Nesting(layout), inside
        self.first = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
        self.last = copy.deepcopy(self.first)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        x = self.first(x)
        return self.last((self.nest if self.inside else self.nest.forward)(x, lengths))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
def test_around_nested_tensors_a_model_is_cut(layout: torch.layout, inside: bool) -> None:
    model = randomise(Nested(layout, inside)).eval()
    inputs = (torch.randn(7, 4), torch.tensor([3, 4]))
    gated: Any = fxprune.instrument(model, inputs)
    assert [change.where for change in gated.report.passes["insert_gates"]] == ["first.1"] * 2
    assert "last: no region: Sequential is called with nested tensors" in str(gated.report)
    assert close_half(gated) == 4
    small: Any = fxprune.finalize(gated)
    assert small.report.verification.verdict == "equal"
    assert small.first.get_submodule("0").out_features == 4
    for case in (inputs, (torch.randn(6, 4), torch.tensor([1, 2, 3]))):
        assert same(gated(*case), copy.deepcopy(gated)(*case))
        expected, actual = gated(*case).unbind(), small(*case).unbind()
        assert all(error(*pair) < 1e-6 for pair in zip(expected, actual, strict=True))


def test_nested_tensors_are_no_example_inputs() -> None:
    x = torch.nested.nested_tensor([torch.randn(3, 4), torch.randn(2, 4)], layout=torch.jagged)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
    with pytest.raises(fxprune.ExampleInputError, match="called with nested tensors"):
        fxprune.instrument(model, x)


class Supervised(nn.Module):
    """A part that keeps what it computes in a list of its model's."""

    def __init__(self, heads: list[Tensor]) -> None:
        super().__init__()
        self.net, self.head, self.heads = Encoder(ordered=True), nn.Linear(8, 8), heads

    def forward(self, x: Tensor) -> Tensor:
        x = self.net(x) + (1 if float(x.detach().sum()) > 1e9 else 0)
        self.heads[0] = x * 2
        return x


class DeeplySupervised(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.heads = [torch.zeros(1)]
        self.part = Supervised(self.heads)

    def forward(self, x: Tensor) -> Tensor:
        x = self.part(x)
        return x + self.heads[0] if float(x.detach().sum()) < 1e9 else x


def test_a_list_that_parts_share_is_one_in_their_copies() -> None:
    model: Any = randomise(DeeplySupervised())
    gated: Any = fxprune.instrument(model, torch.randn(4, 8))
    assert gated.heads is gated.part.heads and torch.equal(gated.heads[0], torch.zeros(1))
    x = torch.randn(4, 8)
    assert torch.equal(gated(x), model(x))


class Forces(nn.Module):
    """A force field: what moves atoms is the gradient of an energy."""

    def __init__(self) -> None:
        super().__init__()
        self.energy = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 1))

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return -torch.autograd.grad(self.energy(x).sum(), x, create_graph=True)[0]


def test_what_differentiates_its_regions_is_proved_with_their_gradients() -> None:
    model: Any = randomise(Forces())
    x = torch.randn(5, 3)
    gated: Any = fxprune.instrument(model, x)
    assert torch.equal(gated(x), model(x))
    close_half(gated)
    small: Any = fxprune.finalize(gated)
    assert small.energy.get_submodule("0").out_features == 8
    check = next(one for one in small.report.verification.checks if "around" in one.name)
    assert check.verdict == "equal" and check.error == 0
    for inputs in (x, torch.randn(2, 3)):
        assert error(gated(inputs), small(inputs)) < 1e-5
