"""What is exported computes what torch computes, or nothing is written at all."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, fx, nn

from fxprune.compiler import finalize
from fxprune.deployment import onnx_program
from fxprune.deployment.export import OnnxCheck, export_onnx, onnx_session
from fxprune.errors import ExampleInputError, ExportError
from tests.conftest import randomise


class ConvNet(nn.Module):
    """A batch norm with statistics of its own, and a head for any input size."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = randomise(nn.BatchNorm2d(6))
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(6, 4)

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.drop(self.norm(self.conv(image)).relu().mean((2, 3))))


class Text(nn.Module):
    """Integers and bools go in; names, nesting, integers and what is no tensor come out."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 8)
        self.scale = nn.Parameter(torch.randn(8))

    def forward(self, ids: Tensor, mask: Tensor, times: int = 1, *, shift: Tensor) -> Any:
        words = self.embedding(ids) * mask[..., None] * self.scale
        logits = words.sum(1) * times + shift
        return {"logits": logits, "best": logits.argmax(1), "ids": ids, "all": (words, None, 3)}


class Broken(nn.Module):
    """Runs in torch, but the exporter has no ONNX for it."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.eigvals(x).real


@pytest.fixture
def image() -> Tensor:
    return torch.randn(1, 3, 8, 8)


def run(path: Path, *inputs: Tensor) -> list[Any]:
    session = onnx_session(path)
    names = [argument.name for argument in session.get_inputs()]
    arrays = [tensor.numpy() for tensor in inputs]
    return list(session.run(None, dict(zip(names, arrays, strict=True))))


def dims(path: Path) -> list[list[int | str]]:
    graph = onnx.load(path).graph
    shapes = [argument.type.tensor_type.shape.dim for argument in graph.input]
    return [[dim.dim_param or dim.dim_value for dim in shape] for shape in shapes]


def test_a_network_at_every_batch_size(tmp_path: Path, image: Tensor) -> None:
    model, path = ConvNet().train(), tmp_path / "net.onnx"
    check = export_onnx(model, path, image)
    assert model.training
    assert list(check.errors) == ["example on CPU", "batch 1 on CPU", "batch 3 on CPU"]
    assert max(check.errors.values()) < 1e-5
    model.eval()
    for batch in (1, 3, 5):
        images = torch.randn(batch, 3, 8, 8)
        np.testing.assert_allclose(
            run(path, images)[0], model(images).detach().numpy(), rtol=1e-4, atol=1e-5
        )
    assert dims(path) == [["batch", 3, 8, 8]]


def test_what_the_check_says(tmp_path: Path, image: Tensor) -> None:
    path = tmp_path / "net.onnx"
    check = export_onnx(ConvNet(), path, image)
    loaded = onnx.load(path)
    assert (check.path, check.bytes) == (str(path), path.stat().st_size)
    assert check.opset == loaded.opset_import[0].version >= 18
    assert (check.inputs, check.outputs) == (("image",), ("output",))
    assert json.loads(json.dumps(check.to_dict(), allow_nan=False))["opset"] == check.opset


def test_any_size(tmp_path: Path, image: Tensor) -> None:
    model, path = ConvNet().eval(), tmp_path / "net.onnx"
    check = export_onnx(model, path, image, dynamic_size=True)
    assert "size +32 on CPU" in check.errors
    assert dims(path) == [["batch", 3, "image_2", "image_3"]]
    images = torch.randn(2, 3, 17, 31)
    np.testing.assert_allclose(
        run(path, images)[0], model(images).detach().numpy(), rtol=1e-4, atol=1e-5
    )


