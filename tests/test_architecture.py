"""The program's parts depend on each other in one direction, read from the syntax tree."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = (
    {"errors"},
    {"model", "measures", "importing", "files"},
    {"labels"},
    {
        "runtime", "ops", "cost", "latency", "memory", "plan", "coupling", "metrics", "profile", "protos", "amend",
        "external", "sibling", "slices", "storage", "trainable",
    },
    {
        "onnx_io", "reader", "shapes", "branches", "prepare", "states", "report", "arrays", "data", "passes", "workers",
        "checkpoint_files", "checkpoint_map", "comparison", "compose", "encoding_entries", "manifest", "recover",
        "supervision", "validity",
    },
    {
        "pipeline", "options", "stopwatch", "calibration", "quality", "search", "budget", "parcels", "sweep", "sensitivity",
        "artifact", "checkpoint", "difference", "encodings",
    },
    {"train"},
    {"iterate", "steps", "trainers"},
    {
        "cli", "cli_artifact", "cli_checkpoint", "cli_completion", "cli_finetune", "cli_iterate", "cli_report",
        "cli_schema", "cli_sensitivity", "cli_sweep", "parameters", "__main__",
    },
)  # fmt: skip
"""From the bottom up; a part may use its own layer and those below it (design.md)."""
LEVEL = {part: level for level, parts in enumerate(LAYERS) for part in parts}


def modules() -> dict[str, Path]:
    """Every module of the package by its importable name."""
    found = {}
    for folder, package in ((ROOT / "onnxprune", "onnxprune"), (ROOT / "passes", "onnxprune.passes")):
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            name = ".".join((package, *parts)).removesuffix(".__init__")
            found[name] = path
    return found


MODULES = modules()


def imported(path: Path) -> Iterator[str]:
    """Absolute names of all modules that a file imports, anywhere in it; names taken from a package are tried as modules."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in MODULES else str(node.module)


def part_of(module: str) -> str:
    """The part of the program that a module belongs to."""
    return module.split(".")[1]


INNER = [name for name in MODULES if name != "onnxprune"]


@pytest.mark.parametrize("module", INNER)
def test_every_module_has_a_layer(module: str) -> None:
    """Every module belongs to a part that the design places in a layer."""
    assert part_of(module) in LEVEL


@pytest.mark.parametrize("module", INNER)
def test_imports_point_down(module: str) -> None:
    """A module imports its own layer and those below, never one above, and never the public package itself."""
    above = []
    for name in imported(MODULES[module]):
        if name.split(".")[0] != "onnxprune":
            continue
        assert name != "onnxprune", "imports the public package"
        if LEVEL[part_of(name)] > LEVEL[part_of(module)]:
            above.append(name)
    assert above == []


@pytest.mark.parametrize(
    ("library", "allowed"),
    [
        pytest.param("onnxruntime", {"onnxprune.runtime"}, id="onnxruntime"),
        pytest.param("onnx_graphsurgeon", {"onnxprune.reader"}, id="onnx_graphsurgeon"),
        pytest.param("click", {f"onnxprune.{name}" for name in LAYERS[-1]}, id="click"),
        pytest.param("rich", {"onnxprune.cli", "onnxprune.cli_finetune", "onnxprune.report.text"}, id="rich"),
        pytest.param("joblib", {"onnxprune.workers"}, id="joblib"),
        pytest.param("distributed", {"onnxprune.workers"}, id="distributed"),
        pytest.param(
            "torch",
            {"onnxprune.checkpoint_files", *(name for name in MODULES if name.startswith("onnxprune.train"))},
            id="torch",
        ),
        pytest.param("safetensors", {"onnxprune.checkpoint_files"}, id="safetensors"),
        pytest.param(
            "matplotlib",
            {"onnxprune.report.pareto", "onnxprune.report.page.charts"},
            id="matplotlib",
        ),
    ],
)
def test_libraries_have_one_place(library: str, allowed: set[str]) -> None:
    """A library that the program could do without elsewhere is imported in its one place, and there it is."""
    users = {name for name, path in MODULES.items() if library in {n.split(".")[0] for n in imported(path)}}
    assert users
    assert users <= allowed


def test_model_knows_numpy_only() -> None:
    """The graph that we reason about depends on the standard library and numpy."""
    tops = {name.split(".")[0] for name in imported(MODULES["onnxprune.model"])}
    assert tops - set(sys.stdlib_module_names) == {"numpy"}


def test_importing_is_light() -> None:
    """``import onnxprune`` loads no training framework, no plotting, no templates and no image library."""
    code = "import sys, onnxprune; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(run.stdout.split())
    assert "onnxprune" in loaded
    plotting = {"matplotlib", "jinja2", "PIL"}
    heavy = {"torch", "torchvision", "safetensors", "dask", "distributed", "joblib", "scipy"}
    assert loaded & (heavy | plotting) == set()


def test_public_names_are_all_there() -> None:
    """``__all__`` is sorted, and everything in it can be had."""
    import onnxprune  # noqa: PLC0415

    assert list(onnxprune.__all__) == sorted(onnxprune.__all__)
    assert all(hasattr(onnxprune, name) for name in onnxprune.__all__)
