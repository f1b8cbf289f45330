"""MNIST without a download.

The four files lie beside this module, gzipped. They are unpacked once, into the user's cache, in
the layout that torchvision reads (`ROOT/MNIST/raw`). A folder of the same files, or a torchvision
root, may stand in for them. Whatever is read was checked to be there and whole.
"""

import gzip
import hashlib
import math
import os
import struct
import zlib
from pathlib import Path

from torch import Tensor
from torchvision.datasets import MNIST

SHIPPED = Path(__file__).parent / "data" / "mnist"

# Each file, and the number of sizes in its header.
RANKS = {
    "train-images-idx3-ubyte": 3,
    "train-labels-idx1-ubyte": 1,
    "t10k-images-idx3-ubyte": 3,
    "t10k-labels-idx1-ubyte": 1,
}

# Of the training set's pixels, once scaled to [0, 1].
MEAN, STD = 0.1307, 0.3081


def load_mnist(root: Path | None = None) -> tuple[MNIST, MNIST]:
    """Return the training and the test set.

    `root` is a torchvision root (it holds `MNIST/raw`) or a folder of the four gzipped IDX files;
    without it the files shipped with fxprune are read. FileNotFoundError names what is missing.
    """
    folder = SHIPPED if root is None else root.expanduser()
    if any(_archive(folder, name).exists() for name in RANKS):
        folder = _unpack(folder)
    for name in RANKS:
        _check_whole(_raw(folder) / name)
    return MNIST(folder, train=True), MNIST(folder, train=False)


def load_images(dataset: MNIST) -> tuple[Tensor, Tensor]:
    """Return all images, normalised (N, 1, 28, 28), and their labels (N)."""
    images = dataset.data.unsqueeze(1).float().div_(255)
    return images.sub_(MEAN).div_(STD), dataset.targets


def _unpack(folder: Path) -> Path:
    """Unpack the archives of a folder into the cache; return the torchvision root made there."""
    contents = {name: _read(_archive(folder, name)) for name in RANKS}
    # Named after what was packed: another folder's files, Fashion-MNIST say, have the same names.
    digest = hashlib.sha256(b"".join(contents.values())).hexdigest()[:16]
    root = _cache() / f"mnist-{digest}"
    _raw(root).mkdir(parents=True, exist_ok=True)
    for name, packed in contents.items():
        target = _raw(root) / name
        if not target.exists():
            _write(target, _decompress(packed, _archive(folder, name)))
    return root


def _read(archive: Path) -> bytes:
    if not archive.is_file():
        raise _missing(archive)
    return archive.read_bytes()


def _decompress(packed: bytes, archive: Path) -> bytes:
    try:
        return gzip.decompress(packed)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise _damaged(archive) from error


def _write(target: Path, content: bytes) -> None:
    """Write beside, then rename: an interrupted run leaves no half file under the final name."""
    part = target.with_name(f"{target.name}.{os.getpid()}.part")
    try:
        part.write_bytes(content)
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)


def _check_whole(path: Path) -> None:
    """Raise unless the file is there and as long as its own header says."""
    if not path.is_file():
        raise _missing(path)
    rank = RANKS[path.name]
    start = 4 + 4 * rank
    with path.open("rb") as file:
        header = file.read(start)
    if len(header) < start or header[:4] != bytes((0, 0, 8, rank)):
        raise _damaged(path)
    if path.stat().st_size != start + math.prod(struct.unpack(f">{rank}I", header[4:])):
        raise _damaged(path)


def _missing(path: Path) -> FileNotFoundError:
    return FileNotFoundError(
        f"MNIST is not complete: there is no {path}; name a folder that holds the four gzipped IDX "
        f"files or torchvision's MNIST/raw, or restore {SHIPPED}."
    )


def _damaged(path: Path) -> FileNotFoundError:
    return FileNotFoundError(
        f"MNIST is not complete: {path} is truncated or not an IDX file; "
        "delete it and fetch it again."
    )


def _archive(folder: Path, name: str) -> Path:
    return folder / f"{name}.gz"


def _raw(root: Path) -> Path:
    return root / "MNIST" / "raw"


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fxprune"
