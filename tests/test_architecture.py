"""The map of fxprune: imports point down it, never up or sideways.

`LAYERS` lists the library from the ground up; a module imports only from layers below its own. Only
the families of `ops` may share code; in particular no pass imports a pass. Around the library,
`SURROUNDINGS`: `models` know nothing of fxprune, and the library knows nothing of what is not
installed with it.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Modules of one layer do not know each other.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("errors",),
    (
        "structure",
        "kinds",
        "garbage",
        "progress",
        "default_device",
        "eager",
        "einops_backend",
        "literals",
        "assignments",
        "memory_formats",
        "parameter_tags",
    ),
    ("stand_ins",),
    (
        "classes",
        "containers",
        "dtype_limits",
        "frozen_attributes",
        "imports",
        "keeping",
        "randomness",
        "scripts",
        "stale_names",
        "tables",
        "whole_numbers",
    ),
    ("terms",),
    ("latency_tables",),
    ("chain_costs",),
    ("unit_costs",),
    ("gates",),
    ("notes",),
    ("inputs",),
    ("deeds",),
    ("beside",),
    ("modules", "joint_terms", "cases", "remembered"),
    ("size_memos", "custom_functions"),
    ("computed_layers", "naming"),
    ("plain_weights",),
    ("dispatch", "gated_reads"),
    ("deferral",),
    ("macs",),
    ("tags",),
    ("sharding",),
    ("penalties",),
    ("selection",),
    ("estimators",),
    ("modes",),
    ("two_modes",),
    ("graph_modules",),
    ("example_values", "expressions"),
    ("lookups",),
    ("call_state",),
    ("assumptions",),
    ("retracing",),
    ("watching", "unrecorded"),
    ("tracing",),
    ("faithful_notes",),
    ("program",),
    ("sharing", "out_of_place", "copying"),
    ("observation",),
    ("overwrites",),
    ("affine_maps", "convolutions"),
    ("average_pools", "transposed_convolutions", "whole_maps"),
    ("affine_neighbours",),
    ("linear_layers", "latency"),
    ("layer_costs",),
    ("plans",),
    ("example_inputs",),
    ("values",),
    ("cuts",),
    ("rules",),
    ("ops", "memories"),
    ("functional_layers",),
    ("flattening", "lowering", "fixed_sizes"),
    ("chains",),
    ("links",),
    ("pipeline",),
    ("boxes",),
    ("channels",),
    ("liveness", "foresight", "gradients"),
    ("handwritten",),
    ("sites",),
    ("absorption", "pooled_layers", "mergers"),
    ("accounts",),
    ("depth_sites",),
    ("passes",),
    ("costs",),
    ("comparison",),
    ("precision",),
    ("verdicts",),
    ("verification",),
    ("onnx_signature",),
    ("open_sizes",),
    ("onnx_program",),
    ("export",),
    ("report",),
    ("recording",),
    ("regions",),
    ("piecewise",),
    ("pipelines",),
    ("compiler",),
    ("inspection", "optimizer_states", "averaged_models"),
    ("compaction",),
    ("budget",),
    ("loops",),
    ("lightning", "huggingface"),
    ("testing",),
    ("permutation",),
    ("cli",),
    ("__main__",),
    ("__init__",),
)
HEIGHT = {name: height for height, layer in enumerate(LAYERS) for name in layer}

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
    return below[0] if below and below[0] in HEIGHT else "__init__"


def layer_of(source: str) -> str:
    parts = Path(source).with_suffix("").parts
    return "passes" if parts[0] == "passes" else parts[1]


@pytest.mark.parametrize("source", sources("fxprune", "passes"))
def test_imports_point_down(source: str) -> None:
    own = layer_of(source)
    assert own in HEIGHT, f"{own} is not on the map: give it a place in LAYERS"
    used = {layer(name) for name in imports(source) if name.split(".")[0] == "fxprune"}
    wrong = {name for name in used if HEIGHT[name] >= HEIGHT[own]} - ({own} & {"ops"})
    assert not wrong, f"{source} imports {sorted(wrong)}, which {own} may not know"


@pytest.mark.parametrize("source", sources(*SURROUNDINGS))
def test_folders_keep_to_themselves(source: str) -> None:
    roots = {name.split(".")[0] for name in imports(source)}
    assert roots & OURS <= SURROUNDINGS[source.split("/")[0]]


@pytest.mark.parametrize("source", sources("models"))
def test_models_need_torch_only(source: str) -> None:
    roots = {name.split(".")[0] for name in imports(source)}
    assert roots <= {"models", "numpy", "torch", "torchvision", *sys.stdlib_module_names}


def test_the_map_names_no_ghosts() -> None:
    there = {path.stem for path in (ROOT / "fxprune").iterdir()}
    assert set(HEIGHT) <= there