def test_a_fixed_batch(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    check = export_onnx(ConvNet(), path, torch.randn(2, 3, 8, 8), dynamic_batch=False)
    assert dims(path) == [[2, 3, 8, 8]]
    assert list(check.errors) == ["example on CPU"]


def test_names_integers_and_nesting(tmp_path: Path) -> None:
    model, path = Text(), tmp_path / "text.onnx"
    ids = torch.randint(0, 50, (1, 7))
    shift = torch.randn(1, 8)
    inputs = ((ids, ids > 10), {"times": 3, "shift": shift})
    check = export_onnx(model, path, inputs)
    assert check.inputs == ("ids", "mask", "shift")
    # What is passed through needs a name of its own.
    assert check.outputs == ("logits", "best", "ids_output", "all_0")
    session = onnxruntime.InferenceSession(path)
    assert tuple(argument.name for argument in session.get_inputs()) == check.inputs
    assert tuple(argument.name for argument in session.get_outputs()) == check.outputs
    ids, shift = torch.randint(0, 50, (4, 7)), torch.randn(4, 8)
    expected = model(ids, ids > 10, 3, shift=shift)
    logits, best, same, words = run(path, ids, ids > 10, shift)
    np.testing.assert_allclose(logits, expected["logits"].detach().numpy(), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(best, expected["best"].numpy())
    np.testing.assert_array_equal(same, ids.numpy())
    assert words.shape == (4, 7, 8)


def test_names_that_are_taken_or_empty(tmp_path: Path) -> None:
    class Names(nn.Module):
        def forward(self, x: list[Tensor], x_0: Tensor) -> dict[str, Tensor]:
            return {"": x[0] + 2 * x[1] + 3 * x_0, "x_0": x_0 * 2}

    path, (one, two, three) = tmp_path / "names.onnx", torch.randn(3, 2, 4)
    check = export_onnx(Names(), path, ([one, two], three))
    assert check.inputs == ("x_0", "x_1", "x_0_input")
    assert check.outputs == ("output", "x_0_output")
    found = run(path, one, two, three)
    np.testing.assert_allclose(found[0], (one + 2 * two + 3 * three).numpy(), rtol=1e-5)
    np.testing.assert_allclose(found[1], (three * 2).numpy())


def test_a_model_that_overwrites_its_inputs_leaves_the_users(tmp_path: Path) -> None:
    class Overwrites(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x.exp(), x.mul_(2)

    image, path = torch.randn(2, 4), tmp_path / "net.onnx"
    before = image.clone()
    export_onnx(Overwrites(), path, image)
    assert torch.equal(image, before)
    np.testing.assert_allclose(run(path, image)[1], (before * 2).numpy())


def test_a_model_without_tensors_to_return(existing: Path) -> None:
    class Silent(nn.Module):
        def forward(self, x: Tensor) -> int:
            return x.shape[0]

    with pytest.raises(ExportError, match="Silent returns no tensor"):
        export_onnx(Silent(), existing, torch.randn(2, 4))


def test_sizes_onnxruntime_rejects_make_no_noise(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    class Halves(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.pixel_unshuffle(x, 2)

    export_onnx(Halves(), tmp_path / "net.onnx", torch.randn(2, 3, 8, 8), dynamic_size=True)
    assert capfd.readouterr() == ("", "")


def test_weights_keep_their_names(tmp_path: Path, image: Tensor) -> None:
    path = tmp_path / "net.onnx"
    export_onnx(ConvNet(), path, image)
    names = {weight.name for weight in onnx.load(path).graph.initializer}
    assert {"conv.weight", "head.weight", "head.bias"} <= names


def test_metadata_is_there_and_paths_are_not(tmp_path: Path, image: Tensor) -> None:
    path = tmp_path / "net.onnx"
    export_onnx(ConvNet(), path, image, metadata={"report": "c0ffee", "layers": {"conv": 6}})
    found = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    assert found.keys() == {"fxprune_version", "report", "layers"}
    assert found["report"] == "c0ffee"
    assert json.loads(found["layers"]) == {"conv": 6}
    text = path.read_bytes()
    for secret in (__file__, os.getcwd(), str(Path.home()), str(tmp_path), ".py", "File "):
        assert secret.encode() not in text


def test_models_of_ours_remember_their_inputs(tmp_path: Path, image: Tensor) -> None:
    model = fx.symbolic_trace(ConvNet().eval())
    model.meta["fxprune"] = {"example_inputs": ((image,), {})}
    assert export_onnx(model, tmp_path / "net.onnx").inputs == ("image",)
    with pytest.raises(ExportError, match="example_inputs="):
        export_onnx(ConvNet(), tmp_path / "other.onnx")


def test_large_models_keep_their_weights_beside(
    tmp_path: Path, image: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_program, "SINGLE_FILE_BYTES", 100)
    model, path = ConvNet().eval(), tmp_path / "net.onnx"
    check = export_onnx(model, path, image)
    files = sorted(tmp_path.iterdir())
    assert [file.name for file in files] == ["net.onnx", "net.onnx.data"]
    assert check.bytes == sum(file.stat().st_size for file in files)
    np.testing.assert_allclose(
        run(path, image)[0], model(image).detach().numpy(), rtol=1e-4, atol=1e-5
    )


@pytest.fixture
def existing(tmp_path: Path) -> Iterator[Path]:
    """A file that must be there, as it was, and alone, when the test is over."""
    path = tmp_path / "net.onnx"
    path.write_bytes(b"precious")
    yield path
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == b"precious"


def test_an_export_that_fails(existing: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ExportError, match=r"Broken cannot be exported.*linalg_eig") as raised:
        export_onnx(Broken(), existing, torch.randn(2, 3, 3))
    assert "\n" not in str(raised.value)
    assert capfd.readouterr() == ("", "")


def test_a_batch_that_cannot_be_dynamic(existing: Path) -> None:
    class Twos(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x[:, : 1 if x.shape[0] == 2 else 2]

    with pytest.raises(ExportError, match="dynamic_batch=False"):
        export_onnx(Twos(), existing, torch.randn(2, 3))


def test_a_batch_the_model_rejects(existing: Path) -> None:
    class Pairs(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.view(2, -1)

    with pytest.raises(ExportError, match=r"does not run on \(float32\[1, 3\]\).*dynamic_batch"):
        export_onnx(Pairs(), existing, torch.randn(2, 3))


class OtherSizes(nn.Module):
    """Python asks for a size, and does something else for another."""

    def __init__(self, asks: Callable[[Any], bool]) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 6, 3, padding=1), nn.Linear(6, 4)
        self.asks = asks

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x).relu()
        if self.asks(x.shape):
            y = y * 2
        return self.head(y.amax((2, 3)))


SIZES_ASKED: dict[str, Callable[[Any], bool]] = {
    "a batch": lambda shape: shape[0] > 4,
    "a batch, in steps": lambda shape: shape[0] // 4 > 0,
    "a height": lambda shape: shape[2] > 50,
    "a remainder": lambda shape: shape[2] % 3 == 0,
    "squares": lambda shape: shape[2] == shape[3],
    "an area": lambda shape: shape[2] * shape[3] > 2000,
}


@pytest.mark.parametrize("asks", SIZES_ASKED.values(), ids=SIZES_ASKED)
def test_sizes_at_which_the_file_would_be_another_model(
    existing: Path, asks: Callable[[Any], bool]
) -> None:
    inputs, model = torch.randn(2, 3, 8, 8), OtherSizes(asks)
    with pytest.raises(ExportError, match=r"something else on .* leaves open: .*dynamic_size"):
        export_onnx(model, existing, inputs, dynamic_size=True)
    with pytest.raises(ExportError, match=r"this model assumes .*dynamic_size"):
        export_onnx(finalize(model, inputs), existing, inputs, dynamic_size=True)


def test_sizes_that_operators_ask_for_stay_open(tmp_path: Path) -> None:
    class Squares(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = nn.functional.pixel_unshuffle(x, 2)
            return y + y.transpose(2, 3)

    path = tmp_path / "squares.onnx"
    export_onnx(Squares(), path, torch.randn(2, 3, 8, 8), dynamic_size=True)
    images = torch.randn(3, 3, 12, 12)
    np.testing.assert_allclose(run(path, images)[0], Squares()(images).numpy())


class Safe(nn.Module):
    """Keeps away from 0 by numbers that are nearly 0, and nearly 1."""

    def __init__(self, epsilon: float) -> None:
        super().__init__()
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        logs = (x.relu() + self.epsilon).log() - (self.epsilon + x.abs()).log()
        return logs + x / (x.abs().sum(1, keepdim=True) + self.epsilon) * (1 + 1e-6)


@pytest.mark.parametrize("epsilon", [1e-6, 1e-8, 1e-10, 1e-30])
@pytest.mark.parametrize("known", [True, False])
def test_a_small_number_stays_in_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, epsilon: float, known: bool
) -> None:
    if not known:  # another version of onnxscript
        monkeypatch.setattr(onnx_program, "_matcher_of_patterns", lambda: None)
    model, path = Safe(epsilon), tmp_path / "safe.onnx"
    export_onnx(model, path, torch.rand(2, 3) + 1)
    for x in (torch.zeros(2, 3), -torch.ones(2, 3), torch.tensor([[1e-9, 0.0, 3.0]])):
        np.testing.assert_allclose(run(path, x)[0], model(x).numpy(), rtol=1e-6)


class Wrong(onnxruntime.InferenceSession):
    """Stands for an exporter that is wrong."""

    def run(self, *args: Any, **kwargs: Any) -> list[Any]:
        return [np.asarray(array) * 1.001 for array in super().run(*args, **kwargs)]


def test_a_file_onnxruntime_computes_otherwise(
    existing: Path, image: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnxruntime, "InferenceSession", Wrong)
    with pytest.raises(ExportError, match=r"disagrees .* output is off by .* tolerance 1e-04"):
        export_onnx(ConvNet(), existing, image)


def test_an_example_of_zeros_is_not_all_that_is_compared(
    existing: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnxruntime, "InferenceSession", Wrong)
    model = nn.Conv2d(3, 4, 3, bias=False)
    with pytest.raises(ExportError, match="disagrees with torch on random"):
        export_onnx(model, existing, torch.zeros(1, 3, 8, 8), dynamic_batch=False)


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_full_disk_and_control_c(
    existing: Path, image: Tensor, monkeypatch: pytest.MonkeyPatch, failure: BaseException
) -> None:
    def fail(program: Any, destination: Path, **options: Any) -> None:
        destination.write_bytes(b"half a file")
        raise failure

    monkeypatch.setattr(torch.onnx.ONNXProgram, "save", fail)
    with pytest.raises((ExportError, KeyboardInterrupt)) as raised:
        export_onnx(ConvNet(), existing, image)
    if isinstance(failure, OSError):
        assert "No space left on device" in str(raised.value)


def test_a_good_export_replaces_what_was_there(tmp_path: Path, image: Tensor) -> None:
    path = tmp_path / "net.onnx"
    path.write_bytes(b"old")
    assert isinstance(export_onnx(ConvNet(), path, image), OnnxCheck)
    onnx.checker.check_model(path)
    assert list(tmp_path.iterdir()) == [path]


def test_places_that_cannot_be_written(tmp_path: Path, image: Tensor) -> None:
    (tmp_path / "file").touch()
    for path, what in {
        tmp_path / "missing" / "net.onnx": "No such file or directory",
        tmp_path / "file" / "net.onnx": "Not a directory",
        tmp_path: "is a directory",
    }.items():
        with pytest.raises(ExportError, match=what):
            export_onnx(ConvNet(), path, image)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_directory_without_permission(tmp_path: Path, image: Tensor) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(ExportError, match="Permission denied"):
        export_onnx(ConvNet(), tmp_path / "net.onnx", image)


def test_inputs_the_model_rejects(existing: Path) -> None:
    with pytest.raises(ExportError, match=r"does not run on \(float32\[1, 4, 8, 8\]\)"):
        export_onnx(ConvNet(), existing, torch.randn(1, 4, 8, 8))
    with pytest.raises(ExportError, match="missing a required argument"):
        export_onnx(ConvNet(), existing, {})
    with pytest.raises(ExampleInputError):
        export_onnx(ConvNet(), existing, 3)


def test_outputs_that_are_never_finite_prove_nothing(existing: Path) -> None:
    class Undefined(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (-x.abs() - 1).log()

    with pytest.raises(ExportError, match="not finite"):
        export_onnx(Undefined(), existing, torch.randn(2, 3))


def test_what_is_no_file_is_not_replaced(tmp_path: Path, image: Tensor) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(ExportError, match="is a device or a pipe"):
        export_onnx(ConvNet(), pipe, image)
    assert pipe.is_fifo()


@pytest.mark.parametrize("path", [None, 3, "a\0b", "a" * 300], ids=["none", "3", "null", "long"])
def test_what_is_no_path_is_refused(path: Any, image: Tensor) -> None:
    with pytest.raises(ExportError, match=r"is no path|cannot be written"):
        export_onnx(ConvNet(), path, image)
