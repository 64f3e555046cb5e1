"""The HTML page: every figure on it is the JSON's, nothing is fetched, and what users name things cannot break it."""

from __future__ import annotations

import copy
import json
import operator
import pathlib
import re
import shutil
import sys
from functools import reduce
from itertools import pairwise
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from pages import Parsed, mismatches

import onnxprune
from chains import chain
from commands import ok, run
from onnxprune.report.page import page

FIXTURES = pathlib.Path(__file__).parents[2] / "fixtures"
DENOISE, DIGITS = FIXTURES / "denoise", FIXTURES / "digits"


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    """Page and JSON of the denoiser, cut in half and compared on pictures."""
    folder = tmp_path_factory.mktemp("page")
    ok(DENOISE / "denoise.onnx", folder / "out.onnx", "--target-mac", "0.5", "--calib", DENOISE / "denoise_calib.npz",
       "--data", DENOISE / "denoise_eval.npz", "--metric", "psnr", "--html", folder / "r.html",
       "--json", folder / "r.json")  # fmt: skip
    return (folder / "r.html").read_text(), json.loads((folder / "r.json").read_text())


def test_every_figure_is_the_jsons(pruned: tuple[str, dict[str, Any]]) -> None:
    """Figures say where they stand in the JSON; there stands, but for the last digit shown, the same number."""
    text, report = pruned
    assert mismatches(text, report) == []
    kinds = {path.split(".")[0] for path, *_ in Parsed(text).figures}
    assert kinds >= {"cost", "latency", "quality", "proof", "targets", "layers", "groups", "compensation", "pictures"}
    rows = [path for path, *_ in Parsed(text).figures if path.startswith("layers.")]
    assert len(rows) == 6 * len(report["layers"])


def test_a_wrong_figure_is_noticed(pruned: tuple[str, dict[str, Any]]) -> None:
    """The check above fails where the page and the JSON part, in what is shown as well as in what is sorted by."""
    text, report = pruned
    assert mismatches(text, {**report, "quality": {**report["quality"], "after": 1.0}})
    shown = next(text for path, _, _, text in Parsed(text).figures if path == "cost.after.mac")
    assert mismatches(text.replace(f">{shown}<", ">1.23 G<"), report)


def test_all_sections_are_there(pruned: tuple[str, dict[str, Any]]) -> None:
    """The page of a pruned image model has every section, and the command that made it."""
    text, report = pruned
    names = {attributes.get("id") for tag, attributes in Parsed(text).tags if tag == "section"}
    assert names >= {
        "cost",
        "pictures",
        "architecture",
        "channels-per-layer",
        "groups",
        "frozen",
        "compensation",
        "reproduce",
    }
    assert report["command"].startswith("onnxprune ")
    shown = "".join(Parsed(text).text)
    assert report["command"] in shown
    for kind in ("input", "output"):
        assert report[kind]["sha256"] in shown
    assert report["environment"]["onnxruntime"] in shown


def test_nothing_is_fetched(pruned: tuple[str, dict[str, Any]]) -> None:
    """Nothing on the page points outside it."""
    found = Parsed(pruned[0])
    for tag, attributes in found.tags:
        assert tag not in ("link", "iframe", "object", "base")
        for name in ("src", "href", "xlink:href", "srcset"):
            assert (attributes.get(name) or "#").startswith(("#", "data:image/png;base64,")), (tag, name)
    assert not re.search(r"@import|url\((?!#)", pruned[0])
    assert found.open == []


def test_pictures_of_a_strange_report_are_not_fetched(pruned: tuple[str, dict[str, Any]]) -> None:
    """A picture that is no data stands nowhere, be it an address or no text at all; the others of its sample stay."""
    report = json.loads(json.dumps(pruned[1]))
    report["pictures"][0] |= {"wanted": "http://evil.example/w.png", "pruned": "//evil.example/p.png", "original": 5}
    sources = [attributes["src"] for tag, attributes in Parsed(page(report)).tags if tag == "img"]
    before = [attributes["src"] for tag, attributes in Parsed(pruned[0]).tags if tag == "img"]
    assert len(sources) == len(before) - 3
    assert all(source.startswith("data:image/") for source in sources)


