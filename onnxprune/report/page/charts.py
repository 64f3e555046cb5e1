"""Charts as inline SVG: matplotlib draws them, the page's style sheet colours them (light, dark, print)."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from onnxprune.report.page.markup import Html

LOOK: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: it can be searched, and looks like the page's
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "path.simplify": False,
    "text.parse_math": False,  # names may hold $
}
COLOURS = {"#000001": "currentColor", "#000002": "var(--before)", "#000003": "var(--after)", "#000004": "var(--line)",
           "#000005": "var(--bad)", "#000006": "var(--page)"}  # fmt: skip
"""What is drawn in place of the colours of the page."""

INK, BEFORE, AFTER, LINE, BAD, PAGE = COLOURS

Draw = Callable[[Any], None]


def chart(draw: Draw, title: str, size: tuple[float, float] = (7.6, 2.6), rows: int = 1) -> Html:
    """Draw a figure of ``rows`` axes one above the other; ``title`` is for those who cannot see it."""
    import matplotlib as mpl  # noqa: PLC0415 (an extra)
    from matplotlib.figure import Figure  # noqa: PLC0415 (a figure of its own needs no screen, as pyplot might)

    inks: Any = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    with mpl.rc_context({**LOOK, **dict.fromkeys(inks, INK), "grid.color": LINE, "svg.hashsalt": title}):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots(rows, 1, sharex=True)
        draw(axes)
        written = io.StringIO()
        figure.savefig(written, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return Html(f'<div class="chart">{_inline(written.getvalue(), title)}</div>')


def _inline(svg: str, title: str) -> Html:
    """Cut an SVG file down to its element, in the page's colours and at the page's width."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r' id="[a-z]+[^"]*_\d+"', "", svg)  # of groups: nobody refers to them, and several charts repeat them
    svg = re.sub(r'^<svg [^>]*?viewBox="([^"]+)"[^>]*>', r'<svg role="img" viewBox="\1">', svg, flags=re.S)
    svg = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", svg)
    for drawn, shown in COLOURS.items():
        svg = svg.replace(drawn, shown)
    label = title.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    return Html(re.sub(r"\n\s*", "\n", svg).replace('role="img"', f'role="img" aria-label="{label}"', 1).strip())


def per_layer(rows: Sequence[Mapping[str, Any]], *, after: bool) -> Html:
    """MAC and weights of every layer in order, also ``after`` pruning: the paper's network architecture analysis."""

    def draw(axes: Any) -> None:
        edges = [index + 0.5 for index in range(len(rows) + 1)]
        for one, kind, name in zip(axes, ("mac", "weights"), ("MAC", "weights"), strict=True):
            for when, colour in (("before", BEFORE), ("after", AFTER)) if after else (("before", AFTER),):
                values = [row[f"{kind}_{when}"] for row in rows]
                one.stairs(values, edges, fill=True, color=colour, label="original" if when == "before" else "kept")
            one.set_ylabel(name)
            one.yaxis.set_major_formatter(_engineering())
            one.grid(axis="y")
            one.set_xlim(0.5, len(rows) + 0.5)
            one.set_ylim(0, None)
        axes[1].set_xlabel("layer, in the order of computation")
        if after:
            axes[0].legend(frameon=False, ncols=2, loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0)

    return chart(draw, "MAC and weights per layer", (7.6, 3.6), rows=2)


Point = tuple[float, float, bool]


def quality(points: Sequence[Point], metric: str, original: float, given: Sequence[tuple[float, float]]) -> Html:
    """Quality of every tried budget (MAC share, quality, whether it passes), and of the original."""

    def draw(axes: Any) -> None:
        axes.axhline(original, color=BEFORE, linestyle="--", label="original")
        ordered = sorted(points)
        axes.plot([100 * p[0] for p in ordered], [p[1] for p in ordered], color=LINE, zorder=1)
        for ok, colour, label in ((True, AFTER, "passes"), (False, BAD, "fails")):
            some = [p for p in points if p[2] is ok]
            if some:
                axes.plot([100 * p[0] for p in some], [p[1] for p in some], "o", color=colour, label=label)
        for kept, value in given:
            axes.plot([100 * kept], [value], "D", color=AFTER, markersize=9, label="written")
        axes.set_xlabel("MAC kept, %")
        axes.set_ylabel(metric)
        axes.grid()
        axes.legend(frameon=False)

    return chart(draw, f"{metric} against MAC", (7.6, 3.0))


def price(points: Sequence[Mapping[str, float]]) -> Html:
    """Share of all scores that goes with each share of MAC."""

    def draw(axes: Any) -> None:
        axes.plot([100 * p["mac"] for p in points], [100 * p["score"] for p in points], "o-", color=AFTER, markersize=3)
        axes.set_xlabel("MAC kept, %")
        axes.set_ylabel("score removed, %")
        axes.set_ylim(0, None)
        axes.invert_xaxis()
        axes.grid()

    return chart(draw, "score removed against MAC kept", (7.6, 2.8))


def _engineering() -> Any:
    from matplotlib.ticker import EngFormatter  # noqa: PLC0415 (an extra)

    return EngFormatter(sep="")


def histogram(scores: Sequence[float], threshold: float | None, bins: int = 24) -> Html:
    """Distribution of a group's scores as a small picture: bars over the logarithm, and a line where the threshold is.

    Scores within a group often span decades; what is below a millionth of the largest stands at the left edge.
    """
    top, least = max(scores, default=0.0) or 1.0, min(scores, default=0.0)
    lowest = max(least, top * 1e-6) if least < top else top / 2
    decades = math.log(top / lowest)

    def place(score: float) -> float:
        return min(1.0, math.log(max(score, lowest) / lowest) / decades)

    counts = [0] * bins
    for score in scores:
        counts[min(bins - 1, int(bins * place(score)))] += 1
    most = max(counts)
    bars = "".join(f"M{4 * i} 20v-{18 * n / most:.1f}h3V20z" for i, n in enumerate(counts) if n)
    line = "" if threshold is None else f'<path class="cut" d="M{4 * bins * place(threshold):.1f} 0V20"/>'
    return Html(f'<svg class="scores" viewBox="0 0 {4 * bins} 20" aria-hidden="true"><path d="{bars}"/>{line}</svg>')
