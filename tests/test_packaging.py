"""What is built is what lies in the tree."""

from __future__ import annotations

import importlib
import importlib.metadata
import subprocess
import sys
import tomllib
from pathlib import Path

import click
import pytest

import onnxprune

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SETUPTOOLS = PROJECT["tool"]["setuptools"]


def packages_in_the_tree() -> dict[str, Path]:
    """Every folder with an ``__init__.py``, by the name that it must be importable under."""
    roots = {"onnxprune": ROOT / "onnxprune", "onnxprune.passes": ROOT / "passes"}
    found = {}
    for package, root in roots.items():
        for marker in root.rglob("__init__.py"):
            parts = marker.parent.relative_to(root).parts
            found[".".join((package, *parts))] = marker.parent
    return found


def test_list_of_packages_equals_the_tree() -> None:
    """The explicit list in pyproject.toml has every package once and no other."""
    assert sorted(SETUPTOOLS["packages"]) == sorted(packages_in_the_tree())


def test_every_module_lies_in_a_package() -> None:
    """No module of the tool lies in a folder without ``__init__.py``, where it would not be built."""
    folders = {path.parent for root in ("onnxprune", "passes") for path in (ROOT / root).rglob("*.py")}
    assert folders == set(packages_in_the_tree().values())


@pytest.mark.parametrize("package", SETUPTOOLS["packages"])
def test_package_comes_from_its_folder(package: str) -> None:
    """Every listed package holds the files of the folder that it is mapped to, whether installed or editable."""
    if package.startswith("onnxprune.train"):
        pytest.importorskip("torch", reason="PyTorch is not installed")
    expected = packages_in_the_tree()[package]
    folder = Path(str(importlib.import_module(package).__file__)).parent
    assert {path.name: path.read_text() for path in folder.glob("*.py")} == {
        path.name: path.read_text() for path in expected.glob("*.py")
    }


def test_clone_works_without_installing() -> None:
    """In the root of a clone Python finds the package and its passes, although those lie beside it."""
    code = "import onnxprune.passes.prove; print(onnxprune.passes.prove.__file__)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert Path(run.stdout.strip()) == ROOT / "passes" / "prove.py"


def test_passes_do_not_take_a_top_level_name() -> None:
    """``passes`` is mapped into the package: nothing called ``passes`` lands in site-packages."""
    assert SETUPTOOLS["package-dir"] == {"onnxprune.passes": "passes"}
    assert {name.split(".")[0] for name in SETUPTOOLS["packages"]} == {"onnxprune"}


def test_type_marker_ships() -> None:
    """py.typed lies in the package and is listed as its data."""
    assert (Path(str(onnxprune.__file__)).parent / "py.typed").is_file()
    assert "py.typed" in SETUPTOOLS["package-data"]["onnxprune"]


def test_data_files_are_listed() -> None:
    """Every file of a package that is not Python is listed as package data."""
    for package, folder in packages_in_the_tree().items():
        patterns = SETUPTOOLS["package-data"].get(package, [])
        listed = {path for pattern in patterns for path in folder.glob(pattern)}
        plain = [own for own in folder.iterdir() if own.is_dir() and own.name != "__pycache__"]
        plain = [own for own in plain if not (own / "__init__.py").exists()]
        files = [path for own in (folder, *plain) for path in own.iterdir() if path.is_file()]
        assert {path for path in files if path.suffix not in (".py", ".pyc")} == listed, package


def test_version_is_the_project_s() -> None:
    """The installed version is the one in pyproject.toml, and it is what reports carry."""
    version = importlib.metadata.version("onnxprune")
    assert version == PROJECT["project"]["version"]


def test_command_is_installed() -> None:
    """The console script points to a function, and the group behind it to the contract's default command."""
    (entry,) = importlib.metadata.entry_points(group="console_scripts", name="onnxprune")
    assert entry.value == PROJECT["project"]["scripts"]["onnxprune"]
    assert callable(entry.load())
    commands = importlib.import_module("onnxprune.cli").commands
    assert isinstance(commands, click.Group)
    assert "prune" in commands.commands


def test_core_dependencies_suffice() -> None:
    """Core needs what the contract lists, what runs in parallel, and no extra's package."""
    names = {requirement.split(">")[0] for requirement in PROJECT["project"]["dependencies"]}
    assert names == {"onnx", "onnxruntime", "onnx-graphsurgeon", "numpy", "click", "rich", "joblib", "threadpoolctl"}
    assert PROJECT["project"]["requires-python"] == ">=3.11"
