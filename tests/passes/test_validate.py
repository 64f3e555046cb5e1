"""Quality is what the fixtures' README states, streamed feed by feed, and refused where the data cannot tell it."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper

from onnxprune import data
from onnxprune.data import Samples
from onnxprune.errors import ModelError, UsageError
from onnxprune.metrics import Metric, View
from onnxprune.passes.validate import Quality, compare, drop, evaluate
from onnxprune.runtime import Session

FIXTURES = Path(__file__).parents[2] / "fixtures"


@pytest.fixture(scope="module")
def digits() -> Session:
    """Return the trained classifier."""
    return Session(str(FIXTURES / "digits" / "digits.onnx"), threads=1)


@pytest.fixture(scope="module")
def denoise() -> Session:
    """Return the trained denoiser."""
    return Session(str(FIXTURES / "denoise" / "denoise.onnx"), threads=1)


def samples(session: Session, name: str, limit: int | None = None, batch: int = 32) -> Samples:
    """Load a fixture's data for a session."""
    return data.load(FIXTURES / name.partition("_")[0] / f"{name}.npz", session.inputs, limit, batch=batch)


def session_of(
    nodes: str, shape: list, result: list, kind: str = "float", output: str = "y", make: type[Session] = Session
) -> Session:
    """Build a model from text: input x of ``shape``, output y of ``result``."""
    declared = [",".join(map(str, axes)) for axes in (shape, result)]
    signature = f"(float[{declared[0]}] x) => ({kind}[{declared[1]}] {output})"
    text = f'<ir_version: 8, opset_import: ["": 17]> g {signature} {{ {nodes} }}'
    return make(onnx.parser.parse_model(text).SerializeToString())


def batch_of(*values: float, targets: list | None = None, labels: list | None = None, **options) -> Samples:
    """Samples of one number each, fed together."""
    return Samples(
        feeds=({"x": np.array(values, np.float32)[:, None]},),
        counts=(options.pop("count", len(values)),),
        targets=None if targets is None else (np.array(targets, np.float32)[:, None],),
        labels=None if labels is None else (np.array(labels),),
        **options,
    )


IDENTITY = ("y = Identity(x)", ["N", 1], ["N", 1])


@pytest.mark.parametrize("batch", [1, 32, 100, 360])
def test_digits_accuracy_is_as_documented(digits: Session, batch: int) -> None:
    """The classifier is right on 359 of 360 held-out images, whatever the batch."""
    quality = evaluate(digits, samples(digits, "digits_eval", batch=batch), "top1")
    assert quality == Quality("top1", pytest.approx(100 * 359 / 360, abs=0.3), 360, True)


def test_denoise_psnr_is_as_documented(denoise: Session) -> None:
    """The denoiser reaches 30.62 dB on all eight pictures, 30.26 on the first four."""
    assert evaluate(denoise, samples(denoise, "denoise_eval"), "psnr").value == pytest.approx(30.62, abs=0.02)
    assert evaluate(denoise, samples(denoise, "denoise_eval", 4), "psnr").value == pytest.approx(30.26, abs=0.02)


def test_noisy_psnr_is_as_documented(denoise: Session) -> None:
    """A model that changes nothing has the noisy pictures' 20.16 dB; one that predicts no noise has it as residual."""
    given = samples(denoise, "denoise_eval")
    shape = ["N", 1, "H", "W"]
    as_is = Session(_renamed("y = Identity(noisy)", shape))
    nothing = Session(_renamed("y = Sub(noisy, noisy)", shape))
    assert evaluate(as_is, given, "psnr").value == pytest.approx(20.16, abs=0.01)
    assert evaluate(nothing, given, "psnr", view=View(output="residual")).value == pytest.approx(20.16, abs=0.01)


