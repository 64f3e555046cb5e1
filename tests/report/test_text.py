"""What ``inspect`` shows of groups and frozen channels, on a terminal of 80 columns and in a pipe."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

import architectures
import onnxprune
from graphs import sandwich
from onnxprune.report import FrozenRow, GroupRow, Report, text


def shown(report: Report, *, width: int, terminal: bool, verbose: bool = False) -> list[str]:
    """Lines of an inspection."""
    file = io.StringIO()
    console = Console(file=file, width=width, force_terminal=terminal, color_system=None)
    text.inspection(console, report, verbose=verbose)
    return [line.rstrip() for line in file.getvalue().splitlines()]


@pytest.fixture(scope="module")
def report() -> Report:
    """Inspect a network with long names."""
    return onnxprune.inspect(architectures.ALL["squeeze_excite_conv"]())


def test_groups_stand_in_order_of_their_cost(report: Report) -> None:
    """The costliest group comes first, each with its name; frozen ones are listed elsewhere."""
    lines = shown(report, width=200, terminal=False)
    first = next(number for number, line in enumerate(lines) if line.startswith("group ")) + 1
    free = sorted((row for row in report.groups if row.frozen is None), key=lambda row: -row.mac)
    assert [line.split()[0] for line in lines[first : first + len(free)]] == [row.id for row in free]
    assert lines[first].endswith(free[0].name)
    assert not any(" axis 0" in line for line in lines)


def test_verbose_lists_members(report: Report) -> None:
    """``-v`` shows every tensor and axis of a group below its name."""
    lines = shown(report, width=200, terminal=False, verbose=True)
    row = report.groups[0]
    place = next(number for number, line in enumerate(lines) if line.startswith(f"{row.id} "))
    below = lines[place + 1 : place + 1 + len(row.members)]
    assert [line.strip() for line in below] == [f"{tensor} axis {axis}" for tensor, axis in row.members]


@pytest.mark.parametrize("verbose", [False, True])
def test_a_terminal_of_80_columns_is_enough(report: Report, verbose: bool) -> None:
    """No line is longer than the terminal, and no name is cut short."""
    lines = shown(report, width=80, terminal=True, verbose=verbose)
    assert max(map(len, lines)) <= 80
    words = " ".join(" ".join(lines).split())
    for row in report.groups:
        if row.frozen is None:
            assert all(word in words for word in row.name.split())


def test_brackets_are_no_markup() -> None:
    """A node whose name looks like markup is shown as it is called."""
    model = sandwich(lambda t, x: x)
    model.graph.node[0].name = "[/b]a[red]"
    assert any("[/b]a[red]" in line for line in shown(onnxprune.inspect(model), width=200, terminal=False))


def test_pruned_groups_show_what_is_left() -> None:
    """Of a pruned group both sizes are shown; of a reason without a node the layers that it concerns."""
    file = io.StringIO()
    console = Console(file=file, width=120)
    text.groups(console, [GroupRow("g1", "hidden layer of m", 1500, 8, 6, (), None, ())])
    text.frozen(console, [FrozenRow("", "", "", "no operator consumes these channels", 9, "unused", ("a", "b", "c"))])
    lines = [" ".join(line.split()) for line in file.getvalue().splitlines()]
    assert "g1 8 -> 6 1.50 K hidden layer of m" in lines
    assert "a and 2 more no operator consumes these channels 9" in lines