def test_identifiers_are_unique(pruned: tuple[str, dict[str, Any]]) -> None:
    """Several charts on one page do not repeat identifiers, and what they refer to is there."""
    identifiers = [a["id"] for _, a in Parsed(pruned[0]).tags if a.get("id")]
    assert len(identifiers) == len(set(identifiers))
    referred = set(re.findall(r'(?:href="|url\()#([^")]+)', pruned[0]))
    assert referred <= set(identifiers)


def test_report_makes_the_same_page(pruned: tuple[str, dict[str, Any]], tmp_path: pathlib.Path) -> None:
    """``onnxprune report`` makes of the JSON what ``--html`` wrote; a page that is there is not overwritten."""
    (tmp_path / "r.json").write_text(json.dumps(pruned[1]))
    assert ok("report", tmp_path / "r.json").output.startswith("written")
    assert (tmp_path / "r.html").read_text() == pruned[0]
    assert run("report", tmp_path / "r.json").exit_code == 2
    ok("report", tmp_path / "r.json", "-o", tmp_path / "other.html", "-q")


@pytest.mark.parametrize(
    ("content", "code", "text"),
    [
        pytest.param("{", 2, "not valid JSON", id="no-json"),
        pytest.param("[]", 2, "no report", id="a-list"),
        pytest.param('{"schema": 1, "layers": [], "cost": {}}', 2, "it has no input", id="a-part-of-one"),
        pytest.param('{"schema": 1, "error": {"code": 4, "message": "m"}}', 2, "no report", id="an-error"),
        pytest.param(None, 7, "no such file", id="no-file"),
    ],
)
def test_what_is_no_report_is_refused(tmp_path: pathlib.Path, content: str | None, code: int, text: str) -> None:
    """Other files end in one message, and no page."""
    if content is not None:
        (tmp_path / "r.json").write_text(content)
    found = run("report", tmp_path / "r.json")
    assert found.exit_code == code
    assert text in found.output
    assert not (tmp_path / "r.html").exists()


def test_reports_of_other_kinds_are_refused(pruned: tuple[str, dict[str, Any]], tmp_path: pathlib.Path) -> None:
    """What ``diff`` writes, and what an older version wrote, is told from a report; so is a folder."""
    model = DENOISE / "denoise.onnx"
    ok("diff", model, model, "--json", tmp_path / "d.json", "-q")
    assert "d.json: no report of a model" in run("report", tmp_path / "d.json").output
    old = {**pruned[1], "layers": [{k: v for k, v in row.items() if k != "groups"} for row in pruned[1]["layers"]]}
    (tmp_path / "old.json").write_text(json.dumps(old))
    found = run("report", tmp_path / "old.json")
    assert found.exit_code == 2
    assert "layers[].groups" in found.output
    for source in (tmp_path, "."):
        assert run("report", source).exit_code == 7


@pytest.mark.parametrize(
    ("path", "value"),
    [
        pytest.param(("cost",), 5, id="number"),
        pytest.param(("layers",), [None], id="null"),
        pytest.param(("timings",), ["x"], id="list"),
        pytest.param(("cost", "before", "mac"), "x", id="text"),
        pytest.param(("cost", "before", "mac"), 10**400, id="giant"),
    ],
)
def test_values_of_other_types_are_refused(
    pruned: tuple[str, dict[str, Any]], path: tuple[str | int, ...], value: Any, tmp_path: pathlib.Path
) -> None:
    """A report that holds what no command writes ends in one message with the file's name, and no page."""
    report = copy.deepcopy(pruned[1])
    reduce(operator.getitem, path[:-1], report)[path[-1]] = value
    (tmp_path / "r.json").write_text(json.dumps(report))
    found = run("report", tmp_path / "r.json")
    assert (found.exit_code, "r.json: " in found.stderr, len(found.stderr.splitlines())) == (2, True, 1)
    assert not (tmp_path / "r.html").exists()


