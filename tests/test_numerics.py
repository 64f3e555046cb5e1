"""Odd numbers: what cannot be ranked or proved is refused by name, everything else is pruned and proved.

Warnings are errors in all tests, so that no number overflows or vanishes unnoticed.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

import onnxprune
from commands import run
from graphs import Tiny, in_type
from onnxprune.passes.score import NAMES
from oracle import assert_close, assert_pruned, masked_reference
from oracle import run as outputs_of

Edit = Callable[[np.ndarray], np.ndarray]
MEASURED = ("obs", "activation", "wanda")
COMPENSATIONS = ("none", "bias", "least-squares")


def network() -> ModelProto:
    """Build three convolutions from ``x`` to ``z``, a normalisation behind the first."""
    t = Tiny()
    y = t.node("Relu", t.batch_norm(t.conv(t.input("n", 2, 5, 5), "a", 2, 8, 3), "n", 8))
    y = t.node("Relu", t.conv(y, "b", 8, 8, 3))
    return t.build(t.conv(y, "z", 8, 3))


def edited(model: ModelProto, edits: Mapping[str, Edit]) -> ModelProto:
    """Change some initializers, which keep their types."""
    for tensor in model.graph.initializer:
        if tensor.name in edits:
            array = numpy_helper.to_array(tensor)
            value = np.asarray(edits[tensor.name](array.copy())).astype(array.dtype)
            tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
    return model


def at(place: int, value: float) -> Edit:
    """Set what belongs to one index of axis 0."""

    def change(array: np.ndarray) -> np.ndarray:
        array[place] = value
        return array

    return change


def times(factor: float) -> Edit:
    """Multiply in float64: the result may be denormal."""
    return lambda array: array.astype(np.float64) * factor


def images(kind: str = "noise", count: int = 12) -> dict[str, np.ndarray]:
    """Calibration data for ``network``."""
    noise = np.random.default_rng(0).standard_normal((count, 2, 5, 5)).astype(np.float32)
    factor = {"noise": 1, "zero": 0, "huge": 1e30, "tiny": 1e-30, "denormal": 1e-40}
    return {"x": np.ones_like(noise) if kind == "constant" else noise * np.float32(factor[kind])}


def refused(code: int, *args: object) -> str:
    """Run a command that ends with ``code`` and one to three lines, and return these."""
    result = run(*args)
    assert result.exit_code == code, result.output
    assert 1 <= len(result.stderr.splitlines()) <= 3
    return result.stderr


# -- weights -----------------------------------------------------------------------------------------------------------

BROKEN = [
    pytest.param("b.w", at(3, np.nan), "b.w: holds NaN", id="nan_weight"),
    pytest.param("z.b", at(1, np.nan), "z.b: holds NaN", id="nan_bias_of_the_output"),
    pytest.param("b.w", at(3, -np.inf), "b.w: holds infinity", id="infinite_weight"),
    pytest.param("b.b", at(3, np.inf), "b.b: holds infinity", id="infinite_bias"),
    pytest.param("z.w", at(0, np.inf), "z.w: holds infinity", id="infinite_reader"),
    pytest.param("n.scale", at(2, np.nan), "n.scale: holds NaN", id="nan_scale"),
    pytest.param("n.variance", at(2, -1), "variance -1 of channel 2", id="negative_variance"),
    pytest.param("n.variance", at(5, -1e-5), "variance 0 of channel 5", id="variance_that_epsilon_makes_zero"),
]


@pytest.mark.parametrize(("name", "edit", "told"), BROKEN)
def test_broken_weights_are_refused(name: str, edit: Edit, told: str) -> None:
    """What cannot be ranked or proved is named, whatever ranks, and whether or not something is removed."""
    model = edited(network(), {name: edit})
    for options in ({"criterion": "random"}, {"criterion": "l1", "proof": False}, {"calib": images()}):
        with pytest.raises(onnxprune.ModelError, match=told):
            onnxprune.prune(model, target_mac=0.6, **options)
    with pytest.raises(onnxprune.ModelError, match=told):
        onnxprune.prune(model, target_mac=1.0)
    with pytest.raises(onnxprune.ModelError, match=told):
        onnxprune.inspect(model)


def test_every_command_refuses_nan(tmp_path: Path) -> None:
    """Prune, apply and verify end with 3 and the same message, and write nothing."""
    sound, broken, small, plan = (tmp_path / name for name in ("in.onnx", "nan.onnx", "small.onnx", "plan.json"))
    onnx.save(network(), sound)
    onnx.save(edited(network(), {"b.w": at(3, np.nan)}), broken)
    assert run(sound, small, "--target-mac", 0.6, "--plan-out", plan, "--no-latency").exit_code == 0
    out = tmp_path / "out.onnx"
    told = {
        refused(3, broken, out, "--target-mac", 0.6),
        refused(3, "apply", broken, out, "--plan", plan),
        refused(3, "verify", broken, small, "--plan", plan),
    }
    assert len(told) == 1
    assert "b.w: holds NaN" in told.pop()
    assert not out.exists()
    assert "holds NaN or infinity" in refused(5, "verify", sound, broken_copy(small), "--plan", plan)


def broken_copy(path: Path) -> Path:
    """Write a model with a NaN in its first weight."""
    model = onnx.load(path)
    onnx.save(edited(model, {"a.w": at(0, np.nan)}), path.with_name("broken.onnx"))
    return path.with_name("broken.onnx")


def test_infinity_that_stays_is_a_value() -> None:
    """Masks of minus infinity on axes that nothing removes are no reason to refuse a model."""
    t = Tiny()
    y = t.conv(t.input(1, 2, 4, 6), "a", 2, 8, 3)
    mask = np.where(np.arange(24).reshape(4, 6) % 5, 0, -np.inf).astype(np.float32)
    y = t.node("Softmax", t.node("Add", y, t.constant(mask, "mask")), axis=3)
    result = assert_pruned(t.build(t.conv(y, "z", 8, 3)))
    assert "mask" not in result.plan.initializers


ODD = {
    "denormal": {"b.w": times(1e-41)},
    "one_denormal": {"b.w": at(3, 1e-42)},
    "zero_layer": {"b.w": times(0)},
    "zero_layer_and_bias": {"b.w": times(0), "b.b": times(0)},
    "constant_channel": {"b.w": at(3, 0)},
    "dead_layer": {"b.b": lambda bias: bias - 1e6},
    "huge": {"b.w": times(1e30)},
    "largest": {"b.w": lambda weight: np.sign(weight) * 3e38},
    "tiny": {"b.w": times(1e-30)},
    "far_apart": {"a.w": times(1e15), "b.w": times(1e-15), "z.w": times(1e10)},
    "zero_variance": {"n.variance": times(0)},
    "zero_scale": {"n.scale": times(0)},
    "huge_scale": {"n.scale": times(1e30), "z.w": times(1e-30)},
    "huge_variance": {"n.variance": times(1e30)},
}


@pytest.mark.parametrize("name", ODD)
def test_odd_weights_are_pruned_and_proved(name: str) -> None:
    """Zeros, denormals and magnitudes at the ends of float32: every criterion and preset gives a proved model."""
    model = edited(network(), ODD[name])
    place = list(ODD).index(name)
    for offset in (0, 1):
        criterion, preset = NAMES[(2 * place + offset) % len(NAMES)], "abcd"[(place + 2 * offset) % 4]
        result = onnxprune.prune(model, target_mac=0.7, criterion=criterion, preset=preset)
        assert result.report.proof.ok
        assert result.report.target.achieved <= 0.7
        assert all(np.isfinite(group.score).all() for group in result.report.groups)


@pytest.mark.parametrize("criterion", ["l1", "l2", "max", "geometric-median", "bn-scale"])
@pytest.mark.parametrize("exponent", [-100, 100])
def test_magnitude_of_a_layer_does_not_decide(criterion: str, exponent: int) -> None:
    """Scores are relative to their layer: weights 2^100 times as large or small keep the same channels."""
    wide = edited(network(), {"b.w": times(2.0**exponent), "n.scale": times(2.0**-exponent)})
    plans = [onnxprune.prune(m, target_mac=0.6, criterion=criterion, proof=False).plan for m in (network(), wide)]
    assert plans[0].initializers == plans[1].initializers


def test_double_weights_beyond_float32() -> None:
    """Weights of float64 that float32 cannot hold are ranked as others are."""
    model = edited(in_type(network(), "float64"), {"b.w": times(1e200)})
    plain = in_type(network(), "float64")
    plans = [onnxprune.prune(each, target_mac=0.6, proof=False).plan for each in (plain, model)]
    assert plans[0].initializers == plans[1].initializers
    with pytest.raises(onnxprune.ModelError, match=r"b\.w: holds values beyond float32"):
        onnxprune.prune(model, target_mac=0.6)


def test_network_of_zeros_has_no_proof(tmp_path: Path) -> None:
    """Where all tensors are constant nothing is shown: exit code 5, with the reason, and nothing is written."""
    zeros = edited(network(), dict.fromkeys(("a.w", "b.w", "z.w", "n.scale"), times(0)))
    onnx.save(zeros, tmp_path / "in.onnx")
    told = refused(5, tmp_path / "in.onnx", tmp_path / "out.onnx", "--target-mac", 0.6)
    assert "all are constant" in told
    assert not (tmp_path / "out.onnx").exists()


def test_a_norm_that_returns_nan_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A criterion of the user's own must rank: NaN is a usage error that names it and the tensor."""

    class Entry:
        def load(self) -> Callable[[np.ndarray], np.ndarray]:
            return lambda weight: np.full(weight.shape[1], np.nan)

    monkeypatch.setattr("onnxprune.passes.score.entry_points", lambda group, name: [Entry()])
    with pytest.raises(onnxprune.UsageError, match=r"--criterion own: .*a\.w"):
        onnxprune.prune(network(), target_mac=0.6, criterion="own")


