"""A table of sensitivities holds what pruning each group alone does, the same however it was made, and feeds selection."""

from __future__ import annotations

import csv
import io
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from rich.console import Console

import onnxprune
from commands import ok, run
from onnxprune import SensitivityRow, SensitivityTable, pipeline, quality, runtime, sensitivity, workers
from onnxprune.errors import ModelError, OnnxPruneError, UsageError
from onnxprune.options import Clock, Options
from onnxprune.passes.sensitivities import Sensitivities
from onnxprune.report import text

DIGITS = Path(__file__).parents[1] / "fixtures" / "digits"
MODEL, DATA, CALIB = DIGITS / "digits.onnx", DIGITS / "digits_eval.npz", DIGITS / "digits_calib.npz"
SOME: dict[str, Any] = {"shares": (0.75, 0.4), "only": ("g2", "g4"), "jobs": 1}
ARGS = ("sensitivity", MODEL, "--shares", "0.75,0.4", "--only", "g2", "--only", "g4", "--jobs", 1)


@pytest.fixture(scope="module")
def plain() -> SensitivityTable:
    """Two groups and two shares by l2, on data."""
    return sensitivity(MODEL, DATA, "top1", **SOME)


@pytest.fixture(scope="module")
def calibrated() -> SensitivityTable:
    """One group and share with calibration data, by obs."""
    return sensitivity(MODEL, DATA, "top1", calib=str(CALIB), shares=[0.25], only=("g4",), jobs=1)


@pytest.fixture
def written(plain: SensitivityTable, tmp_path: Path) -> Path:
    """A table in a file."""
    path = tmp_path / "t.json"
    path.write_text(json.dumps(plain.to_json()))
    return path


# -- rows --------------------------------------------------------------------------------------------------------------


def by_hand(group: str, kept: int, **options: Any) -> onnx.ModelProto:
    """Prune one group to so many channels through the command's ordinary way: a budget that only this group can meet."""
    loaded = pipeline.load(MODEL, Options(only=(group,)), Clock())
    keep = np.ones(loaded.coupling.n_classes, bool)
    (bundle,) = loaded.coupling.bundles
    keep[bundle.cells[0][kept:]] = False
    target = loaded.cost.of(keep)["mac"]
    return pipeline.prune(MODEL, only=(group,), preset="a", target_mac=target, proof=False, **options).model


def relative_error(model: onnx.ModelProto, feed: dict[str, np.ndarray]) -> float:
    """Squared error of the scores over their squared deviation from their mean."""
    wanted = np.asarray(runtime.Session(str(MODEL), threads=1).run(feed)[0], np.float64)
    given = np.asarray(runtime.Session(model.SerializeToString(), threads=1).run(feed)[0], np.float64)
    return float(np.square(given - wanted).sum() / np.square(wanted - wanted.mean()).sum())


def images_of(path: Path) -> dict[str, np.ndarray]:
    """All images of a data set, as the model takes them."""
    with np.load(path) as arrays:
        images = arrays["image"]
    return {"image": images.astype(np.float32) / 255 if images.dtype == np.uint8 else images}


def test_rows_stand_in_order_of_groups_and_shares(plain: SensitivityTable) -> None:
    """Groups in graph order, shares descending, counts rounded to what is nearest; the header says what was measured."""
    assert [(row.group, row.share, row.size, row.kept, row.removed) for row in plain.rows] == [
        ("g2", 0.75, 32, 24, 8), ("g2", 0.4, 32, 13, 19), ("g4", 0.75, 48, 36, 12), ("g4", 0.4, 48, 19, 29),
    ]  # fmt: skip
    names = {group.id: group.name for group in onnxprune.inspect(MODEL).groups}
    assert {row.group: row.name for row in plain.rows} == {group: names[group] for group in ("g2", "g4")}
    assert (plain.metric, plain.samples) == ("top1", 360)
    assert plain.before == quality.evaluate(MODEL, DATA, "top1").value
    assert all(0 < row.mac < 1 for row in plain.rows)


