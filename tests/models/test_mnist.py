"""The loader finds MNIST in each of its three forms, and says so where it is not whole."""

import gzip
import math
import struct
from pathlib import Path

import pytest
import torch

from models.mnist import MEAN, RANKS, STD, load_images, load_mnist

COUNTS = {"train": 3, "t10k": 2}


def idx(name: str) -> bytes:
    """Return a small IDX file: every image is its index in the set, and so is its label."""
    count = COUNTS[name.partition("-")[0]]
    sizes = (count, 28, 28)[: RANKS[name]]
    entries = bytes(index for index in range(count) for _ in range(math.prod(sizes[1:])))
    return bytes((0, 0, 8, len(sizes))) + struct.pack(f">{len(sizes)}I", *sizes) + entries


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "fxprune"


@pytest.fixture
def archives(tmp_path: Path) -> Path:
    folder = tmp_path / "archives"
    folder.mkdir()
    for name in RANKS:
        (folder / f"{name}.gz").write_bytes(gzip.compress(idx(name)))
    return folder


@pytest.fixture
def torchvision_root(tmp_path: Path) -> Path:
    raw = tmp_path / "root" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name in RANKS:
        (raw / name).write_bytes(idx(name))
    return tmp_path / "root"


def test_the_shipped_files_are_mnist(cache: Path) -> None:
    train, test = load_mnist()
    images, labels = load_images(train)
    assert images.shape == (60_000, 1, 28, 28)
    assert torch.bincount(labels).tolist() == [
        *(5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949)
    ]
    assert abs(images.mean()) < 1e-3
    assert abs(images.std() - 1) < 1e-3
    assert len(test) == 10_000
    assert len(list(cache.glob("mnist-*/MNIST/raw/*"))) == 4


def test_images_are_normalised(archives: Path) -> None:
    images, labels = load_images(load_mnist(archives)[0])
    assert labels.tolist() == [0, 1, 2]
    torch.testing.assert_close(images[2], torch.full((1, 28, 28), (2 / 255 - MEAN) / STD))


def test_a_torchvision_root_is_read_where_it_lies(torchvision_root: Path, cache: Path) -> None:
    assert [len(part) for part in load_mnist(torchvision_root)] == [3, 2]
    assert not cache.exists()


def test_unpacking_happens_once(archives: Path, cache: Path) -> None:
    load_mnist(archives)
    before = {path: path.stat().st_mtime_ns for path in cache.rglob("*")}
    load_mnist(archives)
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*")} == before


def test_folders_with_the_same_names_do_not_share_a_cache(archives: Path, cache: Path) -> None:
    load_mnist(archives)
    for name in RANKS:
        (archives / f"{name}.gz").write_bytes(gzip.compress(idx(name)[:-1] + b"\7"))
    load_mnist(archives)
    assert len(list(cache.iterdir())) == 2


def test_an_interrupted_unpacking_leaves_no_half_file(
    archives: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(part: Path, target: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr(Path, "replace", interrupt)
        with pytest.raises(KeyboardInterrupt):
            load_mnist(archives)
    assert not [path for path in cache.rglob("*") if path.is_file()]
    assert len(load_mnist(archives)[0]) == 3


@pytest.mark.parametrize("name", RANKS)
def test_a_truncated_archive_is_named(archives: Path, name: str) -> None:
    archive = archives / f"{name}.gz"
    archive.write_bytes(archive.read_bytes()[:-12])
    with pytest.raises(FileNotFoundError, match=rf"{name}\.gz is truncated"):
        load_mnist(archives)


@pytest.mark.parametrize("length", [0, 3, 10, 100])
@pytest.mark.parametrize("name", ["train-images-idx3-ubyte", "t10k-images-idx3-ubyte"])
def test_a_truncated_file_is_named(torchvision_root: Path, name: str, length: int) -> None:
    file = torchvision_root / "MNIST" / "raw" / name
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(FileNotFoundError, match=f"{name} is truncated"):
        load_mnist(torchvision_root)


@pytest.mark.parametrize("name", RANKS)
def test_a_missing_file_is_named(archives: Path, torchvision_root: Path, name: str) -> None:
    (archives / f"{name}.gz").unlink()
    with pytest.raises(FileNotFoundError, match=rf"no \S*{name}\.gz; name a folder"):
        load_mnist(archives)
    (torchvision_root / "MNIST" / "raw" / name).unlink()
    with pytest.raises(FileNotFoundError, match=rf"no \S*{name}; name a folder"):
        load_mnist(torchvision_root)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\S*; name a folder"):
        load_mnist(tmp_path / "nowhere")