# -- calibration -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["constant", "zero", "tiny", "denormal"])
def test_data_that_tells_nothing(kind: str) -> None:
    """Samples that are all alike, or too small to be squared, are no error; a note says where weights alone rank."""
    for criterion, compensate in (("obs", "least-squares"), ("wanda", "bias")):
        result = onnxprune.prune(
            network(), target_mac=0.7, calib=images(kind), criterion=criterion, compensate=compensate
        )
        assert result.report.proof.ok
        assert all(np.isfinite(numpy_helper.to_array(tensor)).all() for tensor in result.model.graph.initializer)


def perceptron() -> ModelProto:
    """Build two layers."""
    t = Tiny()
    y = t.node("Relu", t.gemm(t.input("n", 4), "a", 4, 8))
    return t.build(t.gemm(y, "z", 8, 3))


def test_one_sample_of_features() -> None:
    """One sample has no variance where there are no positions: a note names the layer, and magnitude ranks instead."""
    calib = {"x": np.ones((1, 4), np.float32)}
    result = onnxprune.prune(perceptron(), target_mac=0.7, calib=calib)
    (note,) = [note for note in result.report.notes if "calibration sample" in note]
    assert "z puts out the same" in note
    plain = onnxprune.prune(perceptron(), target_mac=0.7, criterion="l2", preset="a")
    assert result.plan.initializers == plain.plan.initializers


