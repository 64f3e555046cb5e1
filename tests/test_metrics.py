"""Metrics equal their definitions, refuse what they cannot compare, and are found by name."""

import math
import sys
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from onnxprune import metrics
from onnxprune.errors import UsageError
from onnxprune.measures import MAX_DB, agreement, cosine, decibels, mse, psnr, ssim, top1
from onnxprune.metrics import METRICS, Metric, View, find, from_function

FIXTURES = Path(__file__).parents[1] / "fixtures"
DOUBLED = Metric("doubled", lambda one, other: 2 * mse(one, other), False, "target")


def pictures(*shape: int, seed: int = 0) -> np.ndarray:
    """Draw seeded uniform pictures in 0..1."""
    return np.random.default_rng(seed).random(shape)


@pytest.mark.parametrize(
    ("function", "prediction", "target", "expected"),
    [
        pytest.param(mse, [[1, 2]], [[1, 4]], [2], id="mse"),
        pytest.param(psnr, [[0.0, 0.1]], [[0.0, 0.0]], [10 * math.log10(1 / 0.005)], id="psnr"),
        pytest.param(psnr, [[0.5]], [[0.5]], [100], id="psnr-identical"),
        pytest.param(psnr, [[0.5 + 1e-7]], [[0.5]], [100], id="psnr-never-above-identical"),
        pytest.param(cosine, [[1, 0], [1, 1]], [[0, 1], [2, 2]], [0, 1], id="cosine"),
        pytest.param(cosine, [[1, 2]], [[-2, -4]], [-1], id="cosine-opposite"),
        pytest.param(cosine, [[0, 0], [0, 0]], [[0, 0], [1, 0]], [1, 0], id="cosine-of-zeros"),
        pytest.param(top1, [[0.1, 0.9], [0.8, 0.2]], [1, 1], [100, 0], id="top1"),
        pytest.param(top1, [[[[0.1]], [[0.9]]]], [1], [100], id="top1-with-empty-positions"),
        pytest.param(top1, [[[0.1, 0.7], [0.9, 0.3]]], [[1, 1]], [50], id="top1-per-position"),
    ],
)
def test_value_per_sample(function, prediction, target, expected) -> None:
    """Each function returns the defined value for each sample of axis 0."""
    value = function(np.asarray(prediction), np.asarray(target))
    np.testing.assert_allclose(value, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        pytest.param([[0.1, 0.9], [0.8, 0.2]], [100, 0], id="classes"),
        pytest.param([[[0.1, 0.7], [0.9, 0.3]], [[0.1, 0.1], [0.9, 0.3]]], [50, 100], id="positions"),
    ],
)
def test_agreement_is_the_share_of_equal_decisions(scores: list, expected: list[float]) -> None:
    """Two models agree where both score the same class highest, here the second."""
    wanted = np.zeros(np.shape(scores))
    wanted[:, 1] = 1
    np.testing.assert_array_equal(agreement(np.asarray(scores), wanted), expected)


def test_decibels_of_errors_are_psnr() -> None:
    """The PSNR of a sample is that of its mean squared error."""
    prediction, target = pictures(3, 1, 4, 4), pictures(3, 1, 4, 4, seed=1)
    expected = psnr(prediction, target, peak=2.0)
    np.testing.assert_array_equal(decibels(mse(prediction, target), 2.0), expected)


def test_psnr_is_the_mean_of_decibels() -> None:
    """Each sample has its own PSNR: the mean over samples is not the PSNR of the pooled error."""
    value = psnr(np.array([[0.1], [0.01]]), np.zeros((2, 1)))
    np.testing.assert_allclose(value, [20, 40], rtol=1e-12)


@given(arrays(np.float64, (2, 1, 12, 12), elements=st.floats(0, 1)), st.sampled_from([2.0, 255.0]))
def test_peak_rescales(picture: np.ndarray, peak: float) -> None:
    """Pictures in 0..peak have the PSNR and SSIM that the same pictures have in 0..1."""
    target = pictures(2, 1, 12, 12)
    for function in (psnr, ssim):
        scaled = function(picture * peak, target * peak, peak=peak)
        np.testing.assert_allclose(scaled, function(picture, target), rtol=1e-7, atol=1e-9)


@given(arrays(np.float64, (3, 2, 11, 13), elements=st.floats(0, 1)))
def test_bounds(picture: np.ndarray) -> None:
    """A picture is most similar to itself, and no value leaves its range."""
    target = pictures(3, 2, 11, 13)
    np.testing.assert_allclose(ssim(picture, picture), 1, rtol=0, atol=1e-9)
    assert (np.abs(ssim(picture, target)) <= 1 + 1e-9).all()
    assert (np.abs(cosine(picture, target)) <= 1 + 1e-9).all()
    assert (mse(picture, target) >= 0).all()
    assert (psnr(picture, picture) == MAX_DB).all()


