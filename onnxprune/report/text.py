"""Show a report on a terminal (colours, tables) or in a pipe (plain text, the same words)."""

from __future__ import annotations

import re
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from onnxprune.passes.compensate import Compensation
from onnxprune.report import FrozenRow, GroupRow, Layer, Report
from onnxprune.report.difference import Difference
from onnxprune.report.rows import Row
from onnxprune.report.sensitivity import SensitivityRow, SensitivityTable
from onnxprune.report.tree import lines

SENSITIVITY_WIDTH = 100  # columns: names of groups are cut rather than figures
LONGEST_ID, SHORTEST_NAME = 20, 12

NAMES = {
    "mac": "MAC",
    "weights": "weights",
    "params": "parameters",
    "activations": "activations",
    "bandwidth": "bandwidth",
}
MORE_NAMES = {"effective_mac": "effective MAC", "peak_memory": "peak memory"}


_COMMANDS = re.compile(r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""What a terminal obeys instead of showing it (controls, escapes, marks that turn text around), and what is no text."""


def clean(line: str) -> str:
    """Make text of a file, such as a name, one line that commands no terminal."""
    return _COMMANDS.sub("?", re.sub(r"[\t\n\r]+", " ", line))


def amount(kind: str, value: float) -> str:
    """Write a cost with its unit."""
    return number(value) + ("B" if value >= 1e3 else " B") if kind == "peak_memory" else number(value)


def number(value: float) -> str:
    """Write a count with a unit: 1428.06 G, 7757.3 K."""
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "K")):
        if abs(value) >= limit:
            return f"{value / limit:.2f} {unit}"
    return f"{value:g}"


def summary(console: Console, report: Report, *, verbose: bool = False, verb: str = "written") -> None:
    """Show what a run did: costs before and after, proof, quality, latency, and where the result is."""
    shapes = ", ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in report.input_shapes.items())
    _print(console, f"input    {shapes}")
    table = _table(console, "", "before", "after", "kept")
    for kind, name in (NAMES | {k: n for k, n in MORE_NAMES.items() if k in report.before}).items():
        before, after = report.before[kind], report.after[kind]
        table.add_row(name, amount(kind, before), amount(kind, after), share(after, before))
    if report.latency_ms:
        before_ms, after_ms = report.latency_ms
        table.add_row("latency", f"{before_ms:.2f} ms", f"{after_ms:.2f} ms", share(after_ms, before_ms))
    if report.quality:
        before_q, after_q = report.quality
        _add(table, before_q.metric, f"{before_q.value:.4g}", f"{after_q.value:.4g}", "")
    console.print(table)
    layers(console, report.layers, limit=None if verbose else 12)
    if verbose:
        groups(console, report.groups)
    frozen(console, report.frozen, limit=None if verbose else 3)
    console.print()
    for line in _facts(report):
        _line(console, line)
    if report.output.get("path"):
        _print(console, f"{verb:9}{report.output['path']}", soft_wrap=True)


def inspection(console: Console, report: Report, *, verbose: bool = False) -> None:
    """Show what a model is made of: cost per layer, groups, what is frozen and why, the reachable floor."""
    shapes = ", ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in report.input_shapes.items())
    _print(console, f"input    {shapes}")
    table = _table(console, "", "cost", "floor")
    for kind, name in (NAMES | MORE_NAMES).items():
        if kind in report.before:
            floor = f"{100 * report.floor[kind]:.1f} %" if kind in report.floor else ""
            table.add_row(name, amount(kind, report.before[kind]), floor)
    console.print(table)
    layers(console, report.layers, before_only=True, limit=None if verbose else 40)
    groups(console, report.groups, limit=None if verbose else 40, members=verbose)
    frozen(console, report.frozen, limit=None if verbose else 12)
    for note in report.notes:
        _line(console, f"note     {note}")


def tree(console: Console, report: Report, *, verbose: bool = False) -> None:
    """Show the model as the tree of its modules, and what each costs."""
    for line in lines(report.layers, report.before["mac"], console.width, number):
        _print(console, line, soft_wrap=True)
    for note in report.notes if verbose else ():
        _line(console, f"note     {note}")


def difference(console: Console, found: Difference, *, verbose: bool = False) -> None:
    """Show how two models differ: costs, layers, nodes, constants."""
    table = _table(console, "", "A", "B", "B of A")
    for kind, name in NAMES.items():
        a, b = found.cost[kind]
        table.add_row(name, number(a), number(b), share(b, a))
    console.print(table)
    changed = [pair for pair in found.layers if pair.changed]
    limit = None if verbose else 40
    table = _table(console, "layer", "op", "channels", "MAC", "weights", align="ll")
    for pair in changed[:limit]:
        sides = [_sizes(side) for side in (pair.a, pair.b)]
        _add(table, pair.name, pair.op, *(a if a == b else f"{a} -> {b}" for a, b in zip(*sides, strict=True)))
    _show(console, "layers that differ", table, len(changed), limit)
    if found.graph:
        console.print()
        _print(console, f"the graphs' {', '.join(found.graph)} differ")
    for kind, names in found.nodes.items():
        if names:
            most = len(names) if verbose else 8
            more = f" and {len(names) - most} more" if len(names) > most else ""
            shown = ", ".join(names[:most]) + more
            console.print()
            _print(console, f"nodes {kind} ({len(names)}): {shown}", soft_wrap=True)
    table = _table(console, "constant", "change", "A", "B", "distance", align="ll")
    for one in found.constants[:limit]:
        shapes = (
            "-" if shape is None else "x".join(map(str, shape)) or "scalar" for shape in (one.shape_a, one.shape_b)
        )
        _add(table, one.name, one.change, *shapes, "" if one.distance is None else f"{one.distance:.2g}")
    _show(console, f"constants that differ, of {found.n_constants}", table, len(found.constants), limit)
    if found.same:
        console.print("\nthe models are the same")


def _sizes(layer: Layer | None) -> tuple[str, str, str]:
    if layer is None:
        return "-", "-", "-"
    return str(layer.channels_before), number(layer.mac_before), number(layer.weights_before)


def layers(console: Console, rows: Sequence[Layer], *, before_only: bool = False, limit: int | None = None) -> None:
    """Show channels, MAC and weights of every layer."""
    if before_only:
        table = _table(console, "layer", "op", "channels", "MAC", "weights", align="ll")
        for row in rows[:limit]:
            cells = (str(row.channels_before), number(row.mac_before), number(row.weights_before))
            _add(table, row.node, row.op, *cells)
    else:
        table = _table(console, "layer", "op", "channels", "MAC", "weights", align="ll")
        for row in rows[:limit]:
            _add(
                table,
                row.node,
                row.op,
                f"{row.channels_before} -> {row.channels_after}",
                f"{number(row.mac_after)} ({share(row.mac_after, row.mac_before)})",
                number(row.weights_after),
            )
    _show(console, "layers", table, len(rows), limit)


def groups(console: Console, rows: Sequence[GroupRow], *, limit: int | None = None, members: bool = False) -> None:
    """Show which channels live or die together and what they are, those in the costliest layers first.

    Parameters
    ----------
    members
        Also show the tensors and axes that hold the channels.
    """
    free = sorted((row for row in rows if row.frozen is None), key=lambda row: -row.mac)
    table = _table(console, "group", "channels", "MAC", "what they are", align="lrrl")
    for row in free[:limit]:
        kept = f"{row.size} -> {row.kept}" if row.kept < row.size else str(row.size)
        _add(table, row.id, kept, number(row.mac), row.name)
        for tensor, axis in row.members if members else ():
            _add(table, "", "", "", f"  {tensor} axis {axis}")
    title = "groups of channels that are removed together, with the MAC of their layers"
    _show(console, title, table, len(free), limit)


def frozen(console: Console, rows: Sequence[FrozenRow], *, limit: int | None = None) -> None:
    """Show what cannot be removed, why, and what multiply-accumulates it concerns."""
    table = _table(console, "frozen at", "op", "why", "MAC", align="lll")
    for row in rows[:limit]:
        more = f" and {len(row.layers) - 1} more" if len(row.layers) > 1 else ""
        _add(table, row.node or row.tensor or f"{row.layers[0]}{more}", row.op, row.reason, number(row.mac))
    _show(console, "frozen", table, len(rows), limit)


def sweep(console: Console, rows: Sequence[Row]) -> None:
    """Show one line per run, and under the table why some failed; columns that say nothing are left out."""
    metrics = list(dict.fromkeys(measured.metric for row in rows for measured in row.quality))
    compensated = any(row.compensation != "none" for row in rows)
    columns = ["model", "preset", "criterion", *(["compensation"] if compensated else []), "target"]
    qualities = [name for metric in metrics for name in (metric, "drop")]
    kept = ["MAC", "params", "bandwidth"]
    table = _table(console, *columns, *kept, *qualities, "pareto", "proof", "s", align="l" * len(columns))
    for row in rows:
        target = f"{row.kind} {row.target:g}" if row.target <= 1 else f"{row.kind} {number(row.target)}"
        way = [row.model, row.preset, row.criterion, *([row.compensation] if compensated else []), target]
        shares = ["-" if value is None else f"{100 * value:.1f} %" for value in (row.mac, row.params, row.bandwidth)]
        found = {measured.metric: (f"{measured.after:.4g}", f"{measured.drop:.4g}") for measured in row.quality}
        quality = [cell for metric in metrics for cell in found.get(metric, ("-", "-"))]
        proof = {True: "holds", False: "FAILED", None: "-"}[row.proof]
        end = ["*" if row.pareto else "", proof if row.ok else "failed", f"{row.seconds:.1f}"]
        _add(table, *way, *shares, *quality, *end)
    console.print(table)
    for (model, error), times in Counter((row.model, row.error) for row in rows if not row.ok).items():
        runs = f" ({times} runs)" if times > 1 else ""
        _line(console, f"failed   {model}{runs}: {error}")


def sensitivity(console: Console, table: SensitivityTable) -> None:
    """Show one line per bundle and one column per share, the most sensitive last; under the table what failed, and why."""
    shares = sorted({row.share for row in table.rows}, reverse=True)
    by_group: dict[str, dict[float, SensitivityRow]] = {}
    for row in table.rows:
        by_group.setdefault(row.group, {})[row.share] = row
    shown = _table(console, "group", "channels", "what they are", *(f"{100 * s:g} %" for s in shares), align="lrl")
    shown.columns[0].max_width = LONGEST_ID
    for column in shown.columns[1:]:
        column.no_wrap = True
    places = _places(table.before)
    cells = {group: [_figures(rows.get(s), places) for s in shares] for group, rows in by_group.items()}
    gaps = 2 * len(shares) + 4 if shown.box is None else 3 * len(shares) + 8
    used = min(LONGEST_ID, max(map(len, ["group", *cells]))) + len("channels") + gaps
    used += sum(max(5, *map(len, column)) for column in zip(*cells.values(), strict=True))
    room = max(SHORTEST_NAME, min(console.width, SENSITIVITY_WIDTH) - used)
    for group in sorted(by_group, key=lambda group: _sensitive(by_group[group], shares)):
        row = next(iter(by_group[group].values()))
        name = row.name if len(row.name) <= room else f"{row.name[: room - 2]}.."
        _add(shown, group, str(row.size), name, *cells[group])
    if table.metric:
        _print(console, f"before   {table.metric} {table.before:.6g} over {table.samples} samples")
    what = f"drop of {table.metric}" if table.metric else "relative squared error of the outputs"
    if table.options.get("compensate", "none") != "none":
        what += " (compensated)" if table.metric else ", compensated"
    _print(console, f"{what}, with each group alone pruned to a share of its channels")
    console.print()
    console.print(shown if by_group else "nothing can be pruned; onnxprune inspect says why")
    for (group, note), times in Counter((row.group, row.note) for row in table.rows if row.note).items():
        of = f" ({times} shares)" if times > 1 else ""
        _line(console, f"note     {group}{of}: {note}")
    for note in table.notes:
        _line(console, f"note     {note}")


def _sensitive(rows: Mapping[float, SensitivityRow], shares: Sequence[float]) -> tuple[float, ...]:
    """Figures from the smallest share up, what is missing below all others."""
    figures = [rows[s].figure if s in rows else None for s in reversed(shares)]
    return tuple(-np.inf if figure is None else figure for figure in figures)


def _places(before: float | None) -> int:
    """Decimal places that show a thousandth of the original's quality or less."""
    if not before or not np.isfinite(before):
        return 4
    return int(np.clip(3 - np.floor(np.log10(abs(before))), 0, 9))


def _figures(row: SensitivityRow | None, places: int) -> str:
    if row is None or row.figure is None:
        return "-"
    if row.drop is None and row.drop_compensated is None:
        return f"{row.error:.2g}"
    first, second = (
        v if v is None else f"{round(v, places) + 0.0:.{places}f}" for v in (row.drop, row.drop_compensated)
    )
    return (first or "-") if second is None else f"{first or '-'} ({second})"


def share(part: float, whole: float) -> str:
    """Write a ratio in percent."""
    return f"{100 * part / whole:.1f} %" if whole else "-"


def _facts(report: Report) -> list[str]:
    lines = []
    for t in report.targets:
        write = (lambda value: f"{value:.4f}") if t.share else number
        lines.append(f"target   {t.kind} {write(t.requested)}, achieved {write(t.achieved)}, floor {write(t.floor)}")
    if report.proof:
        p = report.proof
        state = "holds" if p.ok else "FAILED"
        lines.append(
            f"proof    {state}: {p.tensors} tensors equal the masked original, largest error {p.max_rel_err:.1e}"
        )
        if p.redefined:
            lines.append(f"         {len(p.redefined)} operators take their statistics over the kept channels")
        if p.insensitive:
            lines.append(f"         {len(p.insensitive)} segments did not react to the negative control (see --json)")
        if report.weights == "changed" and not report.compensation:
            lines.append("         weight values differ from the original's (trained or compensated)")
    elif report.after["params"] < report.before["params"]:
        lines.append("proof    none: it was skipped (--no-proof)")
    if report.compensation:
        lines.append(_fitted(report.compensation))
    lines += [f"note     {note}" for note in report.notes]
    return lines


def _fitted(compensation: Compensation) -> str:
    """One line on what compensation did."""
    fitted = [row for row in compensation.solved if not row.note]
    others = [row for row in compensation.solved if row.note]
    errors = [row.error / row.error_before for row in fitted if row.error_before > 0]
    text = f"fitted   {len(fitted)} of {len(compensation.solved)} operators"
    if errors:
        left = 100 * float(np.median(errors))
        judged = f"{compensation.held_back} samples held back" if compensation.held_back else "the one sample there is"
        text += f"; on {judged} their errors fell to {left:.0f} %"
    if others:
        text += f"; {others[0].node} stays as it is ({others[0].note})"
        text += f", and {len(others) - 1} more (see --json)" if len(others) > 1 else ""
    return text


def _table(console: Console, *columns: str, align: str = "l") -> Table:
    """Make a table; ``align`` holds l or r per column, r where it is shorter."""
    plain = not console.is_terminal
    table = Table(box=None if plain else box.SIMPLE_HEAD, pad_edge=False, header_style="" if plain else "bold")
    for column, side in zip(columns, align.ljust(len(columns), "r"), strict=True):
        table.add_column(Text(clean(column)), justify="left" if side == "l" else "right", overflow="fold")
    return table


def _add(table: Table, *cells: str) -> None:
    """Add a row of names as they are: a bracket in one is no markup."""
    table.add_row(*(Text(clean(cell)) for cell in cells))


def _print(console: Console, line: str, *, soft_wrap: bool = False) -> None:
    """Print a line as it is."""
    console.print(Text(clean(line)), soft_wrap=soft_wrap)


def _line(console: Console, line: str) -> None:
    """Print a fact behind its word; on a terminal it is broken between words, in a pipe it stays one line."""
    lines = [clean(line)]
    if console.is_terminal:
        lines = textwrap.wrap(
            lines[0], console.width, subsequent_indent=" " * 9, break_long_words=False, break_on_hyphens=False
        )
    for part in lines:
        _print(console, part, soft_wrap=True)


def _show(console: Console, title: str, table: Table, total: int, limit: int | None) -> None:
    console.print()
    console.print(f"{title} ({total})", highlight=False)
    if total:
        console.print(table)
    if limit is not None and total > limit:
        console.print(f"... {total - limit} more; -v shows all", highlight=False)
