"""A training checkpoint is sliced as the plan says, as a whole or not at all, and nothing else in it changes."""

from __future__ import annotations

import json
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from schemas import assert_report

import onnxprune
from commands import ok, run
from onnxprune import checkpoint_files
from onnxprune.errors import FileError, ModelError, UsageError
from onnxprune.plan import Plan

safetensors_numpy = pytest.importorskip("safetensors.numpy")
safetensors = pytest.importorskip("safetensors")

RNG = np.random.default_rng(3)
ARRAYS = {
    "conv.weight": RNG.standard_normal((4, 3, 3, 3)).astype(np.float32),
    "conv.bias": RNG.standard_normal(4).astype(np.float32),
    "fc.weight": RNG.standard_normal((5, 4)).astype(ml_dtypes.bfloat16),
    "steps": np.array(7, np.int64),
    "empty": np.zeros((0, 3), np.float16),
}
SLICES = {"conv.weight": {0: [0, 2, 3]}, "conv.bias": {0: [0, 2, 3]}, "fc.weight": {1: [0, 2, 3]}}
METADATA = {"format": "pt", "made by": "a test", "text": 'é "quoted"', "x": "1", "y": "2"}


def plan_of(initializers: dict[str, Any]) -> Plan:
    """Return a plan of slices alone."""
    return Plan(initializers, ())


def saved(path: Path, arrays: dict[str, np.ndarray], metadata: dict[str, str] | None = None) -> Path:
    """Write a safetensors file."""
    path.write_bytes(safetensors_numpy.save(arrays, metadata))
    return path


def entries(path: Path) -> dict[str, dict[str, Any]]:
    """Data type, shape and bytes of every tensor of a safetensors file, in its order."""
    data = path.read_bytes()
    found = dict(safetensors.deserialize(data))
    return {name: found[name] for name in header(data) if name != "__metadata__"}


def header(data: bytes) -> dict[str, Any]:
    """Return the header of a safetensors file."""
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Write a small checkpoint and return its path."""
    return saved(tmp_path / "in.safetensors", ARRAYS, METADATA)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Return a path for the result."""
    return tmp_path / "out.safetensors"


# -- safetensors -------------------------------------------------------------------------------------------------------


def test_names_of_the_plan_are_sliced_and_others_copied(source: Path, out: Path) -> None:
    """Parameters with the plan's names keep what it says, to the bit in any data type; others keep every byte."""
    summary = onnxprune.apply_checkpoint(plan_of(SLICES), source, out)
    before, after = entries(source), entries(out)
    assert list(after) == list(before)
    assert {name: entry["dtype"] for name, entry in after.items()} == {n: e["dtype"] for n, e in before.items()}
    expected = {
        "conv.weight": ARRAYS["conv.weight"][[0, 2, 3]],
        "conv.bias": ARRAYS["conv.bias"][[0, 2, 3]],
        "fc.weight": ARRAYS["fc.weight"][:, [0, 2, 3]],
    }
    for name, array in ARRAYS.items():
        wanted = expected.get(name, array)
        assert after[name]["shape"] == list(wanted.shape)
        assert bytes(after[name]["data"]) == wanted.tobytes()
    assert {p.name: (p.before, p.after) for p in summary.sliced}["fc.weight"] == ((5, 4), (5, 3))
    assert set(summary.copied) == {"steps", "empty"}
    assert summary.mapped == ()


def test_metadata_stays(source: Path, out: Path) -> None:
    """Texts in the header of a safetensors file are kept, in order, so that the same input gives the same bytes."""
    onnxprune.apply_checkpoint(plan_of(SLICES), source, out)
    with safetensors.safe_open(out, framework="np") as file:
        assert file.metadata() == METADATA
    given, written = (header(path.read_bytes())["__metadata__"] for path in (source, out))
    assert list(written.items()) == list(given.items())


@pytest.mark.parametrize("kind", ["bfloat16", "float8_e4m3fn", "float8_e5m2"])
def test_small_floats_keep_every_bit(kind: str, tmp_path: Path, out: Path) -> None:
    """Every bit pattern survives, NaNs and subnormal numbers among them."""
    dtype = np.dtype(getattr(ml_dtypes, kind))
    bits = np.arange(256, dtype=np.uint8).reshape(-1, dtype.itemsize)
    array = np.ascontiguousarray(bits).view(dtype)
    source = saved(tmp_path / "in.safetensors", {"w": array})
    onnxprune.apply_checkpoint(plan_of({"w": {0: list(range(0, len(array), 2))}}), source, out)
    assert bytes(entries(out)["w"]["data"]) == array[::2].tobytes()


