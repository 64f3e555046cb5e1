"""Shell completion: what a shell asks, and what it is told."""

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

from commands import ok
from onnxprune import cli

ROOT = pathlib.Path(__file__).parents[1]


def completed(words: str, position: int) -> list[str]:
    """What the program proposes for a word of a command line, as bash asks it."""
    asked = {"_ONNXPRUNE_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(position)}
    program = [sys.executable, "-c", "from onnxprune.cli import main; main()"]
    done = subprocess.run(program, env={**os.environ, **asked}, cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.split()


@pytest.mark.parametrize(
    ("words", "position", "expected"),
    [
        pytest.param("onnxprune insp", 1, "plain,inspect", id="command"),
        pytest.param("onnxprune mod", 1, "file,mod", id="file-of-the-default-command"),
        pytest.param("onnxprune in.onnx o", 2, "file,o", id="second-file"),
        pytest.param(
            "onnxprune in.onnx out.onnx --target-m", 3, "plain,--target-mac", id="option-of-the-default-command"
        ),
        pytest.param("onnxprune inspect --preset ", 3, "plain,d", id="choice"),
        pytest.param("onnxprune inspect --provider c", 3, "plain,CPU", id="provider"),
        pytest.param("onnxprune verify a.onnx b.onnx --plan p", 5, "file,p", id="file-of-an-option"),
    ],
)
def test_words_are_completed(words: str, position: int, expected: str) -> None:
    """Commands, options, choices and file names, with and without the default command's name."""
    assert expected in completed(words, position)


@pytest.mark.skipif(not shutil.which("bash"), reason="bash is not installed")
def test_bash_takes_the_script(tmp_path) -> None:
    """The script that is printed is one that bash runs, and that defines a completion for the program."""
    script = tmp_path / "completion"
    script.write_text(ok("completion", "bash").output)
    words = ["bash", "-c", f"source {script}; complete -p onnxprune"]
    assert "onnxprune" in subprocess.run(words, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells(shell: str) -> None:
    """Scripts for zsh and fish name the program and ask it."""
    assert "_ONNXPRUNE_COMPLETE" in ok("completion", shell).output


def test_every_command_shows_an_example() -> None:
    """``--help`` of every command has a line that can be typed."""
    for name in cli.commands.commands:
        assert f"Example:  onnxprune {name if name != 'prune' else ''}".rstrip() in ok(name, "--help").output, name
