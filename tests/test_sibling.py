"""A plan made for a float model replays on its quantised siblings, which rank their channels alike."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from integers import Integers
from onnx import ModelProto, numpy_helper

import architectures
import onnxprune
import oracle
from graphs import Tiny, sandwich
from onnxprune.passes.couple import couple
from onnxprune.passes.score import score

FIXTURES = Path(__file__).parents[1] / "fixtures"
SHARED = Path(__file__).resolve().parents[2] / "shared" / "models"
Quantise = Callable[..., ModelProto]


@pytest.fixture(scope="module")
def quantise(tmp_path_factory: pytest.TempPathFactory) -> Quantise:
    """Return what quantises a model as onnxruntime.quantization.quantize_static does."""
    quantization = pytest.importorskip("onnxruntime.quantization")
    from onnxruntime.quantization.shape_inference import quant_pre_process  # noqa: PLC0415

    folder = tmp_path_factory.mktemp("quantised")

    class Reader(quantization.CalibrationDataReader):
        def __init__(self, feeds: Sequence[Mapping[str, np.ndarray]]) -> None:
            self.feeds = iter(feeds)

        def get_next(self):
            return next(self.feeds, None)

    def make(
        model: ModelProto, feeds: Sequence[Mapping[str, np.ndarray]], form: str, *, processed: bool = False, **options
    ):
        source = folder / "in.onnx"
        onnx.save(model, source)
        logging.disable(logging.WARNING)
        try:
            if processed:
                quant_pre_process(source, folder / "processed.onnx", skip_symbolic_shape=True)
                source = folder / "processed.onnx"
            how = {"per_channel": True, "quant_format": getattr(quantization.QuantFormat, form)} | options
            quantization.quantize_static(source, folder / "out.onnx", Reader(feeds), **how)
        finally:
            logging.disable(logging.NOTSET)
        return onnx.load(folder / "out.onnx")

    return make


def feeds_of(model: ModelProto, data: str = "") -> list[dict[str, np.ndarray]]:
    """A few samples of a fixture's data, or random input, uniform in [0, 1], of the model's declared shape."""
    if data in ("digits", "denoise"):
        images = np.load(FIXTURES / data / f"{data}_calib.npz")
        name = model.graph.input[0].name
        scale = 255 if images[name].dtype == np.uint8 else 1
        return [{name: (images[name][k : k + 1] / scale).astype(np.float32)} for k in range(8)]
    rng = np.random.default_rng(0)
    constants = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in constants]
    shapes = {v.name: [dim.dim_value or 1 for dim in v.type.tensor_type.shape.dim] for v in inputs}
    return [{name: rng.random(shape).astype(np.float32) for name, shape in shapes.items()} for _ in range(4)]


def digits() -> ModelProto:
    return onnx.load(FIXTURES / "digits" / "digits.onnx")


MODELS: dict[str, Callable[[], ModelProto]] = {
    "digits": digits,
    "denoise": lambda: onnx.load(FIXTURES / "denoise" / "denoise.onnx"),
    **{name: architectures.ALL[name] for name in ("edsr", "mobilenet_v1", "resnet_b", "resnext")},
}


# -- replay ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "processed"),
    [
        pytest.param("QDQ", False, id="QDQ-as-is"),
        pytest.param("QDQ", True, id="QDQ-pre-processed", marks=pytest.mark.slow),
        pytest.param("QOperator", False, id="QOperator-as-is", marks=pytest.mark.slow),
        pytest.param("QOperator", True, id="QOperator-pre-processed"),
    ],
)
@pytest.mark.parametrize("name", MODELS)
def test_plan_of_the_float_model_replays(quantise: Quantise, name: str, form: str, processed: bool) -> None:
    """Pruning a sibling by the float model's plan gives what quantising the pruned float model gives, but for rounding.

    The scales of activations were measured on the whole model, those of the reference on the pruned one, whose layers use
    another part of their range: both lie within the same distance of the pruned float model.
    """
    model = MODELS[name]()
    feeds = feeds_of(model, name)
    pruned = onnxprune.prune(model, target_mac=0.95)
    plan = onnxprune.Plan.from_json(json.dumps(pruned.plan.to_json()))
    sibling = quantise(model, feeds, form, processed=processed)
    replayed = onnxprune.apply(sibling, plan)
    report = replayed.report
    assert report.proof.ok
    assert report.after["mac"] / report.before["mac"] == pytest.approx(
        pruned.report.after["mac"] / pruned.report.before["mac"], rel=1e-6
    )
    assert any("names that quantising gives" in note for note in report.notes)
    assert onnxprune.verify(sibling, replayed.model, plan).weights == "exact"
    assert onnxprune.verify(sibling, replayed.model, replayed.plan).weights == "exact"
    outputs = [
        np.concatenate([oracle.run(each, feed)[0] for feed in feeds])
        for each in (replayed.model, quantise(pruned.model, feeds, form, processed=processed), pruned.model)
    ]
    assert outputs[0].shape == outputs[1].shape
    spread = oracle.run(model, feeds[0])[0].std()
    errors = [
        np.sqrt(np.mean(np.square(a - b))) / spread for a, b in ((outputs[0], outputs[1]), (outputs[1], outputs[2]))
    ]
    print(f"{name} {form} {processed}: {errors[0]:.4f} apart, quantising alone {errors[1]:.4f} of the spread")
    assert errors[0] <= 0.1


def test_sliced_integers_are_those_of_the_sibling(quantise: Quantise) -> None:
    """Integers, scales and zero points that stay are the sibling's own, sliced alike along the plan's axes."""
    model = digits()
    plan = onnxprune.prune(model, target_mac=0.6, proof=False).plan
    sibling = quantise(model, feeds_of(model), "QDQ")
    replayed = onnxprune.apply(sibling, plan)
    whole = {tensor.name: numpy_helper.to_array(tensor) for tensor in sibling.graph.initializer}
    now = {tensor.name: numpy_helper.to_array(tensor) for tensor in replayed.model.graph.initializer}
    found = [name for name in plan.initializers if f"{name}_quantized" in whole]
    assert len(found) > 8
    for name, slices in ((name, plan.initializers[name]) for name in found):
        assert np.array_equal(now[f"{name}_quantized"], oracle.sliced(whole[f"{name}_quantized"], slices)), name
        if 0 in slices and now.get(f"{name}_scale", np.zeros(())).ndim:
            for beside in (f"{name}_scale", f"{name}_zero_point"):
                assert np.array_equal(now[beside], oracle.sliced(whole[beside], {0: slices[0]})), beside


@pytest.mark.parametrize("form", ["QDQ", "QOperator"])
def test_plan_of_the_sibling_replays_on_the_float_model(quantise: Quantise, form: str) -> None:
    """The other way round, as many channels go from the float model."""
    model = digits()
    sibling = quantise(model, feeds_of(model), form)
    direct = onnxprune.prune(sibling, target_mac=0.6)
    replayed = onnxprune.apply(model, direct.plan)
    assert replayed.report.proof.ok
    assert replayed.report.after["mac"] == direct.report.after["mac"]


def test_normalisations_folded_into_convolutions_are_found(quantise: Quantise) -> None:
    """Onnxruntime's pre-processing folds normalisations and renames weights; the plan still finds them."""
    rng = np.random.default_rng(1)

    def middle(t: Tiny, y: str) -> str:
        return t.node("Relu", t.batch_norm(t.conv(y, "b.weight", 6, 8, 3, bias=False), "bn", 8))

    model = sandwich(middle, 6, 8)
    feeds = [{"x": rng.random((1, 2, 4, 6)).astype(np.float32)} for _ in range(2)]
    sibling = quantise(model, feeds, "QDQ", processed=True)
    assert not {"bn.scale", "bn.scale_quantized"} & {tensor.name for tensor in sibling.graph.initializer}
    pruned = onnxprune.prune(model, target_mac=0.6)
    replayed = onnxprune.apply(sibling, pruned.plan)
    assert replayed.report.after["mac"] == pruned.report.after["mac"]


