"""Models of every age, size and way of storage are read; what cannot be read is refused with a reason."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

import architectures
import onnxprune
from architectures import variants
from graphs import need
from onnxprune import external, onnx_io, runtime, storage

FIXTURES = Path(__file__).parents[1] / "fixtures"
NEWEST = 26
"""Last opset that onnx's version converter reaches from the fixtures and onnxruntime runs."""


def model_of(
    nodes: Sequence[NodeProto], opset: int, shape: Sequence[int | str | None] = (1, 3, 8, 8), **weights: np.ndarray
) -> ModelProto:
    """Make a model from x to y, whose shape is left open."""
    graph = helper.make_graph(
        list(nodes),
        "small",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=min(8, opset - 3))


def drawn(*shape: int) -> np.ndarray:
    """Draw seeded float32 values."""
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def between(node_type: str, *inputs: Any, opset: int, channels_after: int = 8, **attributes: Any) -> ModelProto:
    """A convolution of 8 channels, one operator, a convolution; arrays among the inputs become initializers."""
    weights = {"w1": drawn(8, 3, 3, 3), "w2": drawn(3, channels_after, 1, 1)}
    names = []
    for index, value in enumerate(inputs):
        weights[f"i{index}"] = value
        names.append(f"i{index}")
    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["a"]),
        helper.make_node(node_type, ["a", *names], ["b"], **attributes),
        helper.make_node("Conv", ["b", "w2"], ["y"]),
    ]
    return model_of(nodes, opset, **weights)


def split_by_attribute(opset: int) -> ModelProto:
    """Split with its sizes as an attribute."""
    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["a"]),
        helper.make_node("Split", ["a"], ["b", "c"], axis=1, split=[5, 3]),
        helper.make_node("Conv", ["b", "w2"], ["d"]),
        helper.make_node("Conv", ["c", "w3"], ["e"]),
        helper.make_node("Add", ["d", "e"], ["y"]),
    ]
    return model_of(nodes, opset, w1=drawn(8, 3, 3, 3), w2=drawn(3, 5, 1, 1), w3=drawn(3, 3, 1, 1))


def classifier(opset: int) -> ModelProto:
    """Average over space by Squeeze with attributes, and Gemm with a bias of rank 1."""
    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["a"]),
        helper.make_node("GlobalAveragePool", ["a"], ["b"]),
        helper.make_node("Squeeze", ["b"], ["c"], axes=[2, 3]),
        helper.make_node("Gemm", ["c", "w2", "bias"], ["y"], transB=1),
    ]
    return model_of(nodes, opset, w1=drawn(8, 3, 3, 3), w2=drawn(4, 8), bias=drawn(4))


NORM = [np.abs(drawn(8)) + 0.5 for _ in range(4)]
OLD: dict[str, ModelProto] = {
    **{f"relu_{opset}": between("Relu", opset=opset) for opset in range(7, 14)},
    "batch_norm_7": between("BatchNormalization", *NORM, opset=7),
    "batch_norm_9": between("BatchNormalization", *NORM, opset=9),
    "dropout_7": between("Dropout", opset=7, ratio=0.3),
    "dropout_10": between("Dropout", opset=10, ratio=0.3),
    "clip_attributes_7": between("Clip", opset=7, min=0.0, max=6.0),
    "clip_inputs_11": between("Clip", np.float32(0), np.float32(6), opset=11),
    "slice_attributes_7": between("Slice", opset=7, channels_after=5, axes=[1], starts=[2], ends=[7]),
    "slice_inputs_10": between(
        "Slice", np.array([2]), np.array([7]), np.array([1]), opset=10, channels_after=5
    ),
    "pad_attributes_7": between("Pad", opset=7, channels_after=12, pads=[0, 1, 0, 0, 0, 3, 0, 0]),
    "pad_inputs_11": between("Pad", np.array([0, 1, 0, 0, 0, 3, 0, 0]), opset=11, channels_after=12),
    "upsample_7": between("Upsample", opset=7, scales=[1.0, 1.0, 2.0, 2.0]),
    "upsample_9": between("Upsample", np.array([1, 1, 2, 2], np.float32), opset=9),
    "resize_10": between("Resize", np.array([1, 1, 2, 2], np.float32), opset=10),
    "prelu_7": between("PRelu", drawn(8, 1, 1), opset=7),
    "max_pool_8": between("MaxPool", opset=8, kernel_shape=[2, 2]),
    "split_7": split_by_attribute(7),
    "split_11": split_by_attribute(11),
    "squeeze_7": classifier(7),
    "squeeze_11": classifier(11),
}  # fmt: skip


