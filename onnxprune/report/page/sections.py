"""The page's sections, from top to bottom; each is left out where the report has nothing for it."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from onnxprune.report.page import charts
from onnxprune.report.page.markup import Html, breaking, figure, join, slug, tag
from onnxprune.report.page.tables import Column, table
from onnxprune.report.reasons import KINDS
from onnxprune.report.text import MORE_NAMES, NAMES

Report = Mapping[str, Any]
Section = Callable[[Report], Html | None]


def pruned(report: Report) -> bool:
    """Whether it tells of a pruned model, rather than of a model alone."""
    cost = report["cost"]
    return bool(report["output"].get("path")) or report["proof"] is not None or cost["after"] != cost["before"]


def title(report: Report) -> str:
    """Name of the file that the report is about."""
    path = report["output"].get("path") or (not pruned(report) and report["input"].get("path"))
    return pathlib.PurePath(path).name if path else "a model in memory"


def header(report: Report) -> Html:
    """Say what became of what, and the figures that matter most."""
    origin = report["input"].get("path")
    line = "pruned" if pruned(report) else "as it is"
    line += f" from {pathlib.PurePath(origin).name}" if pruned(report) and origin else ""
    tiles = _tiles_after(report) if pruned(report) else _tiles_before(report)
    notes = [tag("li", note) for note in report.get("notes", ())]
    return tag(
        "header",
        tag("h1", title(report), " ", tag("small", line)),
        tag("dl", *tiles, class_="tiles"),
        tag("ul", *notes, class_="notes") if notes else None,
    )


def _tile(name: str, value: Html | str, more: Html | str | None = None, state: str | None = None) -> Html:
    return tag("div", tag("dt", name), tag("dd", value), tag("dd", more, class_="more") if more else None, class_=state)


def _tiles_after(report: Report) -> list[Html]:
    tiles = []
    for kind in ("mac", "weights", "bandwidth"):
        counts = [figure(report, f"cost.{when}.{kind}", "count") for when in ("after", "before")]
        tiles.append(
            _tile(NAMES[kind], figure(report, f"cost.ratio.{kind}", "share"), join(counts[0], " of ", counts[1]))
        )
    if report.get("latency"):
        times = join(figure(report, "latency.after_ms", "ms"), " of ", figure(report, "latency.before_ms", "ms"))
        tiles.append(_tile("latency", figure(report, "latency.after_ms / latency.before_ms", "share"), times))
    if report.get("quality"):
        quality = report["quality"]
        more = join("before ", figure(report, "quality.before", "plain"), f", over {quality['samples']} samples")
        tiles.append(_tile(quality["metric"], figure(report, "quality.after", "plain"), more))
    proof = report.get("proof")
    if proof is None:
        tiles.append(_tile("proof", "none", "nothing was removed, or --no-proof"))
    else:
        more = join(figure(report, "proof.tensors", "channels"), " tensors equal the masked original, error ",
                    figure(report, "proof.max_rel_err", "error"))  # fmt: skip
        tiles.append(_tile("proof", "holds" if proof["ok"] else "FAILED", more, "good" if proof["ok"] else "bad"))
    return tiles


def _tiles_before(report: Report) -> list[Html]:
    return [
        _tile(NAMES[kind], figure(report, f"cost.before.{kind}", "count"),
              join("can go down to ", figure(report, f"floor.{kind}", "share")))
        for kind in ("mac", "weights", "params", "bandwidth")
    ]  # fmt: skip


def section(name: str, *content: str | None, about: str | None = None) -> Html:
    """Make a section with its heading, and a line ``about`` it."""
    return tag("section", tag("h2", name), tag("p", about, class_="about") if about else None, *content, id=slug(name))


def costs(report: Report) -> Html | None:
    """Table 1 of the paper: costs and quality before and after."""
    after = pruned(report)
    heads = ("", "original", "pruned", "kept") if after else ("", "cost", "floor")
    rows = []
    for kind, name in {**NAMES, **MORE_NAMES}.items():
        if kind not in report["cost"]["before"]:
            continue
        before = figure(report, f"cost.before.{kind}", "count")
        last = (figure(report, f"cost.after.{kind}", "count"), figure(report, f"cost.ratio.{kind}", "share"))
        floor = (figure(report, f"floor.{kind}", "share") if kind in report["floor"] else "",)
        rows.append((name + (", bytes" if kind == "peak_memory" else ""), before, *(last if after else floor)))
    if report.get("latency"):
        both = (figure(report, f"latency.{when}_ms", "ms") for when in ("before", "after"))
        rows.append(("latency", *both, figure(report, "latency.after_ms / latency.before_ms", "share")))
    if report.get("quality"):
        both = (figure(report, f"quality.{when}", "plain") for when in ("before", "after"))
        rows.append((report["quality"]["metric"], *both, join("drop ", figure(report, "quality.drop", "plain"))))
    body = [tag("tr", tag("th", row[0], scope="row"), *(tag("td", cell) for cell in row[1:])) for row in rows]
    titles = tag("tr", *(tag("th", head) for head in heads))
    shapes = ", ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in report["input_shapes"].items())
    return section(
        "Cost",
        tag("div", tag("table", tag("thead", titles), tag("tbody", *body), class_="plain"), class_="wide"),
        _targets(report),
        about=f"For one inference with {shapes}. Bandwidth is weights plus activations, in elements; peak memory what "
        "computed tensors hold at once.",
    )


def _targets(report: Report) -> Html | None:
    lines = []
    for index, target in enumerate(report.get("targets", ())):
        kind = "share" if target["requested"] <= 1 else "count"
        told = [figure(report, f"targets.{index}.{key}", kind) for key in ("requested", "achieved", "floor")]
        asked = f"Asked for {(NAMES | MORE_NAMES).get(target['kind'], target['kind'])}: "
        lines.append(tag("p", asked, told[0], "; achieved ", told[1], "; floor ", told[2]))
    return join(*lines) if lines else None


def architecture(report: Report) -> Html | None:
    """Where the multiply-accumulates and the weights are."""
    if not report["layers"]:
        return None
    return section(
        "Architecture",
        charts.per_layer(report["layers"], after=pruned(report)),
        about="MAC and weights of every layer. Where one is high and the other low, a weight costs many MAC.",
    )


def layers(report: Report) -> Html | None:
    """Channels per layer, coloured by group."""
    rows, after = report["layers"], pruned(report)
    if not rows:
        return None
    widest = max(row["channels_before"] for row in rows)
    hues = _hues(report)
    columns = [
        Column("#"), Column("layer", text=True), Column("op", text=True), Column("group", text=True),
        Column("channels, original and kept" if after else "channels"), Column("MAC"), Column("MAC kept") if after else None,
        Column("weights"), Column("weights kept") if after else None,
    ]  # fmt: skip
    cells = []
    for index, row in enumerate(rows):
        at = f"layers.{index}"
        counts = [figure(report, f"{at}.channels_before", "channels")]
        counts += [Html(" &rarr; "), figure(report, f"{at}.channels_after", "channels")] if after else []
        hue = next((hues[name] for name in row["groups"] if name in hues), None)
        bar = tag(
            "span", tag("i", style=f"width:{100 * row['channels_after'] / widest:.1f}%"),
            class_="bar", style=f"--whole:{100 * row['channels_before'] / widest:.1f}%;{_hue(hue)}",
        )  # fmt: skip
        badges = join(*(_badge(name, hues.get(name)) for name in row["groups"]))
        cells.append([
            str(index + 1), breaking(row["node"]), row["op"], badges, join(bar, tag("span", *counts, class_="n")),
            figure(report, f"{at}.mac_{'after' if after else 'before'}", "count"),
            figure(report, f"{at}.mac_after / {at}.mac_before", "share") if after else None,
            figure(report, f"{at}.weights_{'after' if after else 'before'}", "count"),
            figure(report, f"{at}.weights_after / {at}.weights_before", "share") if after else None,
        ])  # fmt: skip
    about = "Layers of one colour share their output channels, which live or die together; grey ones cannot shrink."
    return section("Channels per layer", table(columns, cells, "layers"), about=about)


def _hues(report: Report) -> dict[str, float]:
    """A hue per group that can shrink; neighbours in the list differ most (golden angle)."""
    free = [group["id"] for group in report["groups"] if group["frozen"] is None]
    return {name: (index * 137.508) % 360 for index, name in enumerate(free)}


def _hue(hue: float | None) -> str:
    return "" if hue is None else f"--hue:{hue:.0f};--chroma:1"


def _badge(group: str, hue: float | None) -> Html:
    return tag("span", group, class_="group", style=_hue(hue))


def groups(report: Report) -> Html | None:
    """Groups with their scores and thresholds."""
    rows = [(index, group) for index, group in enumerate(report["groups"]) if group["frozen"] is None]
    if not rows:
        return None
    after, hues = pruned(report), _hues(report)
    scored = any(any(group["score"]) for _, group in rows)
    columns = [
        Column("group", text=True), Column("what its channels are", text=True), Column("MAC of its layers"),
        Column("channels"),
        Column("kept") if after else None, Column("threshold") if after and scored else None,
        Column("scores (log)", sort=False) if scored else None,
    ]  # fmt: skip
    cells = []
    for index, group in rows:
        at = f"groups.{index}"
        members = "\n".join(f"{member['tensor']} axis {member['axis']}" for member in group["members"])
        threshold = group.get("threshold")
        cells.append([
            _badge(group["id"], hues[group["id"]]), tag("span", group["name"], title=members),
            figure(report, f"{at}.mac", "count"), figure(report, f"{at}.size", "channels"),
            figure(report, f"{at}.kept", "channels") if after else None,
            figure(report, f"{at}.threshold", "plain") if after and scored else None,
            charts.histogram(group["score"], threshold) if scored else None,
        ])  # fmt: skip
    about = "Channels with the same place in a group are removed together."
    if after and scored:
        about += " The threshold is the lowest score that stayed; the line shows it among the scores."
    return section("Groups", table(columns, cells, "groups"), about=about)


def price(report: Report) -> Html | None:
    """What each target would cost, of a model that was only looked at."""
    if not report.get("curve"):
        return None
    about = "What each target takes away: the share of all channels' scores that goes with the MAC."
    return section("What a target costs", charts.price(report["curve"]), about=about)


def frozen(report: Report) -> Html | None:
    """What cannot be removed, and why."""
    rows = report["frozen"]
    if not rows:
        return section("Frozen", tag("p", "Nothing: every channel that an operator reads can go."))
    columns = [
        Column("MAC"),
        Column("at", text=True),
        Column("op", text=True),
        Column("why", text=True),
        Column("layers"),
    ]
    cells = []
    for index, row in enumerate(rows):
        where = row["node"] or row["tensor"] or next(iter(row["layers"]), "")
        why = tag("span", row["reason"], title=KINDS.get(row["kind"]))
        count = tag("span", str(len(row["layers"])), title="\n".join(row["layers"]))
        cells.append([figure(report, f"frozen.{index}.mac", "count"), breaking(where), row["op"], why, count])
    about = "What no rule can prove stays. MAC are those of the layers concerned; one layer may stand in several rows."
    return section("Frozen", table(columns, cells, "frozen"), about=about)


def quality(report: Report) -> Html | None:
    """Quality against budget, where a search or a loop tried several."""
    probes, steps = report.get("probes") or (), report.get("iterations") or ()
    if not (probes or steps) or not report.get("quality"):
        return None
    kind, rows = ("probes", probes) if probes else ("iterations", steps)
    kept, value = ("achieved", "quality") if probes else ("kept", "metric")
    good = [row["ok"] if probes else row["status"] == "good" for row in rows]
    points = [(row[kept], row[value], ok) for row, ok in zip(rows, good, strict=True) if row[value] is not None]
    metric = report["quality"]["metric"]
    columns = [Column("#"), Column("MAC kept"), Column(metric), Column("", text=True)]
    cells = [
        [
            str(index + 1 if probes else row["number"]), figure(report, f"{kind}.{index}.{kept}", "share"),
            figure(report, f"{kind}.{index}.{value}", "plain"),
            ("passes" if ok else "fails") if probes else row["status"],
        ]
        for index, (row, ok) in enumerate(zip(rows, good, strict=True))
    ]  # fmt: skip
    about = "Every step of the loop."
    before, done = report["quality"]["before"], [(report["cost"]["ratio"]["mac"], report["quality"]["after"])]
    if probes:  # measured on other samples than the figure that is quoted
        before, done = probes[0]["before"], []
        about = "Every budget that was tried, on the half of the samples that the search saw."
    drawn = charts.quality(points, metric, before, done)
    return section("Quality against MAC", drawn, table(columns, cells, kind), about=about)


def compensation(report: Report) -> Html | None:
    """What least squares got back, layer by layer."""
    fitted = report.get("compensation")
    if not fitted or not fitted["layers"]:
        return None
    columns = [Column("layer", text=True), Column("error before"), Column("error after"), Column("note", text=True)]
    cells = [
        [
            breaking(row["node"]), figure(report, f"compensation.layers.{index}.error_before", "plain"),
            figure(report, f"compensation.layers.{index}.error", "plain"), row.get("note") or "",
        ]
        for index, row in enumerate(fitted["layers"])
    ]  # fmt: skip
    held = f", on {fitted['held_back']} samples held back" if fitted["held_back"] else ""
    about = (
        f"Squared error of each layer's output against the original's, before and after its weights were fitted{held}."
    )
    return section("Compensation", table(columns, cells, "compensation"), about=about)


def pictures(report: Report) -> Html | None:
    """Crops of the outputs of original and pruned model, and their difference."""
    rows: Sequence[Mapping[str, Any]] = report.get("pictures") or ()
    if not rows:
        return None
    shown = []
    for index, row in enumerate(rows):
        titles = {
            "wanted": "wanted",
            "original": "original",
            "pruned": "pruned",
            "difference": f"difference x{row['gain']:g}",
        }
        images = [
            tag("figure", tag("img", src=row[key], alt=f"{name}, sample {row['sample']}"), tag("figcaption", name))
            for key, name in titles.items()
            if str(row.get(key)).startswith("data:image/")  # nothing that a page would fetch
        ]
        sample, top, left = (figure(report, f"pictures.{index}.{key}", "channels") for key in ("sample", "top", "left"))
        rms, largest, low, high = (
            figure(report, f"pictures.{index}.{key}", "plain") for key in ("rms", "largest", "low", "high")
        )
        where = join("sample ", sample, ", from row ", top, ", column ", left, "; black is ", low, ", white ", high)
        what = join(". Difference: root mean square ", rms, ", largest ", largest)
        shown += [tag("p", where, what), tag("div", *images, class_="strip")]
    about = "Where the outputs differ most on the first 64 samples: of each sample the worst window."
    return section("Pictures", *shown, about=about)


def reproduce(report: Report) -> Html | None:
    """The command, versions and hashes that the result follows from."""
    files = [(name, report[name]) for name in ("input", "output") if report[name].get("path")]
    facts = [(name, f"{file['path']}  sha256 {file.get('sha256') or '?'}") for name, file in files]
    facts += [(f"{name} version", text) for name, text in (report.get("environment") or {}).items()]
    facts += [(f"option {name}", str(text)) for name, text in report["options"].items()]
    facts += [(f"time of {name}", f"{seconds:.2f} s") for name, seconds in report["timings"].items()]
    return reproduction(report.get("command"), facts)


def reproduction(command: str | None, facts: Sequence[tuple[str, str]]) -> Html:
    """The section that holds a command, and facts behind a click."""
    rows = [tag("tr", tag("th", name, scope="row"), tag("td", text)) for name, text in facts]
    return section(
        "Reproduce",
        tag("pre", tag("code", command)) if command else None,
        tag("details", tag("summary", "versions, hashes, options, times"),
            tag("table", tag("tbody", *rows), class_="plain facts")),
    )  # fmt: skip


SECTIONS: tuple[Section, ...] = (
    costs, quality, pictures, architecture, layers, price, groups, frozen, compensation, reproduce,
)  # fmt: skip
"""In the page's order."""
