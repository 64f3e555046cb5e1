"""The README shows what the program really prints."""

import contextlib
import io
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SESSIONS = re.findall(r"```console\n\$ (onnxprune [^\n]*)\n(.*?)```", README, flags=re.DOTALL)
VOLATILE = ("latency", "note     fewer MAC")  # what depends on the machine


def stable(text: str, *, calibrated: bool = False) -> list[str]:
    """Lines that do not depend on the machine, without the padding of the cost table's last column.

    What is fitted to data differs between processors in its last digits, then in what is chosen: there, only words count.
    """
    lines = [re.sub(r" +", " ", line).strip() for line in text.strip().splitlines()]
    if calibrated:
        lines = [re.sub(r"[\d.]+( [KMG])?", "#", line) for line in lines if not line.startswith("fitted")]
    return [line for line in lines if not line.startswith(VOLATILE)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder like a clone: the fixtures lie in it."""
    path = tmp_path_factory.mktemp("clone")
    for name in ("digits", "denoise"):
        shutil.copytree(ROOT / "fixtures" / name, path / "fixtures" / name)
    return path


def test_every_console_session_is_reproduced(folder):
    """Each command of the tour prints the lines that the README shows, in order."""
    assert len(SESSIONS) >= 4
    volatile = tuple(re.sub(r" +", " ", text) for text in VOLATILE)
    for command, shown in SESSIONS:
        words = [sys.executable, "-c", "from onnxprune.cli import main; main()", *command.split()[1:]]
        done = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False)
        fitted = "--calib" in command
        expected, printed = (
            [line for line in stable(text, calibrated=fitted) if not line.startswith(volatile)]
            for text in (shown, done.stdout + done.stderr)
        )
        assert printed == expected


def test_first_command_writes_a_model(folder):
    """The first command of the README prunes a fixture and leaves the file that it names."""
    command = re.search(r"^ {4}(onnxprune fixtures\S+ \S+ [^\n]*)$", README, flags=re.MULTILINE)[1]
    words = [sys.executable, "-c", "from onnxprune.cli import main; main()", *command.split()[1:], "--force"]
    assert subprocess.run(words, cwd=folder, capture_output=True, check=False).returncode == 0
    assert (folder / command.split()[2]).stat().st_size > 0


def test_python_example_runs(folder, monkeypatch):
    """The Python example prints fewer MAC than the model had, and that the proof holds."""
    monkeypatch.chdir(folder)
    code = re.search(r"```python\n(.*?)```", README, flags=re.DOTALL)[1]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "README.md", "exec"), {})
    macs, holds = printed.getvalue().split()
    assert int(macs) <= 0.9 * 2_960_000
    assert holds == "True"