def proved(model: ModelProto, share: float = 0.6) -> onnxprune.Result:
    """Prune and insist on a proof and on channels removed."""
    result = onnxprune.prune(model, target_mac=share)
    assert result.report.proof is not None
    assert result.report.proof.ok
    assert any(group.kept < group.size for group in result.report.groups)
    return result


@pytest.mark.parametrize("name", OLD)
def test_old_opsets_are_pruned(name: str) -> None:
    """Operators as opsets 7 to 12 wrote them, operands as attributes, are pruned and stay what they were."""
    model = OLD[name]
    result = proved(model).model
    assert result.opset_import[0].version == model.opset_import[0].version
    assert [node.op_type for node in result.graph.node] == [node.op_type for node in model.graph.node]


@pytest.mark.parametrize("opset", [18, 20, 21, 23, NEWEST])
@pytest.mark.parametrize("name", ["edsr", "resnet_a", "c2f_detector", "style_transfer", "layer_norm_mlp"])
def test_new_opsets_are_pruned(name: str, opset: int) -> None:
    """The same network in a newer opset loses the same channels."""
    need(opset)
    model = architectures.ALL[name]()
    newer = variants.to_opset(model, opset)
    assert newer.opset_import[0].version == opset
    newer.ir_version = 10
    same = onnxprune.prune(model, target_mac=0.6, proof=False)
    assert proved(newer).report.after["mac"] == same.report.after["mac"]


@pytest.mark.parametrize("opset", [1, 6])
def test_too_old_opset_is_refused(opset: int) -> None:
    """Opsets before 7 are an error that says what to do."""
    model = between("Relu", opset=7)
    model.opset_import[0].version = opset
    with pytest.raises(onnxprune.ModelError, match=f"opset {opset} is too old; convert"):
        onnxprune.inspect(model)


def test_missing_opset_is_refused() -> None:
    """A model that imports no standard operators is an error."""
    model = between("Relu", opset=13)
    del model.opset_import[:]
    with pytest.raises(onnxprune.ModelError, match="no standard operator set"):
        onnxprune.inspect(model)


# -- input shapes ------------------------------------------------------------------------------------------------------


def test_static_inputs_need_no_note() -> None:
    """Declared sizes are taken as they are, without a note."""
    graph = onnx_io.read(architectures.ALL["edsr"]())
    assert graph.input_shapes == {"image": (1, 3, 20, 24)}
    assert graph.notes == ()


@pytest.mark.parametrize("batch", ["batch", "N", None])
def test_dynamic_batch_counts_as_one(batch: str | None) -> None:
    """A dynamic first axis is taken as 1, and a note says so."""
    nodes = [helper.make_node("Conv", ["x", "w"], ["y"])]
    graph = onnx_io.read(model_of(nodes, 17, (batch, 3, 8, 8), w=drawn(4, 3, 3, 3)))
    assert graph.input_shapes == {"x": (1, 3, 8, 8)}
    assert graph.shapes["y"] == (1, 4, 6, 6)
    assert len(graph.notes) == 1
    assert "x taken as [1, 3, 8, 8]" in graph.notes[0]
    assert "--input-shape" in graph.notes[0]


def test_dynamic_space_gets_a_size_that_runs() -> None:
    """Dynamic height and width get a size on which the model runs, and a note says which."""
    graph = onnx_io.read(onnx.load(FIXTURES / "denoise" / "denoise.onnx"))
    (shape,) = graph.input_shapes.values()
    assert shape[:2] == (1, 1)
    assert shape[2] == shape[3] >= 8
    assert f"noisy taken as {list(shape)}" in graph.notes[0]


def test_size_that_does_not_run_is_not_taken() -> None:
    """Where a fully connected layer needs 16x16, that size is found."""
    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["a"], pads=[1] * 4),
        helper.make_node("Flatten", ["a"], ["b"]),
        helper.make_node("Gemm", ["b", "w2"], ["y"]),
    ]
    graph = onnx_io.read(model_of(nodes, 17, (1, 3, "h", "w"), w1=drawn(4, 3, 3, 3), w2=drawn(4 * 256, 5)))
    assert graph.input_shapes == {"x": (1, 3, 16, 16)}


