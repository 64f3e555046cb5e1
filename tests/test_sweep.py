"""A sweep is many single runs in one table: in order, the same wherever they ran, and never lost."""

from __future__ import annotations

import csv
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st

import onnxprune
from commands import ok, run
from onnxprune import parcels, pipeline, quality, runtime, sweep, workers
from onnxprune.errors import FileError, OnnxPruneError, UsageError
from onnxprune.options import Options
from onnxprune.report import pareto, rows
from onnxprune.report.rows import Measured, Row
from onnxprune.sweep import _calls, _runs, execute
from standins import ten_times

DIGITS = Path(__file__).parents[1] / "fixtures" / "digits"
MODEL, DATA = DIGITS / "digits.onnx", DIGITS / "digits_eval.npz"
QUALITY = {"data": DATA, "metrics": ("top1",)}


# -- rows --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def table() -> list[Row]:
    """Two presets, two targets of MAC and one of parameters, in this process."""
    return sweep([MODEL], {"mac": [0.8, 0.5], "params": [0.6]}, presets=["a", "d"], jobs=1, **QUALITY)


def test_rows_stand_in_the_order_of_the_options(table: list[Row]) -> None:
    """Models, presets, criteria, targets: each as given, the last one changing fastest."""
    assert [(row.preset, row.kind, row.target) for row in table] == [
        (preset, *target) for preset in "ad" for target in (("mac", 0.8), ("mac", 0.5), ("params", 0.6))
    ]
    assert {row.model for row in table} == {str(MODEL)}
    assert len({row.run for row in table}) == len(table)


def test_a_row_says_what_a_single_run_says(table: list[Row]) -> None:
    """Shares, quality and proof of every row are those of ``prune`` and ``evaluate``."""
    for row in table:
        result = pipeline.prune(MODEL, preset=row.preset, **{f"target_{row.kind}": row.target})
        before, after = result.report.before, result.report.after
        assert (row.mac, row.params, row.bandwidth) == tuple(
            after[kind] / before[kind] for kind in ("mac", "params", "bandwidth")
        )
        assert row.proof is result.report.proof.ok is True
        values = [quality.evaluate(model, DATA, "top1") for model in (MODEL, result.model)]
        (measured,) = row.quality
        assert (measured.before, measured.after) == tuple(value.value for value in values)
        assert measured.drop == pytest.approx(measured.before - measured.after)
        assert measured.samples == values[0].samples


def test_processes_give_the_rows_of_one_process(table: list[Row]) -> None:
    """Rows do not depend on how many processes there are, nor on which finishes first."""
    seen: list[int] = []
    spread = sweep(
        [MODEL], {"mac": [0.8, 0.5], "params": [0.6]}, presets=["a", "d"], jobs=2, **QUALITY,
        finished=lambda row, rows: seen.append(len(rows)),
    )  # fmt: skip
    assert spread == table
    assert seen == list(range(1, len(table) + 1))


def test_what_is_asked_for_twice_runs_once() -> None:
    """Repeated models, presets and targets make one row."""
    assert len(sweep([MODEL, MODEL], [0.8, 0.8], presets=["d", "d"], proof=False, jobs=1)) == 1


def test_options_reach_every_run() -> None:
    """Options of ``prune`` hold for all runs of the sweep."""
    (row,) = sweep([MODEL], [0.8], align=8, ignore=("*",), proof=False, jobs=1)
    assert row.code == 4
    rows_ = sweep([MODEL], [0.8], align=8, proof=False, jobs=1)
    report = pipeline.prune(MODEL, target_mac=0.8, align=8, proof=False).report
    assert rows_[0].mac == report.after["mac"] / report.before["mac"]
    assert rows_[0].proof is None


def test_a_target_above_the_cost_is_a_row() -> None:
    """Where nothing has to go the row says that everything is left, and no proof was needed."""
    (row,) = sweep([MODEL], [1.0], jobs=1, **QUALITY)
    assert (row.mac, row.proof, row.quality[0].drop, row.pareto, row.ok) == (1.0, None, 0.0, True, True)


def test_a_failed_run_is_a_row_and_the_others_go_on(tmp_path: Path) -> None:
    """Missing and broken models and impossible targets give rows with the exit code and message of a single run."""
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"no model")
    table = sweep([tmp_path / "none.onnx", broken, MODEL], [0.8, 1e-6], proof=False, jobs=2)
    assert [row.code for row in table] == [7, 7, 3, 3, 0, 4]
    for row in table:
        assert row.ok == (row.error == "") == (row.mac is not None)
        if not row.ok:
            with pytest.raises(OnnxPruneError) as error:
                pipeline.prune(row.model, target_mac=row.target, proof=False)
            assert (row.code, row.error) == (error.value.exit_code, str(error.value))