def test_dead_channels_in_the_data() -> None:
    """Channels that never vary go first, and a singular regression leaves finite weights."""
    t = Tiny()
    y = t.node("Relu", t.conv(t.input("n", 2, 5, 5), "a", 2, 8, 3))
    model = edited(t.build(t.conv(y, "z", 8, 3, 3)), {"a.b": lambda bias: np.where(np.arange(8) < 4, -100, bias)})
    result = onnxprune.prune(model, target_mac=0.5, calib=images())
    assert result.plan.initializers["a.w"][0] == [4, 5, 6, 7]
    data = images(count=20)
    assert_close(outputs_of(result.model, data), outputs_of(model, data), 1e-4)


@pytest.mark.parametrize("criterion", [*MEASURED, "l2"])
def test_data_that_overflows_is_refused(criterion: str) -> None:
    """Activations too large to be squared are an error that names the layer and what to look at, in every mode."""
    for compensate in COMPENSATIONS if criterion == "l2" else ("least-squares",):
        options = {"calib": images("huge"), "criterion": criterion, "compensate": compensate}
        if (criterion, compensate) == ("l2", "none"):  # the data is not looked at
            assert onnxprune.prune(network(), target_mac=0.7, **options).report.proof.ok
            continue
        with pytest.raises(onnxprune.ModelError, match=r"^b: .*calibration data; check the data and its scale"):
            onnxprune.prune(network(), target_mac=0.7, **options)