def test_no_size_that_runs_is_an_error() -> None:
    """Where no size is found, the error names the input and the option."""
    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["a"], pads=[1] * 4),
        helper.make_node("Flatten", ["a"], ["b"]),
        helper.make_node("Gemm", ["b", "w2"], ["y"]),
    ]
    model = model_of(nodes, 17, (1, 3, "h", "w"), w1=drawn(4, 3, 3, 3), w2=drawn(4 * 13 * 11, 5))
    with pytest.raises(onnxprune.ModelError, match=r"no size was found that runs.* x .*--input-shape"):
        onnx_io.read(model)
    assert onnx_io.read(model, {"x": (1, 3, 13, 11)}).shapes["y"] == (1, 5)


def test_given_shape_is_taken() -> None:
    """--input-shape sets the sizes of dynamic axes; cost follows."""
    model = onnx.load(FIXTURES / "denoise" / "denoise.onnx")
    shape = (2, 1, 40, 24)
    report = onnxprune.inspect(model, input_shapes={"noisy": shape})
    assert report.input_shapes == {"noisy": shape}
    assert report.before["mac"] == 55872 * 2 * 40 * 24
    assert report.notes == ()


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        pytest.param("nobody", (1, 1, 32, 32), id="unknown_name"),
        pytest.param("noisy", (1, 1, 32), id="wrong_rank"),
        pytest.param("noisy", (1, 3, 32, 32), id="contradicts"),
        pytest.param("noisy", (1, 1, 0, 32), id="zero"),
        pytest.param("noisy", (1, 1, -1, 32), id="negative"),
    ],
)
def test_given_shape_that_does_not_fit_is_a_usage_error(name: str, shape: tuple[int, ...]) -> None:
    """A shape for an unknown input, or against its declaration, is a UsageError that names the input."""
    model = onnx.load(FIXTURES / "denoise" / "denoise.onnx")
    with pytest.raises(onnxprune.UsageError, match=f"--input-shape {name}: ") as caught:
        onnx_io.read(model, {name: shape})
    assert caught.value.exit_code == 2


# -- shapes ------------------------------------------------------------------------------------------------------------


def unfolded_chain() -> ModelProto:
    """Reshape to a shape that constants compute through Mul, Cast, Concat and Unsqueeze, as old exporters leave it."""
    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["a"], pads=[1] * 4),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Constant", [], ["four"], value=numpy_helper.from_array(np.array(4.0, np.float32))),
        helper.make_node("Constant", [], ["sixteen"], value=numpy_helper.from_array(np.array(16.0, np.float32))),
        helper.make_node("Mul", ["four", "sixteen"], ["product"]),
        helper.make_node("Cast", ["product"], ["integer"], to=TensorProto.INT64),
        helper.make_node("Unsqueeze", ["integer", "zero"], ["space"]),
        helper.make_node("Shape", ["b"], ["shape"]),
        helper.make_node("Slice", ["shape", "zero", "one"], ["batch"]),
        helper.make_node("Concat", ["batch", "minus", "space"], ["target"], axis=0),
        helper.make_node("Reshape", ["b", "target"], ["c"]),
        helper.make_node("ReduceMean", ["c"], ["d"], axes=[2], keepdims=0),
        helper.make_node("Gemm", ["d", "w2"], ["y"]),
    ]
    integers = {"zero": np.array([0]), "one": np.array([1]), "minus": np.array([-1])}
    return model_of(nodes, 17, w1=drawn(8, 3, 3, 3), w2=drawn(8, 5), **integers)


def test_shapes_through_unfolded_constants() -> None:
    """Shapes behind constants that nobody folded are known without running the model on data, and channels stay free."""
    graph = onnx_io.read(unfolded_chain())
    assert graph.shapes["c"] == (1, 8, 64)
    assert graph.shapes["y"] == (1, 5)
    assert {"product", "integer", "space", "shape", "batch", "target"} <= graph.static
    assert graph.static_values["target"].tolist() == [1, -1, 64]
    proved(unfolded_chain())