def test_a_bug_in_one_run_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error that nobody foresaw ends its run with code 1, not the sweep."""

    def bug(*args: Any, **kwargs: Any) -> None:
        raise ZeroDivisionError("oops")

    monkeypatch.setattr(pipeline, "prune", bug)
    (row,) = sweep([MODEL], [0.8], jobs=1)
    assert (row.code, row.error) == (1, "internal error: ZeroDivisionError: oops")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"presets": ["z"]}, "preset 'z'"),
        ({"criteria": ["l2", "nonsense"]}, "nonsense"),
        ({"targets": []}, "no target"),
        ({"targets": [-1]}, "target mac"),
        ({"nonsense": 1}, "nonsense"),
        ({"metrics": ["top1"]}, "--data and --metric"),
        ({"data": DATA, "metrics": ["nonsense"]}, "nonsense"),
        ({"backend": "slurm"}, "backend 'slurm'"),
        ({"backend": "dask"}, "address"),
        ({"scheduler": "tcp://127.0.0.1:1"}, "dask backend"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "-".join(value),
)
def test_wrong_options_are_refused_before_any_run(wrong: dict[str, Any], message: str) -> None:
    """What is wrong for all runs is an error of the sweep, not of its rows."""
    started: list[object] = []
    with pytest.raises(UsageError, match=message):
        sweep([MODEL], **{"targets": [0.8], "finished": lambda *rows: started.append(rows), "jobs": 1, **wrong})
    assert started == []


def test_sessions_of_a_run_use_the_threads_that_it_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """A limit holds for the sessions that its context starts, not for one that asks for its own, nor afterwards."""
    threads: list[int] = []

    def session(model: bytes, options: Any, providers: list[str], **_: Any) -> SimpleNamespace:
        threads.append(options.intra_op_num_threads)
        return SimpleNamespace(get_inputs=list, get_outputs=list, get_providers=lambda: providers)

    monkeypatch.setattr(runtime.onnxruntime, "InferenceSession", session)
    with runtime.threads_limited(3):
        runtime.Session(b"")
        runtime.Session(b"", threads=2)
        with runtime.threads_limited(0):
            runtime.Session(b"")
    runtime.Session(b"")
    assert threads == [3, 2, 3, 0]


# -- models and plans --------------------------------------------------------------------------------------------------


def test_models_and_plans_are_those_of_single_runs(tmp_path: Path) -> None:
    """``out_dir`` holds, byte for byte, what ``prune`` writes; where nothing was removed, a copy of the input."""
    table = sweep([MODEL], [1.0, 0.8], jobs=2, out_dir=tmp_path / "new" / "folder")
    assert [Path(row.output).name for row in table] == ["digits-d-l2-mac1.0.onnx", "digits-d-l2-mac0.8.onnx"]
    ok(MODEL, tmp_path / "one.onnx", "--target-mac", 0.8, "--plan-out", tmp_path / "plan.json", "--no-latency")
    assert Path(table[0].output).read_bytes() == MODEL.read_bytes()
    assert Path(table[1].output).read_bytes() == (tmp_path / "one.onnx").read_bytes()
    plan = Path(table[1].output).with_suffix(".plan.json")
    assert json.loads(plan.read_text()) == json.loads((tmp_path / "plan.json").read_text())
    ok("verify", MODEL, table[1].output, "--plan", plan)


def test_models_are_not_overwritten(tmp_path: Path) -> None:
    """A model that is there already is replaced with ``force`` alone."""
    sweep([MODEL], [0.8], proof=False, jobs=1, out_dir=tmp_path)
    with pytest.raises(UsageError, match=r"digits-d-l2-mac0.8.onnx: exists"):
        sweep([MODEL], [0.8], proof=False, jobs=1, out_dir=tmp_path)
    assert sweep([MODEL], [0.8], proof=False, jobs=1, out_dir=tmp_path, force=True)[0].ok


def test_models_of_one_name_do_not_collide(tmp_path: Path) -> None:
    """Models of one name from two folders are both written."""
    models = []
    for number, source in enumerate((MODEL, DIGITS.parent / "denoise" / "denoise.onnx")):
        models.append(tmp_path / str(number) / "net.onnx")
        models[-1].parent.mkdir()
        models[-1].write_bytes(source.read_bytes())
    table = sweep(models, [0.8], proof=False, jobs=1, out_dir=tmp_path)
    assert len({row.output for row in table}) == 2
    assert all(Path(row.output).is_file() for row in table)


# -- Pareto ------------------------------------------------------------------------------------------------------------


def point(model: str, mac: float | None, drop: float | None) -> Row:
    """A row with a share and a drop."""
    quality_ = () if drop is None else (Measured("top1", 1.0, 1.0 - drop, drop, 1),)
    return Row(model, "d", "l2", "none", "mac", 0.5, mac=mac, quality=quality_)


SHARES = st.integers(1, 6).map(lambda value: value / 6)


@given(
    st.lists(st.builds(point, st.sampled_from("ab"), st.none() | SHARES, st.none() | st.integers(-3, 3)), max_size=12)
)
def test_pareto_rows_are_those_that_none_dominates(table: list[Row]) -> None:
    """A row is marked where no other of its model is at least as good in both and better in one, by brute force."""
    for row, marked in zip(table, rows.mark(table), strict=True):
        assert replace(marked, pareto=None) == row
        if row.mac is None or not row.quality:
            assert marked.pareto is None
            continue
        mine = (row.mac, row.quality[0].drop)
        others = [(o.mac, o.quality[0].drop) for o in table if o.model == row.model and o.mac is not None and o.quality]
        dominated = any(mac <= mine[0] and drop <= mine[1] and (mac, drop) != mine for mac, drop in others)
        assert marked.pareto is not dominated


# -- tables ------------------------------------------------------------------------------------------------------------

TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\r"), max_size=8)
FLOATS = st.floats(allow_nan=False, width=64)
ROWS = st.builds(
    Row,
    *[TEXTS] * 5,
    FLOATS,
    *[st.none() | FLOATS] * 3,
    st.lists(
        st.builds(Measured, st.sampled_from(["psnr", "my_metric"]), FLOATS, FLOATS, FLOATS, st.integers(1, 9)),
        max_size=2,
        unique_by=lambda measured: measured.metric,
    ).map(lambda found: tuple(sorted(found, key=lambda measured: measured.metric))),
    *[st.none() | st.booleans()] * 2,
    seconds=FLOATS,
    output=TEXTS,
    code=st.integers(0, 7),
    error=TEXTS,
)


def in_order(row: Row) -> Row:
    """The same row with its metrics in alphabetical order: a CSV's columns have one order for all rows."""
    return replace(row, quality=tuple(sorted(row.quality, key=lambda measured: measured.metric)))


