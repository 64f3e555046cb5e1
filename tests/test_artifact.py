"""The training artifact: what the folder holds, that it is true of both models, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto, numpy_helper
from schemas import assert_report

import architectures
import onnxprune
import oracle
from commands import ok, run
from graphs import Tiny
from onnxprune import Artifact, export_artifact, onnx_io, read_artifact, runtime
from onnxprune.protos import named_tensors

FIXTURES = Path(__file__).parents[1] / "fixtures"
DIGITS = FIXTURES / "digits" / "digits.onnx"
DENOISE = FIXTURES / "denoise" / "denoise.onnx"
FEW = (
    "edsr",
    "resnet_a",
    "resnext",
    "mobilenet_v2",
    "densenet",
    "transposed_generator",
    "layer_norm_mlp",
    "unet_resize",
)
SELECTED = pytest.mark.parametrize("name", FEW)


def export(folder: Path, name: str, share: float = 0.6, **chosen: Any) -> tuple[ModelProto, onnxprune.Result, Artifact]:
    """Prune an architecture and export its artifact."""
    model = architectures.ALL[name]()
    result = onnxprune.prune(model, target_mac=share, proof=False)
    return model, result, export_artifact(model, result.model, folder / "art", result.plan, **chosen)


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """Write a pruned model and its plan to a folder."""
    ok(DIGITS, tmp_path / "pruned.onnx", "--target-mac", "0.6", "--no-latency", "--plan-out", tmp_path / "plan.json")
    return tmp_path / "pruned.onnx", tmp_path / "plan.json"


# -- what is in it -----------------------------------------------------------------------------------------------------


def test_files_are_copies(files: tuple[Path, Path], tmp_path: Path) -> None:
    """Student and teacher are the given files byte for byte, the plan is the given plan, and nothing else lies there."""
    pruned, plan = files
    made = export_artifact(DIGITS, pruned, tmp_path / "art", plan)
    assert made.student.read_bytes() == pruned.read_bytes()
    assert made.teacher.read_bytes() == DIGITS.read_bytes()
    assert json.loads(made.plan.read_text()) == json.loads(plan.read_text())
    names = {path.name for path in (tmp_path / "art").iterdir()}
    assert names == {"student.onnx", "teacher.onnx", "plan.json", "manifest.json", "README.md"}
    assert {path.name for path in tmp_path.iterdir()} == {"art", "pruned.onnx", "plan.json"}
    assert "onnxprune finetune" in (tmp_path / "art" / "README.md").read_text()


def test_reading_gives_what_was_written(tmp_path: Path) -> None:
    """``read_artifact`` gives the same manifest, and typed views of it."""
    made = export(tmp_path, "resnext", loss="cross-entropy", metric="top1")[2]
    found = read_artifact(tmp_path / "art")
    assert found.manifest == json.loads(json.dumps(made.manifest))
    assert (found.student, found.teacher, found.plan) == (made.student, made.teacher, made.plan)
    assert (found.loss, found.metric) == ("cross-entropy", "top1")
    assert found.trainable == tuple(entry["name"] for entry in found.manifest["trainable"])
    assert [group.id for group in found.groups] == [g["id"] for g in found.manifest["regularizer"]["groups"]]
    assert {m.channels.ndim for group in found.groups for m in group.members} == {1, 2}
    assert all(feature.kept is None or feature.kept.dtype == np.int64 for feature in found.features)


def test_manifest_has_the_documented_form(files: tuple[Path, Path], tmp_path: Path) -> None:
    """Schema, kind, signature, every constant once, cost of both models, and default suggestions."""
    manifest = export_artifact(DIGITS, files[0], tmp_path / "art", files[1]).manifest
    assert list(manifest)[:4] == ["schema", "kind", "onnxprune", "files"]
    assert (manifest["schema"], manifest["kind"]) == (1, "onnxprune-artifact")
    assert (manifest["loss"], manifest["metric"], manifest["data"]) == ({"output": "distillation"}, None, None)
    assert manifest["inputs"] == [{"name": "image", "shape": ["batch", 1, 8, 8], "dtype": "float32"}]
    assert [entry["name"] for entry in manifest["outputs"]] == ["scores"]
    student = onnx.load(files[0])
    listed = [entry["name"] for entry in (*manifest["trainable"], *manifest["constant"])]
    floating = {t.name: t for t in named_tensors(student.graph) if t.data_type == onnx.TensorProto.FLOAT}
    assert sorted(listed) == sorted(floating)
    assert all(entry["shape"] == list(floating[entry["name"]].dims) for entry in manifest["trainable"])
    assert all(entry["reason"] for entry in manifest["constant"])
    costs = [onnxprune.inspect(model).before for model in (DIGITS, files[0])]
    for when, cost in zip(("before", "after"), costs, strict=True):
        assert {kind: manifest["cost"][when][kind] for kind in cost} == cost


@SELECTED
def test_group_members_shrink_together(name: str, tmp_path: Path) -> None:
    """Every channel of a group stands on every axis listed; the tensors are trainable; weights average to one."""
    _, result, made = export(tmp_path, name)
    shapes = {t.name: tuple(t.dims) for t in named_tensors(result.model.graph)}
    assert made.groups
    for group in made.groups:
        for member in group.members:
            assert member.tensor in made.trainable
            assert member.channels.shape[-1] == shapes[member.tensor][member.axis]
            assert member.channels.min() >= -1
        carried = np.concatenate([member.channels.ravel() for member in group.members])
        assert set(range(group.size)) <= set(carried.tolist()) <= set(range(-1, group.size))
    total = sum(group.size for group in made.groups)
    assert sum(group.weight * group.size for group in made.groups) / total == pytest.approx(1)


def test_weight_is_the_cost_of_one_channel(tmp_path: Path) -> None:
    """A group's weight is in proportion to the MAC that removing one of its channels saves."""
    _, result, made = export(tmp_path, "resnet_b_no_norm")
    coupling = oracle.couple(onnx_io.read(result.model))
    before = onnxprune.inspect(result.model).before["mac"]
    saved = []
    for group in made.groups:
        classes = next(g.classes for g in coupling.groups if g.id == group.id)
        keep = np.ones(coupling.n_classes, bool)
        keep[classes[0]] = False
        plan = onnxprune.plan.make_plan(coupling, keep)
        saved.append(before - onnxprune.apply(result.model, plan, proof=False).report.after["mac"])
    ratio = np.array(saved) / [group.weight for group in made.groups]
    assert ratio == pytest.approx(ratio[0])