@pytest.mark.parametrize("peak", [1.0, 255.0])
@pytest.mark.parametrize("channels", [1, 3], ids=["grey", "rgb"])
def test_ssim_equals_scikit_image(channels: int, peak: float) -> None:
    """SSIM of grey and RGB pictures agrees with scikit-image's, with the same window and constants, to 1e-9."""
    reference = pytest.importorskip("skimage.metrics")
    target = pictures(2, channels, 40, 31) * peak
    noisy = np.clip(target + 0.2 * peak * pictures(2, channels, 40, 31, seed=1), 0, peak)
    expected = [
        reference.structural_similarity(
            one, other, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=peak, channel_axis=0
        )
        for one, other in zip(noisy, target, strict=True)
    ]
    np.testing.assert_allclose(ssim(noisy, target, peak=peak), expected, rtol=0, atol=1e-9)


def test_ssim_equals_scikit_image_on_photographs() -> None:
    """SSIM of the noisy fixture pictures, float32, agrees with scikit-image's to 1e-6."""
    reference = pytest.importorskip("skimage.metrics")
    with np.load(FIXTURES / "denoise" / "denoise_eval.npz") as data:
        noisy, target = data["noisy"], data["target"]
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 1}
    expected = [
        reference.structural_similarity(a[0].astype(float), b[0].astype(float), **options)
        for a, b in zip(noisy, target, strict=True)
    ]
    np.testing.assert_allclose(ssim(noisy, target), expected, rtol=0, atol=1e-6)


def test_axes_of_length_one_may_differ() -> None:
    """A target without the channel axis of a one-channel output is the same picture."""
    picture, target = pictures(2, 1, 5, 4), pictures(2, 5, 4, seed=1)
    np.testing.assert_array_equal(mse(picture, target), mse(picture[:, 0], target))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        pytest.param(lambda: mse(pictures(2, 3), pictures(2, 4)), r"shape \(3,\), its target \(4,\)", id="shape"),
        pytest.param(lambda: psnr(pictures(2, 3, 4), pictures(2, 4, 3)), "shaped like", id="transposed"),
        pytest.param(lambda: ssim(pictures(1, 1, 10, 20), pictures(1, 1, 10, 20)), "11 pixels or more", id="small"),
        pytest.param(lambda: ssim(pictures(20, 20), pictures(20, 20)), "11 pixels or more", id="not-pictures"),
        pytest.param(lambda: top1(pictures(2, 3), np.array([0, 3])), "from 0 to 3.*classes 0 to 2", id="class-above"),
        pytest.param(lambda: top1(pictures(2, 3), np.array([-1, 0])), "from -1 to 0", id="class-below"),
        pytest.param(lambda: top1(pictures(2, 3), np.array([0, 0, 0])), r"labels of shape \(3,\)", id="label-count"),
        pytest.param(lambda: top1(pictures(2), np.array([0, 1])), r"scores of shape \(2,\)", id="no-classes"),
        pytest.param(
            lambda: agreement(pictures(2, 3), pictures(2, 4)), r"found \(2, 3\), \(2, 4\)", id="agreement-of-others"
        ),
        pytest.param(lambda: agreement(pictures(2), pictures(2)), r"found \(2,\)", id="agreement-without-classes"),
        pytest.param(lambda: View(output="noise"), "'noise' is unknown; choose direct or residual", id="output"),
        pytest.param(lambda: View(data_range=0), "data range 0 is not above 0", id="data-range"),
        pytest.param(lambda: View(crop_border=-1), "border -1", id="border"),
        pytest.param(lambda: View(channels="hsv"), "'hsv' is unknown; choose rgb or y", id="channels"),
        pytest.param(lambda: View(round_bits=0), "round bits 0: pictures have 1 to 16", id="round-bits"),
        pytest.param(
            lambda: View(channels="y").compared(pictures(2, 1, 4, 4)),
            r"shape \(1, 4, 4\).*3 channels",
            id="luma-of-grey",
        ),
        pytest.param(lambda: View(crop_border=2).crop(pictures(1, 1, 4, 9)), "leaves nothing", id="border-too-wide"),
        pytest.param(
            lambda: View(output="residual").predict(pictures(1, 1, 8, 8), pictures(1, 1, 4, 4)),
            r"output has shape \(1, 1, 8, 8\), the input \(1, 1, 4, 4\)",
            id="residual-of-another-size",
        ),
    ],
)
def test_refusal(call, message: str) -> None:
    """What cannot be compared is a usage error that names the shapes or values."""
    with pytest.raises(UsageError, match=message):
        call()


