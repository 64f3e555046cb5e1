"""Models whose weights lie in other files: read where they lie, written back outside, never paired with other weights."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import IO, Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

import architectures
import onnxprune
from commands import ok, run
from graphs import Tiny
from onnxprune import external, onnx_io, pipeline, protos, runtime, storage

FIXTURES = Path(__file__).parents[1] / "fixtures"
ROOT = Path(__file__).parents[1]
DIGITS = FIXTURES / "digits"
MODEL = DIGITS / "digits.onnx"


def spread(model: ModelProto, path: Path, n_files: int = 3, smallest: int = 256) -> Path:
    """Write a model with its larger tensors dealt out to several files, one of them in a folder of its own."""
    split = ModelProto()
    split.CopyFrom(model)
    names = [f"part {number}.bin" for number in range(n_files - 1)] + ["deep/last.bin"]
    path.parent.mkdir(parents=True, exist_ok=True)
    (path.parent / "deep").mkdir(exist_ok=True)
    held = [tensor for tensor in external.every_tensor(split) if len(tensor.raw_data) >= smallest]
    for number, tensor in enumerate(held):
        with (path.parent / names[number % n_files]).open("ab") as file:
            file.write(bytes(-file.tell() % 64))
            where, length = file.tell(), len(tensor.raw_data)
            file.write(tensor.raw_data)
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        facts = {"location": names[number % n_files], "offset": str(where), "length": str(length)}
        for key, value in facts.items():
            tensor.external_data.add(key=key, value=value)
    path.write_bytes(split.SerializeToString())
    return path


def inline() -> ModelProto:
    """A trained convolutional network in one file."""
    return onnx.load(MODEL)


def values(path: Path) -> dict[str, np.ndarray]:
    """Every constant of a file by name, read by onnx alone."""
    return {t.name: numpy_helper.to_array(t) for t in protos.named_tensors(onnx.load(path).graph)}


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
    """Insist on equal names, types and values."""
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert value.dtype == b[name].dtype
        np.testing.assert_array_equal(value, b[name])


def data_files(out: Path) -> list[Path]:
    """What lies beside a written model as its data."""
    return [f for f in out.parent.iterdir() if re.fullmatch(re.escape(out.name) + r"\.[0-9a-f]{16}\.data", f.name)]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """The trained network with its weights in three files, in a folder with a space in its name."""
    return spread(inline(), tmp_path / "the model" / "in.onnx")


@pytest.fixture
def expected(tmp_path: Path) -> dict[str, np.ndarray]:
    """The weights that pruning the same network in one file leaves."""
    ok(MODEL, tmp_path / "expected.onnx", "--target-mac", "0.6", "--no-latency")
    return values(tmp_path / "expected.onnx")


# -- ways in and out ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["absolute", "beside", "above"])
def test_prunes_from_any_working_directory(
    source: Path, expected: dict[str, np.ndarray], where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From several files, by absolute and relative paths, the result is that of the same model in one file."""
    given, out = {
        "absolute": (source, tmp_path / "out.onnx"),
        "beside": (Path("in.onnx"), Path("../out.onnx")),
        "above": (Path("the model/in.onnx"), Path("out.onnx")),
    }[where]
    monkeypatch.chdir({"absolute": "/", "beside": source.parent, "above": tmp_path}[where])
    ok(given, out, "--target-mac", "0.6")
    same(values(tmp_path / "out.onnx"), expected)


