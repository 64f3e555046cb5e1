"""The page of a sweep: its figures are the table's, and what failed stands there, too."""

from __future__ import annotations

import copy
import json
import pathlib
import shutil
from typing import Any

import pytest
from pages import Parsed, mismatches

from commands import ok, run
from onnxprune.errors import UsageError
from onnxprune.report.page import page

DIGITS = pathlib.Path(__file__).parents[2] / "fixtures" / "digits"
ARGS = ("--target-mac", "0.8", "--target-mac", "0.001", "--preset", "a", "--preset", "d", "--data",
        DIGITS / "digits_eval.npz", "--metric", "top1", "--metric", "agreement-top1", "--jobs", "1")  # fmt: skip


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> tuple[pathlib.Path, str, dict[str, Any]]:
    """Folder, page and JSON of a sweep in which every second run fails."""
    folder = tmp_path_factory.mktemp("sweep")
    ok("sweep", DIGITS / "digits.onnx", *ARGS, "--html", folder / "s.html", "--json", folder / "s.json")
    return folder, (folder / "s.html").read_text(), json.loads((folder / "s.json").read_text())


def test_every_figure_is_the_jsons(swept: tuple[pathlib.Path, str, dict[str, Any]]) -> None:
    """Each run that succeeded shows its target, costs and both metrics; a changed figure is noticed."""
    _, text, report = swept
    assert mismatches(text, report) == []
    good = [index for index, row in enumerate(report["rows"]) if row["error"] is None]
    assert len(good) == len(report["rows"]) // 2 == 2
    shown = {path for path, *_ in Parsed(text).figures}
    for index in good:
        wanted = {
            "target.requested",
            "mac",
            "params",
            "bandwidth",
            "quality.0.after",
            "quality.0.drop",
            "quality.1.after",
        }
        assert shown >= {f"rows.{index}.{path}" for path in wanted}
    changed = copy.deepcopy(report)
    changed["rows"][good[0]]["quality"][1]["drop"] += 0.5
    assert len(mismatches(text, changed)) == 1


def test_failures_stand_in_the_table(swept: tuple[pathlib.Path, str, dict[str, Any]]) -> None:
    """Their message is in their row, and the head of the page counts them."""
    _, text, report = swept
    words = "".join(Parsed(text).text)
    assert "2 of 4 runs failed" in words
    assert all(row["error"]["message"] in words for row in report["rows"] if row["error"])
    assert report["command"] in words
    assert report["rows"][0]["sha256"] in words


def test_the_table_makes_the_same_page(swept: tuple[pathlib.Path, str, dict[str, Any]]) -> None:
    """``report`` writes, byte by byte, what ``sweep --html`` wrote."""
    folder, text, _ = swept
    ok("report", folder / "s.json", "-o", folder / "again.html")
    assert (folder / "again.html").read_text() == text


def test_without_quality_there_is_a_table(tmp_path: pathlib.Path) -> None:
    """A sweep that measured none has no chart, but its page; so has one of which every run failed."""
    ok("sweep", DIGITS / "digits.onnx", "--target-mac", "0.8", "--jobs", "1", "--html", tmp_path / "s.html")
    text = (tmp_path / "s.html").read_text()
    assert 'class="chart"' not in text
    assert 'id="runs"' in text
    failed = run("sweep", DIGITS / "digits.onnx", "--target-mac", "0.001", "--jobs", "1", "--html", tmp_path / "f.html")
    assert failed.exit_code != 0
    assert "1 of 1 runs failed" in (tmp_path / "f.html").read_text()


def test_names_cannot_break_it(swept: tuple[pathlib.Path, str, dict[str, Any]], tmp_path: pathlib.Path) -> None:
    """A model may be called anything."""
    name = tmp_path / "<b>$x$&amp;.onnx"
    shutil.copy(DIGITS / "digits.onnx", name)
    ok("sweep", name, DIGITS / "digits.onnx", *ARGS, "--html", tmp_path / "s.html")
    read = Parsed((tmp_path / "s.html").read_text())
    assert not read.open
    assert not [tag for tag, _ in read.tags if tag == "b"]
    assert "<b>$x$&amp;.onnx" in "".join(read.text)


@pytest.mark.parametrize("change", [{"rows": [{"pareto": True}]}, {"rows": []}, {"rows": "x"}, {"schema": 2}])
def test_other_content_is_refused(swept: tuple[pathlib.Path, str, dict[str, Any]], change: dict[str, Any]) -> None:
    """What is no table of a sweep is an error that says what to give."""
    with pytest.raises(UsageError, match="sweep"):
        page({**swept[2], **change})