@pytest.mark.parametrize(
    ("view", "expected"),
    [
        pytest.param(View(), [2.0, -1.0], id="direct"),
        pytest.param(View(clip=True), [1.0, 0.0], id="clip"),
        pytest.param(View(clip=True, data_range=1.5), [1.5, 0.0], id="clip-to-peak"),
        pytest.param(View(output="residual"), [-1.5, 1.5], id="residual"),
        pytest.param(View(output="residual", clip=True), [0.0, 1.0], id="residual-then-clip"),
    ],
)
def test_view_reads_the_output(view: View, expected: list[float]) -> None:
    """A residual is taken from the input, then values are limited to 0..peak."""
    np.testing.assert_array_equal(view.predict(np.array([[2.0, -1.0]]), np.array([[0.5, 0.5]])), [expected])


def test_view_crops_the_last_two_axes() -> None:
    """The border goes from all four sides of a picture; without one the picture stays."""
    picture = pictures(1, 3, 8, 9)
    np.testing.assert_array_equal(View(crop_border=2).crop(picture), picture[:, :, 2:6, 2:7])
    assert View().crop(picture) is picture


@pytest.mark.parametrize("peak", [1.0, 255.0])
@pytest.mark.parametrize(
    ("colour", "level"),
    [
        pytest.param((0, 0, 0), 16, id="black"),
        pytest.param((1, 1, 1), 235, id="white"),
        pytest.param((1, 0, 0), 81.481, id="red"),
        pytest.param((0, 1, 0), 144.553, id="green"),
        pytest.param((0, 0, 1), 40.966, id="blue"),
    ],
)
def test_luma_is_that_of_bt601(colour: tuple[int, ...], level: float, peak: float) -> None:
    """Luma reaches from 16 to 235 of 255, whatever the largest value of a picture."""
    picture = np.broadcast_to(np.reshape(colour, (1, 3, 1, 1)) * peak, (1, 3, 4, 5))
    found = View(channels="y", data_range=peak).compared(picture)
    np.testing.assert_allclose(found, np.full((1, 1, 4, 5), level / 255 * peak), rtol=1e-12)


@pytest.mark.parametrize(
    ("view", "expected"),
    [
        pytest.param(View(round_bits=8), [0.0, 100 / 255, 1.0], id="8-bit"),
        pytest.param(View(round_bits=1), [0.0, 0.0, 1.0], id="1-bit"),
        pytest.param(View(round_bits=8, data_range=255), [0.0, 0.0, 1.0], id="levels-of-255"),
        pytest.param(View(), [0.001, 0.3922, 0.999], id="not-rounded"),
    ],
)
def test_rounding_to_bits(view: View, expected: list[float]) -> None:
    """Values are rounded to the levels that so many bits have between 0 and the largest value."""
    found = view.compared(np.array([0.001, 0.3922, 0.999]).reshape(1, 1, 1, 3))
    np.testing.assert_allclose(found.ravel(), expected, rtol=0, atol=1e-12)


@given(arrays(np.float32, (1, 3, 6, 7), elements=st.floats(0, 1, width=32)))
def test_rounded_luma_is_that_of_rounded_pictures(picture: np.ndarray) -> None:
    """The protocol of super-resolution: a picture of whole levels, its luma in whole levels again, then the border off."""
    found = View(channels="y", round_bits=8, crop_border=1).compared(picture)
    levels = np.rint(picture.astype(np.float64) * 255)
    expected = 16 + np.tensordot([65.481, 128.553, 24.966], levels[0] / 255, axes=1)
    assert found.shape == (1, 1, 4, 5)
    np.testing.assert_allclose(found * 255, np.rint(found * 255), rtol=0, atol=1e-9)
    assert np.abs(found[0, 0] * 255 - expected[1:-1, 1:-1]).max() <= 0.5 + 1e-9


def test_registry_states_direction_and_needs() -> None:
    """Every metric says what is better and what it compares with."""
    facts = {name: (metric.higher_is_better, metric.needs) for name, metric in METRICS.items()}
    assert facts == {
        "psnr": (True, "target"),
        "ssim": (True, "target"),
        "top1": (True, "label"),
        "cosine": (True, "reference"),
        "mse": (False, "reference"),
        "agreement-psnr": (True, "original"),
        "agreement-top1": (True, "original"),
    }
    assert all(find(name) is metric for name, metric in METRICS.items())


def plug_in(monkeypatch: pytest.MonkeyPatch, target: str) -> None:
    """Pretend that a package offers the metric ``doubled`` at ``target``."""
    entry = EntryPoint("doubled", target, "onnxprune.metrics")
    monkeypatch.setattr(metrics, "entry_points", lambda group, name="doubled": [entry] if name == "doubled" else [])


def test_plug_in_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """An entry point of the group is a metric like any other."""
    plug_in(monkeypatch, "example:DOUBLED")
    monkeypatch.setattr(EntryPoint, "load", lambda _: DOUBLED)
    assert find("doubled") is DOUBLED
    assert metrics.names() == (*METRICS, "doubled")