def test_a_row_is_a_single_pruning(plain: SensitivityTable) -> None:
    """MAC share, quality, drop and error are those of the model that ``prune`` makes of the group alone."""
    feed = images_of(DATA)
    whole = onnxprune.inspect(MODEL).before["mac"]
    for row in plain.rows:
        model = by_hand(row.group, row.kept)
        after = quality.evaluate(model, DATA, "top1").value
        assert (row.quality, row.drop) == (after, plain.before - after)
        assert row.mac == pytest.approx(onnxprune.inspect(model).before["mac"] / whole, abs=1e-6)
        assert row.error == pytest.approx(relative_error(model, feed), rel=1e-3)
        assert (row.quality_compensated, row.drop_compensated, row.note) == (None, None, "")


def test_with_calibration_a_row_has_both_figures(calibrated: SensitivityTable) -> None:
    """Without compensation and with, in the order that obs gives; the error is the compensated one, on that data."""
    (row,) = calibrated.rows
    feed = images_of(CALIB)
    options = {"calib": str(CALIB), "allocation": "error"}
    raw, fitted = by_hand("g4", row.kept, compensate="none", **options), by_hand("g4", row.kept, **options)
    assert (row.kept, row.quality) == (12, quality.evaluate(raw, DATA, "top1").value)
    assert row.quality_compensated == pytest.approx(quality.evaluate(fitted, DATA, "top1").value, abs=0.6)
    assert row.drop_compensated == calibrated.before - row.quality_compensated
    assert row.error == pytest.approx(relative_error(fitted, feed), rel=0.05)
    assert row.error < relative_error(raw, feed)


def test_errors_alone_need_no_labels(calibrated: SensitivityTable) -> None:
    """Calibration data without evaluation data gives errors, the same ones; arrays and a model in memory do for it."""
    table = sensitivity(onnx.load(MODEL), calib=images_of(CALIB), shares=[0.25], only=("g4",), jobs=1)
    (row,) = table.rows
    assert (table.metric, table.before, table.model["path"]) == (None, None, None)
    assert (row.quality, row.drop, row.drop_compensated) == (None, None, None)
    assert row.error == pytest.approx(calibrated.rows[0].error, rel=0.02)


def test_metrics_that_compare_with_the_original() -> None:
    """A metric that needs the original's outputs has them."""
    (row,) = sensitivity(MODEL, DATA, "agreement-top1", shares=[0.4], only=("g2",), jobs=1).rows
    assert row.quality == quality.evaluate(by_hand("g2", 13), DATA, "agreement-top1", reference=MODEL).value


def test_limits_apply() -> None:
    """Counts obey --align; a share that leaves nothing to remove is a row with a note."""
    rows = sensitivity(MODEL, DATA, "top1", shares=[0.9, 0.4], only=("g2",), align=16, jobs=1).rows
    assert [(row.kept, row.removed) for row in rows] == [(32, 0), (16, 16)]
    assert "nothing to remove" in rows[0].note
    assert rows[0].drop is None
    assert rows[1].drop is not None


def test_processes_change_nothing(plain: SensitivityTable) -> None:
    """Two processes give the rows of one."""
    told: list[int] = []
    table = sensitivity(
        MODEL, DATA, "top1", **{**SOME, "jobs": 2}, finished=lambda row, table: told.append(len(table.rows))
    )
    assert [replace(row, error=0.0) for row in table.rows] == [replace(row, error=0.0) for row in plain.rows]
    assert [row.error for row in table.rows] == pytest.approx([row.error for row in plain.rows], rel=1e-5)
    assert told == [1, 2, 3, 4]
    assert table.run == plain.run