def test_torch_is_not_needed_for_safetensors(source: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where torch is missing, safetensors files are sliced all the same, and torch files are refused with the remedy."""
    monkeypatch.setitem(sys.modules, "torch", None)
    onnxprune.apply_checkpoint(plan_of(SLICES), source, out)
    with pytest.raises(UsageError, match=r"pip install 'onnxprune\[train\]'"):
        onnxprune.apply_checkpoint(plan_of(SLICES), source, out.with_suffix(".pt"))


def test_safetensors_missing(source: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where safetensors is missing, the error says what to install."""
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(UsageError, match=r"needs safetensors: pip install 'onnxprune\[checkpoint\]'"):
        onnxprune.apply_checkpoint(plan_of(SLICES), source, out)


def test_grouped_convolution(tmp_path: Path, out: Path) -> None:
    """Rows of a grouped convolution keep other inputs per block of outputs, which is sliced itself; transposed as well."""
    weight = RNG.standard_normal((4, 3)).astype(np.float32)
    source = saved(tmp_path / "in.safetensors", {"w": weight, "t": np.ascontiguousarray(weight.T)})
    slices = {0: [0, 3], 1: [[0, 1], [1, 2]]}
    onnxprune.apply_checkpoint(
        plan_of({"w": slices, "other": slices}), source, out, mapping={"other": {"name": "t", "axes": [1, 0]}}
    )
    expected = np.stack([weight[0, [0, 1]], weight[3, [1, 2]]])
    loaded = safetensors_numpy.load(out.read_bytes())
    np.testing.assert_array_equal(loaded["w"], expected)
    np.testing.assert_array_equal(loaded["t"], expected.T)


# -- maps --------------------------------------------------------------------------------------------------------------


def test_map_forms(source: Path, out: Path, tmp_path: Path) -> None:
    """A name, a list, an object with axes, and null; entries for tensors that the plan leaves whole do no harm."""
    mapping = {
        "a": "conv.weight",
        "b": ["conv.bias"],
        "c": {"name": "fc.weight", "axes": [1, 0]},
        "table": None,
        "whole": "nobody",
    }
    path = tmp_path / "map.json"
    path.write_text(json.dumps(mapping))
    plan = plan_of({"a": {0: [1]}, "b": {0: [1]}, "c": {0: [1], 1: [4, 2]}, "table": {0: [0]}})
    summary = onnxprune.apply_checkpoint(plan, source, out, mapping=path)
    assert set(summary.mapped) == {"conv.weight", "conv.bias", "fc.weight"}
    assert bytes(entries(out)["fc.weight"]["data"]) == ARRAYS["fc.weight"][[4, 2]][:, [1]].tobytes()


@pytest.mark.parametrize(
    ("axes", "shape"), [([0], (4,)), ([None, 0], (1, 4)), ([0, None, None], (4, 1, 1))], ids=["fewer", "more", "scale"]
)
def test_axes_of_another_rank(axes: list[int | None], shape: tuple[int, ...], tmp_path: Path, out: Path) -> None:
    """A parameter may have further axes (null) that the plan's tensor does not have, and lack some that are not sliced."""
    array = np.arange(4, dtype=np.float32).reshape(shape)
    source = saved(tmp_path / "in.safetensors", {"gamma": array})
    onnxprune.apply_checkpoint(plan_of({"x": {0: [1, 3]}}), source, out, mapping={"x": {"name": "gamma", "axes": axes}})
    assert safetensors_numpy.load(out.read_bytes())["gamma"].ravel().tolist() == [1, 3]


def test_unknown_tensors_are_all_listed(source: Path, out: Path) -> None:
    """Tensors that are no parameters, and a shared vector with its reader's slice, are refused in one message."""
    plan = plan_of({**SLICES, "onnx::Conv_1": {0: [0]}, "onnx::Conv_2": {0: [0]}, "conv.bias@/y": {0: [1]}})
    with pytest.raises(ModelError) as caught:
        onnxprune.apply_checkpoint(plan, source, out)
    assert "4 tensors" in str(caught.value)
    for name in ("onnx::Conv_1", "onnx::Conv_2", "conv.bias,", "conv.bias@/y"):
        assert name in str(caught.value)
    assert not out.exists()


def test_names_of_many_marks_take_no_memory(source: Path, out: Path) -> None:
    """Every @ may be where a reader's name begins, and yet a name of very many is refused as any other."""
    tracemalloc.start()
    with pytest.raises(ModelError, match="1 tensors of the plan are no parameters"):
        onnxprune.apply_checkpoint(plan_of({"@" * 5000: {0: [0]}}), source, out)
    assert tracemalloc.get_traced_memory()[1] < 5 << 20
    tracemalloc.stop()


BAD_MAPS: dict[str, tuple[Any, str]] = {
    "missing": ({"conv.weight": ["nowhere", "?"]}, r"nowhere \(for conv.weight\), \? \(for conv.weight\)"),
    "number": ({"conv.weight": 3}, "conv.weight must be"),
    "stranger": ({"conv.weight": {"name": "x", "axis": [0]}}, "conv.weight must be"),
    "nested": ({"conv.weight": [["x"]]}, "conv.weight must be"),
    "axes_text": ({"conv.weight": {"name": "conv.weight", "axes": "01"}}, "different numbers"),
    "axes_twice": ({"conv.weight": {"name": "conv.weight", "axes": [0, 0]}}, "different numbers"),
    "axis_missing": ({"conv.weight": {"name": "conv.weight", "axes": [1, 2, 3]}}, "none is axis 0"),
}


@pytest.mark.parametrize("name", BAD_MAPS)
def test_bad_map(name: str, source: Path, out: Path) -> None:
    """A map of another form, or to parameters that are not there, is refused in words."""
    mapping, message = BAD_MAPS[name]
    with pytest.raises(UsageError, match=message):
        onnxprune.apply_checkpoint(plan_of(SLICES), source, out, mapping=mapping)
    assert not out.exists()


@pytest.mark.parametrize(("text", "error"), [("[]", UsageError), ("{", UsageError), (None, FileError)])
def test_bad_map_file(text: str | None, error: type[Exception], source: Path, out: Path, tmp_path: Path) -> None:
    """A map that is no JSON object, or cannot be read, is refused."""
    path = tmp_path / "map.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(error, match=r"map\.json"):
        onnxprune.apply_checkpoint(plan_of(SLICES), source, out, mapping=path)


def test_two_slices_of_one_parameter(source: Path, out: Path) -> None:
    """A parameter that two tensors slice differently is refused; the same slice twice is one slice."""
    plan = plan_of({**SLICES, "shared": {0: [0, 1, 2]}})
    with pytest.raises(ModelError, match=r"conv.bias gets two different slices, of conv.bias and shared"):
        onnxprune.apply_checkpoint(plan, source, out, mapping={"shared": "conv.bias"})
    plan = plan_of({**SLICES, "shared": SLICES["conv.bias"]})
    summary = onnxprune.apply_checkpoint(plan, source, out, mapping={"shared": "conv.bias"})
    assert {p.name: p.tensors for p in summary.sliced}["conv.bias"] == ("conv.bias", "shared")


@pytest.mark.parametrize(
    "slices",
    [{0: [4]}, {0: [-1]}, {0: [0, 0]}, {0: []}, {1: [0]}, {-1: [0]}, {0: [[0], [1], [2]]}],
    ids=["large", "negative", "twice", "nothing", "axis", "negative_axis", "rows"],
)
def test_shape_does_not_fit(slices: dict[int, list], source: Path, out: Path) -> None:
    """Indices and axes that a parameter does not have are refused, with its name and shape."""
    with pytest.raises(ModelError, match=r"conv.bias of shape \[4\] \(the plan's conv.bias keeps"):
        onnxprune.apply_checkpoint(plan_of({"conv.bias": slices}), source, out)
    assert not out.exists()


def test_batch_normalization_stays_whole(tmp_path: Path, out: Path) -> None:
    """Slicing one vector of a batch normalization alone is refused; slicing none of any is told."""
    vectors = {f"bn.{last}": np.ones(4, np.float32) for last in ("weight", "bias", "running_mean", "running_var")}
    source = saved(tmp_path / "in.safetensors", {**ARRAYS, **vectors})
    with pytest.raises(ModelError, match=r"the vectors of bn would not stay equally long"):
        onnxprune.apply_checkpoint(plan_of({**SLICES, "bn.weight": {0: [0]}}), source, out)
    (note,) = onnxprune.apply_checkpoint(plan_of(SLICES), source, out).notes
    assert "batch normalizations that stay whole: bn;" in note


def test_bias_unlike_its_weight_is_told(source: Path, out: Path) -> None:
    """A bias that stays whole beside a weight that lost outputs is noted: exporters share equal vectors."""
    (note,) = onnxprune.apply_checkpoint(plan_of({"conv.weight": {0: [0]}}), source, out).notes
    assert note.endswith("check them: conv.bias")


# -- files and the command ---------------------------------------------------------------------------------------------


@pytest.fixture
def plan_path(tmp_path: Path) -> Path:
    """Write the plan and return its path."""
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(plan_of(SLICES).to_json()))
    return path