def _renamed(nodes: str, shape: list) -> bytes:
    declared = ",".join(map(str, shape))
    text = f'<ir_version: 8, opset_import: ["": 17]> g (float[{declared}] noisy) => (float[{declared}] y) {{ {nodes} }}'
    return onnx.parser.parse_model(text).SerializeToString()


@pytest.mark.parametrize(
    ("view", "better"),
    [pytest.param(View(clip=True), True, id="clip"), pytest.param(View(crop_border=8), False, id="border")],
)
def test_view_changes_psnr(denoise: Session, view: View, better: bool) -> None:
    """Clipping can only lower the error where the target is in range; cutting a border changes what is measured."""
    given = samples(denoise, "denoise_eval")
    plain, viewed = (evaluate(denoise, given, "psnr", view=v).value for v in (None, view))
    assert viewed != plain
    assert viewed > plain or not better


def test_psnr_does_not_depend_on_the_batch(denoise: Session) -> None:
    """The mean over samples is the same however samples are fed."""
    values = [evaluate(denoise, samples(denoise, "denoise_eval", 5, batch), "psnr").value for batch in (1, 2, 5)]
    np.testing.assert_allclose(values, values[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize(("metric", "perfect"), [("cosine", 1.0), ("mse", 0.0)])
@pytest.mark.parametrize("same_session", [True, False])
def test_fidelity_to_itself_is_perfect(digits: Session, metric: str, perfect: float, same_session: bool) -> None:
    """Without targets, cosine and mse compare with the reference model."""
    reference = digits if same_session else Session(str(FIXTURES / "digits" / "digits.onnx"), threads=1)
    quality = evaluate(digits, samples(digits, "digits_calib", 64), metric, reference=reference)
    assert quality.value == pytest.approx(perfect, abs=1e-9)


def test_targets_go_before_the_reference() -> None:
    """Where the data has targets, a reference model is not asked."""
    given = batch_of(1.0, 2.0, targets=[1.5, 2.5])
    reference = session_of("y = Neg(x)", ["N", 1], ["N", 1])
    assert evaluate(session_of(*IDENTITY), given, "mse", reference=reference).value == pytest.approx(0.25)
    assert evaluate(session_of(*IDENTITY), batch_of(1.0, 2.0), "mse", reference=reference).value == pytest.approx(10)


# -- agreement with the original ---------------------------------------------------------------------------------------


class Counted(Session):
    """A session that counts its runs."""

    runs = 0

    def run(self, *args, **options) -> list:
        """Run once more."""
        self.runs += 1
        return super().run(*args, **options)


DOUBLE = ("y = Add(x, x)", ["N", 1], ["N", 1])


def two_feeds(**wanted: tuple[np.ndarray, ...]) -> Samples:
    """Three samples, 1, 2 and 5, in two feeds."""
    feeds = tuple({"x": np.array(values, np.float32)[:, None]} for values in ([1.0, 2.0], [5.0]))
    return Samples(feeds, (2, 1), **wanted)


@pytest.mark.parametrize(
    "wanted",
    [
        pytest.param({}, id="alone"),
        pytest.param({"targets": (np.full((2, 1), 9.0), np.full((1, 1), 9.0))}, id="targets"),
        pytest.param({"labels": (np.array([0, 0]), np.array([0]))}, id="labels"),
    ],
)
@pytest.mark.parametrize(
    ("data_range", "peak"), [pytest.param(None, 4.0, id="own-range"), pytest.param(10.0, 10.0, id="given-range")]
)
def test_agreement_psnr_is_relative_to_the_range_of_the_original(
    wanted: dict, data_range: float | None, peak: float
) -> None:
    """Outputs 1, 2, 5 differ by themselves from twice as much; their range over all feeds is 4 unless one is given."""
    notes: list[str] = []
    original, other = session_of(*IDENTITY), session_of(*DOUBLE)
    view = View(data_range=data_range)
    before, after = compare(original, other, two_feeds(**wanted), "agreement-psnr", view=view, note=notes.append)
    expected = np.mean([20 * np.log10(peak / error) for error in (1, 2, 5)])
    assert after == Quality("agreement-psnr", pytest.approx(expected), 3, True)
    assert before.value == 100
    assert evaluate(other, two_feeds(**wanted), "agreement-psnr", reference=original, view=view) == after
    assert len(notes) == (data_range is None)
    assert all("peak 4, the range of the original's output" in note for note in notes)


def test_agreement_top1_compares_decisions() -> None:
    """The original agrees with itself in all samples, its negative in none, whatever the labels say."""
    rows = np.array([[0.1, 0.9], [0.8, 0.2], [0.3, 0.4]], np.float32)
    given = Samples(({"x": rows},), (3,), labels=(np.zeros(3, int),))
    shape = ["N", 2]
    original, negative = (session_of(nodes, shape, shape) for nodes in ("y = Identity(x)", "y = Neg(x)"))
    before, after = compare(original, negative, given, "agreement-top1")
    assert (before.value, after.value, after.higher_is_better) == (100, 0, True)


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        pytest.param("agreement-psnr", "compares with the original model; give it", id="no-original"),
        pytest.param("agreement-top1", "compares with the original model; give it", id="no-original-of-classes"),
    ],
)
def test_agreement_needs_an_original(metric: str, message: str) -> None:
    """Targets and labels do not stand in for the original."""
    with pytest.raises(UsageError, match=message):
        evaluate(session_of(*IDENTITY), batch_of(1.0, targets=[1.0], labels=[0]), metric)