def test_a_failing_group_stops_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error, or a bug, in one group is a note in its rows; what was measured before stays."""
    real = pipeline.cut

    def cut(ready: pipeline.Ready, keep: np.ndarray, options: Options) -> Any:
        removed = int((~keep).sum())
        if removed == 12:
            raise ModelError("cannot be pruned")
        if removed == 29:
            raise ZeroDivisionError("oops")
        return real(ready, keep, options)

    monkeypatch.setattr(sys.modules["onnxprune.sensitivity"], "cut", cut)
    rows = sensitivity(MODEL, DATA, "top1", **SOME).rows
    assert [row.note for row in rows] == ["", "", "cannot be pruned", "internal error: ZeroDivisionError: oops"]
    assert [row.drop is None for row in rows] == [False, False, True, True]


def test_a_lost_process_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row whose process died says so."""
    lost = workers.WorkerLostError("the process was killed")
    monkeypatch.setattr(workers, "locally", lambda *args: (pair for pair in [(0, lost)]))
    (row,) = sensitivity(MODEL, DATA, "top1", shares=[0.5], only=("g2",)).rows
    assert row.note == "the process was killed"


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        pytest.param({"data": None, "metric": None}, "nothing to measure on", id="neither data nor calib"),
        pytest.param({"metric": None}, "--data and --metric go together", id="data without metric"),
        pytest.param({"shares": [1.0]}, "between 0 and 1", id="share of 1"),
        pytest.param({"shares": []}, "between 0 and 1", id="no share"),
        pytest.param({"nonsense": 1}, "nonsense", id="unknown option"),
        pytest.param({"targets": {"mac": 0.5}}, "target", id="target"),
        pytest.param({"calib": str(CALIB), "sensitivity": "t.json"}, "use --json", id="table to read"),
        pytest.param({"sensitivity": "t.json"}, "needs --calib", id="table without calib"),
        pytest.param({"calib": str(DIGITS / "none.npz")}, "none.npz", id="no calibration data there"),
    ],
)
def test_what_contradicts_itself_is_refused(wrong: dict[str, Any], words: str) -> None:
    """Options that do not belong together, and data that is not there, are errors before any work."""
    given = {"data": DATA, "metric": "top1", **SOME, **wrong}
    with pytest.raises(OnnxPruneError, match=words):
        sensitivity(MODEL, **given, finished=lambda *_: pytest.fail("work was done"))


# -- the command -------------------------------------------------------------------------------------------------------


def test_the_command_writes_its_table(plain: SensitivityTable, tmp_path: Path) -> None:
    """JSON and CSV hold the rows exactly; the terminal shows one line per group, the most sensitive last, in 100 columns."""
    table, cells = tmp_path / "t.json", tmp_path / "t.csv"
    result = ok(*ARGS, "--data", DATA, "--metric", "top1", "--json", table, "--csv", cells)
    content = json.loads(table.read_text())
    assert (content["schema"], content["onnxprune"]) == (1, "0.1.0")
    assert content["model"] == {"path": str(MODEL), "sha256": pipeline.load(MODEL, Options(), Clock()).sha256}
    assert (content["metric"], content["before"]) == ("top1", plain.before)
    assert SensitivityTable.read(table).rows == plain.rows
    with cells.open() as file:
        lines = list(csv.DictReader(file))
    assert [(line["group"], float(line["drop"])) for line in lines] == [(row.group, row.drop) for row in plain.rows]
    shown = result.stdout.splitlines()
    assert max(map(len, shown)) <= 100
    assert [line.split()[0] for line in shown if line.startswith("g") and line[1].isdigit()] == ["g4", "g2"]
    assert "75 %" in result.stdout
    assert "40 %" in result.stdout


def test_compensated_drops_stand_in_parentheses(calibrated: SensitivityTable) -> None:
    """Where there is calibration data every cell shows both drops; without evaluation data it shows the error."""
    (row,) = calibrated.rows
    console = Console(width=200, file=io.StringIO())
    text.sensitivity(console, calibrated)
    bare = replace(row, quality=None, drop=None, quality_compensated=None, drop_compensated=None)
    text.sensitivity(
        console, replace(calibrated, metric=None, rows=(bare, replace(bare, share=0.1, error=None, note="no")))
    )
    shown = console.file.getvalue()
    assert f" {row.drop:.2f} ({row.drop_compensated:.2f})\n" in shown
    assert f" {row.error:.2g}     -\n" in shown
    assert "note     g4: no" in shown


def test_json_on_stdout_is_alone() -> None:
    """``--json -`` prints the table and nothing else."""
    result = ok(
        "sensitivity", MODEL, "--shares", 0.5, "--only", "g2", "--data", DATA, "--metric", "top1", "--json", "-"
    )
    assert len(json.loads(result.stdout)["rows"]) == 1