@pytest.mark.parametrize("name", architectures.ALL)
def test_every_tensor_has_its_true_shape(name: str) -> None:
    """The shape of every tensor of every fixture equals what onnxruntime computes."""
    model = architectures.ALL[name]()
    graph = onnx_io.read(model)
    names = [output for node in graph.nodes for output in node.outputs if output]
    assert set(names) <= set(graph.shapes)
    probe = ModelProto()
    probe.CopyFrom(model)
    del probe.graph.output[:]
    probe.graph.output.extend(onnx.ValueInfoProto(name=output) for output in names)
    measured = runtime.measure(probe.SerializeToString(), names, graph.input_shapes)
    assert {output: graph.shapes[output] for output in names} == {n: shape for n, (shape, _) in measured.items()}


def test_shape_that_only_running_tells_is_measured() -> None:
    """Where inference gives up (a custom chain through NonZero's length is fixed by the weights), the model is run."""
    mask = numpy_helper.from_array(np.array([1, 0, 1, 1, 0, 1], np.float32), "mask")
    nodes = [
        helper.make_node("NonZero", ["mask"], ["where"]),
        helper.make_node("Squeeze", ["where", "zero"], ["picked"]),
        helper.make_node("Conv", ["x", "w1"], ["a"]),
        helper.make_node("Gather", ["a", "picked"], ["b"], axis=2),
        helper.make_node("Conv", ["b", "w2"], ["y"]),
    ]
    model = model_of(nodes, 17, zero=np.array([0]), w1=drawn(8, 3, 3, 3), w2=drawn(3, 8, 1, 1))
    model.graph.initializer.append(mask)
    assert onnx_io.read(model).shapes["b"] == (1, 8, 4, 6)
    proved(model)


def test_order_of_nodes_does_not_matter_for_reading() -> None:
    """Two constants behind an Identity are known under both names."""
    nodes = [
        helper.make_node("Identity", ["w"], ["alias"]),
        helper.make_node("Identity", ["alias"], ["alias2"]),
        helper.make_node("Conv", ["x", "alias2"], ["y"]),
    ]
    graph = onnx_io.read(model_of(nodes, 17, w=drawn(4, 3, 1, 1)))
    assert dict(graph.aliases) == {"alias": "w", "alias2": "w"}
    assert graph.constant("alias2") is graph.constants["w"]
    assert graph.shapes["alias2"] == (4, 3, 1, 1)


@pytest.mark.parametrize(
    "attributes",
    [
        pytest.param({"value_ints": [1, -1]}, id="value_ints"),
        pytest.param({"value": numpy_helper.from_array(np.array([1, -1]))}, id="value"),
    ],
)
def test_constant_nodes_are_constants(attributes: dict[str, Any]) -> None:
    """A Constant node counts as constant, whichever attribute holds it."""
    nodes = [
        helper.make_node("Constant", [], ["target"], **attributes),
        helper.make_node("Reshape", ["x", "target"], ["y"]),
    ]
    graph = onnx_io.read(model_of(nodes, 17))
    assert graph.constants["target"].load().tolist() == [1, -1]
    assert graph.shapes["y"] == (1, 192)


# -- files -------------------------------------------------------------------------------------------------------------


def stored_outside(folder: Path, name: str = "model.onnx") -> Path:
    """Write a fixture with its weights in another file, and return the model's path."""
    path = folder / name
    onnx.save_model(
        architectures.ALL["edsr"](), str(path), save_as_external_data=True, location="weights.bin", size_threshold=256
    )
    return path


def test_external_data_is_read(tmp_path: Path) -> None:
    """A model with external data is read from any working directory, and prunes like the same model in one file."""
    loaded = onnx_io.load(stored_outside(tmp_path))
    inside = architectures.ALL["edsr"]()
    for one, other in zip(loaded.graph.initializer, inside.graph.initializer, strict=True):
        np.testing.assert_array_equal(external.array(one), numpy_helper.to_array(other))
    result = onnxprune.prune(tmp_path / "model.onnx", target_mac=0.6)
    assert result.plan.groups == onnxprune.prune(inside, target_mac=0.6, proof=False).plan.groups


def test_missing_external_data_is_a_model_error(tmp_path: Path) -> None:
    """Weights that are gone are a ModelError that names the model."""
    path = stored_outside(tmp_path)
    (tmp_path / "weights.bin").unlink()
    with pytest.raises(onnxprune.ModelError, match=r"model\.onnx: its external data cannot be read"):
        onnx_io.load(path)


