"""Pictures: the window in which outputs differ most."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest

from onnxprune.report.pictures import WINDOW, is_picture, worst

PIL = pytest.importorskip("PIL.Image")


def pixels(uri: str) -> np.ndarray:
    """The picture in a data URI."""
    return np.asarray(PIL.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))))


def test_the_worst_window_of_the_worst_sample_comes_first() -> None:
    """Brute force over all windows finds the same place and the same error."""
    rng = np.random.default_rng(0)
    samples = []
    for size in (0.01, 0.05, 0.02):
        before = rng.random((3, 130, 117), np.float32)
        after = before + size * rng.standard_normal(before.shape).astype(np.float32) * (rng.random((130, 117)) < 0.3)
        samples.append((before, after, None))
    found = worst(samples, 1.0, shown=2)
    assert [picture.sample for picture in found] == [1, 2]
    squares = np.square(samples[1][1].astype(np.float64) - samples[1][0]).mean(0)
    corners = [(y, x) for y in range(130 - WINDOW + 1) for x in range(117 - WINDOW + 1)]
    places = [(squares[y : y + WINDOW, x : x + WINDOW].mean(), y, x) for y, x in corners]
    error, top, left = max(places)
    assert (found[0].top, found[0].left) == (top, left)
    assert found[0].rms == pytest.approx(error**0.5)


def test_pixels_are_the_outputs() -> None:
    """Original and pruned are shown from black to white over the peak; the difference around grey, times the gain."""
    before = np.linspace(0, 255, 16 * 16, dtype=np.float32).reshape(1, 16, 16)
    after = before + np.float32(8)
    (picture,) = worst([(before, after, before[:, ::-1])], 255.0)
    np.testing.assert_array_equal(pixels(picture.original), np.rint(before[0]))
    np.testing.assert_array_equal(pixels(picture.pruned), np.rint(np.clip(after[0], 0, 255)))
    assert picture.wanted is not None
    np.testing.assert_array_equal(pixels(picture.wanted), np.rint(before[0, ::-1]))
    assert picture.gain == 8
    np.testing.assert_array_equal(pixels(picture.difference), np.full((16, 16), np.rint(255 * (0.5 + 8 * 8 / 255))))


def test_without_a_peak_the_originals_range_is_shown() -> None:
    """Outputs in other units are neither black nor white all over."""
    before = np.linspace(-3, 5, 64, dtype=np.float32).reshape(1, 8, 8)
    (picture,) = worst([(before, before + 0.1, None)], None)
    assert (picture.low, picture.high) == (-3, 5)
    assert pixels(picture.original).min() == 0
    assert pixels(picture.original).max() == 255


@pytest.mark.parametrize(
    "sample",
    [
        pytest.param(np.zeros((1, 8, 8), np.float32), id="no-difference"),
        pytest.param(np.full((1, 8, 8), 6e4, np.float16), id="overflowing-half"),
    ],
)
def test_extremes(sample: np.ndarray) -> None:
    """Equal outputs have a picture; halves do not overflow in their difference."""
    (picture,) = worst([(sample, -sample, None)], 1.0)
    assert np.isfinite(picture.largest)
    assert picture.gain >= 1


def test_infinities_and_other_shapes_are_passed_over() -> None:
    """They are no pictures."""
    endless = np.full((1, 8, 8), np.inf, np.float32)
    assert worst([(endless, endless, None), (np.zeros((10,)), np.zeros((10,)), None)], 1.0) == ()
    assert not is_picture((4, 64, 64))
    assert not is_picture((1, 1, 64))
