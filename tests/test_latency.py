"""Latency is a budget: tables guide it, and what is measured end to end decides."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable

import numpy as np
import pytest

import architectures
import onnxprune
from commands import run
from graphs import Tiny
from onnxprune import onnx_io, profile, runtime, stopwatch
from onnxprune.cost import Cost
from onnxprune.latency import Table, parse, read_tables, with_latency
from onnxprune.options import Options
from onnxprune.passes.couple import couple
from onnxprune.stopwatch import Race, Result, fit
from onnxprune.sweep import sweep


@pytest.fixture(autouse=True)
def _cache(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONNXPRUNE_CACHE", str(tmp_path / "cache"))


def chain(*widths: int, size: int = 8) -> onnx_io.onnx.ModelProto:
    """Convolutions one after another."""
    t = Tiny()
    y = t.input(1, 3, size, size)
    for number, (inputs, outputs) in enumerate(zip((3, *widths), (*widths, 10), strict=True)):
        y = t.conv(y, f"c{number}", inputs, outputs, 3)
    return t.build(y)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0.7", 0.7),
        (0.7, 0.7),
        ("1", 1.0),
        ("12ms", 12e3),
        ("800us", 800.0),
        ("1.5 s", 1.5e6),
        ("12", 12e3),
        (12, 12e3),
    ],
)
def test_targets_are_shares_or_times(text: str | float, value: float) -> None:
    """Up to 1 is a share; times are kept in microseconds, and are in milliseconds without a unit."""
    assert parse(text) == pytest.approx(value)


@pytest.mark.parametrize("text", ["0", "-0.5", "0.5us", "ms", "12 min", "nan", "1e400ms", ""])
def test_other_targets_are_refused(text: str) -> None:
    """What is no share and no time is named."""
    with pytest.raises(onnxprune.UsageError, match=r"share like 0\.7, or a time"):
        parse(text)


def test_tables_are_linear_between_their_counts() -> None:
    """A bilinear function is met everywhere, also below the smallest counts, but never below nothing."""
    inputs, outputs = (8, 16, 32), (4, 24)

    def truth(i: float, o: float) -> float:
        return 1 + 0.5 * i + 0.25 * o + 0.01 * i * o

    table = Table(inputs, outputs, np.array([[truth(i, o) for o in outputs] for i in inputs]))
    for i, o in ((8, 4), (12, 20), (32, 24), (20, 10), (4, 2)):
        assert table.at(i, o) == pytest.approx(truth(i, o))
    assert Table((8, 16), (8,), np.array([[1.0], [9.0]])).at(1, 8) == 0


def predicted(cost: Cost, keep: np.ndarray) -> float:
    return cost.total("latency", cost.counts(keep))


def test_prediction_is_the_sum_of_the_layers() -> None:
    """Under any plan latency is what the tables say at the kept counts, plus a rest that shrinks with the activations."""
    coupling = couple(onnx_io.read(chain(16, 24)))
    cost = Cost(coupling)
    grid = Table((1, 32), (1, 32), np.array([[1.0, 32.0], [32.0, 1024.0]]))  # inputs times outputs
    timed = with_latency(cost, [None, grid, Table((24,), (10,), np.array([[5.0]]))], 24 * 16 + 5 + 7.0)
    rng = np.random.default_rng(0)
    every = np.ones(coupling.n_classes, bool)
    assert predicted(timed, every) == pytest.approx(16 * 24 + 5 + 7)
    whole = cost.of(every)["activations"]
    for _ in range(5):
        keep = every.copy()
        first, second = (group.classes for group in coupling.groups if group.frozen is None)
        keep[rng.choice(first, 5, replace=False)] = False
        keep[rng.choice(second, 9, replace=False)] = False
        rest = 7 * cost.of(keep)["activations"] / whole
        assert predicted(timed, keep) == pytest.approx(11 * 15 + 5 * 15 / 24 + rest)


def test_changes_equal_differences() -> None:
    """What a step is said to save is what the totals differ by."""
    coupling = couple(onnx_io.read(chain(16, 24)))
    cost = Cost(coupling)
    grid = Table((4, 16), (6, 24), np.array([[1.0, 3.0], [2.0, 9.0]]))
    timed = with_latency(cost, [None, grid, None], 20.0)
    every = np.ones(coupling.n_classes, bool)
    for group in coupling.groups:
        keep = every.copy()
        keep[group.classes[:3]] = False
        atoms, times = timed.increment(group.classes[:3])
        change = timed.terms["latency"].change(timed.counts(every), atoms, -times)
        assert change == pytest.approx(predicted(timed, keep) - predicted(timed, every))


def table_file(folder: pathlib.Path, text: str) -> pathlib.Path:
    """Write a table."""
    path = folder / "table.csv"
    path.write_text(text)
    return path


def test_a_device_table_decides(tmp_path: pathlib.Path) -> None:
    """With a table nothing is measured: what it says is slow shrinks, and its prediction is what is budgeted."""
    cheap, dear = "c1,16,24,1\n", "c1,16,24,100\n"
    kept = {}
    for name, row in (("cheap", cheap), ("dear", dear)):
        path = table_file(tmp_path, f"layer,inputs,outputs,ms\nc0,3,16,1\n{row}c2,24,10,1\nc3,10,10,1\n")
        result = onnxprune.prune(chain(16, 24, 10), target_latency=0.5, latency_table=str(path), proof=False)
        (target,) = result.report.targets
        assert target.achieved <= 0.5
        assert result.report.latency_ms is None
        assert any("nothing was measured" in note for note in result.report.notes)
        kept[name] = [layer.mac_after / layer.mac_before for layer in result.report.layers]
    assert kept["dear"][1] == pytest.approx(0.5, abs=0.06)
    assert kept["cheap"][0] < kept["dear"][0] + 1e-9


def test_absolute_times(tmp_path: pathlib.Path) -> None:
    """A target in milliseconds is met in milliseconds, and reported in them."""
    path = table_file(tmp_path, "layer,inputs,outputs,ms\nc0,3,16,4\nc1,16,10,8\n")
    (target,) = onnxprune.prune(chain(16), target_latency="9ms", latency_table=str(path), proof=False).report.targets
    assert (target.kind, target.requested, target.share) == ("latency", 9.0, False)
    assert 8 <= target.achieved <= 9


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param("name,ms\nc0,1\n", "first line must be", id="header"),
        pytest.param("layer,inputs,outputs,ms\nc0,3,x,1\n", "line 2 does not read", id="number"),
        pytest.param("layer,inputs,outputs,ms\nc0,3,16,-1\n", "milliseconds 0 or more", id="negative"),
        pytest.param("layer,inputs,outputs,ms\nc0,3,16,nan\n", "milliseconds 0 or more", id="nan"),
        pytest.param("layer,inputs,outputs,ms\nother,3,16,1\n", "names no layer", id="stranger"),
        pytest.param("layer,inputs,outputs,ms\nc0,3,8,1\nc0,3,16\n", "line 3 does not read", id="short"),
        pytest.param("layer,inputs,outputs,ms\nc1,8,10,1\nc1,16,5,1\n", "no row for 8 inputs and 5 outputs", id="hole"),
        pytest.param("layer,inputs,outputs,ms\nc1,8,10,1\nc1,12,10,2\n", "the table ends at 12 and 10", id="end"),
        pytest.param("layer,inputs,outputs,ms\nc1,8,10,1\n", "the table ends at 8 and 10", id="part"),
        pytest.param("layer,inputs,outputs,ms\nc1,16,10,1\nc1,16,10,2\n", "two rows for 16 inputs", id="twice"),
    ],
)
def test_wrong_tables_are_refused(text: str, message: str, tmp_path: pathlib.Path) -> None:
    """A table that does not say enough is a usage error with its line or layer."""
    with pytest.raises(onnxprune.UsageError, match=message):
        read_tables(table_file(tmp_path, text), Cost(couple(onnx_io.read(chain(16)))))


def race_of(truth: Callable[[float], float]) -> Callable[[np.ndarray], Result]:
    """Pretend to measure: what is kept holds the predicted share."""
    return lambda keep: Result(10.0, 10.0 * truth(keep[0]), truth(keep[0]))


@pytest.mark.parametrize(
    "truth",
    [
        pytest.param(lambda p: p, id="right"),
        pytest.param(lambda p: 0.4 + 0.6 * p, id="optimistic"),
        pytest.param(lambda p: p**2, id="pessimistic"),
        pytest.param(lambda p: np.ceil(p * 40) / 40, id="steps"),
        pytest.param(lambda p: 0.2 + 0.8 * p + 0.01 * np.sin(300 * p), id="rough"),
    ],
)
def test_what_is_measured_decides(truth: Callable[[float], float]) -> None:
    """However wrong the prediction, the result measures within 0.03 below what was asked for, and never above."""
    keep, found = fit(lambda share: np.array([share]), race_of(truth), 0.7)
    assert found.ratio == pytest.approx(truth(keep[0]))
    assert 0.67 <= found.ratio <= 0.7


def test_nothing_slower_is_returned() -> None:
    """Where every candidate measures above the target it is out of reach, and the best figure is named."""
    with pytest.raises(onnxprune.BudgetError, match=r"85 % measured at best"):
        fit(lambda share: np.array([max(share, 0.5)]), race_of(lambda p: 0.7 + 0.3 * p), 0.7)


def test_the_least_that_may_stay_is_tried() -> None:
    """Where predictions all lead to one candidate that is too slow, what has everything removed is measured, too."""
    keep, found = fit(lambda share: np.array([0.9 if share > 0 else 0.1]), race_of(lambda p: p), 0.7)
    assert (keep[0], found.ratio) == (0.1, 0.1)


def test_fewer_channels_may_take_longer(tmp_path: pathlib.Path) -> None:
    """Where a table says that 16 channels are slower than 32, a target that 32 meet is met."""
    rows = {(64, 64): 4, (32, 32): 1} | {(i, o): 3 for i in (16, 32, 64) for o in (16, 32, 64) if 16 in (i, o)}
    rows |= {(32, 64): 2, (64, 32): 2}
    text = "\ufefflayer,inputs,outputs,ms\n" + "".join(f"c1,{i},{o},{ms}\n" for (i, o), ms in rows.items())
    path = table_file(tmp_path, text)
    result = onnxprune.prune(chain(64, 64), target_latency=0.5, latency_table=str(path), align=16, proof=False)
    assert [layer.channels_after for layer in result.report.layers][:2] != [16, 16]
    assert result.report.targets[0].achieved <= 0.5


@pytest.mark.parametrize("content", ["{", "[]", '{"KEY": {"inputs": [8], "outputs": [8], "ms": [1]}}', '{"KEY": null}'])
def test_a_broken_cache_is_measured_anew(content: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever lies in the cache, or where it cannot be: tables are measured."""
    model = chain(16)
    cost = Cost(couple(onnx_io.read(model)))
    first = stopwatch.measure_tables(model, cost, "model", lambda kind: (8, 8))
    (path,) = (tmp_path / "cache" / "latency").iterdir()
    key = next(iter(json.loads(path.read_text())))
    path.write_text(content.replace("KEY", key))
    again = stopwatch.measure_tables(model, cost, "model", lambda kind: (8, 8))
    assert [t is not None and t.ms.shape for t in again] == [t is not None and t.ms.shape for t in first]

    def homeless(path: pathlib.Path) -> pathlib.Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("ONNXPRUNE_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(pathlib.Path, "expanduser", homeless)
    assert all(t is not None for t in stopwatch.measure_tables(model, cost, "model", lambda kind: (8, 8)))


def test_tables_are_measured_once(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    """A second run of the same model on this machine reads the cache; another number of threads is measured anew."""
    model = chain(32, 32)
    cost = Cost(couple(onnx_io.read(model)))

    def tables(threads: int = 1) -> list[Table | None]:
        with runtime.threads_limited(threads):
            return stopwatch.measure_tables(model, cost, "model", lambda kind: (8, 8))

    first = tables()
    assert [None if t is None else t.ms.shape for t in first] == [(1, 3), (3, 3), (3, 1)]
    assert all(t is not None and (t.ms > 0).all() for t in first)
    assert all(t is not None and t.whole == t.ms[-1, -1] for t in first)
    clocks = []
    real = runtime.KernelClock
    monkeypatch.setattr(runtime, "KernelClock", lambda *given: clocks.append(given) or real(*given))
    again = tables()
    assert clocks == []
    assert all(a and b and np.array_equal(a.ms, b.ms) for a, b in zip(first, again, strict=True))
    tables(threads=2)
    assert clocks
    (path, _) = sorted((tmp_path / "cache" / "latency").iterdir())
    path.write_text("{")
    tables(threads=1), tables(threads=2)


@pytest.mark.parametrize("name", ["mobilenet_v2", "transposed_generator", "layer_norm_mlp", "video_3d", "c2f_detector"])
def test_every_kind_of_layer_is_measured(name: str) -> None:
    """Convolutions, depthwise and transposed ones, and products run alone at every count of their table."""
    model = architectures.ALL[name]()
    cost = Cost(couple(onnx_io.read(model)))
    tables = stopwatch.measure_tables(model, cost, name, lambda kind: (8, 8))
    assert all(table is not None and np.isfinite(table.ms).all() for table in tables)
    assert any(table is not None and table.ms.size > 1 for table in tables)


def test_a_measured_target(tmp_path: pathlib.Path) -> None:
    """The command writes a proved model whose latency, measured in turn with the original's, meets the target."""
    model = chain(64, 64, 64, size=48)
    onnx_io.save(model, tmp_path / "in.onnx")
    out = tmp_path / "out.onnx"
    found = run("prune", tmp_path / "in.onnx", out, "--target-latency", "0.7", "--json", tmp_path / "r.json")
    assert found.exit_code == 0, found.output
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["target"]["kind"] == "latency"
    assert report["target"]["achieved"] <= 0.7
    assert report["latency"]["after_ms"] < report["latency"]["before_ms"]
    assert report["proof"]["ok"]
    again = Race(str(tmp_path / "in.onnx"), {"x": (1, 3, 48, 48)}).run(str(out))
    assert again.ratio < 0.9


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--target-latency", "12 min"), "share like 0.7, or a time"),
        (("--target-mac", "0.5", "--latency-table", "t.csv"), "--latency-table goes with --target-latency"),
        (("--target-latency", "0.5", "--latency-table", "none.csv"), "cannot be read"),
    ],
)
def test_wrong_options(words: tuple[str, ...], message: str, tmp_path: pathlib.Path) -> None:
    """What cannot be meant is said in one line, and nothing is written."""
    onnx_io.save(chain(16), tmp_path / "in.onnx")
    found = run("prune", tmp_path / "in.onnx", tmp_path / "out.onnx", *words)
    assert found.exit_code in (2, 7)
    assert message in found.output
    assert not (tmp_path / "out.onnx").exists()