@pytest.mark.parametrize(("value", "code"), [(np.nan, 2), (np.inf, 3)])
def test_data_with_nan_or_infinity(tmp_path: Path, value: float, code: int) -> None:
    """NaN in a file is refused by sample, infinity where it reaches a layer; nothing is written."""
    onnx.save(network(), tmp_path / "in.onnx")
    data = images()["x"]
    data[5, 1, 2, 2] = value
    np.savez(tmp_path / "data.npz", x=data)
    words = (tmp_path / "in.onnx", tmp_path / "out.onnx", "--target-mac", 0.7)
    told = refused(code, *words, "--calib", tmp_path / "data.npz")
    assert "sample 5" in told if code == 2 else "b: what reaches it" in told
    told = refused(code, *words, "--data", tmp_path / "data.npz", "--metric", "cosine", "--no-latency")
    assert "NaN" in told or "nan" in told
    assert not (tmp_path / "out.onnx").exists()


@pytest.mark.parametrize("metric", ["psnr", "ssim", "mse", "cosine", "agreement-psnr"])
def test_infinite_outputs_have_no_quality(tmp_path: Path, metric: str) -> None:
    """Outputs that overflow, in both models alike, give no figure: an error says that they cannot be judged."""
    t = Tiny()
    model = t.build(t.node("Mul", t.input("n", 1, 12, 12), t.constant(3e38)))
    pictures = np.linspace(-2, 2, 4 * 144, dtype=np.float32).reshape(4, 1, 12, 12)
    np.savez(tmp_path / "data.npz", x=pictures, target=pictures)
    with pytest.raises(onnxprune.OnnxPruneError, match=r"cannot be judged on this data|give a data range") as caught:
        onnxprune.evaluate(model, tmp_path / "data.npz", metric, reference=model)
    assert caught.value.exit_code in (2, 3)


def test_half_precision_that_overflows_by_itself() -> None:
    """A float16 network whose activations are infinite on the data is refused, not ranked by what is left."""
    model = edited(in_type(network(), "float16"), {"a.w": times(3e4), "n.scale": times(1e2)})
    with pytest.raises(onnxprune.ModelError, match="calibration data; check the data and its scale"):
        onnxprune.prune(model, target_mac=0.7, calib={"x": images()["x"].astype(np.float16)})


def test_fitted_weights_beyond_half_precision() -> None:
    """Where a fit wants weights that float16 cannot hold, the layer stays as it is, and the report says why."""
    t = Tiny()
    y = t.node("Relu", t.conv(t.input("n", 2, 5, 5), "a", 2, 8, 3))
    model = in_type(t.build(t.conv(y, "z", 8, 3)), "float16")
    model = edited(model, {"a.w": times(1e-4), "a.b": times(1e-4), "z.w": lambda w: w / np.abs(w).max() * 65000.0})
    result = onnxprune.prune(model, target_mac=0.5, calib={"x": images()["x"].astype(np.float16)})
    (row,) = [row for row in result.report.compensation.solved if row.node == "z"]
    assert row.note == "unchanged: the fitted values exceed the type of the weights"
    assert row.error == row.error_before
    assert all(np.isfinite(numpy_helper.to_array(tensor)).all() for tensor in result.model.graph.initializer)