@SELECTED
def test_features_are_the_teachers_at_kept_channels(name: str, tmp_path: Path) -> None:
    """Every feature has the shape of the teacher's at ``kept``; where nothing before it shrank, the values, too."""
    model, result, made = export(tmp_path, name)
    outputs = []
    for graph in (model, result.model):
        probe = ModelProto.FromString(graph.SerializeToString())
        probe.graph.output.extend(onnx.ValueInfoProto(name=feature.tensor) for feature in made.features)
        session = runtime.Session(probe.SerializeToString())
        feeds = runtime.random_feeds(session.inputs, onnx_io.read(model).input_shapes)
        outputs.append(session.run(feeds, [feature.tensor for feature in made.features]))
    assert made.features
    assert {value.name for value in model.graph.output}.isdisjoint(feature.tensor for feature in made.features)
    same = 0
    for feature, teacher, student in zip(made.features, *outputs, strict=True):
        expected = teacher if feature.kept is None else teacher.take(feature.kept, feature.axis)
        assert student.shape == expected.shape
        same += np.allclose(student, expected, atol=1e-5)
    assert same
    assert any(feature.kept is not None for feature in made.features)


# -- without a plan ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", architectures.ALL)
def test_plan_is_recovered(name: str, tmp_path: Path) -> None:
    """Where weights are unchanged, the plan is found from the two models alone, exactly."""
    model = architectures.ALL[name]()
    result = onnxprune.prune(model, target_mac=0.6, proof=False)
    made = export_artifact(model, result.model, tmp_path / "art", proof=False)
    found = onnxprune.Plan.from_json(made.plan.read_text())
    assert found.initializers == result.plan.initializers
    assert found.groups == result.plan.groups