def test_output_is_external_and_whole(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What lay outside goes outside, into one file; small tensors stay inside; onnx and onnxruntime take it anywhere."""
    out = tmp_path / "there" / "out.onnx"
    out.parent.mkdir()
    ok(source, out, "--target-mac", "0.6")
    (data,) = data_files(out)
    monkeypatch.chdir("/")
    onnx.checker.check_model(str(out))
    graph = onnx.load(out, load_external_data=False).graph
    assert {entry.value for t in graph.initializer for entry in t.external_data if entry.key == "location"} == {
        data.name
    }
    ends = [0]
    for tensor in graph.initializer:
        facts = {entry.key: entry.value for entry in tensor.external_data}
        size = external.n_bytes(tensor)
        assert bool(facts) == (size >= 1024)
        if facts:
            assert set(facts) == {"location", "offset", "length"}
            assert int(facts["length"]) == size
            assert int(facts["offset"]) >= ends[-1]
            assert int(facts["offset"]) % (4096 if size >= 4096 else 16) == 0
            ends.append(int(facts["offset"]) + size)
    assert data.stat().st_size == ends[-1] > 0
    session = onnxruntime.InferenceSession(str(out))
    (given,) = session.get_inputs()
    feed = {given.name: np.zeros([d if isinstance(d, int) else 1 for d in given.shape], np.float32)}
    assert np.isfinite(session.run(None, feed)[0]).all()


def test_untouched_tensors_keep_their_bytes(source: Path, tmp_path: Path) -> None:
    """What is not pruned has the same bytes, wherever it lies now."""
    out = tmp_path / "out.onnx"
    ok(source, out, "--target-mac", "0.8", "--no-latency", "--plan-out", tmp_path / "plan.json")
    cut = json.loads((tmp_path / "plan.json").read_text())["initializers"]
    before, after = values(source), values(out)
    untouched = [name for name in after if name not in cut]
    assert any(before[name].nbytes >= 1024 for name in untouched) or len(untouched) > 2
    for name in untouched:
        assert after[name].tobytes() == before[name].tobytes()


def test_same_input_gives_the_same_bytes(source: Path, tmp_path: Path) -> None:
    """Two runs write the same two files, and the graph's file names its data by what that holds."""
    found = []
    for folder in ("one", "two"):
        out = tmp_path / folder / "out.onnx"
        out.parent.mkdir()
        ok(source, out, "--target-mac", "0.6", "--no-latency")
        (data,) = data_files(out)
        assert onnx_io.sha256(data).startswith(data.name.split(".")[2])
        found.append((out.read_bytes(), data.name, data.read_bytes()))
    assert found[0] == found[1]


def test_tensors_inside_stay_inside(tmp_path: Path) -> None:
    """Large tensors that the input holds in its own file stay in it, while others lie outside."""
    model = inline()
    big = sorted((t for t in model.graph.initializer), key=lambda t: -len(t.raw_data))[:2]
    source = spread(model, tmp_path / "in.onnx", smallest=len(big[0].raw_data))
    ok(source, tmp_path / "out.onnx", "--target-mac", "0.8", "--no-latency")
    graph = onnx.load(tmp_path / "out.onnx", load_external_data=False).graph
    outside = {t.name for t in graph.initializer if t.data_location == TensorProto.EXTERNAL}
    assert outside == {t.name for t in model.graph.initializer if len(t.raw_data) >= len(big[0].raw_data)}


def test_too_much_for_one_file_goes_outside(
    expected: dict[str, np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model in one file whose tensors exceed what one file holds is written as two, typed fields included."""
    model = inline()
    tensor = max(model.graph.initializer, key=lambda t: len(t.raw_data))
    array = numpy_helper.to_array(tensor)
    tensor.ClearField("raw_data")
    tensor.float_data.extend(array.ravel().tolist())
    monkeypatch.setattr(storage, "LIMIT", 10_000)
    result = onnxprune.prune(model, target_mac=0.6)
    onnxprune.save(result.model, tmp_path / "out.onnx")
    assert len(data_files(tmp_path / "out.onnx")) == 1
    same(values(tmp_path / "out.onnx"), expected)
    again = onnxprune.prune(tmp_path / "out.onnx", target_mac=0.9)
    assert again.report.proof is not None
    assert again.report.proof.ok


def test_target_one_copies_every_file(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A target that is met copies all files as they are, without reading weights into memory."""
    monkeypatch.setattr(external, "_mapped", forbidden, raising=True)
    there = tmp_path / "there"
    there.mkdir()
    monkeypatch.setattr(
        pipeline, "score", lambda coupling, *_: onnxprune.passes.score.Scores(*[np.zeros(coupling.n_classes)] * 2)
    )
    ok(source, there / "out.onnx", "--target-mac", "1", "--no-latency")
    assert (there / "out.onnx").read_bytes() == source.read_bytes()
    for name in ("part 0.bin", "part 1.bin", "deep/last.bin"):
        assert (there / name).read_bytes() == (source.parent / name).read_bytes()


def forbidden(*_: Any) -> None:
    """Stand for a function that must not be called."""
    raise AssertionError("a weight was read")


def test_loading_reads_no_weights(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Opening and coupling look at no tensor that lies outside."""
    monkeypatch.setattr(external, "_mapped", forbidden)
    loaded = pipeline.load(source, onnxprune.Options(), pipeline.Clock())
    assert any(external.is_outside(tensor) for tensor in loaded.proto.graph.initializer)


def test_pruned_model_holds_no_weights(source: Path) -> None:
    """A pruned model in memory only says which slices of which files it consists of."""
    result = onnxprune.prune(source, target_mac=0.6)
    outside = [t for t in result.model.graph.initializer if external.is_outside(t)]
    assert outside
    assert not any(t.raw_data for t in outside)
    cut = [t for t in outside if t.name in result.plan.initializers]
    assert cut
    original = values(source)
    for tensor in cut:
        want = original[tensor.name]
        for axis, kept in result.plan.initializers[tensor.name].items():
            want = want.take(kept, axis)
        np.testing.assert_array_equal(external.array(tensor), want)


# -- commands ----------------------------------------------------------------------------------------------------------


def test_every_command_reads_external_data(source: Path, tmp_path: Path) -> None:
    """Inspect, apply, verify, evaluate, artifact and sensitivity do with several files what they do with one."""
    out, plan = tmp_path / "out.onnx", tmp_path / "plan.json"
    ok(source, out, "--target-mac", "0.6", "--no-latency", "--plan-out", plan)
    for model in (MODEL, source):
        ok("inspect", model, "--json", tmp_path / f"{model.stem}.json", "-q")
    one, several = (json.loads((tmp_path / f"{m.stem}.json").read_text()) for m in (MODEL, source))
    assert one["cost"] == several["cost"]
    assert one["groups"] == several["groups"]
    ok("apply", source, tmp_path / "again.onnx", "--plan", plan)
    same(values(out), values(tmp_path / "again.onnx"))
    ok("verify", source, out, "--plan", plan)
    for model in (source, out):
        ok("evaluate", model, "--data", DIGITS / "digits_eval.npz", "--metric", "top1")
    ok("artifact", source, out, tmp_path / "artifact", "--plan", plan)
    student = values(tmp_path / "artifact" / "student.onnx")
    same(student, values(out))
    manifest = json.loads((tmp_path / "artifact" / "manifest.json").read_text())
    assert len(manifest["files"]["student"]["external"]) == 1


def test_verify_sees_changed_data(source: Path, tmp_path: Path) -> None:
    """Verify compares what lies outside: other values are reported as changed, another structure is refused."""
    out, plan, told = tmp_path / "out.onnx", tmp_path / "plan.json", tmp_path / "r.json"
    ok(source, out, "--target-mac", "0.6", "--no-latency", "--plan-out", plan)
    ok("verify", source, out, "--plan", plan, "--json", told, "-q")
    assert json.loads(told.read_text())["proof"]["weights"] == "exact"
    (data,) = data_files(out)
    content = bytearray(data.read_bytes())
    content[:4] = np.float32(0.123).tobytes()
    data.write_bytes(content)
    ok("verify", source, out, "--plan", plan, "--json", told, "-q")
    assert json.loads(told.read_text())["proof"]["weights"] == "changed"
    content[:4] = np.float32(np.nan).tobytes()
    data.write_bytes(content)
    assert run("verify", source, out, "--plan", plan).exit_code == 5


@pytest.mark.slow
def test_calibration_and_compensation(source: Path, tmp_path: Path) -> None:
    """Calibrated and fitted weights are those of the model in one file, and go outside again."""
    calib = ["--target-mac", "0.5", "--no-latency", "--calib", DIGITS / "digits_calib.npz"]
    for model, name in ((MODEL, "one"), (source, "several")):
        ok(model, tmp_path / f"{name}.onnx", *calib)
    same(values(tmp_path / "one.onnx"), values(tmp_path / "several.onnx"))
    assert data_files(tmp_path / "one.onnx") == []
    assert len(data_files(tmp_path / "several.onnx")) == 1


def test_sweep_writes_external_models(source: Path, tmp_path: Path) -> None:
    """Models that a sweep writes lie outside like their original, and prune to the same weights."""
    rows = onnxprune.sweep(source, [0.8, 0.6], out_dir=tmp_path / "swept", jobs=1)
    assert [row.error for row in rows] == ["", ""]
    for row in rows:
        assert len(data_files(Path(row.output))) == 1
        ok(source, tmp_path / "alone.onnx", "--target-mac", row.target, "--no-latency", "--force")
        same(values(Path(row.output)), values(tmp_path / "alone.onnx"))


def test_branches_with_weights_outside(tmp_path: Path) -> None:
    """Weights in the branches of an If, as initializers and as Constant nodes, are pruned where they lie."""
    rng = np.random.default_rng(0)

    def drawn(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    def branch(name: str, *, constant: bool) -> onnx.GraphProto:
        tensors = [
            numpy_helper.from_array(drawn(32, 16, 3, 3), f"{name}.a"),
            numpy_helper.from_array(drawn(16, 32, 1, 1), f"{name}.b"),
        ]
        nodes = [helper.make_node("Constant", [], [t.name], value=t) for t in tensors] if constant else []
        nodes += [
            helper.make_node("Conv", ["stem", f"{name}.a"], [f"{name}.mid"], pads=[1] * 4),
            helper.make_node("Conv", [f"{name}.mid", f"{name}.b"], [f"{name}.out"]),
        ]
        return helper.make_graph(
            nodes,
            name,
            [],
            [helper.make_tensor_value_info(f"{name}.out", 1, [1, 16, 8, 8])],
            [] if constant else tensors,
        )

    nodes = [
        helper.make_node("Conv", ["x", "w"], ["stem"], pads=[1] * 4),
        helper.make_node(
            "If", ["flag"], ["y"], then_branch=branch("then", constant=False), else_branch=branch("else", constant=True)
        ),
    ]
    inputs = [
        helper.make_tensor_value_info("x", 1, [1, 3, 8, 8]),
        helper.make_tensor_value_info("flag", TensorProto.BOOL, []),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        inputs,
        [helper.make_tensor_value_info("y", 1, [1, 16, 8, 8])],
        [numpy_helper.from_array(drawn(16, 3, 3, 3), "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    source = spread(model, tmp_path / "in.onnx")
    for given, name in ((model, "one"), (source, "several")):
        result = onnxprune.prune(given, target_mac=0.6)
        assert result.report.proof is not None
        assert result.report.proof.ok
        onnxprune.save(result.model, tmp_path / f"{name}.onnx")
    same(values(tmp_path / "one.onnx"), values(tmp_path / "several.onnx"))
    assert len(data_files(tmp_path / "several.onnx")) == 1
    onnxruntime.InferenceSession(str(tmp_path / "several.onnx"))


def test_model_in_memory_without_its_data_is_refused(source: Path) -> None:
    """A ModelProto that somebody read without its data cannot be found on disk: the error says what to do."""
    model = onnx.load(source, load_external_data=False)
    with pytest.raises(onnxprune.ModelError, match="folder is not known here; give the model's path, or load"):
        onnxprune.prune(model, target_mac=0.6)
    onnx.load_external_data_for_model(model, str(source.parent))
    assert onnxprune.prune(model, target_mac=0.6).report.proof.ok  # type: ignore[union-attr]


@pytest.mark.parametrize("change", ["touched", "gone"])
def test_data_that_changes_during_a_run_is_noticed(source: Path, tmp_path: Path, change: str) -> None:
    """What was proved is not written from other bytes: a file that changed since the model was opened is an error."""
    result = onnxprune.prune(source, target_mac=0.6)
    file = source.parent / "part 1.bin"
    if change == "gone":
        file.unlink()
    else:
        os.utime(file, ns=(0, 0))
    with pytest.raises(onnxprune.FileError, match=r"part 1\.bin: (has changed since|cannot be read any more)"):
        onnxprune.save(result.model, tmp_path / "out.onnx")
    assert list(tmp_path.glob("out.onnx*")) == []


# -- whole or absent ---------------------------------------------------------------------------------------------------


def full(_: storage.Stored, file: IO[bytes]) -> str:
    """Write something, then find the disk full."""
    file.write(bytes(100))
    raise OSError(errno.ENOSPC, "No space left on device")


def interrupted(_: storage.Stored, file: IO[bytes]) -> str:
    """Write something, then be stopped."""
    file.write(bytes(100))
    raise KeyboardInterrupt


@pytest.mark.parametrize("stop", [full, interrupted])
def test_nothing_is_left_when_the_data_cannot_be_written(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: Any
) -> None:
    """Neither the model nor data nor a temporary file stays when the disk fills up, or on Ctrl-C."""
    there = tmp_path / "there"
    there.mkdir()
    result = onnxprune.prune(source, target_mac=0.6)
    monkeypatch.setattr(storage.Stored, "write_data", stop)
    with pytest.raises((onnxprune.FileError, KeyboardInterrupt)):
        onnxprune.save(result.model, there / "out.onnx")
    assert list(there.iterdir()) == []


@pytest.mark.parametrize("point", [1, 2])
def test_old_model_keeps_its_own_data(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: int
) -> None:
    """When writing over a model fails, at the data's rename or at the model's, the old model runs on its own weights."""
    out = tmp_path / "there" / "out.onnx"
    out.parent.mkdir()
    ok(source, out, "--target-mac", "0.9", "--no-latency")
    before, files = values(out), sorted(out.parent.iterdir())
    result = onnxprune.prune(source, target_mac=0.6)
    calls, rename = [0], Path.replace

    def failing(self: Path, target: Path) -> Path:
        calls[0] += 1
        if calls[0] == point:
            raise OSError(errno.ENOSPC, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "replace", failing)
    with pytest.raises(onnxprune.FileError, match="No space left"):
        onnxprune.save(result.model, out)
    assert sorted(out.parent.iterdir()) == files
    same(values(out), before)
    monkeypatch.undo()
    onnxprune.save(result.model, out)
    assert len(data_files(out)) == 1
    assert sorted(out.parent.iterdir()) != files


def test_overwriting_takes_its_own_old_data_alone(source: Path, tmp_path: Path) -> None:
    """With --force the data of the model before goes; other files beside it stay, whatever they are called."""
    out = tmp_path / "out.onnx"
    strangers = [
        tmp_path / name for name in ("out.onnx.data", "other.onnx.0123456789abcdef.data", "out.onnx.short.data")
    ]
    for stranger in strangers:
        stranger.write_bytes(b"precious")
    ok(source, out, "--target-mac", "0.9", "--no-latency")
    old = data_files(out)
    ok(source, out, "--target-mac", "0.6", "--no-latency", "--force")
    assert len(data_files(out)) == 1
    assert data_files(out) != old
    ok(MODEL, out, "--target-mac", "0.6", "--no-latency", "--force")
    assert data_files(out) == []
    assert all(stranger.read_bytes() == b"precious" for stranger in strangers)


def test_data_of_the_input_is_never_overwritten(source: Path, tmp_path: Path) -> None:
    """An output that would take the input's data away is refused, in its own name or as older data of that name."""
    for name in ("part 0.bin", "part 1.bin"):
        refused = run(source, source.parent / name, "--target-mac", "0.6", "--force")
        assert refused.exit_code == 2
        assert "holds the input's data" in refused.output
    first = tmp_path / "first.onnx"
    ok(source, first, "--target-mac", "0.9", "--no-latency")
    (tmp_path / "second.onnx").write_bytes(first.read_bytes())
    refused = run(tmp_path / "second.onnx", first, "--target-mac", "0.8", "--force")
    assert refused.exit_code == 2
    assert "holds the input's data" in refused.output
    assert len(data_files(first)) == 1


def test_link_as_output_is_refused(source: Path, tmp_path: Path) -> None:
    """Data cannot lie beside both a link and what it points to."""
    (tmp_path / "link.onnx").symlink_to(tmp_path / "target.onnx")
    refused = run(source, tmp_path / "link.onnx", "--target-mac", "0.6", "--force")
    assert refused.exit_code == 2
    assert "is a link" in refused.output


def beside(path: Path, seed: int = 0, data: str = "model.data") -> Path:
    """Write a model of seeded weights with one file of data beside it."""
    model = inline()
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            drawn = np.random.default_rng(seed).random(tuple(tensor.dims), np.float32)
            tensor.CopyFrom(numpy_helper.from_array(drawn, tensor.name))
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, path, save_as_external_data=True, location=data, size_threshold=0)
    return path


def test_a_renamed_model_keeps_its_data(source: Path, tmp_path: Path) -> None:
    """Writing again under the name that a model once had takes no data from it: by prune, by save, and by a copy."""
    out, best = tmp_path / "out.onnx", tmp_path / "best.onnx"
    ok(source, out, "--target-mac", "0.9", "--no-latency")
    before = values(out)
    out.rename(best)
    for target in ("0.6", "1"):
        ok(source, out, "--target-mac", target, "--no-latency", "--force")
        same(values(best), before)
    ok(MODEL, out, "--target-mac", "0.6", "--no-latency", "--force")
    same(values(best), before)


def test_a_copy_never_takes_the_place_of_its_data(source: Path, tmp_path: Path) -> None:
    """A target that is met, with an output named like the data, is refused, and nothing is written."""
    there = tmp_path / "there"
    there.mkdir()
    refused = run(source, there / "part 0.bin", "--target-mac", "1", "--no-latency")
    assert (refused.exit_code, "belongs" in refused.output) == (2, True)
    assert list(there.iterdir()) == []


def test_models_of_a_sweep_have_data_of_their_own(tmp_path: Path) -> None:
    """Models whose data files share a name keep their weights where a sweep has nothing to remove."""
    models = [beside(tmp_path / name / f"{name}.onnx", seed) for seed, name in enumerate(("ma", "mb"))]
    rows = onnxprune.sweep(models, [1.0], out_dir=tmp_path / "swept", jobs=1)
    assert [row.error for row in rows] == ["", ""]
    for model, row in zip(models, rows, strict=True):
        same(values(Path(row.output)), values(model))


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(("OUT", "--target-mac", "0.6", "--no-latency", "--plan-out", "DATA"), id="plan"),
        pytest.param(("OUT", "--target-mac", "0.6", "--no-latency", "--encodings", "E", "--encodings-out", "DATA"),
                     id="encodings"),
        pytest.param(("inspect", "--json", "DATA"), id="inspect"),
        pytest.param(("inspect", "--criterion", "nonsense", "--json", "DATA"), id="wrong-value"),
        pytest.param(("inspect", "--nonsense", "--json", "DATA"), id="wrong-option"),
        pytest.param(("sweep", "--target-mac", "0.6", "--csv", "DATA", "--force"), id="sweep"),
        pytest.param(("diff", "ORIGINAL", "--json", "DATA"), id="diff"),
        pytest.param(("evaluate", "--data", DIGITS / "digits_eval.npz", "--metric", "top1", "--json", "DATA"),
                     id="evaluate"),
    ],
)  # fmt: skip
def test_no_report_goes_over_the_data_of_a_model(source: Path, tmp_path: Path, words: tuple[Any, ...]) -> None:
    """Whatever a command writes, it is refused where the weights of a model lie that it reads, also to tell of an error."""
    data, before = source.parent / "part 0.bin", (source.parent / "part 0.bin").read_bytes()
    (tmp_path / "e.json").write_text("{}")
    names = {"DATA": data, "OUT": tmp_path / "out.onnx", "ORIGINAL": MODEL, "E": tmp_path / "e.json"}
    given = [names.get(word, word) for word in words]
    place = 0 if given[0] == names["OUT"] else 1
    refused = run(*given[:place], source, *given[place:])
    assert refused.exit_code == 2
    assert ("nonsense" if words[1] == "--nonsense" else "holds the input's data") in refused.output
    assert data.read_bytes() == before
    assert not (tmp_path / "out.onnx").exists()


# -- what a model may point to -----------------------------------------------------------------------------------------


def pointing(path: Path, **facts: object) -> Path:
    """Let the first external tensor of a model point elsewhere."""
    model = onnx.load(path, load_external_data=False)
    tensor = next(t for t in model.graph.initializer if t.data_location == TensorProto.EXTERNAL)
    known = {entry.key: entry.value for entry in tensor.external_data} | {k: str(v) for k, v in facts.items()}
    del tensor.external_data[:]
    for key, value in known.items():
        tensor.external_data.add(key=key, value=value)
    path.write_bytes(model.SerializeToString())
    return path


@pytest.mark.parametrize(
    ("location", "words"),
    [
        pytest.param("../secret.bin", "not a file within the folder", id="above"),
        pytest.param("deep/../../secret.bin", "not a file within the folder", id="above_through_a_folder"),
        pytest.param("{root}/secret.bin", "not a file within the folder", id="absolute"),
        pytest.param("link.bin", "not a file within the folder", id="link_out"),
        pytest.param("pipe", "not a plain file", id="pipe"),
        pytest.param("deep", "not a plain file", id="folder"),
        pytest.param("", "not a file within the folder", id="nowhere"),
        pytest.param("gone.bin", "no such file", id="missing"),
        pytest.param("circle.bin", "not a file within the folder", id="links_in_a_circle"),
        pytest.param("a" * 5000, "not a file within the folder", id="long"),
    ],
)
def test_unsafe_location_is_refused(source: Path, tmp_path: Path, location: str, words: str) -> None:
    """What is not a plain file within the model's folder is not read; the error names model and tensor, exit code 3."""
    (tmp_path / "secret.bin").write_bytes(bytes(1 << 20))
    (source.parent / "link.bin").symlink_to(tmp_path / "secret.bin")
    (source.parent / "circle.bin").symlink_to("circle.bin")
    os.mkfifo(source.parent / "pipe")
    pointing(source, location=location.format(root=tmp_path))
    with pytest.raises(onnxprune.ModelError, match=words) as caught:
        onnx_io.load(source)
    assert len(str(caught.value)) < 1000
    refused = run("inspect", source)
    assert refused.exit_code == 3
    assert "in.onnx: its external data cannot be read" in refused.output


@pytest.mark.parametrize("command", ["prune", "artifact"])
def test_two_locations_of_one_tensor_are_refused(source: Path, tmp_path: Path, command: str) -> None:
    """Of two locations one might be read, and the other be where a copy of the data is written: outside of OUT's folder."""
    (tmp_path / "out").mkdir()
    (tmp_path / "profile").write_text("precious")
    sound = tmp_path / "sound.onnx"
    ok("prune", MODEL, sound, "--target-mac", 0.6, "--no-latency", "--plan-out", tmp_path / "plan.json")
    model = onnx.load(source, load_external_data=False)
    tensor = next(t for t in model.graph.initializer if t.data_location == TensorProto.EXTERNAL)
    facts = [(entry.key, entry.value) for entry in tensor.external_data]
    del tensor.external_data[:]
    for key, value in [("location", "../profile"), *facts]:
        tensor.external_data.add(key=key, value=value)
    source.write_bytes(model.SerializeToString())
    words = {
        "prune": (source, tmp_path / "out" / "out.onnx", "--target-mac", "1.0", "--no-latency", "--force"),
        "artifact": (source, sound, tmp_path / "out" / "artifact", "--plan", tmp_path / "plan.json"),
    }[command]
    refused = run(command, *words)
    assert refused.exit_code == 3
    assert "says twice where its data lies" in refused.output
    assert (tmp_path / "profile").read_text() == "precious"


def test_copy_is_not_written_through_a_link(source: Path, tmp_path: Path) -> None:
    """A folder of the data that is a link to elsewhere, where OUT is to lie, takes no copy."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "deep").symlink_to(tmp_path / "elsewhere")
    refused = run(source, tmp_path / "out" / "out.onnx", "--target-mac", "1.0", "--no-latency")
    assert refused.exit_code == 2
    assert "through a link" in refused.output
    assert [*(tmp_path / "elsewhere").iterdir()] == []


def test_copy_takes_data_of_sparse_tensors(tmp_path: Path) -> None:
    """The numbers of a sparse initializer that lie outside go along with a copy."""
    t = Tiny()
    y = t.linear(t.linear(t.input(4, 6), "a", 6, 8), "z", 8, 3)
    model = t.build(t.node("Add", y, t.random(4, 3, name="sparse")))
    del model.graph.initializer[-1]
    values, indices = numpy_helper.from_array(np.ones(8, np.float32), "sparse"), numpy_helper.from_array(np.arange(8))
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, (4, 3)))
    values = model.graph.sparse_initializer[0].values
    (tmp_path / "values.bin").write_bytes(values.raw_data)
    values.ClearField("raw_data")
    values.data_location = TensorProto.EXTERNAL
    values.external_data.add(key="location", value="values.bin")
    (tmp_path / "in.onnx").write_bytes(model.SerializeToString())
    (tmp_path / "out").mkdir()
    ok(tmp_path / "in.onnx", tmp_path / "out" / "out.onnx", "--target-mac", "1.0", "--no-latency")
    assert (tmp_path / "out" / "values.bin").read_bytes() == (tmp_path / "values.bin").read_bytes()


def test_no_report_goes_over_the_data_that_a_copy_takes_along(source: Path, tmp_path: Path) -> None:
    """Beside OUT the data has the names that it has beside IN."""
    (tmp_path / "out").mkdir()
    report = tmp_path / "out" / "part 0.bin"
    refused = run(source, tmp_path / "out" / "out.onnx", "--target-mac", "1.0", "--no-latency", "--json", report)
    assert refused.exit_code == 2
    assert "is where the input's data belongs" in refused.output
    assert [*(tmp_path / "out").iterdir()] == []


def test_link_within_the_folder_is_followed(source: Path) -> None:
    """A link to a file of the same folder is as good as the file."""
    (source.parent / "part 0.bin").rename(source.parent / "renamed.bin")
    (source.parent / "part 0.bin").symlink_to(source.parent / "renamed.bin")
    assert onnxprune.inspect(source).before["mac"] == onnxprune.inspect(MODEL).before["mac"]


@pytest.mark.parametrize(
    "facts",
    [
        pytest.param({"offset": 1 << 40}, id="offset_beyond_the_end"),
        pytest.param({"offset": -4096}, id="negative_offset"),
        pytest.param({"offset": "many"}, id="no_number"),
        pytest.param({"length": 12}, id="too_short_for_its_shape"),
        pytest.param({"length": 1 << 40}, id="too_long_for_its_shape"),
    ],
)
def test_places_outside_the_file_are_refused(source: Path, facts: dict[str, object]) -> None:
    """Offsets and lengths that do not fit file and shape are a ModelError that names model and tensor."""
    pointing(source, **facts)
    with pytest.raises(onnxprune.ModelError, match=r"in\.onnx: its external data cannot be read \(.+: .+\)"):
        onnx_io.load(source)


# -- values ------------------------------------------------------------------------------------------------------------

KINDS = [
    "FLOAT", "FLOAT16", "BFLOAT16", "DOUBLE", "INT8", "UINT8", "INT64", "BOOL", "FLOAT8E4M3FN", "INT4", "UINT4",
]  # fmt: skip


@pytest.mark.parametrize("offset", [0, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_values_of_every_type(tmp_path: Path, kind: str, offset: int) -> None:
    """Of any type and at any offset, values outside equal those inside; so do slices, and the bytes that are written."""
    number = getattr(TensorProto, kind)
    dtype = helper.tensor_dtype_to_np_dtype(number)
    array = (np.random.default_rng(0).integers(0, 7, (45, 67)) % (2 if kind == "BOOL" else 7)).astype(dtype)
    tensor = numpy_helper.from_array(array, "w")
    assert tensor.data_type == number
    (tmp_path / "w.bin").write_bytes(bytes(offset) + tensor.raw_data)
    outside = TensorProto(name="w", data_type=number, dims=array.shape, data_location=TensorProto.EXTERNAL)
    outside.external_data.add(key="location", value="w.bin")
    outside.external_data.add(key="offset", value=str(offset))
    model = ModelProto()
    model.graph.initializer.append(outside)
    external.attach(model, tmp_path / "m.onnx")
    (found,) = model.graph.initializer
    assert external.is_outside(found)
    np.testing.assert_array_equal(external.array(found), array)
    assert external.array(found).dtype == array.dtype
    assert b"".join(external.contents(found)) == tensor.raw_data
    cut = external.sliced(external.sliced(found, {0: [1, 4, 40], 1: list(range(20))}, "w"), {1: [0, 2, 19]}, "cut")
    want = array[[1, 4, 40]][:, [0, 2, 19]]
    assert tuple(cut.dims) == want.shape
    np.testing.assert_array_equal(external.array(cut), want)
    assert b"".join(external.contents(cut)) == numpy_helper.from_array(want).raw_data


def test_bfloat16_runs_in_float32(tmp_path: Path) -> None:
    """External bfloat16 weights are widened piece by piece for onnxruntime, and written back as they were."""
    model = architectures.ALL["layer_norm_mlp"]()
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            tensor.CopyFrom(
                numpy_helper.from_array(numpy_helper.to_array(tensor).astype(ml_dtypes.bfloat16), tensor.name)
            )
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        value.type.tensor_type.elem_type = TensorProto.BFLOAT16
    source = spread(model, tmp_path / "in.onnx")
    result = onnxprune.prune(source, target_mac=0.7)
    assert result.report.proof is not None
    assert result.report.proof.ok
    onnxprune.save(result.model, tmp_path / "out.onnx")
    one = onnxprune.prune(model, target_mac=0.7)
    onnxprune.save(one.model, tmp_path / "one.onnx")
    same(values(tmp_path / "out.onnx"), values(tmp_path / "one.onnx"))


# -- size --------------------------------------------------------------------------------------------------------------


def test_large_model_is_never_run_whole(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond the bound, no session holds the whole model; segments are proved, and the report says what was left out."""
    sizes = list[int]()
    opened = runtime._started

    def spied(model: Any, *rest: Any) -> Any:
        if isinstance(model, str):
            model = onnx.load(model)
        elif isinstance(model, bytes):
            model = ModelProto.FromString(model)
        sizes.append(len(model.graph.node))
        return opened(model, *rest)

    monkeypatch.setattr(runtime, "WHOLE_BYTES", 1000)
    monkeypatch.setattr(runtime, "_started", spied)
    out, plan = tmp_path / "out.onnx", tmp_path / "plan.json"
    ok(source, out, "--target-mac", "0.6", "--json", tmp_path / "r.json", "-q", "--plan-out", plan)
    assert 0 < max(sizes) < len(inline().graph.node)
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["proof"]["ok"]
    assert report["latency"] is None
    assert any("too large to run in one piece" in note for note in report["notes"])
    assert any("latency was not measured" in note for note in report["notes"])
    ok("verify", source, out, "--plan", plan, "--json", tmp_path / "v.json", "-q")
    assert any("too large to run in one piece" in n for n in json.loads((tmp_path / "v.json").read_text())["notes"])


IN_PIECES = """
import pathlib, re, sys
sys.path.insert(0, sys.argv[2])
from big_model import build
import onnxprune
from onnxprune import runtime
runtime.WHOLE_BYTES = 0
path = pathlib.Path(sys.argv[1]) / "in.onnx"
build(path, float(sys.argv[3]), hidden=512, vocabulary=8000, n_files=3)
result = onnxprune.prune(path, target_mac=0.6)
assert result.report.proof.ok
onnxprune.save(result.model, path.with_name("out.onnx"))
onnxprune.verify(path, path.with_name("out.onnx"), result.plan)
print(int(re.search(r"VmHWM:\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text())[1]) * 1024)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """Pruning, writing and verifying 600 MB of weights in pieces takes less than 200 MB more than 20 MB of them."""
    peaks = []
    for size in ("0.02", "0.6"):
        folder = tmp_path / size
        folder.mkdir()
        command = [sys.executable, "-c", IN_PIECES, folder, ROOT / "tools", size]
        peaks.append(int(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    assert peaks[1] - peaks[0] < 200e6