def test_sweeps_do_not_measure(tmp_path: pathlib.Path) -> None:
    """Runs side by side would spoil each other's latencies: a sweep needs a table, and then budgets by it."""
    onnx_io.save(chain(16), tmp_path / "in.onnx")
    with pytest.raises(onnxprune.UsageError, match="side by side"):
        sweep([tmp_path / "in.onnx"], {"latency": [0.8]}, jobs=1)
    path = table_file(tmp_path, "layer,inputs,outputs,ms\nc0,3,16,4\nc1,16,10,8\n")
    (row,) = sweep([tmp_path / "in.onnx"], {"latency": [0.6]}, latency_table=str(path), proof=False, jobs=1)
    assert row.ok
    assert row.mac is not None
    assert row.mac <= 0.7


def test_blocks_follow_the_machine() -> None:
    """Where latency is measured channels stay in this machine's blocks, unless a profile, alignment or table is given."""
    measured = Options(targets={"latency": 0.7})
    assert measured.hardware is not None
    assert measured.hardware.multiple("Conv") == (runtime.BLOCK, runtime.BLOCK)
    assert measured.hardware.array == {}
    assert Options(targets={"latency": 0.7}, align=4).hardware is None
    assert Options(targets={"latency": 0.7}, latency_table="t.csv").hardware is None
    assert Options(targets={"mac": 0.7}).hardware is None
    assert Options(targets={"latency": 0.7}, profile="ascend").hardware == profile.load("ascend")
