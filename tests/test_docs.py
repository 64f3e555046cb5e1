"""Every code block of the documentation runs, and console sessions print the words that their page shows."""

from __future__ import annotations

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
from typing import NamedTuple

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md"))
BLOCK = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
KINDS = {"console", "python", "json", "toml", "yaml", "text", "mermaid"}
"""``text`` is for what cannot be run: pictures in characters."""
VOLATILE = ("latency", "note fewer MAC")


class Block(NamedTuple):
    """A code block: its language, and what is in it."""

    kind: str
    text: str


def blocks(page: str) -> list[Block]:
    """Code blocks of a page, in order; ``{eval-rst}`` and the like are directives, no code."""
    return [Block(*found) for found in BLOCK.findall((DOCS / page).read_text(encoding="utf-8")) if found[0]]


def sessions(text: str) -> list[tuple[str, str]]:
    """Commands of a console block, each with the output that is shown."""
    parts = re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]
    return [(command, shown) for command, _, shown in (part.partition("\n") for part in parts)]


def words(text: str) -> list[str]:
    """Lines of an output without figures, which depend on the machine, and without padding."""
    lines = [re.sub(r"-?[\d.]+(e[-+]\d+)?( [KMG]\b)?", "#", line) for line in text.strip().splitlines()]
    lines = [re.sub(r"[ ─]+", " ", line).strip() for line in lines]
    return [line for line in lines if not line.startswith(VOLATILE)]


@pytest.fixture
def clone(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """A folder like a clone to try a page in, with the command on the path."""
    for name in ("digits", "denoise", "architectures"):
        shutil.copytree(ROOT / "fixtures" / name, tmp_path / "fixtures" / name)
    (tmp_path / "tools").symlink_to(ROOT / "tools")
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    programs = tmp_path / ".programs"
    programs.mkdir()
    for name, code in (("onnxprune", "from onnxprune.cli import main; main()"), ("python", None)):
        call = f"exec {sys.executable} -c '{code}' \"$@\"" if code else f'exec {sys.executable} "$@"'
        (programs / name).write_text(f"#!/bin/sh\n{call}\n")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(tmp_path / "fixtures")]))
    monkeypatch.chdir(tmp_path)
    return tmp_path


HOWTO = ("finetune", "guard", "large", "npu", "quantised")
SLOW = {"sensitivity.md", "training.md", "tutorial.md", *(f"howto/{page}.md" for page in HOWTO)}
"""Pages that take minutes together."""


@pytest.mark.parametrize("page", [pytest.param(p, marks=[pytest.mark.slow] if p in SLOW else []) for p in PAGES])
@pytest.mark.usefixtures("clone")
def test_code_runs(page: str) -> None:
    """Blocks of a page, one after the other in one folder."""
    for kind, text in blocks(page):
        if kind == "json":
            json.loads(text)
        elif kind == "console":
            for command, shown in sessions(text):
                run(command, shown)
        elif kind == "python":
            needs_torch(text)
            done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=False)
            assert done.returncode == 0, f"{text}\n{done.stderr}"


def run(command: str, shown: str) -> None:
    """Run a command of a session; where an output is shown, its words are what is printed."""
    needs_torch(command)
    if " models/" in command:
        return  # recipes for networks that are not ours: tests/tools/test_convert_data.py
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False)
    printed = done.stdout + done.stderr
    refused = shown.startswith("onnxprune: ")
    assert (done.returncode != 0) == refused, f"{command}\n{printed}"
    if shown:
        assert words(shown) in (words(printed), words(done.stdout)), command


def needs_torch(text: str) -> None:
    """Skip a page from where it needs PyTorch on, where that is not installed."""
    if re.search(r"\btorch\b|onnxprune\.train|onnxprune (finetune|iterate)", text):
        pytest.importorskip("torch", reason="PyTorch is not installed: the page's training was not run")


@pytest.mark.parametrize("page", PAGES)
def test_every_block_says_what_it_is(page: str) -> None:
    """A fence names its language, so that no code escapes the test above; indented blocks are synopses in one line each."""
    text = (DOCS / page).read_text(encoding="utf-8")
    fences = re.findall(r"^```(.*)$", text, flags=re.MULTILINE)
    assert len(fences) % 2 == 0
    assert {opening for opening in fences[::2] if not opening.startswith("{")} <= KINDS


def test_figures_do_not_count_but_words_do() -> None:
    """The comparison takes other digits and other padding for the same, and nothing else."""
    assert words("MAC   1.00 M  50.0 %\nlatency 3") == words("MAC 22.10 M 49.9 %")
    assert words("proof    holds: 3 tensors") != words("proof    FAILED: 3 tensors")


def test_links_lead_somewhere() -> None:
    """Links between pages, and to headings in them."""
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]*)(?:#[^)]*)?\)", (DOCS / page).read_text(encoding="utf-8")):
            assert not target or (DOCS / page).parent.joinpath(target).exists(), f"{page}: {target}"