@given(st.lists(ROWS, max_size=4))
def test_csv_and_json_lose_nothing(table: list[Row]) -> None:
    """Rows written and read again are the same, to the last digit."""
    again = rows.from_csv(rows.to_csv(table))
    assert [in_order(row) for row in again] == table
    assert [row.seconds for row in again] == [row.seconds for row in table]
    table = [row if row.code else replace(row, error="") for row in table]
    again = rows.from_json(json.dumps(rows.to_json(table, {})))
    assert again == table
    assert [row.seconds for row in again] == [row.seconds for row in table]


@pytest.mark.parametrize(
    "content",
    ["a,b\n1,2\n", '{"rows": [1]}', '{"rows": [{}]}', "{", "[1]", "\0", ",".join(Row.__dataclass_fields__) + "\nx\n"],
)
def test_other_files_are_no_tables(tmp_path: Path, content: str) -> None:
    """A file that holds something else is named in an error, not taken for an empty table."""
    path = tmp_path / "t"
    path.write_text(content)
    with pytest.raises(UsageError, match="no table of a sweep"):
        rows.read(path)


# -- the command -------------------------------------------------------------------------------------------------------

ARGS = ("sweep", MODEL, "--target-mac", 0.8, "--target-mac", 0.5, "--jobs", 1, "--data", DATA, "--metric", "top1")


def test_command_writes_the_table(tmp_path: Path) -> None:
    """CSV and JSON hold the same rows, which are those of the Python function; each finished run is told on stderr."""
    result = ok(*ARGS, "--preset", "a", "--preset", "d", "--csv", tmp_path / "t.csv", "--json", tmp_path / "t.json")
    expected = sweep([MODEL], [0.8, 0.5], presets=["a", "d"], jobs=1, **QUALITY)
    assert rows.read(tmp_path / "t.csv") == rows.read(tmp_path / "t.json") == expected
    assert len(result.stderr.splitlines()) == 4
    assert len(result.stdout.splitlines()) == 5
    assert "\x1b" not in result.output
    content = json.loads((tmp_path / "t.json").read_text())
    assert (content["schema"], content["error"], content["options"]["seed"]) == (1, None, 0)
    assert content["rows"][0]["target"] == {"kind": "mac", "requested": 0.8}
    with (tmp_path / "t.csv").open(newline="") as file:
        (first, *_) = csv.DictReader(file)
    assert (first["model"], first["preset"], first["top1_samples"], first["proof"]) == (str(MODEL), "a", "360", "true")