@pytest.mark.parametrize("kind", ["bfloat16", "float64"])
def test_other_types_are_fitted(kind: str) -> None:
    """Weights of bfloat16 and float64 are ranked and fitted on data, and keep their type."""
    model = network()
    model.opset_import[0].version = 22
    model = in_type(model, kind)
    data = images()["x"] if kind == "bfloat16" else images()["x"].astype(np.float64)
    result = onnxprune.prune(model, target_mac=0.7, calib={"x": data})
    assert result.report.proof.ok
    assert any(np.isfinite(row.ridge) for row in result.report.compensation.solved)
    before = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    assert all(before.get(t.name, before["b.w"]) == t.data_type for t in result.model.graph.initializer)


def test_infinite_outputs_do_not_unsettle_the_weights_of_groups() -> None:
    """Outputs masked with minus infinity count where they are finite."""
    t = Tiny()
    y = t.node("Relu", t.conv(t.input("n", 2, 5, 5), "a", 2, 8, 3))
    y = t.conv(t.node("Relu", t.conv(y, "b", 8, 8, 3)), "z", 8, 3)
    mask = np.where(np.arange(25).reshape(5, 5) % 5, 0, -np.inf).astype(np.float32)
    masked = t.build(t.node("Add", y, t.constant(mask, "mask")))
    result = onnxprune.prune(masked, target_mac=0.6, calib=images())
    assert result.report.proof.ok
    groups = [np.asarray(group.score) for group in result.report.groups if not group.frozen]
    assert all(np.isfinite(scores).all() for scores in groups)


# -- shapes ------------------------------------------------------------------------------------------------------------


def single_channels() -> ModelProto:
    """Layers of one channel between others, from one channel to one."""
    t = Tiny()
    y = t.node("Relu", t.conv(t.input(1, 1, 5, 5), "a", 1, 1, 3))
    y = t.node("Relu", t.conv(y, "b", 1, 6, 3))
    return t.build(t.conv(t.node("Relu", t.conv(y, "c", 6, 1, 3)), "z", 1, 1))


def single_class() -> ModelProto:
    """A perceptron with one score."""
    t = Tiny()
    y = t.node("Relu", t.gemm(t.input(2, 4), "a", 4, 8))
    return t.build(t.node("Sigmoid", t.gemm(y, "z", 8, 1)))


def nothing_beside() -> ModelProto:
    """A constant and a convolution without channels, joined with others."""
    t = Tiny()
    y = t.conv(t.input(1, 2, 5, 5), "a", 2, 8, 3)
    none = t.constant(np.zeros((0, 8, 1, 1), np.float32), "none.w")
    empty = t.constant(np.zeros((1, 0, 5, 5), np.float32), "empty")
    return t.build(t.conv(t.node("Concat", y, t.node("Conv", y, none, name="none"), empty, axis=1), "z", 8, 3))


def channels_of_a_batch(batch: int | str = 2) -> ModelProto:
    """Samples become groups of channels, and samples again."""
    t = Tiny()
    y = t.node("Relu", t.conv(t.input(batch, 2, 5, 5), "a", 2, 8, 3))
    y = t.node("Reshape", y, t.constant([1, 16, 5, 5]))
    y = t.node("Relu", t.conv(y, "g", 16, 16, 3, group=2))
    return t.build(t.conv(t.node("Reshape", y, t.constant([2, 8, 5, 5])), "z", 8, 3))


def channels_as_samples() -> ModelProto:
    """Every channel becomes a sample, and channels again."""
    t = Tiny()
    y = t.node("Relu", t.conv(t.input("n", 2, 5, 5), "a", 2, 8, 3))
    y = t.node("Reshape", y, t.constant([-1, 1, 5, 5]))
    y = t.node("Reshape", t.node("Relu", t.conv(y, "g", 1, 1, 3)), t.constant([-1, 8, 5, 5]))
    return t.build(t.conv(y, "z", 8, 3))