def test_one_exact_member_tells_of_its_group(tmp_path: Path) -> None:
    """Changed weights do not matter as long as one tensor of each group is what it was: here the biases."""
    result = onnxprune.prune(DENOISE, target_mac=0.6)
    for tensor in result.model.graph.initializer:
        value = numpy_helper.to_array(tensor)
        if value.ndim > 1:
            tensor.CopyFrom(numpy_helper.from_array(value * np.float32(1.5), tensor.name))
    made = export_artifact(DENOISE, result.model, tmp_path / "art")
    assert onnxprune.Plan.from_json(made.plan.read_text()).initializers == result.plan.initializers


def test_same_shapes_mean_that_all_stays(tmp_path: Path) -> None:
    """An unpruned, possibly trained student has a plan that keeps everything, and features without indices."""
    model = onnx.load(DIGITS)
    for tensor in model.graph.initializer:
        value = numpy_helper.to_array(tensor)
        if value.dtype == np.float32:
            tensor.CopyFrom(numpy_helper.from_array(value * np.float32(1.5), tensor.name))
    made = export_artifact(DIGITS, model, tmp_path / "art")
    plan = onnxprune.Plan.from_json(made.plan.read_text())
    assert plan.initializers == {}
    assert all(all(keep) for _, _, keep in plan.groups)
    assert made.features
    assert all(feature.kept is None for feature in made.features)


def _trained(model: ModelProto) -> None:
    for tensor in model.graph.initializer:
        value = numpy_helper.to_array(tensor)
        if value.dtype == np.float32:
            tensor.CopyFrom(numpy_helper.from_array(value + np.float32(0.5), tensor.name))


def _constant(model: ModelProto) -> None:
    for tensor in model.graph.initializer:
        value = numpy_helper.to_array(tensor)
        if value.dtype == np.float32:
            tensor.CopyFrom(numpy_helper.from_array(np.ones_like(value), tensor.name))


@pytest.mark.parametrize("change", [_trained, _constant], ids=["changed", "alike"])
def test_what_cannot_be_told_needs_a_plan(change: Callable[[ModelProto], None], tmp_path: Path) -> None:
    """Weights that have all changed, and channels that are all alike, tell nothing: the error asks for the plan."""
    model = onnx.load(DENOISE)
    if change is _constant:
        _constant(model)
    result = onnxprune.prune(model, target_mac=0.6, proof=False)
    if change is _trained:
        _trained(result.model)
    with pytest.raises(onnxprune.UsageError, match="--plan"):
        export_artifact(model, result.model, tmp_path / "art", proof=False)
    assert not (tmp_path / "art").exists()
    export_artifact(model, result.model, tmp_path / "art", result.plan, proof=False)


def test_compensated_model_is_recovered_where_some_weights_are_unchanged(tmp_path: Path) -> None:
    """Compensation changes consumers; the normalisations behind the producers still tell what was kept."""
    result = onnxprune.prune(DIGITS, target_mac=0.6, calib=FIXTURES / "digits" / "digits_calib.npz")
    assert result.report.weights == "changed"
    made = export_artifact(DIGITS, result.model, tmp_path / "art")
    assert onnxprune.Plan.from_json(made.plan.read_text()).initializers == result.plan.initializers


