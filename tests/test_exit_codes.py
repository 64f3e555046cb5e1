"""The exit codes that the README promises, as a shell script sees them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).with_name("exit_codes.sh")
PROMISED = ["0", "1", "130", "2", "3", "4", "5", "6", "7"]


def test_every_exit_code() -> None:
    """Each happens, with one to three lines on stderr, and nothing is written that must not be."""
    done = subprocess.run(
        ["sh", SCRIPT, sys.executable, "-m", "onnxprune"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(line.split()[3] for line in done.stdout.splitlines() if line.startswith("ok ")) == PROMISED


def test_another_code_fails_the_script() -> None:
    """A program that always succeeds keeps none of the promises but the first, and the script says so."""
    done = subprocess.run(["sh", SCRIPT, "true"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stdout.count("\nnot ok ") == len(PROMISED) - 1


def test_readme_lists_the_codes() -> None:
    """The README's table has the codes that the script provokes."""
    readme = SCRIPT.parents[1].joinpath("README.md").read_text(encoding="utf-8")
    table = readme.partition("| code | meaning |")[2].partition("## ")[0]
    assert sorted(line.split()[1] for line in table.splitlines() if line[2:3].isdigit()) == PROMISED