def renamed(model: ModelProto, names: Mapping[str, str]) -> ModelProto:
    """Rename initializers."""
    other = ModelProto()
    other.CopyFrom(model)
    for tensor in other.graph.initializer:
        tensor.name = names.get(tensor.name, tensor.name)
    for node in other.graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
    return other


def test_strangers_are_refused(quantise: Quantise) -> None:
    """A model that lacks the tensors is told so: all of them, or so many that channels of the plan have no place."""
    model = digits()
    plan = onnxprune.prune(model, target_mac=0.6, proof=False).plan
    with pytest.raises(onnxprune.OnnxPruneError, match="does not have or does not use"):
        onnxprune.apply(sandwich(lambda t, y: t.node("Relu", y)), plan)
    sibling = quantise(model, feeds_of(model), "QDQ")
    first = next(iter(plan.initializers))
    gone = {t.name: f"other{k}" for k, t in enumerate(sibling.graph.initializer) if not t.name.startswith(first)}
    stranger = renamed(sibling, gone)
    real = [node.output[0] for node in stranger.graph.node if node.op_type == "DequantizeLinear"]
    computed = {name: f"t{k}" for k, name in enumerate(real) if name not in (v.name for v in stranger.graph.output)}
    for node in stranger.graph.node:  # else the outputs of their DequantizeLinear give them away
        node.input[:] = [computed.get(name, name) for name in node.input]
        node.output[:] = [computed.get(name, name) for name in node.output]
    with pytest.raises(onnxprune.OnnxPruneError, match="it is no sibling"):
        onnxprune.apply(stranger, plan)