def batch_for_channels() -> ModelProto:
    """Batch and channels change places, are convolved, and change back."""
    t = Tiny()
    y = t.node("Relu", t.conv(t.input(3, 2, 5, 5), "a", 2, 8, 3))
    y = t.node("Relu", t.conv(t.node("Transpose", y, perm=[1, 0, 2, 3]), "s", 3, 3, 3))
    return t.build(t.conv(t.node("Transpose", y, perm=[1, 0, 2, 3]), "z", 8, 3))


@pytest.mark.parametrize(
    "build",
    [
        single_channels, single_class, nothing_beside, channels_of_a_batch, channels_as_samples, batch_for_channels,
    ],
)  # fmt: skip
def test_unusual_shapes_prune(build: Callable[[], ModelProto]) -> None:
    """One channel, none, and channels that trade places with samples: pruned, proved, equal to the masked original."""
    model = build()
    result = assert_pruned(model, 0.75)
    shape = [dim.dim_value or 2 for dim in model.graph.input[0].type.tensor_type.shape.dim]
    feeds = {"x": np.random.default_rng(0).standard_normal(shape).astype(np.float32)}
    assert_close(outputs_of(result.model, feeds), masked_reference(model, result.plan, feeds))


def test_samples_that_are_groups_stay_whole() -> None:
    """Channels of a batch that became groups go together in all of them."""
    result = onnxprune.prune(channels_of_a_batch(), target_mac=0.75)
    kept = result.plan.initializers
    assert len(kept["a.w"][0]) < 8
    assert kept["a.w"][0] == kept["z.w"][1] or "g.w" in kept


@pytest.mark.parametrize("shape", [(0, 2, 5, 5), (1, 2, 0, 5), (1, 0, 5, 5)])
def test_inputs_that_hold_nothing_are_refused(tmp_path: Path, shape: Sequence[int]) -> None:
    """An input declared with a size of 0 is named, with what to do: exit code 3."""
    model = channels_as_samples()
    model.graph.input[0].CopyFrom(helper.make_tensor_value_info("x", TensorProto.FLOAT, shape))
    onnx.save(model, tmp_path / "in.onnx")
    told = refused(3, tmp_path / "in.onnx", tmp_path / "out.onnx", "--target-mac", 0.7)
    assert f"input x is declared as {list(shape)}" in told


def test_a_model_that_does_not_run_is_blamed_itself(tmp_path: Path) -> None:
    """Where the original does not run in one piece, either, that is an invalid model (3), not a failed proof."""
    t = Tiny()
    y = t.conv(t.input(1, 2, 5, 5), "a", 2, 8, 3)
    none = t.node("Slice", y, t.constant([0]), t.constant([0]), t.constant([2]))
    joined = t.node("Concat", t.conv(y, "b", 8, 4), t.conv(none, "e", 8, 4), axis=2)
    onnx.save(t.build(t.conv(t.node("Relu", joined), "z", 4, 3)), tmp_path / "in.onnx")
    assert "cannot run" in refused(3, tmp_path / "in.onnx", tmp_path / "out.onnx", "--target-mac", 0.7)


# -- all of it ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ODD)
def test_every_choice_on_odd_weights(name: str) -> None:
    """Every criterion, preset, mode and kind of data: a proved model with finite weights, or an error with its reason."""
    model = edited(network(), ODD[name])
    plain = [{"criterion": c, "preset": p} for c, p in itertools.product(NAMES, "abcd")]
    fitted = [
        {"criterion": c, "compensate": m, "calib": images(kind)}
        for c, m, kind in itertools.product(
            (*MEASURED, "l2"), COMPENSATIONS, ("noise", "constant", "zero", "tiny", "huge")
        )
    ]
    for options in (*plain, *fitted):
        try:
            result = onnxprune.prune(model, target_mac=0.7, **options)
        except onnxprune.ModelError as error:
            assert "calibration data" in str(error)
            continue
        assert result.report.proof.ok
        assert all(np.isfinite(numpy_helper.to_array(tensor)).all() for tensor in result.model.graph.initializer)
        json.dumps(result.report.to_json(), allow_nan=False)