def test_command(source: Path, out: Path, plan_path: Path, tmp_path: Path) -> None:
    """The command says what was sliced and copied and writes a report; -v lists every parameter."""
    report = tmp_path / "r.json"
    text = ok("apply-checkpoint", plan_path, source, out, "--json", report).stdout
    assert text.splitlines() == [
        "sliced   3 parameters, 0 of them by the map",
        "copied   2 parameters as they are",
        f"written  {out}",
    ]
    data = json.loads(report.read_text())
    assert_report("checkpoint", data)
    assert data["sliced"]["fc.weight"] == {"before": [5, 4], "after": [5, 3], "tensors": ["fc.weight"]}
    assert data["output"]["sha256"] == checkpoint_files.onnx_io.sha256(out)
    assert data["copied"] == [name for name in entries(source) if name in ("steps", "empty")]
    again = ok("apply-checkpoint", plan_path, source, out, "--force", "-v").stdout
    assert "fc.weight  5x4 -> 5x3" in again
    assert ok("apply-checkpoint", plan_path, source, out, "--force", "-q").output == ""


@pytest.mark.parametrize("force", [(), ("--force",)], ids=["plain", "force"])
def test_inputs_are_never_overwritten(source: Path, plan_path: Path, force: tuple[str, ...]) -> None:
    """OUT may be neither IN nor the plan, by whatever name: exit code 2, and all bytes stay."""
    before = source.read_bytes()
    link = source.with_name("link.safetensors")
    link.symlink_to(source)
    for target in (source, link, plan_path):
        assert run("apply-checkpoint", plan_path, source, target, *force).exit_code == 2
    with pytest.raises(UsageError):
        onnxprune.apply_checkpoint(plan_path, source, link, force=True)
    assert source.read_bytes() == before


