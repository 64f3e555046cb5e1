"""The command line on a real terminal (a pseudo-terminal): progress, colours, width, Ctrl-C."""

from __future__ import annotations

import fcntl
import json
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

import numpy as np
import onnx
import pytest
from onnx import ModelProto
from test_safety import small

from commands import ok, run

DIGITS = pathlib.Path(__file__).parents[1] / "fixtures" / "digits"
MODEL, CALIB, DATA = (DIGITS / f"{name}" for name in ("digits.onnx", "digits_calib.npz", "digits_eval.npz"))
ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
NASTY = "[/b]\x1b[8m\x1b]0;owned\x07\x9b2J\u202e:smile:\nforged "
"""A name with markup, colours, commands to a terminal, text that turns around, an emoji, and a line of its own."""
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


# -- what files say ----------------------------------------------------------------------------------------------------


def nasty(model: ModelProto) -> ModelProto:
    """Put something in front of all names of a model."""
    graph = model.graph
    for node in graph.node:
        node.name = NASTY + node.name
        for names in (node.input, node.output):
            names[:] = [NASTY + name for name in names]
    for named in (*graph.input, *graph.output, *graph.initializer, *graph.value_info):
        named.name = NASTY + named.name
    return model


def assert_shown_as_it_is(shown: str) -> None:
    """Nothing commands a terminal, and markup is none."""
    assert not set(shown) & set("\x1b\x07\x9b\u202e")
    assert "internal error" not in shown


COMMANDS = {
    "inspect": ["inspect", "M", "-v"],
    "tree": ["inspect", "M", "--tree", "-v"],
    "prune": ["M", "OUT", "--target-mac", "0.75", "--no-latency", "-v"],
    "verify": ["verify", "M", "PRUNED", "--plan", "PLAN", "-v"],
    "diff": ["diff", "M", "PRUNED", "-v"],
    "sensitivity": ["sensitivity", "M", "--calib", "C", "--shares", "0.5", "--jobs", "1", "-v"],
    "sweep": ["sweep", "M", "--target-mac", "0.75", "--jobs", "1"],
    "checkpoint": ["apply-checkpoint", "PLAN", "W", "OUT", "-v"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_names_are_shown_as_they_are(command: str, tmp_path: pathlib.Path) -> None:
    """Names in a model are no markup, no colours and no lines of their own, and command no terminal."""
    places = {word: tmp_path / f"{word}.onnx" for word in ("M", "OUT", "PRUNED", "PLAN", "W")}
    onnx.save(nasty(small()), places["M"])
    if command == "sensitivity":
        places["C"] = tmp_path / "C.npy"
        np.save(places["C"], np.random.default_rng(0).standard_normal((4, 2, 4, 6), np.float32))
    if command in ("verify", "diff", "checkpoint"):
        ok(places["M"], places["PRUNED"], "--target-mac", "0.75", "--no-latency", "--plan-out", places["PLAN"])
    if command == "sweep":
        places["M"] = places["M"].rename(tmp_path / f"{NASTY.replace('/', '')}.onnx")
    if command == "checkpoint":
        safetensors = pytest.importorskip("safetensors.numpy")
        places["W"], places["OUT"] = (tmp_path / f"{word}.safetensors" for word in ("W", "OUT"))
        arrays = {NASTY + name: np.ones(shape, np.float32) for name, shape in WEIGHTS.items()}
        places["W"].write_bytes(safetensors.save(arrays | {f"{NASTY}other": np.ones(2)}))
    shown = ok(*(places.get(word, word) for word in COMMANDS[command])).output
    assert "\nforged" not in shown
    assert "?]0;owned?" in shown
    assert ":smile:" in shown
    assert_shown_as_it_is(shown)


WEIGHTS = {"a.w": (8, 2, 3, 3), "a.b": (8,), "b.w": (8, 8, 3, 3), "b.b": (8,), "z.w": (3, 8, 1, 1), "z.b": (3,)}


def test_messages_command_no_terminal(tmp_path: pathlib.Path) -> None:
    """A message is one line of bounded length, whatever it quotes of a file; so are the lines of its traceback."""
    plan = tmp_path / "plan.json"
    onnx.save(small(), tmp_path / "in.onnx")
    plan.write_text(json.dumps({"schema": 1, "groups": [], "initializers": {NASTY + 3000 * "long ": {"0": [0]}}}))
    result = run("apply", tmp_path / "in.onnx", tmp_path / "out.onnx", "--plan", plan)
    assert result.exit_code == 3
    assert len(result.stderr.splitlines()) == 1
    assert len(result.stderr) < 1100
    assert "?]0;owned?" in result.stderr
    assert ":smile: forged long " in result.stderr
    traced = run("apply", tmp_path / "in.onnx", tmp_path / "out.onnx", "--plan", plan, "-v").stderr
    assert "Traceback" in traced
    for shown in (result.stderr, traced):
        assert_shown_as_it_is(shown)


def test_own_colours_stay_on_a_terminal(tmp_path: pathlib.Path) -> None:
    """Headers are bold where the names below them have no say."""
    onnx.save(nasty(small()), tmp_path / "in.onnx")
    terminal = Terminal("inspect", tmp_path / "in.onnx")
    assert terminal.end() == 0
    assert "\x1b[1m" in terminal.shown
    assert_shown_as_it_is(ESCAPE.sub("", terminal.shown))
    assert "\x1b[8m" not in terminal.shown