def test_constant_original_has_no_range() -> None:
    """Where the original's outputs are all alike, a data range must be given."""
    original, given = session_of("y = Sub(x, x)", ["N", 1], ["N", 1]), batch_of(1.0, 2.0)
    with pytest.raises(UsageError, match="reaches from 0 to 0; give a data range"):
        compare(original, original, given, "agreement-psnr")
    assert compare(original, original, given, "agreement-psnr", view=View(data_range=1))[0].value == 100


@pytest.mark.parametrize("metric", ["agreement-psnr", "mse", "cosine"])
def test_each_model_runs_once(metric: str) -> None:
    """An original that is compared with itself, too, runs once per feed; one feed more finds the float output."""
    original, other = session_of(*IDENTITY, make=Counted), session_of(*DOUBLE, make=Counted)
    compare(original, other, two_feeds(), metric)
    assert (original.runs, other.runs) == (1 + 2, 2)
    original.runs = 0
    evaluate(original, two_feeds(), metric, reference=original)
    assert original.runs == 1 + 2


def test_comparison_uses_targets_where_there_are_any() -> None:
    """Both models are judged by the data's targets, as two evaluations would."""
    given = batch_of(1.0, 2.0, targets=[1.0, 2.5])
    original, other = session_of(*IDENTITY), session_of(*DOUBLE)
    assert compare(original, other, given, "mse") == tuple(evaluate(one, given, "mse") for one in (original, other))


def test_comparison_of_other_outputs() -> None:
    """Models that share no output do not compare."""
    other = session_of("z = Identity(x)", ["N", 1], ["N", 1], output="z")
    with pytest.raises(UsageError, match="the model has no output 'y'; it has z"):
        compare(session_of(*IDENTITY), other, batch_of(1.0), "mse")


# -- samples, feeds and outputs ----------------------------------------------------------------------------------------


def test_rows_that_fill_a_batch_do_not_count() -> None:
    """Only the first ``counts[k]`` results of a feed are measured."""
    given = batch_of(1.0, 2.0, 9.0, targets=[1.0, 3.0], count=2)
    assert evaluate(session_of(*IDENTITY), given, "mse") == Quality("mse", pytest.approx(0.5), 2, False)


