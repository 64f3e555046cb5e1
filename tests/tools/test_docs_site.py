"""``tools/docs`` builds the documentation without a warning."""

from __future__ import annotations

import pathlib
import subprocess

import click
import pytest

pytest.importorskip(
    "sphinx_click", reason="Sphinx and its extensions (extra docs) are not installed: the site is not built"
)
pytest.importorskip("myst_parser", reason="myst-parser (extra docs) is not installed: the site is not built")

from onnxprune import cli

ROOT = pathlib.Path(__file__).parents[2]


def test_the_site_builds(tmp_path: pathlib.Path) -> None:
    """Every page is in it, every command and its options, and the public functions."""
    done = subprocess.run([ROOT / "tools" / "docs", tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    pages = {path.relative_to(ROOT / "docs").with_suffix(".html") for path in (ROOT / "docs").rglob("*.md")}
    assert all((tmp_path / page).is_file() for page in pages)
    commands = (tmp_path / "reference" / "commands.html").read_text()
    for name, command in cli.commands.commands.items():
        assert f'id="onnxprune-{name}"' in commands, name
        options = [option.opts[-1] for option in command.params if isinstance(option, click.Option)]
        assert [option for option in options if option not in commands] == []
    functions = (tmp_path / "reference" / "python.html").read_text()
    for name in ("prune", "inspect", "verify", "Options", "Report", "errors.ProofError"):
        assert f'id="onnxprune.{name}"' in functions, name
