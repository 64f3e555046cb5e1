"""The command line on a real terminal (a pseudo-terminal): progress, colours, width, Ctrl-C."""

from __future__ import annotations

import fcntl
import os
import pathlib
import pty
import re
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time

import pytest

DIGITS = pathlib.Path(__file__).parents[1] / "fixtures" / "digits"
MODEL, CALIB, DATA = (DIGITS / f"{name}" for name in ("digits.onnx", "digits_calib.npz", "digits_eval.npz"))
ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
COLOUR = re.compile(r"\x1b\[(?:\d+;)*(?:3[0-8]|4[0-8]|9[0-7]|10[0-7])(?:;\d+)*m")


class Terminal:
    """A command that runs on a terminal of 80 columns."""

    def __init__(self, *args: object, folder: pathlib.Path | None = None, **environment: str) -> None:
        self._mine, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 80, 0, 0))
        known = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "COLUMNS", "LINES")}
        self.process = subprocess.Popen(
            [sys.executable, "-c", "from onnxprune.cli import main; main()", *map(str, args)],
            stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True, cwd=folder,
            env=known | {"TERM": "xterm-256color"} | environment,
        )  # fmt: skip
        os.close(theirs)
        self.shown = ""

    def read(self, until: str | None = None) -> str:
        """Read what it shows, to the end or until a text shows."""
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and (until is None or until not in self.shown):
            try:
                more = os.read(self._mine, 4096)
            except OSError:  # closed at the other end
                break
            if not more:
                break
            self.shown += more.decode(errors="replace")
        return self.shown

    def end(self) -> int:
        """Read the rest; returns the exit code."""
        self.read()
        os.close(self._mine)
        return self.process.wait(60)


def test_progress_names_what_is_going_on(tmp_path: pathlib.Path) -> None:
    """Calibration, fitting and proof have a bar with a count and the time left; the summary follows it."""
    terminal = Terminal(
        MODEL, tmp_path / "out.onnx", "--target-mac", "0.6", "--calib", CALIB, "--data", DATA, "--metric", "top1"
    )
    assert terminal.end() == 0
    assert (tmp_path / "out.onnx").is_file()
    shown = ESCAPE.sub("", terminal.shown)
    for stage in ("calibrate", "prove", "evaluate"):
        assert re.search(rf"{stage}[^\n]*\d+/\d+ +[\d:-]+", shown), shown


@pytest.mark.parametrize("command", ["inspect", "tree", "prune", "diff"])
def test_lines_fit_80_columns(command: str, tmp_path: pathlib.Path) -> None:
    """Nothing wraps, but for what the user has named."""
    shutil.copy(MODEL, tmp_path)
    prune = ("digits.onnx", "out.onnx", "--target-mac", "0.6")
    if command == "diff":
        assert Terminal(*prune, folder=tmp_path).end() == 0
    args = {"inspect": ("inspect", "digits.onnx"), "tree": ("inspect", "digits.onnx", "--tree"), "prune": prune,
            "diff": ("diff", "digits.onnx", "out.onnx")}[command]  # fmt: skip
    terminal = Terminal(*args, folder=tmp_path)
    assert terminal.end() == 0
    lines = ESCAPE.sub("", terminal.shown).replace("\r", "\n").splitlines()
    assert len(lines) > 5
    assert max(map(len, lines)) <= 80


@pytest.mark.parametrize("refused", [False, True])
def test_no_color_is_honoured(refused: bool, tmp_path: pathlib.Path) -> None:
    """With NO_COLOR nothing has a colour, not even the bars, which have one without it."""
    args = (MODEL, tmp_path / "out.onnx", "--target-mac", "0.6", "--force")
    terminal = Terminal(*args, **({"NO_COLOR": "1"} if refused else {}))
    assert terminal.end() == 0
    assert bool(COLOUR.search(terminal.shown)) is not refused
    assert "prove" in terminal.shown


def test_ctrl_c_leaves_nothing_behind(tmp_path: pathlib.Path) -> None:
    """It ends with 130 and one line; no file, no bar and no traceback stay, and the cursor comes back."""
    terminal = Terminal(
        MODEL, tmp_path / "out.onnx", "--target-mac", "0.6", "--calib", CALIB, "--json", tmp_path / "r.json"
    )
    terminal.read(until="calibrate")
    os.killpg(terminal.process.pid, signal.SIGINT)
    assert terminal.end() == 130
    assert "nothing was written" in terminal.shown
    assert "Traceback" not in terminal.shown
    assert terminal.shown.rfind("\x1b[?25h") >= terminal.shown.rfind("\x1b[?25l")
    assert {path.name for path in tmp_path.iterdir()} <= {"r.json"}