def test_columns_show_what_their_heads_say(pruned: tuple[str, dict[str, Any]]) -> None:
    """A figure stands under the head that it belongs to, and in the row of its layer or group."""
    wanted = {
        "table-layers": {
            "channels, original and kept": ["channels_before", "channels_after"], "MAC": ["mac_after"],
            "MAC kept": ["mac_after", "mac_before"], "weights": ["weights_after"],
            "weights kept": ["weights_after", "weights_before"],
        },
        "table-groups": {"MAC of its layers": ["mac"], "channels": ["size"], "kept": ["kept"], "threshold": ["threshold"]},
        "table-compensation": {"error before": ["error_before"], "error after": ["error"]},
    }  # fmt: skip
    for name, columns in wanted.items():
        table = re.search(rf'id="{name}".*?</table>', pruned[0], flags=re.DOTALL)
        assert table
        heads = [re.sub("<[^>]*>", "", head) for head in re.findall(r"<th.*?</th>", table[0])]
        rows = [re.findall(r"<td.*?</td>", row) for row in re.findall(r"<tr>(<td.*?)</tr>", table[0])]
        assert set(columns) <= set(heads)
        for index, cells in enumerate(rows):
            for head, keys in columns.items():
                paths = re.findall(r'data-at="([^"]*)"', cells[heads.index(head)])
                parts = [part.split(".") for path in paths for part in path.split(" / ")]
                assert [part[-1] for part in parts] == (keys if parts else [])
                assert {part[-2] for part in parts} <= {str(index)}


def test_charts_draw_the_jsons_figures(pruned: tuple[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    """What is handed to matplotlib is what the report holds."""
    from matplotlib.axes import Axes  # noqa: PLC0415

    drawn, stairs = [], Axes.stairs

    def noted(axes: Axes, values: Any, *args: Any, **options: Any) -> Any:
        drawn.append(list(values))
        return stairs(axes, values, *args, **options)

    monkeypatch.setattr(Axes, "stairs", noted)
    page(pruned[1])
    kinds = ("mac_before", "mac_after", "weights_before", "weights_after")
    assert drawn == [[row[kind] for row in pruned[1]["layers"]] for kind in kinds]


def test_a_failing_page_takes_nothing_along(tmp_path: pathlib.Path) -> None:
    """A page that cannot be written leaves the model, and its error is the JSON, which stays one document."""
    out = tmp_path / "o.onnx"
    found = run(
        DIGITS / "digits.onnx", out, "--target-mac", "0.5", "--no-latency", "--html", "/dev/full", "--json", "-", "-q"
    )
    assert found.exit_code == 7
    assert json.loads(found.stdout)["error"]["code"] == 7
    assert f"{out} was written before" in found.stderr
    assert out.exists()


def test_a_page_is_no_stream(tmp_path: pathlib.Path) -> None:
    """``--html -`` is refused, rather than taken for a file name."""
    found = run("inspect", DIGITS / "digits.onnx", "--html", "-")
    assert found.exit_code == 2
    assert not pathlib.Path("-").exists()


def test_models_in_memory_have_a_heading() -> None:
    """Without file names the page still says whether something was pruned."""
    result = onnxprune.prune(onnx.load(DIGITS / "digits.onnx"), target_mac=0.5)
    assert "a model in memory <small>pruned</small>" in page(result.report.to_json())


def test_names_are_text(tmp_path: pathlib.Path) -> None:
    """Names in a model cannot put markup on the page."""
    name = '<script>alert("&")</script>'
    rng = np.random.default_rng(0)
    weights = [numpy_helper.from_array(rng.standard_normal((4, 4, 1, 1), np.float32), f"{name}{k}") for k in range(2)]
    nodes = [
        helper.make_node("Conv", ["x", f"{name}0"], ["h"], name=name),
        helper.make_node("Conv", ["h", f"{name}1"], ["y"], name=f"$1_{name}"),
    ]
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 4, 8, 8]) for n in "xy"]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, tmp_path / "m.onnx")
    ok("inspect", tmp_path / "m.onnx", "--html", tmp_path / "r.html", "-q")
    text = (tmp_path / "r.html").read_text()
    assert sum(tag == "script" for tag, _ in Parsed(text).tags) == 1
    assert name in "".join(Parsed(text).text)