def test_quiet_prints_nothing() -> None:
    """With -q a sweep that succeeds prints nothing."""
    assert ok(*ARGS, "-q").output == ""


@pytest.mark.parametrize("option", ["--csv", "--json"])
def test_table_on_stdout_stands_alone(option: str, tmp_path: Path) -> None:
    """``-`` prints the table, and nothing else, on stdout."""
    result = ok(*ARGS, option, "-")
    read = rows.from_csv if option == "--csv" else rows.from_json
    assert len(read(result.stdout)) == 2


def test_some_failures_are_counted(tmp_path: Path) -> None:
    """The exit code is 0 if any run succeeded; stderr says how many failed."""
    result = ok("sweep", MODEL, tmp_path / "none.onnx", "--target-mac", 0.8, "--jobs", 1)
    assert result.stderr.splitlines()[-1] == "1 of 2 runs failed"
    assert f"failed   {tmp_path / 'none.onnx'}: {tmp_path / 'none.onnx'}: no such file" in result.stdout.splitlines()


def test_all_failures_end_with_the_code_of_the_first(tmp_path: Path) -> None:
    """Where every run failed the exit code is the first one's, and the table holds the rows and the error."""
    result = run(
        "sweep", MODEL, tmp_path / "none.onnx", "--target-mac", 1e-6, "--jobs", 1, "--json", tmp_path / "t.json"
    )
    assert result.exit_code == 4
    content = json.loads((tmp_path / "t.json").read_text())
    assert [row["error"]["code"] for row in content["rows"]] == [4, 7]
    assert content["error"]["code"] == 4
    assert result.stderr.splitlines()[-1].startswith("onnxprune: all 2 runs failed; the first: target out of reach")


def test_options_may_come_from_a_file(tmp_path: Path) -> None:
    """A TOML file gives lists, or single values, for what may be repeated."""
    config = tmp_path / "onnxprune.toml"
    config.write_text('[sweep]\ntarget-mac = [0.8, 0.5]\npreset = "a"\njobs = 1\n')
    ok("sweep", MODEL, "--config", config, "--csv", tmp_path / "t.csv", "--no-proof")
    assert [(row.preset, row.target) for row in rows.read(tmp_path / "t.csv")] == [("a", 0.8), ("a", 0.5)]
    config.write_text("[sweep]\ntarget-mac = 0.8\njobs = 1\n")
    ok("sweep", MODEL, "--config", config, "--no-proof")


# -- resuming ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("table", ["t.csv", "t.json"])
def test_resume_keeps_what_is_there(tmp_path: Path, table: str) -> None:
    """Rows of the same model and options are kept with their times; only the others run, and the order is the new one."""
    option, path = f"--{table.split('.')[1]}", tmp_path / table
    ok("sweep", MODEL, "--target-mac", 0.5, "--jobs", 1, option, path)
    (first,) = rows.read(path)
    result = ok("sweep", MODEL, "--target-mac", 0.8, "--target-mac", 0.5, "--jobs", 1, option, path, "--resume")
    second, kept = rows.read(path)
    assert (second.target, kept, kept.seconds) == (0.8, first, first.seconds)
    assert len(result.stderr.splitlines()) == 1


def test_resume_loses_no_finished_run(tmp_path: Path) -> None:
    """A table with runs that the command does not ask for is left alone, unless --force says that they may go."""
    path, args = tmp_path / "t.csv", ("sweep", MODEL, "--jobs", 1, "--no-proof", "--csv", tmp_path / "t.csv")
    ok(*args, "--target-mac", 0.8, "--target-mac", 0.7)
    before = path.read_text()
    result = run(*args, "--target-mac", 0.7, "--target-mac", 0.6, "--resume")
    assert (result.exit_code, path.read_text()) == (2, before)
    assert "1 finished runs of the table are not of this sweep" in result.stderr
    result = ok(*args, "--target-mac", 0.7, "--target-mac", 0.6, "--resume", "--force")
    assert [row.target for row in rows.read(path)] == [0.7, 0.6]
    assert len(result.stderr.splitlines()) == 1


def test_resume_runs_again_what_changed(tmp_path: Path) -> None:
    """Another model, option, data or a failure is run again."""
    model = tmp_path / "m.onnx"
    model.write_bytes(MODEL.read_bytes())
    ran: list[Row] = []
    options: dict[str, Any] = {"jobs": 1, "proof": False, "finished": lambda row, rows: ran.append(row)}
    known = sweep([model], [0.8, 1e-6], **options)
    options["force"] = True
    ran.clear()
    assert sweep([model], [0.8, 1e-6], known=known, **options) == known
    assert [row.code for row in ran] == [4]
    for changed in ({"align": 2}, {"seed": 1}, QUALITY):
        ran.clear()
        sweep([model], [0.8], known=known, **options, **changed)
        assert len(ran) == 1
    proto = onnx.load(model)
    proto.doc_string = "other"
    onnx.save(proto, model)
    ran.clear()
    sweep([model], [0.8], known=known, **options)
    assert len(ran) == 1