def test_short_external_data_is_a_model_error(tmp_path: Path) -> None:
    """Weights that are cut short are a ModelError, not random numbers."""
    path = stored_outside(tmp_path)
    data = tmp_path / "weights.bin"
    data.write_bytes(data.read_bytes()[:1000])
    with pytest.raises(onnxprune.ModelError):
        onnxprune.prune(path, target_mac=0.6)


def test_external_data_outside_the_folder_is_refused(tmp_path: Path) -> None:
    """A model that points to a file above its folder is not followed there."""
    (tmp_path / "inner").mkdir()
    path = stored_outside(tmp_path / "inner")
    (tmp_path / "inner" / "weights.bin").rename(tmp_path / "weights.bin")
    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "../weights.bin"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(onnxprune.ModelError, match="external data"):
        onnx_io.load(path)


def test_copy_takes_external_data_along(tmp_path: Path) -> None:
    """A copy into another folder holds the same bytes in both files."""
    source = stored_outside(tmp_path)
    (tmp_path / "there").mkdir()
    onnx_io.copy(source, tmp_path / "there" / "copy.onnx")
    assert (tmp_path / "there" / "copy.onnx").read_bytes() == source.read_bytes()
    assert (tmp_path / "there" / "weights.bin").read_bytes() == (tmp_path / "weights.bin").read_bytes()


def test_copy_does_not_overwrite_other_weights(tmp_path: Path) -> None:
    """External data of another model in the target folder is not overwritten without being told to."""
    source = stored_outside(tmp_path)
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "weights.bin").write_bytes(b"precious")
    with pytest.raises(onnxprune.UsageError, match="exists"):
        onnx_io.copy(source, tmp_path / "there" / "copy.onnx")
    assert (tmp_path / "there" / "weights.bin").read_bytes() == b"precious"
    assert not (tmp_path / "there" / "copy.onnx").exists()


def test_write_is_whole_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the disk fills up while writing, the old file stays, and no temporary file does."""

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    out = tmp_path / "out.onnx"
    out.write_bytes(b"old")
    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(onnxprune.FileError, match="No space left on device") as caught:
        onnx_io.write(out, b"new")
    assert caught.value.exit_code == 7
    assert out.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("kind", ["sequence", "undefined"])
def test_input_that_is_no_tensor_is_refused(kind: str) -> None:
    """Sequences, and inputs without a type, are an error that names the input."""
    model = model_of([helper.make_node("Identity", ["x"], ["y"])], 17)
    model.graph.input[0].ClearField("type")
    if kind == "sequence":
        tensor = helper.make_tensor_type_proto(TensorProto.FLOAT, None)
        model.graph.input[0].type.CopyFrom(helper.make_sequence_type_proto(tensor))
    with pytest.raises(onnxprune.ModelError, match="input x is not a tensor"):
        onnx_io.read(model)


def test_compare_finds_every_difference() -> None:
    """Comparison ignores float values alone: integers, shapes, nodes, signature and opsets are structure."""
    model = architectures.ALL["resnet_a"]()
    assert onnx_io.compare(model, model) == ((), True)

    def differing(change: Any) -> tuple[tuple[str, ...], bool]:
        other = ModelProto()
        other.CopyFrom(model)
        change(other)
        return onnx_io.compare(model, other)

    def weight(other: ModelProto) -> None:
        tensor = other.graph.initializer[0]
        tensor.CopyFrom(numpy_helper.from_array(2 * numpy_helper.to_array(tensor), tensor.name))

    assert differing(weight) == ((), False)
    structural = [
        lambda other: other.graph.node.pop(3),
        lambda other: setattr(other.graph.node[3], "op_type", "Sigmoid"),
        lambda other: setattr(other.graph.node[0].attribute[0], "name", "other"),
        lambda other: other.graph.initializer.pop(0),
        lambda other: other.graph.initializer.add(name="more", data_type=1, dims=[1], raw_data=b"0000"),
        lambda other: setattr(other.graph.input[0], "name", "renamed"),
        lambda other: other.graph.output.pop(),
        lambda other: setattr(other.opset_import[0], "version", 18),
    ]
    for change in structural:
        differences, exact = differing(change)
        assert differences
        assert not exact


def test_no_place_for_temporary_files_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no folder for temporary files can be made, the error says what to set."""
    monkeypatch.setattr(tempfile, "tempdir", "/nowhere/at/all")
    with pytest.raises(onnxprune.FileError, match="TMPDIR"), storage.temporary_file(between("Relu", opset=13)):
        pass