def test_resume_measures_what_is_missing(written: Path, plain: SensitivityTable, monkeypatch: Any) -> None:
    """Rows of the table stay as they are, also of shares that are not asked for again; noted ones are measured again."""
    content = json.loads(written.read_text())
    content["rows"][0]["drop"] = -77.0
    content["rows"][3] |= {"drop": None, "note": "failed"}
    written.write_text(json.dumps(content))
    calls: list[SensitivityRow] = []
    real = workers.locally

    def locally(function: Any, given: Any, *rest: Any) -> Any:
        calls.extend(row for _, row in given)
        return real(function, given, *rest)

    monkeypatch.setattr(workers, "locally", locally)
    ok(*ARGS, "--shares", "0.9,0.4", "--data", DATA, "--metric", "top1", "--json", written, "--resume")
    assert [(row.group, row.share) for row in calls] == [("g2", 0.9), ("g4", 0.9), ("g4", 0.4)]
    rows = SensitivityTable.read(written).rows
    assert [(row.group, row.share) for row in rows] == [(g, s) for g in ("g2", "g4") for s in (0.9, 0.75, 0.4)]
    assert rows[1].drop == -77.0
    assert rows[5] == plain.rows[3]


@pytest.mark.parametrize(
    ("words", "why"),
    [
        pytest.param(["--criterion", "l1"], "other data, options", id="options"),
        pytest.param(["--metric", "agreement-top1"], "other data, options", id="metric"),
    ],
)
def test_resume_refuses_another_table(written: Path, words: list[str], why: str) -> None:
    """Rows that were measured otherwise are not mixed in, and not lost either, unless --force drops them."""
    before = json.loads(written.read_text())
    command = [*ARGS, "--data", DATA, "--metric", "top1", *words, "--json", written, "--resume"]
    result = run(*command)
    assert result.exit_code == 2
    assert why in result.stderr
    assert json.loads(written.read_text())["rows"] == before["rows"]
    ok(*command, "--force")
    assert json.loads(written.read_text())["run"] != before["run"]


def test_resume_refuses_rows_of_another_profile(tmp_path: Path) -> None:
    """A profile that was edited makes other rows, although its file is called as before."""
    profile, table = tmp_path / "p.toml", tmp_path / "t.json"
    profile.write_text("[multiples]\nConv = 2\n")
    words = (*ARGS, "--data", DATA, "--metric", "top1", "--profile", profile, "--json", table)
    ok(*words)
    ok(*words, "--resume")
    profile.write_text("[multiples]\nConv = 4\n")
    result = run(*words, "--resume")
    assert (result.exit_code, "other data, options" in result.stderr) == (2, True)


def test_resume_refuses_the_table_of_another_model(written: Path) -> None:
    """The message says that it is another model's."""
    content = json.loads(written.read_text())
    written.write_text(json.dumps(content | {"run": "x", "model": {"path": "other.onnx", "sha256": "0"}}))
    result = run(*ARGS, "--data", DATA, "--metric", "top1", "--json", written, "--resume")
    assert (result.exit_code, "another model" in result.stderr) == (2, True)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("group", []), ("name", None), ("size", 0.5), ("share", "x"), ("drop", "x"),
        pytest.param("error", 10**400, id="giant"), ("note", "\ud800"),
        (".model", []), (".metric", 5), (".before", {}), (".run", None),
    ],
)  # fmt: skip
def test_resume_refuses_other_types(written: Path, name: str, value: Any) -> None:
    """A table whose fields hold what no measurement writes there is refused, and stays."""
    content = json.loads(written.read_text())
    (content if name.startswith(".") else content["rows"][0])[name.removeprefix(".")] = value
    written.write_text(text := json.dumps(content))
    result = run(*ARGS, "--data", DATA, "--metric", "top1", "--json", written, "--resume")
    assert (result.exit_code, "is no table of onnxprune sensitivity" in result.stderr) == (2, True)
    assert written.read_text() == text