@pytest.mark.parametrize(
    ("name", "target", "message"),
    [
        pytest.param("nosuch", "math:pi", "nosuch: unknown; choose from psnr, ssim, top1, cosine, mse", id="unknown"),
        pytest.param("doubled", "no_such_module:metric", "no_such_module:metric does not load", id="broken-plug-in"),
        pytest.param("doubled", "math:pi", "math:pi is not an onnxprune.metrics.Metric", id="not-a-metric"),
    ],
)
def test_metric_not_found(monkeypatch: pytest.MonkeyPatch, name: str, target: str, message: str) -> None:
    """A name without a working metric is a usage error that says what there is or what failed."""
    plug_in(monkeypatch, target)
    with pytest.raises(UsageError, match=message):
        find(name)


# -- metrics of one's own ----------------------------------------------------------------------------------------------


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A module of metrics in the current folder."""
    (tmp_path / "own_metrics.py").write_text(OWN)
    (tmp_path / "own_script.py").write_text("raise SystemExit(3)")
    (tmp_path / "own_broken.py").write_text("import no_such_package")
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for name in ("own_metrics", "own_script", "own_broken"):
        sys.modules.pop(name, None)


OWN = """
import numpy as np
from onnxprune.measures import mse
from onnxprune.metrics import Metric

def plain(prediction, wanted):
    return np.abs(prediction - wanted).reshape(len(prediction), -1).max(1)

def labelled(prediction, wanted):
    return wanted
labelled.higher_is_better = False
labelled.needs = "label"

class Space:
    inner = staticmethod(plain)

ready = Metric("ready", mse, False, "reference")
number = 3

def unsure(prediction, wanted):
    return wanted
unsure.higher_is_better = "yes"

def greedy(prediction, wanted):
    return wanted
greedy.needs = "everything"

def failing(prediction, wanted):
    return prediction[99]
"""


@pytest.mark.parametrize(
    ("name", "better", "needs"),
    [
        pytest.param("plain", True, "target", id="defaults"),
        pytest.param("labelled", False, "label", id="attributes"),
        pytest.param("Space.inner", True, "target", id="dotted"),
    ],
)
def test_function_named_by_its_module(own: Path, name: str, better: bool, needs: str) -> None:
    """A function of a module in the current folder is a metric of that name; its attributes say what it needs."""
    path = list(sys.path)
    metric = find(f"own_metrics:{name}")
    assert (metric.name, metric.higher_is_better, metric.needs) == (f"own_metrics:{name}", better, needs)
    assert sys.path == path
    if needs == "target":
        np.testing.assert_array_equal(metric.function(np.array([[1.0, 5.0]]), np.array([[0.0, 2.0]])), [3])


def test_metric_object_named_by_its_module(own: Path) -> None:
    """A module may hold a metric ready made, with options that a function cannot state."""
    assert find("own_metrics:ready").name == "ready"


def test_function_and_metric_are_found_as_they_are() -> None:
    """From Python a function needs no name, and a metric is itself."""
    assert find(mse).name == "mse"
    assert find(DOUBLED) is DOUBLED
    assert from_function(mse, "error").name == "error"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        pytest.param("no_such_module:score", "there is no module no_such_module; install it", id="no-module"),
        pytest.param("own_metrics.deeper:score", "there is no module|is not a package", id="no-package"),
        pytest.param("own_metrics:nothing", "module own_metrics has no nothing", id="no-function"),
        pytest.param("own_metrics:", "write it as module:function", id="no-name"),
        pytest.param(":plain", "write it as module:function", id="nameless-module"),
        pytest.param("own_metrics:number", "is no function but int", id="no-callable"),
        pytest.param("own_metrics:unsure", "higher_is_better is 'yes'; it must be True or False", id="direction"),
        pytest.param("own_metrics:greedy", "needs is 'everything'; it must be one of target, label", id="needs"),
        pytest.param("own_broken:score", "importing own_broken fails: No module named 'no_such_package'", id="broken"),
        pytest.param("own_script:score", "importing own_script fails: SystemExit: 3", id="script"),
        pytest.param(".own:score", "importing .own fails: TypeError", id="relative"),
    ],
)
def test_name_without_a_function(own: Path, name: str, message: str) -> None:
    """A module or function that is not there, or is not what it must be, is a usage error that says so."""
    with pytest.raises(UsageError, match=message):
        find(name)


def test_failing_function(own: Path) -> None:
    """What a user's function raises is told with the shapes that it was given, not as an internal error."""
    with pytest.raises(UsageError, match=r"fails on a prediction of shape \(1, 2\), wanted \(1, 2\): IndexError"):
        find("own_metrics:failing").function(np.zeros((1, 2)), np.zeros((1, 2)))