def test_dequantised_name_is_enough(quantise: Quantise) -> None:
    """A weight whose own name says nothing is found through the name of its DequantizeLinear's output."""
    model = digits()
    plan = onnxprune.prune(model, target_mac=0.6, proof=False).plan
    sibling = quantise(model, feeds_of(model), "QDQ")
    names = {f"{name}_quantized": f"q{number}" for number, name in enumerate(plan.initializers)}
    replayed = onnxprune.apply(renamed(sibling, names), plan)
    assert replayed.report.proof.ok
    assert replayed.report.after["mac"] == onnxprune.apply(sibling, plan).report.after["mac"]


def test_blocks_that_a_plan_cuts_through_are_refused() -> None:
    """Where a sibling removes channels in blocks, a plan of single channels does not fit, and nothing else is removed."""
    rng = np.random.default_rng(0)
    arrays = {"a.w": (4, 32), "b.w": (32, 5)}

    def network(*, blocked: bool) -> ModelProto:
        t = Integers()
        weights = {}
        for name, shape in arrays.items():
            value = rng.standard_normal(shape).astype(np.float32)
            if not blocked:
                weights[name] = t.constant(value, name)
                continue
            scale = t.constant(np.full((shape[0] // 4, shape[1]), 0.02, np.float32), f"{name}_scale")
            t.constant(np.clip(np.rint(value / 0.02), -127, 127).astype(np.int8), f"{name}_quantized")
            weights[name] = t.node("DequantizeLinear", f"{name}_quantized", scale, axis=0, block_size=4)
        y = t.node("Relu", t.node("MatMul", t.input(3, 4), weights["a.w"]))
        return t.build(t.node("MatMul", y, weights["b.w"]))

    plan = onnxprune.prune(network(blocked=False), target_mac=0.6, proof=False).plan
    with pytest.raises(onnxprune.OnnxPruneError, match="removes together"):
        onnxprune.apply(network(blocked=True), plan)


def test_command_line_replays_on_a_sibling(quantise: Quantise, tmp_path: Path) -> None:
    """``apply`` takes a float model's plan, says what it found, and writes a model that runs."""
    from commands import run  # noqa: PLC0415

    model = digits()
    plan = onnxprune.prune(model, target_mac=0.6, proof=False).plan
    (tmp_path / "plan.json").write_text(json.dumps(plan.to_json()))
    onnx.save(quantise(model, feeds_of(model), "QOperator"), tmp_path / "q.onnx")
    done = run("apply", tmp_path / "q.onnx", tmp_path / "out.onnx", "--plan", tmp_path / "plan.json")
    assert done.exit_code == 0, done.output
    assert "found under the names that quantising gives" in done.output
    assert oracle.run(onnx.load(tmp_path / "out.onnx"), feeds_of(model)[0])[0].shape == (1, 10)


# -- ranking -----------------------------------------------------------------------------------------------------------

NORMS = np.array([1.0, 0.2, 0.7, 0.45, 0.85, 0.3, 0.58, 0.12])


def ranked(form: str) -> np.ndarray:
    """Scores of 8 channels of known norms, between two products whose weights are in some form."""
    t = Integers()
    rng = np.random.default_rng(4)
    first = rng.standard_normal((16, 8)) * NORMS / 2
    last = rng.standard_normal((8, 5)) * NORMS[:, None] * 0
    t.constant(np.ones((8, 5), np.float32) + last.astype(np.float32), "z.w")
    x = t.input(3, 16)
    y = t.node("Relu", product(t, x, first, form))
    coupling = couple(onnxprune.onnx_io.read(t.build(t.node("MatMul", y, "z.w"))))
    labels = coupling.ledger.constants["z.w", ""][0].labels
    return score(coupling).value[coupling.classes[labels]]


def product(t: Integers, x: str, weight: np.ndarray, form: str) -> str:
    """Multiply by a weight of floats, or of what they are quantised to."""
    if form == "float":
        return t.node("MatMul", x, t.constant(weight.astype(np.float32), "a.w"), name="a")
    per_column = form != "per-tensor"
    scale = np.abs(weight).max(0) / 100 if per_column else np.array(np.abs(weight).max() / 100)
    zero = np.full(scale.shape, 110)
    q = np.clip(np.rint(weight / scale) + zero, 0, 255).astype(np.uint8)
    names = [
        t.constant(q, "a.w"),
        t.constant(scale.astype(np.float32), "a.s"),
        t.constant(zero.astype(np.uint8), "a.z"),
    ]
    if form in ("per-tensor", "per-channel"):
        return t.node("MatMul", x, t.node("DequantizeLinear", *names, axis=1), name="a")
    if form == "QLinearMatMul":
        after = t.point(0.05, 128, "y")
        return t.node("DequantizeLinear", t.node(form, *t.enter(x, 0.02, 128, "x"), *names, *after, name="a"), *after)
    if form == "QGemm":
        bias = t.constant(np.zeros(8, np.int32))
        return t.own(form, *t.enter(x, 0.02, 128, "x"), *names, bias, name="a")
    if form == "MatMulInteger":
        low, x_scale, x_zero = t.node("DynamicQuantizeLinear", x, outputs=3)
        sums = t.node("Cast", t.node(form, low, names[0], x_zero, names[2], name="a"), to=onnx.TensorProto.FLOAT)
        return t.node("Mul", sums, t.node("Mul", x_scale, names[1]))
    if form == "DynamicQuantizeMatMul":
        return t.own(form, x, *names, name="a")
    blocks = weight.T.reshape(8, 1, 16)
    scale = np.abs(blocks).max(2) / 7
    q = np.clip(np.rint(blocks / scale[..., None]) + 8, 0, 15).astype(np.uint8)
    packed = t.constant(q[..., ::2] | (q[..., 1::2] << 4), "n.w")
    return t.own(
        "MatMulNBits",
        x,
        packed,
        t.constant(scale.astype(np.float32), "n.s"),
        name="a",
        K=16,
        N=8,
        bits=4,
        block_size=16,
    )


FORMS = (
    "per-tensor", "per-channel", "QLinearMatMul", "QGemm", "MatMulInteger", "DynamicQuantizeMatMul", "MatMulNBits",
)  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_quantised_weights_score_like_the_floats_they_stand_for(form: str) -> None:
    """Scores come from (w - zero point) * scale: those of a quantised form differ from the float's by rounding only."""
    tolerance = 0.08 if form == "MatMulNBits" else 0.02  # steps of a seventh, of a hundredth of the largest weight
    assert ranked(form) == pytest.approx(ranked("float"), rel=tolerance, abs=tolerance / 5)


@pytest.mark.parametrize("name", ["int4", "uint4", "int8", "float8_e4m3fn"])
def test_blocks_score_by_their_own_scales(name: str) -> None:
    """A channel of small integers and a large scale weighs more than one of large integers and a small scale."""
    dtype = np.dtype(getattr(ml_dtypes, name, None) or name)
    t = Integers()
    raw = np.where(np.arange(8) % 2, 1, 3)[None, :] * np.ones((16, 1))
    zero = 5 if name.startswith("u") else 0
    t.constant((raw + zero).astype(np.float32).astype(dtype), "w")
    t.constant(np.where(np.arange(8) % 2, 1.0, 0.1)[None, :].astype(np.float32) * np.ones((4, 1), np.float32), "s")
    t.constant(np.full((4, 8), zero, np.float32).astype(dtype), "z")
    y = t.node("MatMul", t.input(3, 16), t.node("DequantizeLinear", "w", "s", "z", axis=0, block_size=4), name="a")
    t.constant(np.ones((8, 5), np.float32), "last")
    coupling = couple(onnxprune.onnx_io.read(t.build(t.node("MatMul", y, "last"))))
    value = score(coupling).value[coupling.classes[coupling.ledger.constants["last", ""][0].labels]]
    assert value[1] / value[0] == pytest.approx(1 / 0.3, rel=1e-3)


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"trained networks are not there: {SHARED}")
@pytest.mark.parametrize("form", ["QDQ", "QOperator"])
@pytest.mark.parametrize("name", ["resnet20", "dncnn_s25"])
def test_trained_siblings_lose_the_same_channels(quantise: Quantise, name: str, form: str) -> None:
    """Pruned directly, a quantised network loses the channels that its float original loses."""
    model = onnx.load(SHARED / f"{name}.onnx")
    feeds = (
        feeds_of(model)
        if name == "dncnn_s25"
        else [{"input": np.random.default_rng(0).random((4, 3, 32, 32), np.float32)}]
    )
    sibling = quantise(model, feeds, form)
    plan = onnxprune.prune(model, target_mac=0.5, proof=False).plan
    direct = onnxprune.prune(sibling, target_mac=0.5)
    assert direct.report.proof.ok
    assert direct.plan.initializers == onnxprune.apply(sibling, plan, proof=False).plan.initializers


# -- what calibration cannot do ----------------------------------------------------------------------------------------


def half_quantised(dtype: str, per: str) -> ModelProto:
    """Three convolutions, the middle one with quantised weights."""

    def middle(t: Tiny, y: str) -> str:
        kind = np.dtype(getattr(ml_dtypes, dtype, None) or dtype)
        limit = {"int8": 100, "uint8": 200, "int4": 7}.get(dtype, 1)
        values = t.rng.uniform(-limit if dtype[0] != "u" else 0, limit, (8, 6, 3, 3))
        t.constant(values.astype(np.float32).astype(kind), "w")
        t.constant(np.full((8,) if per == "channel" else (), 0.3 / limit, np.float32), "s")
        zero = np.full((8,) if per == "channel" else (), 100 if dtype == "uint8" else 0, np.float32).astype(kind)
        kernel = t.node("DequantizeLinear", "w", "s", t.constant(zero, "zero"), axis=0)
        return t.node("Relu", t.node("Conv", y, kernel, name="c", pads=[1] * 4))

    return sandwich(middle, 6, 8, opset=21)


@pytest.mark.parametrize("per", ["channel", "tensor"])
@pytest.mark.parametrize("dtype", ["int8", "uint8", "int4", "float8_e4m3fn"])
def test_quantised_layers_are_not_fitted_and_a_note_says_so(dtype: str, per: str) -> None:
    """Where some layers are quantised, calibration ranks and fits the others; integers and their scales stay."""
    model = half_quantised(dtype, per)
    calib = [{"x": np.random.default_rng(i).standard_normal((1, 2, 4, 6)).astype(np.float32)} for i in range(16)]
    result = onnxprune.prune(model, target_mac=0.6, calib=calib)
    plain = onnxprune.apply(model, result.plan).model
    assert any(note.startswith("1 of 3 layers have quantised weights") for note in result.report.notes)
    for name in ("w", "s"):
        values = [
            numpy_helper.to_array(t) for m in (plain, result.model) for t in m.graph.initializer if t.name == name
        ]
        assert np.array_equal(*values)
    assert onnxprune.verify(model, result.model, result.plan).weights == "changed"


@pytest.mark.parametrize("form", ["QDQ", "QOperator"])
def test_all_quantised_falls_back_to_weights(quantise: Quantise, form: str) -> None:
    """Where every layer is quantised, data change nothing, whatever criterion they are given for; a note says so."""
    model = digits()
    sibling = quantise(model, feeds_of(model), form)
    data = FIXTURES / "digits" / "digits_calib.npz"
    result = onnxprune.prune(sibling, target_mac=0.6, calib=data, criterion="obs")
    assert result.plan.initializers == onnxprune.prune(sibling, target_mac=0.6, proof=False).plan.initializers
    assert any("layers have quantised weights" in note for note in result.report.notes)
    assert result.report.weights == "exact"
    assert result.report.facts == {"criterion": "l2"}
    assert result.report.compensation is None


def test_weights_behind_a_transpose_count_as_quantised() -> None:
    """A weight that is dequantised and then turned belongs to a quantised layer, too."""
    t = Integers()
    y = t.input(3, 16)
    for name, shape in (("a", (12, 16)), ("b", (5, 12))):
        t.constant(t.rng.integers(-100, 101, shape).astype(np.int8), f"{name}.w")
        real = t.node("DequantizeLinear", f"{name}.w", t.constant(0.01))
        y = t.node("MatMul", y, t.node("Transpose", real, perm=[1, 0]), name=name)
    calib = [{"x": np.ones((3, 16), np.float32)}]
    notes = onnxprune.prune(t.build(y), target_mac=0.6, calib=calib).report.notes
    assert any(note.startswith("2 of 2 layers have quantised weights") for note in notes)


@pytest.mark.parametrize("mode", ["least-squares", "bias"])
def test_compensation_that_was_asked_for_is_an_error(quantise: Quantise, mode: str) -> None:
    """Asking to fit weights that are all quantised is refused, with what to do instead."""
    model = digits()
    sibling = quantise(model, feeds_of(model), "QDQ")
    with pytest.raises(onnxprune.UsageError, match="compensate the float model, then quantise that"):
        onnxprune.prune(sibling, target_mac=0.6, calib=FIXTURES / "digits" / "digits_calib.npz", compensate=mode)
