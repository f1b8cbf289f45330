"""One import package is installed, `fxprune`, with every pass in it, from whatever checkout."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# What became of the link `fxprune/passes`, by who made the checkout.
LINKS: dict[str, Callable[[Path], object]] = {
    "link": lambda link: link.symlink_to("../passes", target_is_directory=True),
    "text file": lambda link: link.write_text("../passes"),
    "nothing": lambda link: None,
}


def copy_checkout(target: Path, link: str) -> Path:
    """Copy what a distribution is made of, with `fxprune/passes` as `link` says."""
    target.mkdir()
    for name in ("pyproject.toml", "hatch_build.py", "README.md", "LICENSE", ".gitignore"):
        shutil.copy(ROOT / name, target)
    for folder in ("fxprune", "passes"):
        junk = shutil.ignore_patterns("__pycache__", "passes")
        shutil.copytree(ROOT / folder, target / folder, ignore=junk)
    LINKS[link](target / "fxprune" / "passes")
    return target


def build(checkout: Path, kind: str) -> Path:
    command = [sys.executable, "-m", "build", f"--{kind}", "--no-isolation", "--outdir", "dist"]
    subprocess.run(command, cwd=checkout, check=True, capture_output=True)
    (artifact,) = (checkout / "dist").iterdir()
    return artifact


def files_under(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


@pytest.mark.parametrize("link", LINKS)
def test_the_wheel_is_one_package_with_every_pass(tmp_path: Path, link: str) -> None:
    checkout = copy_checkout(tmp_path / "checkout", link)
    site = tmp_path / "site"
    with zipfile.ZipFile(build(checkout, "wheel")) as wheel:
        assert len(set(wheel.namelist())) == len(wheel.namelist())
        wheel.extractall(site)
    assert {path.name.partition("-")[0] for path in site.iterdir()} == {"fxprune"}
    assert files_under(site / "fxprune" / "passes") == files_under(ROOT / "passes")


def test_a_wheel_from_the_source_distribution_is_the_same(tmp_path: Path) -> None:
    checkout = copy_checkout(tmp_path / "checkout", "link")
    with tarfile.open(build(checkout, "sdist")) as sdist:
        sdist.extractall(tmp_path, filter="data")
    (unpacked,) = tmp_path.glob("fxprune-*")
    assert files_under(unpacked / "passes") == files_under(ROOT / "passes")
    assert files_under(unpacked / "fxprune" / "passes") == files_under(ROOT / "passes")
    with zipfile.ZipFile(build(unpacked, "wheel")) as wheel:
        from_sdist = set(wheel.namelist())
    shutil.rmtree(checkout / "dist")
    with zipfile.ZipFile(build(checkout, "wheel")) as wheel:
        assert set(wheel.namelist()) == from_sdist


def test_the_wheel_runs_away_from_the_checkout(tmp_path: Path) -> None:
    checkout = copy_checkout(tmp_path / "checkout", "text file")
    with zipfile.ZipFile(build(checkout, "wheel")) as wheel:
        wheel.extractall(tmp_path / "site")
    code = "import fxprune.passes; print(fxprune.passes.__file__)"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert ran.stdout.strip() == str(tmp_path / "site/fxprune/passes/__init__.py"), ran.stderr


@pytest.mark.parametrize("link", ["text file", "nothing"])
def test_an_editable_installation_without_the_link_is_refused(tmp_path: Path, link: str) -> None:
    checkout = copy_checkout(tmp_path / "checkout", link)
    code = "from hatchling.build import build_editable; build_editable('dist')"
    ran = subprocess.run([sys.executable, "-c", code], cwd=checkout, capture_output=True, text=True)
    assert ran.returncode == 1
    assert "ln -s ../passes fxprune/passes" in ran.stderr


def test_passes_is_not_a_package_of_its_own() -> None:
    ran = subprocess.run(
        [sys.executable, "-c", "import passes"], cwd=ROOT, capture_output=True, text=True
    )
    assert ran.returncode == 1
    assert "ImportError: the passes are imported as fxprune.passes" in ran.stderr