@pytest.mark.parametrize("changed", ["profile", "latency_table", "sensitivity", "calib"])
def test_files_of_options_stand_for_what_they_hold(tmp_path: Path, changed: str) -> None:
    """A file that holds something else under its old name makes another run; a name alone, or a move, does not."""
    files = {name: tmp_path / f"{name}.toml" for name in ("profile", "latency_table", "sensitivity", "calib")}
    for path in files.values():
        path.write_text("[multiples]\n'*' = 4\n")
    options = Options(targets={"latency": 0.5}, **{name: str(path) for name, path in files.items()})
    before = parcels.settings(options)
    files[changed].write_text("[multiples]\n'*' = 8\n")
    after = parcels.settings(options)
    assert [name for name in before if before[name] != after[name]] == [changed]
    moved = files["profile"].rename(tmp_path / "moved.toml")
    assert parcels.settings(replace(options, profile=str(moved))) == after
    assert parcels.settings(replace(options, profile="generic"))["profile"] == "generic"


def _latency_table(path: Path, first: float = 1.0) -> None:
    """One row of 1 ms per layer of the model, the first one with its own."""
    graph = onnx.load(MODEL).graph
    shapes = {weight.name: weight.dims for weight in graph.initializer}
    lines = ["layer,inputs,outputs,ms"]
    for node in graph.node:
        if node.op_type in ("Conv", "Gemm"):
            outputs, inputs, *_ = shapes[node.input[1]]
            group = next((a.i for a in node.attribute if a.name == "group"), 1)
            lines.append(f"{node.output[0]},{inputs * group},{outputs},{first if len(lines) == 1 else 1}")
    path.write_text("\n".join((*lines, "")))


def test_resume_runs_again_after_a_profile_or_latency_table_changed(tmp_path: Path) -> None:
    """The rows follow what the files say now."""
    profile, table = tmp_path / "p.toml", tmp_path / "t.csv"
    options: dict[str, Any] = {"jobs": 1, "proof": False, "force": True, "profile": profile, "latency_table": table}
    found, known = list[list[Row]](), list[Row]()
    for multiple, ms in ((1, 1), (1, 1), (8, 1), (8, 2)):
        profile.write_text(f"[multiples]\nConv = {multiple}\n")
        _latency_table(table, first=ms)
        known = sweep([MODEL], {"latency": [0.6]}, known=known, **options)
        assert [row.error for row in known] == [""]
        found.append(known)
    assert found[0] == found[1]
    assert len({rows_[0].run for rows_ in found}) == 3
    assert found[0][0].mac != found[2][0].mac


def test_changed_external_data_is_another_model(tmp_path: Path) -> None:
    """A model whose weights lie beside it is run again when they change."""
    model = tmp_path / "m.onnx"
    onnx.save(onnx.load(MODEL), model, save_as_external_data=True, location="m.bin", size_threshold=0)
    before = parcels.digest(model)
    weights = bytearray((tmp_path / "m.bin").read_bytes())
    weights[0] ^= 1
    (tmp_path / "m.bin").write_bytes(weights)
    assert parcels.digest(model) != before


def test_a_table_is_not_lost_by_mistake(tmp_path: Path) -> None:
    """Without --resume or --force a table stays as it is; a wrong option leaves its rows, too."""
    path, args = tmp_path / "t.json", ("sweep", MODEL, "--target-mac", 0.8, "--jobs", 1, "--no-proof", "--json")
    ok(*args, path)
    content = path.read_text()
    assert run(*args, path).exit_code == 2
    assert path.read_text() == content
    for wrong in (("--preset", "z"), ("--criterion", "nonsense")):
        assert run(*args, path, *wrong).exit_code == 2
        assert len(rows.read(path)) == 1
        assert json.loads(path.read_text())["error"]["code"] == 2
    ok(*args, path, "--resume")
    assert json.loads(path.read_text())["error"] is None
    ok(*args, path, "--force")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model", "\ud800"), ("preset", None), ("criterion", 5), ("mac", "x"), ("mac", True), ("params", []),
        pytest.param("bandwidth", 10**400, id="giant"), ("proof", 1), ("seconds", None), ("run", {}), ("output", 5),
        ("error", {"code": "x", "message": "m"}), ("target", {"kind": 5, "requested": 0.5}), ("quality.metric", None),
        ("quality.after", "x"), ("quality.drop", None), ("quality.samples", 0.5),
    ],
)  # fmt: skip
def test_rows_of_other_types_are_no_table(name: str, value: Any, tmp_path: Path) -> None:
    """A table whose fields hold what no sweep writes there is refused on reading, before a run or a page meets it."""
    measured = rows.Measured("top1", 0.9, 0.8, 0.1, 100)
    content = rows.to_json([rows.Row("m.onnx", "d", "l2", "none", "mac", 0.5, 0.5, 0.5, 0.5, (measured,))], {})
    path = tmp_path / "t.json"
    path.write_text(json.dumps(content))
    assert len(rows.read(path)) == 1
    row = content["rows"][0]
    (row["quality"][0] if name.startswith("quality.") else row)[name.removeprefix("quality.")] = value
    path.write_text(json.dumps(content))
    with pytest.raises(UsageError, match="is no table of a sweep"):
        rows.read(path)