def test_added_biases_need_the_plan(tmp_path: Path) -> None:
    """A model to which compensation added biases goes with its plan, and those biases are trainable."""
    t = Tiny()
    y = t.node("Relu", t.node("MatMul", t.input(4, 8), t.random(8, 8, name="a.w"), name="a"))
    model = t.build(t.node("MatMul", y, t.random(8, 3, name="b.w"), name="b"))
    rng = np.random.default_rng(0)
    feeds = [{"x": 1 + rng.standard_normal((4, 8)).astype(np.float32)} for _ in range(64)]
    result = onnxprune.prune(model, target_mac=0.6, calib=feeds)
    assert result.plan.added
    with pytest.raises(onnxprune.UsageError, match="--plan"):
        export_artifact(model, result.model, tmp_path / "art")
    made = export_artifact(model, result.model, tmp_path / "art", result.plan)
    assert set(result.plan.added) <= set(made.trainable)


# -- refusals ----------------------------------------------------------------------------------------------------------


def test_wrong_model_is_not_exported(files: tuple[Path, Path], tmp_path: Path) -> None:
    """A model that is not what the plan makes of the original ends with the exit code of a failed proof."""
    ok(DIGITS, tmp_path / "other.onnx", "--target-mac", "0.5", "--no-latency")
    result = run("artifact", DIGITS, tmp_path / "other.onnx", tmp_path / "art", "--plan", files[1])
    assert result.exit_code == 5
    assert not (tmp_path / "art").exists()
    assert run("artifact", DIGITS, DENOISE, tmp_path / "art").exit_code == 2


def test_existing_folder_is_kept(files: tuple[Path, Path], tmp_path: Path) -> None:
    """Without --force nothing is replaced; with it the artifact is, and other files in the folder stay."""
    arguments = ("artifact", DIGITS, files[0], tmp_path / "art", "--plan", files[1])
    ok(*arguments)
    result = run(*arguments)
    assert result.exit_code == 2
    assert "--force" in result.output
    mine = tmp_path / "art" / "trained.onnx"
    mine.write_text("mine")
    (tmp_path / "art" / "student.onnx").write_text("old")
    ok(*arguments, "--force")
    assert mine.read_text() == "mine"
    read_artifact(tmp_path / "art")


def test_folder_without_artifact_is_never_written_to(files: tuple[Path, Path], tmp_path: Path) -> None:
    """A folder with other files is refused even with --force, as are a file and a folder in nowhere."""
    (tmp_path / "art").mkdir()
    (tmp_path / "art" / "thesis.tex").write_text("mine")
    for target, code in ((tmp_path / "art", 2), (files[0], 2), (tmp_path / "nowhere" / "art", 7)):
        assert run("artifact", DIGITS, files[0], target, "--force").exit_code == code
    assert [path.name for path in (tmp_path / "art").iterdir()] == ["thesis.tex"]


def _edit(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], Any]:
    def apply(folder: Path) -> None:
        manifest = json.loads((folder / "manifest.json").read_text())
        change(manifest)
        (folder / "manifest.json").write_text(json.dumps(manifest))

    return apply


DAMAGE: dict[str, tuple[Callable[[Path], Any], type[Exception], str]] = {
    "no_folder": (shutil.rmtree, onnxprune.FileError, "no such folder"),
    "no_manifest": (lambda folder: (folder / "manifest.json").unlink(), onnxprune.ModelError, "not a training artifact"),
    "no_json": (lambda folder: (folder / "manifest.json").write_text("{"), onnxprune.ModelError, "not a manifest"),
    "list": (lambda folder: (folder / "manifest.json").write_text("[]"), onnxprune.ModelError, "not a manifest"),
    "kind": (_edit(lambda m: m.update(kind="other")), onnxprune.ModelError, "is not the manifest"),
    "schema": (_edit(lambda m: m.update(schema=2)), onnxprune.ModelError, "schema 2 is unknown"),
    "no_files": (_edit(lambda m: m.pop("files")), onnxprune.ModelError, "not a manifest"),
    "outside": (_edit(lambda m: m["files"]["plan"].update(path="../plan.json")), onnxprune.ModelError, "outside"),
    "nul": (_edit(lambda m: m["files"]["plan"].update(path="\0")), onnxprune.ModelError, "not a manifest"),
    "surrogate": (_edit(lambda m: m["files"]["plan"].update(path="\ud800")), onnxprune.ModelError, "not a manifest"),
    "no_groups": (_edit(lambda m: m.pop("regularizer")), onnxprune.ModelError, "not a manifest"),
    "channels": (
        _edit(lambda m: m["regularizer"]["groups"][0]["members"][0].update(channels=["a"])),
        onnxprune.ModelError,
        "not a manifest",
    ),
    "student_changed": (
        lambda folder: (folder / "student.onnx").write_bytes(b"other"), onnxprune.ModelError, "student.onnx",
    ),
    "teacher_gone": (lambda folder: (folder / "teacher.onnx").unlink(), onnxprune.FileError, "teacher.onnx"),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "kind", "text"), DAMAGE.values(), ids=DAMAGE)
