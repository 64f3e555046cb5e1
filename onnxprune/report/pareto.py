"""Draw quality against MAC: the rows of a sweep, one line per model and way of pruning; the steps of an iterative run."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any

from onnxprune.errors import UsageError
from onnxprune.report.rows import Row

FORMATS = ("svg", "png", "pdf")
_LOOK: dict[Any, Any] = {
    "svg.hashsalt": "onnxprune",  # ids in an SVG follow from it, so that the same rows give the same bytes
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def require_matplotlib(what: str = "--plot") -> None:
    """Raise :class:`UsageError` where matplotlib, which ``what`` needs, is not installed or does not start."""
    try:
        import matplotlib.figure  # noqa: F401, PLC0415 (an extra)
    except ImportError as error:
        raise UsageError(f"{what} needs matplotlib: pip install 'onnxprune[report]'") from error
    except Exception as error:  # of its settings, which may be anybody's
        raise UsageError(f"{what}: matplotlib does not start; check MPLBACKEND and matplotlibrc ({error})") from error


def draw(rows: Sequence[Row], kind: str = "svg") -> bytes:
    """Draw a picture; Pareto-optimal points are filled, the others hollow, and what the originals reach is dashed.

    Parameters
    ----------
    kind
        ``svg``, ``png`` or ``pdf``; the same rows give the same bytes.

    Raises
    ------
    UsageError
        matplotlib is missing, or no row has a quality.
    """
    require_matplotlib()
    import matplotlib as mpl  # noqa: PLC0415 (an extra)
    from matplotlib.figure import Figure  # noqa: PLC0415 (a figure of its own needs no screen, as pyplot might)

    shown = [row for row in rows if row.mac is not None and row.quality]
    if not shown:
        raise UsageError("no run has a quality to draw")
    with mpl.rc_context(_LOOK):
        figure = Figure(figsize=(6.4, 4.2), layout="constrained")
        plot(figure.add_subplot(), shown)
        target = io.BytesIO()
        figure.savefig(target, format=kind, dpi=150, metadata=_without_date(kind))
    return target.getvalue()


def draw_path(points: Sequence[tuple[float, float, bool]], metric: str, before: float, kind: str = "svg") -> bytes:
    """Draw an iterative run: quality against MAC kept, step by step; steps that were taken back are hollow.

    Parameters
    ----------
    points
        Share of MAC kept, metric, and whether the step was kept, in the order of the steps.
    before
        Metric of the original, dashed.
    """
    require_matplotlib()
    import matplotlib as mpl  # noqa: PLC0415 (an extra)
    from matplotlib.figure import Figure  # noqa: PLC0415

    with mpl.rc_context(_LOOK):
        figure = Figure(figsize=(6.4, 4.2), layout="constrained")
        axes = figure.add_subplot()
        path = [(100.0, before), *((100 * share, value) for share, value, kept in points if kept)]
        axes.plot([x for x, _ in path], [y for _, y in path], "o-", color="C0", linewidth=1.2, markersize=6)
        for share, value, kept in points:
            if not kept and math.isfinite(value):
                axes.plot(100 * share, value, "o", markersize=6, color="C3", markerfacecolor="white")
        axes.axhline(before, color="0.5", linewidth=0.8, linestyle="--")
        axes.invert_xaxis()
        axes.set_xlabel("MAC kept, % of the original")
        axes.set_ylabel(metric)
        axes.grid(alpha=0.25)
        target = io.BytesIO()
        figure.savefig(target, format=kind, dpi=150, metadata=_without_date(kind))
    return target.getvalue()


def plot(axes: Any, shown: Sequence[Row], grey: str = "0.5", hollow: str = "white") -> None:
    """Draw rows that have a quality into axes of matplotlib; ``hollow`` fills points that are not Pareto-optimal."""
    metric = shown[0].quality[0].metric
    lines = list(dict.fromkeys(row.line for row in shown))
    varying = [len({line[part] for line in lines}) > 1 for part in range(len(lines[0]))]
    colours: dict[str, str] = {}
    for number, line in enumerate(lines):
        points = sorted((row for row in shown if row.line == line), key=lambda row: (row.mac, row.quality[0].after))
        label = " ".join(word for word, varies in zip(line, varying, strict=True) if varies) or line[0]
        label = label.replace("$", r"\$").replace("_", " _", label.startswith("_"))  # $ is mathematics, _ hides a label
        at = [100 * (row.mac or 0) for row in points]
        values = [row.quality[0].after for row in points]
        (drawn,) = axes.plot(at, values, color=f"C{number % 10}", linewidth=1.2, label=label)
        colours.setdefault(line[0], drawn.get_color())
        for row, x, y in zip(points, at, values, strict=True):
            fill = drawn.get_color() if row.pareto else hollow
            axes.plot(x, y, "o", markersize=6, color=drawn.get_color(), markerfacecolor=fill)
    for model, colour in colours.items():
        before = next(row.quality[0].before for row in shown if row.model == model)
        axes.axhline(before, color=colour if len(colours) > 1 else grey, linewidth=0.8, linestyle="--")
    axes.set_xlabel("MAC kept, % of the original")
    axes.set_ylabel(metric + _better(shown))
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, title="filled: Pareto-optimal", alignment="left")


def _better(shown: Sequence[Row]) -> str:
    """Which way a metric points, by the rows alone: the name in a table may be one of code that nobody wants to run."""
    signs = [(row.quality[0].before - row.quality[0].after) * row.quality[0].drop for row in shown]
    return " (higher is better)" if max(signs) > 0 else " (lower is better)" if min(signs) < 0 else ""


def _without_date(kind: str) -> dict[str, None]:
    return {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(kind, {})