def test_feeds_weigh_as_many_samples_as_they_hold() -> None:
    """The mean is over samples, not over feeds."""
    feeds = ({"x": np.zeros((3, 1), np.float32)}, {"x": np.ones((1, 1), np.float32)})
    given = Samples(feeds, (3, 1), targets=(np.zeros((3, 1)), np.zeros((1, 1))))
    assert evaluate(session_of(*IDENTITY), given, "mse").value == pytest.approx(0.25)


def test_feed_without_batch_axis_is_one_sample() -> None:
    """Where axis 0 is no batch axis, the whole output is one sample."""
    feeds = tuple({"x": np.full((3, 1), value, np.float32)} for value in (0.1, 0.01))
    given = Samples(feeds, (1, 1), targets=(np.zeros((1, 3, 1)),) * 2, batched=False)
    assert evaluate(session_of(*IDENTITY), given, "psnr").value == pytest.approx(30, abs=1e-4)


def test_first_float_output_is_judged() -> None:
    """Integer outputs are passed over; an output can be named."""
    nodes = [helper.make_node("Cast", ["x"], ["whole"], to=onnx.TensorProto.INT64),
             helper.make_node("Identity", ["x"], ["first"]), helper.make_node("Neg", ["x"], ["second"])]  # fmt: skip
    outputs = [helper.make_tensor_value_info("whole", onnx.TensorProto.INT64, ["N", 1])]
    outputs += [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["N", 1]) for name in ("first", "second")]
    entered = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["N", 1])
    opset = [helper.make_opsetid("", 17)]
    graph = helper.make_graph(nodes, "g", [entered], outputs)
    session = Session(helper.make_model(graph, opset_imports=opset, ir_version=8).SerializeToString())
    given = batch_of(1.0, targets=[1.0])
    assert evaluate(session, given, "mse").value == 0
    assert evaluate(session, given, "mse", output="second").value == pytest.approx(4)
    with pytest.raises(UsageError, match="no output 'second'; it has y"):
        evaluate(session, batch_of(1.0), "mse", output="second", reference=session_of(*IDENTITY))


def test_progress_counts_samples(digits: Session) -> None:
    """Progress reports the samples done after each feed."""
    seen = []
    evaluate(digits, samples(digits, "digits_eval", 40), "top1", progress=lambda done, n: seen.append((done, n)))
    assert seen == [(32, 40), (40, 40)]


def test_metric_may_be_an_object() -> None:
    """A metric of one's own needs no registration."""
    worst = Metric("worst", lambda one, other: np.abs(one - other).max(1), False, "target")
    assert evaluate(session_of(*IDENTITY), batch_of(1.0, 3.0, targets=[1.0, 1.0]), worst).value == pytest.approx(1)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        pytest.param(lambda one, other: np.abs(one - other), r"float32 of shape \(2, 1\) for 2 samples", id="no-mean"),
        pytest.param(lambda one, other: 0.5, r"float64 of shape \(\) for 2 samples", id="one-for-all"),
        pytest.param(lambda one, other: ["a", "b"], r"<U1 of shape \(2,\).*one number per sample", id="text"),
    ],
)
def test_metric_that_returns_no_value_per_sample(function, message: str) -> None:
    """A function of one's own must return one number per sample, or the mean would be of something else."""
    with pytest.raises(UsageError, match=message):
        evaluate(session_of(*IDENTITY), batch_of(1.0, 3.0, targets=[1.0, 1.0]), function)


