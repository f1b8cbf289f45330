"""The map of fxprune: imports point down it, never up or sideways.

`MAP` lists the library from the ground up; a module imports only from those before it, so that
packages import one way too. Only the families of `ops` may share code; no pass imports a pass, and
what makes a folder a package holds no code. Around the library,
`SURROUNDINGS`: `models` know nothing of fxprune, and the library knows nothing of what is not
installed with it.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Packages from the ground up, "" being fxprune itself; a module knows only those before it.
MAP = (
    ("", "errors progress"),
    (
        "runtime",
        "default_device dispatch eager garbage kinds memory_formats parameter_tags randomness "
        "storages structure turns",
    ),
    (
        "user_models",
        "containers frozen_attributes hooks inputs keeping cases deeds modules beside "
        "computed_layers replaced_methods custom_functions graph_modules naming size_memos "
        "plain_weights",
    ),
    (
        "gating",
        "terms latency_tables chain_costs unit_costs gates gated_reads joint_terms remembered "
        "sharding deferral owners optimizer_groups penalties",
    ),
    (
        "tracing",
        "assignments einops_backend example_values expressions literals lookups source_lines "
        "notes stale_names stand_ins aten_operators two_modes assumptions askable asked_tracer "
        "caches call_state checkpoints classes dtype_limits faithful_notes imports modes scripts "
        "tables watching whole_numbers retracing unrecorded signatures mappings own_hooks "
        "model_tracer one_mode both_modes",
    ),
    (
        "programs",
        "example_inputs macs out_of_place program copying observation pipeline sharing overwrites",
    ),
    ("dataflow", "tags boxes values cuts gradients rules"),
    ("", "ops"),
    ("dataflow", "fixed_sizes memories channels flattening foresight liveness"),
    (
        "folding",
        "functional_layers affine_maps convolutions average_pools transposed_convolutions "
        "whole_maps affine_neighbours chains latency linear_layers layer_costs links plans",
    ),
    ("proof", "comparison precision verdicts verification training_steps"),
    (
        "planning",
        "absorption handwritten lowering mergers pooled_layers sites accounts depth_sites",
    ),
    ("deployment", "onnx_signature open_sizes onnx_program export"),
    ("", "passes costs pipelines testing permutation report"),
    ("parts", "recording regions piecewise remarks gate_insertion cutting"),
    ("", "compiler inspection cli"),
    ("training", "averaged_models optimizer_states selection compaction estimators budget loops"),
    ("", "huggingface lightning __main__ __init__"),
)
ORDER = [f"{package}.{name}".lstrip(".") for package, names in MAP for name in names.split()]
HEIGHT = {name: height for height, name in enumerate(ORDER)}

# Which of our own folders each folder may import from.
SURROUNDINGS = {
    "fxprune": {"fxprune"},
    "passes": {"fxprune"},
    "models": {"models"},
    "tools": {"fxprune", "models", "tools"},
}
OURS = {"fxprune", "passes", "models", "tools", "tests"}


def sources(*folders: str) -> list[str]:
    paths = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    return sorted(path.relative_to(ROOT).as_posix() for path in paths)


def imports(source: str) -> Iterator[str]:
    """Yield the dotted name of everything a file imports, wherever in the file it does."""
    for node in ast.walk(ast.parse((ROOT / source).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{source}:{node.lineno}: imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def layer(name: str) -> str:
    """Return the layer of a dotted name below fxprune; the public names are those of __init__."""
    below = name.split(".")[1:]
    found = (known for known in (".".join(below[:2]), *below[:1]) if known in HEIGHT)
    return next(found, "__init__")


def layer_of(source: str) -> str:
    parts = Path(source).with_suffix("").parts
    return "passes" if parts[0] == "passes" else layer(".".join(parts))


def is_module(source: str) -> bool:
    return not source.endswith("/__init__.py") or source == "fxprune/__init__.py"


@pytest.mark.parametrize("source", [*filter(is_module, sources("fxprune", "passes"))])
def test_imports_point_down(source: str) -> None:
    own = layer_of(source)
    assert own != "__init__" or source == "fxprune/__init__.py", f"give {source} a place in MAP"
    used = {layer(name) for name in imports(source) if name.split(".")[0] == "fxprune"}
    wrong = {name for name in used if HEIGHT[name] >= HEIGHT[own]} - ({own} & {"ops"})
    assert not wrong, f"{source} imports {sorted(wrong)}, which {own} may not know"


@pytest.mark.parametrize("package", sorted({package for package, _ in MAP if package}))
def test_packages_hold_no_code(package: str) -> None:
    tree = ast.parse((ROOT / "fxprune" / package / "__init__.py").read_text(encoding="utf-8"))
    assert len(tree.body) == 1 and ast.get_docstring(tree)


@pytest.mark.parametrize("source", sources(*SURROUNDINGS))
def test_folders_keep_to_themselves(source: str) -> None:
    roots = {name.split(".")[0] for name in imports(source)}
    assert roots & OURS <= SURROUNDINGS[source.split("/")[0]]


@pytest.mark.parametrize("source", sources("models"))
def test_models_need_torch_only(source: str) -> None:
    roots = {name.split(".")[0] for name in imports(source)}
    assert roots <= {"models", "numpy", "torch", "torchvision", *sys.stdlib_module_names}


def test_the_map_names_no_ghosts() -> None:
    places = [ROOT / "fxprune" / name.replace(".", "/") for name in HEIGHT]
    assert all(place.is_dir() or place.with_suffix(".py").is_file() for place in places)