def test_inspection_shows_what_targets_cost(tmp_path: pathlib.Path) -> None:
    """A model alone has no second column, but a curve from everything down to its floor."""
    ok("inspect", DIGITS / "digits.onnx", "--html", tmp_path / "r.html", "--json", tmp_path / "r.json", "-q")
    report, text = json.loads((tmp_path / "r.json").read_text()), (tmp_path / "r.html").read_text()
    assert mismatches(text, report) == []
    curve = report["curve"]
    assert curve[0] == {"mac": 1.0, "score": 0.0}
    assert curve[-1]["mac"] == pytest.approx(report["floor"]["mac"])
    assert all(a["mac"] > b["mac"] and a["score"] < b["score"] for a, b in pairwise(curve))
    assert "What a target costs" in text
    assert "MAC kept" not in [t.strip() for t in Parsed(text).text]


def test_the_search_is_drawn(tmp_path: pathlib.Path) -> None:
    """Where a guard looked for the budget, the page has a point for every budget that it tried."""
    ok(DIGITS / "digits.onnx", tmp_path / "o.onnx", "--data", DIGITS / "digits_eval.npz", "--metric", "top1",
       "--max-drop", "0.02", "--html", tmp_path / "r.html", "--json", tmp_path / "r.json", "-q")  # fmt: skip
    report, text = json.loads((tmp_path / "r.json").read_text()), (tmp_path / "r.html").read_text()
    assert mismatches(text, report) == []
    assert report["probes"]
    tried = {path for path, *_ in Parsed(text).figures if path.startswith("probes.")}
    assert len(tried) == 2 * len(report["probes"])
    for probe in report["probes"]:
        assert probe["before"] - probe["quality"] == pytest.approx(probe["drop"])


@pytest.mark.parametrize("command", ["apply", "verify"])
def test_plans_have_pages(command: str, tmp_path: pathlib.Path) -> None:
    """What ``apply`` and ``verify`` say can be had as a page, too."""
    plan, out = tmp_path / "plan.json", tmp_path / "o.onnx"
    ok(DIGITS / "digits.onnx", out, "--target-mac", "0.5", "--plan-out", plan, "-q")
    arguments = [
        DIGITS / "digits.onnx",
        out,
        "--plan",
        plan,
        "--html",
        tmp_path / "r.html",
        "--json",
        tmp_path / "r.json",
    ]
    ok(command, *arguments, *(["--force"] if command == "apply" else []))
    assert mismatches((tmp_path / "r.html").read_text(), json.loads((tmp_path / "r.json").read_text())) == []


def test_a_page_over_another_file_is_refused(tmp_path: pathlib.Path) -> None:
    """The page may not go over the model, nor over the JSON."""
    for taken in ("o.onnx", "r.json"):
        found = run(DIGITS / "digits.onnx", tmp_path / "o.onnx", "--target-mac", "0.5", "--json", tmp_path / "r.json",
                    "--html", tmp_path / taken)  # fmt: skip
        assert found.exit_code == 2
        assert "another file" in found.output
        assert not (tmp_path / "o.onnx").exists()


def test_without_matplotlib_it_says_so_first(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No work is done for a page that cannot be drawn."""
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    found = run(DIGITS / "digits.onnx", tmp_path / "o.onnx", "--target-mac", "0.5", "--html", tmp_path / "r.html")
    assert found.exit_code == 2
    assert "onnxprune[report]" in found.output
    assert list(tmp_path.iterdir()) == []
    model = tmp_path / "m.onnx"
    shutil.copy(DIGITS / "digits.onnx", model)
    run(model, tmp_path / "o.onnx", "--target-mac", "0.5", "--html", tmp_path / "r.html", "--json", model)
    assert model.read_bytes() == (DIGITS / "digits.onnx").read_bytes()


def test_a_thousand_layers_stay_small() -> None:
    """The page of a model with 1,000 layers is under 3 MB."""
    report = onnxprune.prune(chain(1000), target_mac=0.5, proof=False).report.to_json()
    assert len(report["layers"]) == 1000
    assert len(page(report).encode()) < 3e6