def test_existing_tables_stay(written: Path) -> None:
    """Without --resume or --force an existing file is refused, as is one that is no table, and each stays as it is."""
    before = written.read_bytes()
    data = ("--data", DATA, "--metric", "top1", "--json", written)
    result = run(*ARGS, *data)
    assert (result.exit_code, "exists" in result.stderr, written.read_bytes()) == (2, True, before)
    written.write_text("[1, 2]")
    result = run(*ARGS, *data, "--resume")
    assert (result.exit_code, written.read_text()) == (2, "[1, 2]")


@pytest.mark.parametrize(
    ("words", "code"),
    [
        pytest.param((), 2, id="nothing to measure on"),
        pytest.param(("--data", DATA), 2, id="no metric"),
        pytest.param(("--data", DATA, "--metric", "top1", "--resume"), 2, id="resume without a table"),
        pytest.param(("--data", DATA, "--metric", "top1", "--shares", "x"), 2, id="no number"),
        pytest.param(("--data", DATA, "--metric", "top1", "--json", MODEL), 2, id="over the model"),
        pytest.param(("--data", "none.npz", "--metric", "top1"), 7, id="no data"),
        pytest.param(("--data", DATA, "--metric", "top1", "--json", "none/t.json"), 7, id="no folder"),
    ],
)
def test_exit_codes(words: tuple[Any, ...], code: int) -> None:
    """Errors before any work have the exit codes of every command."""
    assert run(*ARGS, *words).exit_code == code


def test_a_broken_model_is_unreadable(tmp_path: Path) -> None:
    """A file that is no model exits 3, one that is not there 7."""
    (tmp_path / "m.onnx").write_bytes(b"no model")
    data = ("--data", DATA, "--metric", "top1")
    assert run("sensitivity", tmp_path / "m.onnx", *data).exit_code == 3
    assert run("sensitivity", tmp_path / "none.onnx", *data).exit_code == 7


def test_ctrl_c_leaves_a_whole_table_to_go_on_with(tmp_path: Path) -> None:
    """An interrupted measurement exits with 130; its table holds the finished rows, and --resume takes them."""
    table = tmp_path / "t.json"
    shares = ",".join(f"{k / 300:.5f}" for k in range(30, 270))
    words = ["sensitivity", MODEL, "--data", DATA, "--metric", "top1", "--shares", shares, "--jobs", 2, "--json", table]
    process = subprocess.Popen(
        [sys.executable, "-c", "from onnxprune.cli import main; main()", *map(str, words)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    end = time.monotonic() + 60
    while time.monotonic() < end and not (table.exists() and len(SensitivityTable.read(table).rows) >= 3):
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    stdout, stderr = process.communicate(timeout=30)
    assert (process.returncode, stdout) == (130, "")
    assert stderr.splitlines()[-1].startswith("onnxprune: interrupted; what was finished,")
    assert "Traceback" not in stderr
    assert json.loads(table.read_text())["error"]["code"] == 130
    found = SensitivityTable.read(table)
    assert 3 <= len(found.rows) < 1200
    assert [path.name for path in tmp_path.iterdir()] == ["t.json"]
    few = sensitivity(MODEL, DATA, "top1", shares=[found.rows[0].share], known=found, jobs=1)
    assert set(found.rows) <= set(few.rows)


# -- selection ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table of all groups, errors alone, as the command writes it."""
    path = tmp_path_factory.mktemp("table") / "t.json"
    ok("sensitivity", MODEL, "--calib", CALIB, "--shares", "0.75,0.4", "--compensate", "none", "--json", path)
    return path


def test_the_table_feeds_selection(table: Path, tmp_path: Path) -> None:
    """``prune --sensitivity`` meets the target, otherwise than by default, and keeps what the table calls sensitive."""
    common = ("--calib", CALIB, "--target-mac", 0.6, "--no-proof", "--no-latency", "--compensate", "none")
    kept = {}
    for name, words in {"table": ("--sensitivity", table), "default": ()}.items():
        ok(MODEL, tmp_path / f"{name}.onnx", *common, *words, "--json", tmp_path / f"{name}.json")
        report = json.loads((tmp_path / f"{name}.json").read_text())
        assert report["target"]["achieved"] <= 0.6
        kept[name] = [group["kept"] / group["size"] for group in report["groups"] if not group["frozen"]]
    assert kept["table"] != kept["default"]

    content = json.loads(table.read_text())
    for row in content["rows"]:  # what if the residual stream did not matter at all, and its neighbours did
        row["error"] = 1e-9 if row["group"] == "g1" else 1.0
    turned = tmp_path / "turned.json"
    turned.write_text(json.dumps(content))
    ok(MODEL, tmp_path / "turned.onnx", *common, "--sensitivity", turned, "--json", tmp_path / "r.json")
    groups = json.loads((tmp_path / "r.json").read_text())["groups"]
    found = [group["kept"] / group["size"] for group in groups if not group["frozen"]]
    assert found[0] < kept["table"][0]
    assert found[1:] == [1.0] * 4


def test_errors_of_the_table_are_errors_of_the_ranking(table: Path) -> None:
    """What removals of one group add up to at a point of the table is what was measured there."""
    rows = [row for row in SensitivityTable.read(table).rows if row.group == "g2"]
    read = Sensitivities.read(table)
    assert read.errors["g2"] == {row.removed: row.error for row in rows}
    assert read.sizes["g2"] == 32


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("size", "Infinity"),
        ("removed", "Infinity"),
        ("error", "1e400"),
        ("error", "NaN"),
        pytest.param("error", "1" + "0" * 400, id="giant"),
    ],
)
def test_numbers_without_end_are_refused(table: Path, name: str, value: str, tmp_path: Path) -> None:
    """Nothing that was measured is infinite."""
    content = json.loads(table.read_text())
    content["rows"][0][name] = "here"
    path = tmp_path / "t.json"
    path.write_text(json.dumps(content).replace('"here"', value))
    with pytest.raises(ModelError, match="is not a table that onnxprune sensitivity wrote"):
        Sensitivities.read(path)