def test_damaged_artifact_is_refused(
    damage: Callable[[Path], Any], kind: type[Exception], text: str, tmp_path: Path
) -> None:
    """What is no artifact, or no longer the one that was written, is an error that names the file."""
    export(tmp_path, "edsr", proof=False)
    damage(tmp_path / "art")
    with pytest.raises(kind, match=text):
        read_artifact(tmp_path / "art")


# -- files and command line ----------------------------------------------------------------------------------------------


def test_external_data_comes_along(tmp_path: Path) -> None:
    """A teacher whose weights lie in a file of their own keeps it, and a change of that file is noticed."""
    (tmp_path / "given").mkdir()
    model, path = onnx.load(DIGITS), tmp_path / "given" / "model.onnx"
    onnx.save(model, path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    result = onnxprune.prune(path, target_mac=0.6)
    made = export_artifact(path, result.model, tmp_path / "art", result.plan)
    assert (tmp_path / "art" / "weights.bin").read_bytes() == (tmp_path / "given" / "weights.bin").read_bytes()
    onnx_io.load(made.teacher)
    read_artifact(tmp_path / "art")
    (tmp_path / "art" / "weights.bin").write_bytes(b"other")
    with pytest.raises(onnxprune.ModelError, match=r"weights\.bin"):
        read_artifact(tmp_path / "art")


def test_external_files_of_one_name_are_refused(tmp_path: Path) -> None:
    """Two models that keep different data under one name do not fit into one folder."""
    pruned = onnxprune.prune(DIGITS, target_mac=0.6)
    for name, model in (("a", onnx.load(DIGITS)), ("b", pruned.model)):
        (tmp_path / name).mkdir()
        onnx.save(model, tmp_path / name / "m.onnx", save_as_external_data=True, location="w.bin", size_threshold=0)
    with pytest.raises(onnxprune.UsageError, match=r"w\.bin"):
        export_artifact(tmp_path / "a" / "m.onnx", tmp_path / "b" / "m.onnx", tmp_path / "art", pruned.plan)
    assert not (tmp_path / "art").exists()


def test_summary_and_json(files: tuple[Path, Path], tmp_path: Path) -> None:
    """The text says what was exported and where; --json - prints the manifest alone."""
    arguments = ("artifact", DIGITS, files[0], tmp_path / "art", "--loss", "cross-entropy", "--metric", "top1")
    lines = ok(*arguments).stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["student", "trainable", "groups", "features", "loss", "written"]
    assert lines[-2] == "loss      cross-entropy, metric top1"
    assert lines[-1] == f"written   {tmp_path / 'art'}"
    printed = ok(*arguments, "--force", "--json", "-").stdout
    assert_report("artifact", json.loads(printed))
    assert json.loads(printed) == read_artifact(tmp_path / "art").manifest
    assert ok(*arguments, "--force", "-q").output == ""


def test_same_arguments_same_bytes(files: tuple[Path, Path], tmp_path: Path) -> None:
    """Exporting twice writes the same files."""
    for name in ("one", "two"):
        export_artifact(DIGITS, files[0], tmp_path / name, files[1])
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()