def test_existing_output(source: Path, out: Path, plan_path: Path) -> None:
    """An existing OUT is exit code 2 and stays; --force replaces it."""
    out.write_text("precious")
    result = run("apply-checkpoint", plan_path, source, out)
    assert result.exit_code == 2
    assert "--force" in result.stderr
    assert out.read_text() == "precious"
    ok("apply-checkpoint", plan_path, source, out, "--force")
    assert len(entries(out)) == len(ARRAYS)


@pytest.mark.parametrize(
    ("name", "content", "code"),
    [("in.onnx", b"x", 2), ("in.safetensors", b"x", 3), ("in.safetensors", b"", 3), ("in.safetensors", None, 7)],
    ids=["suffix", "cut", "empty", "missing"],
)
def test_bad_input(name: str, content: bytes | None, code: int, out: Path, plan_path: Path, tmp_path: Path) -> None:
    """Files that are no checkpoints end with the contract's exit codes, one line, and no output."""
    if content is not None:
        (tmp_path / name).write_bytes(content)
    result = run("apply-checkpoint", plan_path, tmp_path / name, out)
    assert result.exit_code == code
    assert 1 <= len(result.stderr.splitlines()) <= 3
    assert not out.exists()


def test_disk_full(source: Path, out: Path, plan_path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """When OUT cannot be written to its end, exit code 7: neither half a file nor a temporary one stays, nor OUT goes."""
    out.write_text("precious")
    names = sorted(tmp_path.iterdir())

    def full(handle: int, *_: Any, **__: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint_files.onnx_io.os, "fdopen", full)
    result = run("apply-checkpoint", plan_path, source, out, "--force")
    assert result.exit_code == 7
    assert "No space left" in result.stderr
    assert out.read_text() == "precious"
    assert sorted(tmp_path.iterdir()) == names