@pytest.mark.parametrize(
    ("given", "metric", "view", "message"),
    [
        pytest.param(batch_of(1.0), "psnr", None, "psnr needs a target per sample", id="no-target"),
        pytest.param(batch_of(1.0), "top1", None, "add an array 'label'", id="no-label"),
        pytest.param(batch_of(1.0), "mse", None, "targets or a reference model", id="no-reference"),
        pytest.param(batch_of(1.0), "nosuch", None, "nosuch: unknown", id="unknown-metric"),
        pytest.param(batch_of(1.0, labels=[0]), "top1", View(clip=True), "are for pictures", id="clip-scores"),
        pytest.param(
            batch_of(1.0, labels=[0]), "top1", View(output="residual"), "are for pictures", id="residual-scores"
        ),
        pytest.param(batch_of(1.0, labels=[0]), "top1", View(channels="y"), "are for pictures", id="luma-of-scores"),
        pytest.param(batch_of(1.0), "agreement-top1", View(crop_border=1), "are for pictures", id="agreement-border"),
        pytest.param(batch_of(1.0, labels=[1]), "top1", None, "classes 0 to 0", id="label-out-of-range"),
    ],
)
def test_data_that_cannot_tell(given: Samples, metric: str, view: View | None, message: str) -> None:
    """Data without what the metric needs is a usage error that says what to add."""
    with pytest.raises(UsageError, match=message):
        evaluate(session_of(*IDENTITY), given, metric, view=view)


def test_target_of_another_shape() -> None:
    """A target that is not shaped like the output is named with both shapes."""
    given = Samples(({"x": np.zeros((1, 1), np.float32)},), (1,), targets=(np.zeros((1, 5)),))
    with pytest.raises(UsageError, match=r"shape \(1,\), its target \(5,\)"):
        evaluate(session_of(*IDENTITY), given, "mse")


def test_output_without_sample_axis() -> None:
    """An output that mixes samples cannot be judged in batches, but one sample at a time."""
    flat = session_of("y = Flatten<axis = 0>(x)", ["N", 1], [1, "N"])
    with pytest.raises(UsageError, match=r"shape \(1, 2\) for 2 samples fed together"):
        evaluate(flat, batch_of(1.0, 2.0, targets=[0, 0]), "mse")
    assert evaluate(flat, batch_of(2.0, targets=[0]), "mse").value == pytest.approx(4)


@pytest.mark.parametrize(
    ("nodes", "metric", "message"),
    [
        pytest.param("y = Sqrt(x)", "mse", "output 'y' holds NaN for feed 0", id="nan"),
        pytest.param("z = Sub(x, x) y = Div(x, z)", "psnr", "psnr is -inf for samples 0 to 0", id="infinite"),
    ],
)
def test_broken_predictions_are_no_quality(nodes: str, metric: str, message: str) -> None:
    """NaN or an infinite error never passes for a quality, so that no guard compares with it."""
    with pytest.raises(ModelError, match=message):
        evaluate(session_of(nodes, ["N", 1], ["N", 1]), batch_of(-1.0, targets=[0.0]), metric)


def test_no_float_output() -> None:
    """A model whose outputs are all integers has nothing to judge."""
    session = session_of("y = Cast<to = 7>(x)", ["N", 1], ["N", 1], "int64")
    with pytest.raises(UsageError, match="no output holds floats"):
        evaluate(session, batch_of(1.0, targets=[1.0]), "mse")


@pytest.mark.parametrize(
    ("higher_is_better", "before", "after", "expected"),
    [
        pytest.param(True, 30.0, 29.5, 0.5, id="worse-psnr"),
        pytest.param(True, 90.0, 91.0, -1.0, id="better-top1"),
        pytest.param(False, 0.1, 0.3, 0.2, id="worse-mse"),
        pytest.param(False, 0.3, 0.1, -0.2, id="better-mse"),
        pytest.param(True, 1.0, 1.0, 0.0, id="equal"),
    ],
)
def test_drop_is_positive_where_worse(higher_is_better: bool, before: float, after: float, expected: float) -> None:
    """The drop respects the metric's direction."""
    one, other = (Quality("m", value, 10, higher_is_better) for value in (before, after))
    assert drop(one, other) == pytest.approx(expected)


def test_drop_of_different_metrics() -> None:
    """Qualities of different metrics have no difference."""
    with pytest.raises(ValueError, match="psnr, ssim"):
        drop(Quality("psnr", 30.0, 1, True), Quality("ssim", 0.9, 1, True))