def test_the_table_of_another_model_is_refused(table: Path, tmp_path: Path) -> None:
    """Its sha256 gives it away, whatever its groups are called; a model in memory has none to compare."""
    other = tmp_path / "other.onnx"
    changed = onnx.load(MODEL)
    changed.doc_string = "trained further"
    onnx.save(changed, other)
    words = ("--calib", CALIB, "--target-mac", 0.6, "--no-proof", "--compensate", "none", "--sensitivity", table)
    result = run(other, tmp_path / "out.onnx", *words)
    assert result.exit_code == 3
    assert "was measured on another model" in result.stderr
    assert not (tmp_path / "out.onnx").exists()
    chosen = {"calib": str(CALIB), "compensate": "none", "sensitivity": str(table), "proof": False}
    pruned = onnxprune.prune(changed, target_mac=0.6, **chosen)
    assert pruned.report.after["mac"] < pruned.report.before["mac"]


def test_a_table_of_other_groups_is_refused(table: Path, tmp_path: Path) -> None:
    """A group of the same name but another size, and one that is missing, are errors that say what to do."""
    content = json.loads(table.read_text())
    path = tmp_path / "t.json"
    for row in content["rows"]:
        row["size"] += row["group"] == "g2"
    path.write_text(json.dumps(content))
    words = (MODEL, tmp_path / "out.onnx", "--calib", CALIB, "--target-mac", 0.6, "--no-proof", "--sensitivity", path)
    result = run(*words)
    assert (result.exit_code, "33 in the sensitivity table" in result.stderr) == (3, True)
    content["rows"] = [row for row in content["rows"] if row["group"] != "g2"]
    path.write_text(json.dumps(content))
    result = run(*words)
    assert (result.exit_code, "no row for group g2" in result.stderr) == (3, True)


def test_a_table_without_calibration_is_refused(table: Path, tmp_path: Path) -> None:
    """Without calibration data the table would have no effect, so it is an error to give it."""
    result = run(MODEL, tmp_path / "out.onnx", "--target-mac", 0.6, "--sensitivity", table)
    assert (result.exit_code, "needs --calib" in result.stderr) == (2, True)
    with pytest.raises(UsageError, match="criterion obs"):
        Options(sensitivity=str(table), calib=str(CALIB), criterion="l1")