def test_models_are_never_taken_for_tables(tmp_path: Path) -> None:
    """A table that would go over a model or a picture is refused, and so is one that is some other file."""
    model = tmp_path / "m.onnx"
    model.write_bytes(MODEL.read_bytes())
    for option in ("--csv", "--json"):
        assert run("sweep", model, "--target-mac", 0.8, option, model).exit_code == 2
    other = tmp_path / "notes.csv"
    other.write_text("my,notes\n")
    assert run("sweep", model, "--target-mac", 0.8, "--csv", other).exit_code == 2
    assert (model.read_bytes(), other.read_text()) == (MODEL.read_bytes(), "my,notes\n")


# -- interruption ------------------------------------------------------------------------------------------------------


def test_ctrl_c_leaves_whole_tables_and_models(tmp_path: Path) -> None:
    """An interrupted sweep ends with 130; its tables hold the finished runs, its models are whole, nothing else is left."""
    targets = [word for k in range(400) for word in ("--target-mac", str(0.95 - k / 500))]
    table = tmp_path / "t.csv"
    words = [MODEL, *targets, "--jobs", 2, "--csv", table, "--json", tmp_path / "t.json", "--out-dir", tmp_path]
    process = subprocess.Popen(
        [sys.executable, "-c", "from onnxprune.cli import main; main()", "sweep", *map(str, words)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    end = time.monotonic() + 60
    while time.monotonic() < end and not (table.exists() and len(rows.read(table)) >= 3):
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    stdout, stderr = process.communicate(timeout=30)
    assert (process.returncode, stdout) == (130, "")
    assert stderr.splitlines()[-1].startswith("onnxprune: interrupted; what was finished,")
    assert "Traceback" not in stderr
    assert "Warning" not in stderr
    found = rows.read(table)
    assert 3 <= len(found) < 400
    assert abs(len(rows.read(tmp_path / "t.json")) - len(found)) <= 1
    assert json.loads((tmp_path / "t.json").read_text())["error"]["code"] == 130
    for row in found:
        onnx.checker.check_model(onnx.load(row.output))
    assert {path.suffix for path in tmp_path.iterdir()} == {".onnx", ".json", ".csv"}


# -- workers -----------------------------------------------------------------------------------------------------------


def test_nothing_is_said_of_what_killed_processes_held() -> None:
    """What a killed process held is freed by another, which outlives this one; it warns of that to nobody."""
    program = (
        "from onnxprune import workers\n"
        "from joblib.externals.loky.backend import resource_tracker\n"
        "print(sorted(workers.locally(abs, [(-1,), (-2,)], jobs=2, threads=1)))\n"
        "resource_tracker.register('/nowhere/at-all', 'file')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "[(0, 1), (1, 2)]\n", "")


def test_a_killed_process_costs_its_own_run_alone() -> None:
    """Where a process dies, as when memory runs out, its call is an error and all the others have their results."""
    results = dict(workers.locally(ten_times, [(number,) for number in range(5)], jobs=2, threads=1))
    assert isinstance(results.pop(2), workers.WorkerLostError)
    assert results == {0: 0, 1: 10, 3: 30, 4: 40}


def test_processes_that_cannot_be_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the system gives no semaphores, several jobs are an error that says what to do, and one job works."""

    def refused() -> NoReturn:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(multiprocessing, "Semaphore", refused)
    with pytest.raises(UsageError, match=r"Permission denied.*--jobs 1"):
        list(workers.locally(ten_times, [(1,), (3,)], jobs=2, threads=1))
    assert dict(workers.locally(ten_times, [(1,), (3,)], jobs=1, threads=1)) == {0: 10, 1: 30}


def test_a_lost_run_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run whose process died is a row that says so."""
    lost = workers.WorkerLostError("the process was killed")
    monkeypatch.setattr(workers, "locally", lambda *args: (pair for pair in [(0, lost)]))
    (row,) = sweep([MODEL], [0.8])
    assert (row.code, row.error) == (1, "the process was killed")


def test_another_version_or_file_in_the_worker_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that has another onnxprune, or another or no file under the path, fails the run with advice."""
    sweeps = sys.modules["onnxprune.sweep"]
    runs: list[Any] = []
    monkeypatch.setattr(workers, "locally", lambda function, calls, *_: (runs.append(run) for (run,) in calls))
    model = tmp_path / "m.onnx"
    model.write_bytes(MODEL.read_bytes())
    with pytest.raises(TypeError):
        sweep([model], [0.8], jobs=1)
    assert "install the same" in sweeps.execute(replace(runs[0], version="0.0")).row.error
    model.write_bytes(b"other")
    assert "--ship" in sweeps.execute(runs[0]).row.error
    model.unlink()
    assert "no such file; share" in sweeps.execute(runs[0]).row.error


@pytest.fixture(scope="module")
def scheduler() -> Iterator[str]:
    """Start a scheduler and two worker processes; returns the address."""
    distributed = pytest.importorskip("distributed", reason="DASK IS NOT TESTED: pip install 'onnxprune[dask]'")
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None, silence_logs=50
    ) as cluster:
        yield cluster.scheduler_address


@pytest.mark.parametrize("ship", [False, True], ids=["by-path", "shipped"])
def test_dask_gives_the_rows_of_this_machine(scheduler: str, tmp_path: Path, ship: bool) -> None:
    """On two workers behind a scheduler the table is the same, errors and models included, whichever way files travel."""
    chosen = {"presets": ["a", "d"], "data": DATA, "metrics": ["top1", "cosine"]}
    models, targets = [MODEL, tmp_path / "none.onnx"], [0.8, 0.5, 1e-6]
    local = sweep(models, targets, **chosen, jobs=1, out_dir=tmp_path / "local")
    remote = sweep(
        models, targets, **chosen, backend="dask", scheduler=scheduler, ship=ship, out_dir=tmp_path / "remote"
    )
    assert [replace(row, output="") for row in remote] == [replace(row, output="") for row in local]
    assert [row.code for row in remote] == 2 * [0, 0, 4] + 6 * [7]
    for here, there in zip(local, remote, strict=True):
        if here.ok:
            assert Path(here.output).read_bytes() == Path(there.output).read_bytes()


def test_everything_that_options_name_is_sent(tmp_path: Path) -> None:
    """A worker without the folder gets profile and latency table, too, and its row is the same."""
    profile, table = tmp_path / "p.toml", tmp_path / "t.csv"
    profile.write_text("[multiples]\nConv = 4\n")
    _latency_table(table)
    options = Options(targets={"latency": 0.6}, profile=str(profile), latency_table=str(table), proof=False)
    shared = {"data": None, "metrics": (), "reading": quality.Reading(), "threads": 1, "whole": False}
    (asked,) = _runs([MODEL], [options], shared, None)
    here = execute(asked).row
    ((asked, *sent),) = _calls([asked], ship=True)
    for path in (profile, table):
        path.unlink()
    there = execute(asked, *sent).row
    assert there.ok, there.error
    assert replace(there, seconds=0) == replace(here, seconds=0)


def test_dask_from_the_command_line(scheduler: str, tmp_path: Path) -> None:
    """``--backend dask --scheduler ADDRESS`` runs there."""
    words = [word for word in ARGS if word not in ("--jobs", 1)]
    ok(*words, "--backend", "dask", "--scheduler", scheduler, "--csv", tmp_path / "t.csv")
    assert rows.read(tmp_path / "t.csv") == sweep([MODEL], [0.8, 0.5], jobs=1, **QUALITY)
    assert run(*ARGS, "--backend", "dask", "--scheduler", scheduler).exit_code == 2  # --jobs is for this machine


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:9", "nonsense"])
def test_no_scheduler_is_an_error_within_seconds(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An address where no scheduler answers costs one line and exit code 2."""
    pytest.importorskip("distributed", reason="DASK IS NOT TESTED: pip install 'onnxprune[dask]'")
    assert workers.CONNECT_SECONDS <= 10
    monkeypatch.setattr(workers, "CONNECT_SECONDS", 1)
    begin = time.monotonic()
    result = run("sweep", MODEL, "--target-mac", 0.8, "--backend", "dask", "--scheduler", address)
    assert (result.exit_code, time.monotonic() - begin < 5) == (2, True)
    assert result.stderr.startswith(f"onnxprune: {address}: no Dask scheduler answers there")
    assert len(result.stderr.splitlines()) == 1


def test_parcels_bring_everything_that_a_path_holds(tmp_path: Path) -> None:
    """A model travels with its external data, a folder with all that is in it; what lies outside its folder does not."""
    model, folder = tmp_path / "a" / "m.onnx", tmp_path / "data"
    (folder / "inner").mkdir(parents=True)
    model.parent.mkdir()
    onnx.save(onnx.load(MODEL), model, save_as_external_data=True, location="m.bin", size_threshold=0)
    (folder / "inner" / "x.npy").write_bytes(b"x")
    expected, sent = onnx.load(model), [parcels.pack(model), parcels.pack(folder)]
    shutil.rmtree(model.parent)
    with parcels.unpacked(sent) as placed:
        assert onnx.load(placed[str(model)]) == expected
        assert (Path(placed[str(folder)]) / "inner" / "x.npy").read_bytes() == b"x"
    assert not Path(placed[str(model)]).exists()
    outside = onnx.load(MODEL)
    onnx.external_data_helper.convert_model_to_external_data(outside, location="../m.bin", size_threshold=0)
    (tmp_path / "o.onnx").write_bytes(outside.SerializeToString())
    with pytest.raises(UsageError, match="outside its folder"):
        parcels.pack(tmp_path / "o.onnx")
    assert parcels.members(tmp_path / "o.onnx").keys() == {"o.onnx"}  # nor is it read, which might never end


# -- extras ------------------------------------------------------------------------------------------------------------


def test_missing_extras_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without Dask or matplotlib the options that need them end with code 2 and say what to install, before any run."""
    monkeypatch.setitem(sys.modules, "distributed", None)
    result = run("sweep", MODEL, "--target-mac", 0.8, "--backend", "dask", "--scheduler", "tcp://127.0.0.1:9")
    assert (result.exit_code, "pip install 'onnxprune[dask]'" in result.stderr) == (2, True)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = run(*ARGS, "--plot", tmp_path / "p.svg")
    assert (result.exit_code, "pip install 'onnxprune[report]'" in result.stderr) == (2, True)
    assert list(tmp_path.iterdir()) == []


def test_plot_is_drawn_the_same_every_time(tmp_path: Path) -> None:
    """The SVG names metric, lines and axes, and the same rows give the same bytes; PNG is a picture, too."""
    pytest.importorskip("matplotlib", reason="PLOTS ARE NOT TESTED: pip install 'onnxprune[report]'")
    for name in ("one.svg", "two.svg", "p.png"):
        ok(*ARGS, "--preset", "a", "--preset", "d", "--plot", tmp_path / name, "-q")
    svg = (tmp_path / "one.svg").read_text()
    assert svg == (tmp_path / "two.svg").read_text()
    assert all(word in svg for word in ("top1 (higher is better)", "MAC kept, % of the original", ">a<", ">d<"))
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_plot_fills_pareto_points_only(table: list[Row]) -> None:
    """One point per row with a quality: filled where it is Pareto-optimal; failed rows are left out."""
    pytest.importorskip("matplotlib", reason="PLOTS ARE NOT TESTED: pip install 'onnxprune[report]'")
    failed = replace(table[0], mac=None, quality=(), code=4)
    assert pareto.draw([*table, failed]) == pareto.draw(table)
    assert pareto.draw(table) != pareto.draw([replace(row, pareto=not row.pareto) for row in table])
    odd = [replace(row, model=f"_{row.preset} $x_") for row in table]
    assert b"_a $x_" in pareto.draw(odd)
    with pytest.raises(UsageError, match="no run has a quality"):
        pareto.draw([failed])


@pytest.mark.parametrize(
    "args",
    [
        ("--plot", "p.svg"),
        ("--plot", "p.doc", "--data", DATA, "--metric", "top1"),
        ("--plot", "none/p.svg", "--data", DATA),
    ],
    ids=["no-quality", "no-picture", "no-folder"],
)
def test_plots_that_cannot_be_are_refused(args: tuple[object, ...]) -> None:
    """A picture without a quality, of another kind, or in no folder is refused before any run."""
    result = run("sweep", MODEL, "--target-mac", 0.8, *args)
    assert result.exit_code in (2, FileError.exit_code)
    assert len(result.output.splitlines()) == 1


def test_sweep_is_public() -> None:
    """The function and its rows are had from the package."""
    assert onnxprune.sweep is sweep
    assert onnxprune.SweepRow is Row


def test_axes_multiply() -> None:
    """The number of rows is the product of the axes."""
    table = sweep([MODEL], [0.9, 0.8], presets=["a", "b"], criteria=["l1", "l2"], proof=False, jobs=1)
    assert [(row.preset, row.criterion, row.target) for row in table] == list(
        itertools.product("ab", ["l1", "l2"], [0.9, 0.8])
    )
