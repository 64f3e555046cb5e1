"""``inspect --tree``: modules, and what each costs."""

from __future__ import annotations

import pathlib

import onnxprune
from commands import ok
from onnxprune.report import Layer
from onnxprune.report.text import number
from onnxprune.report.tree import grown, lines

DIGITS = pathlib.Path(__file__).parents[2] / "fixtures" / "digits" / "digits.onnx"


def layer(path: str, mac: int = 10) -> Layer:
    """A layer of a module."""
    return Layer(path, "Conv", (), (path,), 8, 8, mac, mac, 1, 1, ("g1",), tuple(path.split(".")))


def test_a_branch_costs_what_its_layers_cost() -> None:
    """Every layer is in the tree once, in order; shares of the first level add up to all."""
    report = onnxprune.inspect(DIGITS)
    root = grown(report.layers)
    assert list(root.layers) == list(report.layers)
    whole = report.before["mac"]
    shown = lines(report.layers, whole, 80, number)
    top = [float(line.split("%")[0].split()[-1]) for line in shown[1:] if line.startswith(("├─", "└─"))]
    assert abs(sum(top) - 100) < 0.2
    assert len([line for line in shown if line.split()[-1].startswith("g")]) >= len(report.layers)


def test_modules_that_hold_one_module_share_a_line() -> None:
    """A chain of modules without branches is one name; a layer stays where it is."""
    shown = lines([layer("net.body.0.conv"), layer("net.body.1.conv"), layer("head.fc")], 30, 80, number)
    assert [line[:24].rstrip() for line in shown[1:]] == [
        "├─ net.body",
        "│  ├─ 0.conv",
        "│  └─ 1.conv",
        "└─ head.fc",
    ]


def test_two_layers_of_one_name() -> None:
    """Neither is lost."""
    assert len(list(grown([layer("a.b"), layer("a.b"), layer("a.b")]).layers)) == 3


def test_it_fits_the_terminal() -> None:
    """Lines keep to the width; long names are cut."""
    rows = [layer(".".join([f"a_long_name_of_a_module_{k}"] * 6 + [str(k)])) for k in range(3)]
    assert max(map(len, lines(rows, 30, 80, number))) <= 80


def test_the_command_prints_it() -> None:
    """``inspect --tree`` shows modules by their names."""
    output = ok("inspect", DIGITS, "--tree").output
    assert "├─ stem" in output
    assert "classifier" in output
