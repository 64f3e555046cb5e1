"""Data of every documented format becomes feeds that fit the model, or an error that says what to do."""

import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, numpy_helper

from onnxprune.data import Inputs, Samples, halves, load, part_of
from onnxprune.errors import FileError, OnnxPruneError, UsageError
from onnxprune.runtime import Session

FIXTURES = Path(__file__).parents[1] / "fixtures"
FLOAT = np.dtype(np.float32)
ANY_SIZE: Inputs = {"x": (("batch", 1, "height", "width"), FLOAT)}
COLOUR: Inputs = {"x": ((None, 3, None, None), FLOAT)}
PAIR: Inputs = {"ids": (("n", "length"), np.dtype(np.int64)), "mask": (("n", "length"), FLOAT)}


def floats(*shape: int, seed: int = 0) -> np.ndarray:
    """Draw seeded float32 values in 0..1."""
    return np.random.default_rng(seed).random(shape, dtype=np.float32)


def bytes_(*shape: int, seed: int = 0) -> np.ndarray:
    """Draw seeded uint8 values."""
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def npz(folder: Path, **arrays: np.ndarray) -> Path:
    """Write arrays to a file and return its path."""
    path = folder / "data.npz"
    np.savez(path, **arrays)
    return path


def shapes(samples: Samples, name: str) -> list[tuple[int, ...]]:
    """Return the shape of one input in every feed."""
    return [feed[name].shape for feed in samples.feeds]


@pytest.mark.parametrize(
    ("name", "n", "labels", "targets"),
    [
        pytest.param("digits_calib", 256, False, False, id="digits_calib"),
        pytest.param("digits_eval", 360, True, False, id="digits_eval"),
        pytest.param("denoise_calib", 64, False, False, id="denoise_calib"),
        pytest.param("denoise_eval", 8, False, True, id="denoise_eval"),
    ],
)
def test_fixtures_load(name: str, n: int, labels: bool, targets: bool) -> None:
    """The project's own data load for its own models, in order and unchanged."""
    folder = FIXTURES / name.partition("_")[0]
    session = Session(str(folder / f"{folder.name}.onnx"), threads=1)
    samples = load(folder / f"{name}.npz", session.inputs)
    assert samples.n == n
    assert (samples.labels is not None, samples.targets is not None) == (labels, targets)
    assert samples.batched
    assert samples.notes == ()
    (key,) = session.inputs
    with np.load(folder / f"{name}.npz") as stored:
        np.testing.assert_array_equal(np.concatenate([feed[key] for feed in samples.feeds]), stored[key])
        if labels:
            np.testing.assert_array_equal(np.concatenate(samples.labels), stored["label"])


@given(st.integers(1, 20), st.integers(1, 7), st.none() | st.integers(1, 25), st.sampled_from(["n", 1, 3, 4]))
def test_batches_hold_every_sample_once(n: int, batch: int, limit: int | None, declared: int | str) -> None:
    """Whatever the batch, the counted rows are the samples in order, and a fixed batch is always full."""
    array = floats(n, 2)
    with tempfile.TemporaryDirectory() as folder:
        path = npz(Path(folder), x=array, label=np.arange(n))
        samples = load(path, {"x": ((declared, 2), FLOAT)}, limit, batch=batch)
    expected = array[:limit]
    assert samples.n == len(expected) == sum(samples.counts)
    rows = [feed["x"][:count] for feed, count in zip(samples.feeds, samples.counts, strict=True)]
    np.testing.assert_array_equal(np.concatenate(rows), expected)
    np.testing.assert_array_equal(np.concatenate(samples.labels), np.arange(len(expected)))
    size = declared if isinstance(declared, int) else batch
    assert all(count == size for count in samples.counts[:-1])
    assert all(len(feed["x"]) == declared for feed in samples.feeds if isinstance(declared, int))


def test_fixed_batch_repeats_the_last_sample(tmp_path: Path) -> None:
    """An incomplete fixed batch is filled up with its last sample; counts say how many rows are real."""
    samples = load(npz(tmp_path, x=floats(5, 1, 4, 4)), {"x": ((4, 1, 4, 4), FLOAT)})
    assert samples.counts == (4, 1)
    last = samples.feeds[1]["x"]
    assert last.shape == (4, 1, 4, 4)
    assert (last == last[0]).all()


@pytest.mark.parametrize("with_axis", [True, False], ids=["with_batch_axis", "without_batch_axis"])
def test_samples_of_different_sizes(tmp_path: Path, with_axis: bool) -> None:
    """NAME_000, ... hold one sample each, in numerical order; neighbours of equal size share a feed."""
    lead = (1,) if with_axis else ()
    sizes = {"2": (6, 5), "000": (4, 4), "1": (6, 5), "10": (3, 3)}
    pictures = {key: floats(*lead, 1, *size) for key, size in sizes.items()}
    arrays = {f"x_{key}": picture for key, picture in pictures.items()}
    arrays |= {f"target_{key}": picture + 1 for key, picture in pictures.items()}
    samples = load(npz(tmp_path, **arrays), ANY_SIZE)
    assert shapes(samples, "x") == [(1, 1, 4, 4), (2, 1, 6, 5), (1, 1, 3, 3)]
    for feed, target in zip(samples.feeds, samples.targets, strict=True):
        np.testing.assert_array_equal(feed["x"] + 1, target)


def test_numbered_labels_and_one_label_array_agree(tmp_path: Path) -> None:
    """Labels may be numbered scalars or one array for all samples."""
    pictures = {f"x_{k}": floats(1, 4, 4 + k) for k in range(3)}
    one = load(npz(tmp_path, **pictures, labels=np.array([5, 6, 7])), ANY_SIZE)
    numbered = load(npz(tmp_path, **pictures, **{f"label_{k}": np.array(k + 5) for k in range(3)}), ANY_SIZE)
    for samples in (one, numbered):
        assert [label.tolist() for label in samples.labels] == [[5], [6], [7]]


def test_several_inputs_go_together(tmp_path: Path) -> None:
    """Arrays of several inputs are cut alike; integers may be narrower than the model's."""
    path = npz(tmp_path, ids=np.arange(12, dtype=np.int32).reshape(4, 3), mask=np.ones((4, 3), bool))
    samples = load(path, PAIR, batch=3)
    assert samples.counts == (3, 1)
    assert samples.feeds[1]["ids"].tolist() == [[9, 10, 11]]
    assert samples.feeds[1]["ids"].dtype == np.int64
    assert samples.feeds[1]["mask"].tolist() == [[1, 1, 1]]


@pytest.mark.parametrize(
    ("declared", "stored", "fed", "batched"),
    [
        pytest.param(("n", 3, 4, 4), (5, 1, 3, 4, 4), (5, 3, 4, 4), True, id="batch-axis-in-each-sample"),
        pytest.param((1, 3, 4, 4), (5, 3, 4, 4), (1, 3, 4, 4), True, id="batch-1"),
        pytest.param(("h", "w"), (5, 6, 7), (6, 7), False, id="no-batch-axis"),
        pytest.param((), (5,), (), False, id="scalar"),
        pytest.param(("n", 3, 4, 4), (5, 2, 3, 4, 4), (2, 3, 4, 4), True, id="rows-together"),
    ],
)
def test_axis_0_is_samples(tmp_path: Path, declared: tuple, stored: tuple, fed: tuple, batched: bool) -> None:
    """Axis 0 of a stored array is the samples, with or without a batch axis behind it."""
    samples = load(npz(tmp_path, x=floats(*stored)), {"x": (declared, FLOAT)})
    assert shapes(samples, "x")[0] == fed
    assert samples.batched == batched


def test_whole_samples_keep_their_targets(tmp_path: Path) -> None:
    """A target of a sample without batch axis gets the axis of samples that every target has."""
    samples = load(npz(tmp_path, x=floats(2, 6, 7), target=floats(2, 6, 7)), {"x": (("h", "w"), FLOAT)})
    assert samples.counts == (1, 1)
    assert samples.targets[0].shape == (1, 6, 7)


@pytest.mark.parametrize(
    "arrays",
    [
        pytest.param({"pictures": floats(3, 1, 4, 4)}, id="only-array"),
        pytest.param({"pictures": floats(3, 1, 4, 4), "label": np.arange(3)}, id="beside-label"),
        pytest.param({"pictures": floats(3, 1, 4, 4), "sigma": np.array(25.0)}, id="only-one-that-fits"),
        pytest.param({f"pictures_{k}": floats(1, 4, 4) for k in range(3)}, id="numbered"),
        pytest.param({"pictures": floats(3, 1, 4, 4), "names": np.array(["a", "b", "c"])}, id="beside-text"),
    ],
)
def test_only_array_feeds_the_only_input(tmp_path: Path, arrays: dict[str, np.ndarray]) -> None:
    """A model with one input takes the one array that can be meant, and a note says so."""
    samples = load(npz(tmp_path, **arrays), ANY_SIZE)
    assert samples.n == 3
    assert samples.notes == ("array 'pictures' is taken as the model's input 'x'",)
    assert (samples.labels is not None) == ("label" in arrays)


def test_input_may_be_called_label(tmp_path: Path) -> None:
    """An input's own name goes before the meaning of "label"."""
    samples = load(npz(tmp_path, label=floats(3, 2)), {"label": (("n", 2), FLOAT)})
    assert samples.labels is None
    assert shapes(samples, "label") == [(3, 2)]


# -- halves ------------------------------------------------------------------------------------------------------------


def numbers(samples: Samples) -> list[float]:
    """Return the first value of every sample, as it is fed."""
    rows = [feed["x"][:count] for feed, count in zip(samples.feeds, samples.counts, strict=True)]
    return np.concatenate(rows).reshape(samples.n, -1)[:, 0].tolist()


@given(st.integers(2, 20), st.integers(1, 7), st.sampled_from(["n", 1, 3, 4]))
def test_halves_share_no_sample(n: int, batch: int, declared: int | str) -> None:
    """Every second sample is in one half, the others in the other, with their labels, and fixed batches are full."""
    array = np.arange(2 * n, dtype=np.float32).reshape(n, 2)
    with tempfile.TemporaryDirectory() as folder:
        path = npz(Path(folder), x=array, label=np.arange(n), target=array + 1)
        samples = load(path, {"x": ((declared, 2), FLOAT)}, batch=batch)
    for first, half in enumerate(halves(samples)):
        assert numbers(half) == array[first::2, 0].tolist()
        assert np.concatenate(half.labels).tolist() == list(range(n))[first::2]
        np.testing.assert_array_equal(np.concatenate(half.targets), array[first::2] + 1)
        assert 0 not in half.counts
        assert all(len(feed["x"]) == declared for feed in half.feeds if isinstance(declared, int))


def test_rows_that_fill_a_batch_are_in_no_half(tmp_path: Path) -> None:
    """A batch is filled up with the half's own last sample, not with one of the other half."""
    samples = load(npz(tmp_path, x=np.arange(6, dtype=np.float32).reshape(6, 1)), {"x": ((4, 1), FLOAT)})
    search, check = halves(samples)
    assert [feed["x"].ravel().tolist() for feed in search.feeds] == [[0, 2, 2, 2], [4, 4, 4, 4]]
    assert [feed["x"].ravel().tolist() for feed in check.feeds] == [[1, 3, 3, 3], [5, 5, 5, 5]]
    assert (search.counts, check.counts) == ((2, 1), (2, 1))


def test_halves_of_samples_of_different_sizes(tmp_path: Path) -> None:
    """Samples that are fed one by one alternate; a feed of which nothing is left goes."""
    arrays = {f"x_{k}": np.full((1, 4, 4 + k), k, np.float32) for k in range(3)}
    search, check = halves(load(npz(tmp_path, **arrays), ANY_SIZE))
    assert (numbers_of_feeds(search), numbers_of_feeds(check)) == ([0, 2], [1])


def numbers_of_feeds(samples: Samples) -> list[float]:
    """Return the first value of every feed."""
    return [float(feed["x"].ravel()[0]) for feed in samples.feeds]


def test_halves_of_feeds_without_batch_axis(tmp_path: Path) -> None:
    """Where a feed as a whole is one sample, it is never taken apart."""
    array = np.arange(5, dtype=np.float32)[:, None, None] * np.ones((1, 6, 7), np.float32)
    search, check = halves(load(npz(tmp_path, x=array, target=array), {"x": (("h", "w"), FLOAT)}))
    assert (numbers_of_feeds(search), numbers_of_feeds(check)) == ([0, 2, 4], [1, 3])
    assert shapes(search, "x") == [(6, 7)] * 3
    assert [target.shape for target in check.targets] == [(1, 6, 7)] * 2


def test_parts_are_all_and_the_halves(tmp_path: Path) -> None:
    """A part is named; another name is a usage error."""
    samples = load(npz(tmp_path, x=np.arange(4, dtype=np.float32).reshape(4, 1)), {"x": (("n", 1), FLOAT)})
    assert part_of(samples, "all") is samples
    assert (numbers(part_of(samples, "search")), numbers(part_of(samples, "check"))) == ([0, 2], [1, 3])
    with pytest.raises(UsageError, match="part 'train' of the data is unknown; choose all, search or check"):
        part_of(samples, "train")


def test_one_sample_has_no_halves(tmp_path: Path) -> None:
    """A result cannot be checked on another sample than it fits where there is but one."""
    with pytest.raises(UsageError, match="holds one sample; give two or more"):
        halves(load(npz(tmp_path, x=floats(1, 1, 4, 4)), ANY_SIZE))


# -- values ------------------------------------------------------------------------------------------------------------


def test_uint8_is_divided_by_255(tmp_path: Path) -> None:
    """uint8 for a float input, and as target, becomes 0..1 exactly at both ends, and a note says so."""
    ramp = np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16)
    samples = load(npz(tmp_path, x=ramp, target=ramp), ANY_SIZE)
    for values in (samples.feeds[0]["x"], samples.targets[0]):
        assert values.dtype == np.float32
        np.testing.assert_array_equal(values, ramp / np.float32(255))
    assert samples.notes == ("uint8 values were divided by 255; give a scale for anything else",)


@pytest.mark.parametrize(
    ("mean", "std"),
    [
        pytest.param(0.5, 0.25, id="one-number"),
        pytest.param((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), id="per-channel"),
    ],
)
@pytest.mark.parametrize("last", [False, True], ids=["nchw", "nhwc"])
def test_mean_and_std(tmp_path: Path, mean: float, std: float, last: bool) -> None:
    """Integers become (value * scale - mean) / std along the channels, in float32."""
    pictures = bytes_(2, 4, 5, 3)
    expected = (pictures / 255 - np.array(mean)) / np.array(std)
    if not last:
        pictures, expected = pictures.transpose(0, 3, 1, 2), expected.transpose(0, 3, 1, 2)
    inputs = {"x": ((None, *pictures.shape[1:]), FLOAT)}
    samples = load(npz(tmp_path, x=pictures), inputs, mean=mean, std=std)
    np.testing.assert_allclose(samples.feeds[0]["x"], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "scale"), [pytest.param(np.uint16, 1 / 65280, id="uint16"), pytest.param(np.uint8, 1, id="uint8")]
)
def test_explicit_scale(tmp_path: Path, dtype: type, scale: float) -> None:
    """A given scale holds for every integer type and needs no note."""
    pictures = bytes_(2, 1, 4, 4).astype(dtype)
    samples = load(npz(tmp_path, x=pictures), ANY_SIZE, scale=scale)
    np.testing.assert_allclose(samples.feeds[0]["x"], pictures * scale, rtol=1e-6)
    assert samples.notes == ()


def test_floats_are_taken_as_they_are(tmp_path: Path) -> None:
    """Scale, mean and std leave floats alone, and a note says that they had no effect."""
    pictures = floats(2, 1, 4, 4)
    samples = load(npz(tmp_path, x=pictures), ANY_SIZE, scale=0.5, mean=1, std=2)
    np.testing.assert_array_equal(samples.feeds[0]["x"], pictures)
    assert samples.notes == ("scale, mean and std apply to integers that enter a float input; the data holds none",)


@pytest.mark.parametrize(
    ("stored", "taken"),
    [(np.float64, np.float32), (np.float32, np.float16), (">f4", np.float32), (np.float16, np.float64)],
)
def test_floats_are_cast(tmp_path: Path, stored: type, taken: type) -> None:
    """Floats of any precision and byte order become what the model takes."""
    pictures = floats(2, 3).astype(stored)
    fed = load(npz(tmp_path, x=pictures), {"x": (("n", 3), np.dtype(taken))}).feeds[0]["x"]
    assert fed.dtype == taken
    np.testing.assert_array_equal(fed, pictures.astype(taken))


@pytest.mark.parametrize("limit", [None, 2])
def test_fortran_order(tmp_path: Path, limit: int | None) -> None:
    """Arrays in column order read like any other, and feeds are contiguous."""
    pictures = floats(3, 1, 4, 5)
    samples = load(npz(tmp_path, x=np.asfortranarray(pictures)), ANY_SIZE, limit)
    np.testing.assert_array_equal(samples.feeds[0]["x"], pictures[:limit])
    assert samples.feeds[0]["x"].flags.c_contiguous


# -- folders -----------------------------------------------------------------------------------------------------------


def test_folder_of_npy(tmp_path: Path) -> None:
    """Each .npy file is a sample, in the order of names; limit counts files; other files are passed over."""
    for name, value in (("b", 2), ("a", 1), ("c", 3)):
        np.save(tmp_path / f"{name}.npy", np.full((1, 4, 4), value, np.float32))
    (tmp_path / "README.txt").write_text("three samples")
    samples = load(tmp_path, ANY_SIZE, 2)
    assert samples.feeds[0]["x"][:, 0, 0, 0].tolist() == [1, 2]


def test_folder_of_npz(tmp_path: Path) -> None:
    """Each .npz file is a sample of all inputs, with its label."""
    for k in range(3):
        np.savez(tmp_path / f"{k}.npz", ids=np.full(4, k), mask=np.ones((1, 4), np.float32), label=np.array(k))
    samples = load(tmp_path, PAIR)
    assert shapes(samples, "ids") == shapes(samples, "mask") == [(3, 4)]
    assert samples.labels[0].tolist() == [0, 1, 2]


def test_npy_file_holds_all_samples(tmp_path: Path) -> None:
    """A .npy file alone is an array of samples."""
    np.save(tmp_path / "x.npy", floats(5, 1, 4, 4))
    assert load(tmp_path / "x.npy", ANY_SIZE).n == 5


def data_set(folder: Path, **tensors: np.ndarray) -> None:
    """Write tensors as .pb files, each under the name ``t_`` + its own, as exporters like to rename."""
    folder.mkdir()
    for name, array in tensors.items():
        (folder / f"{name}.pb").write_bytes(numpy_helper.from_array(array, f"t_{name}").SerializeToString())


def test_onnx_test_data_set(tmp_path: Path) -> None:
    """Inputs come in the model's order, and the first float output is the target."""
    folder = tmp_path / "test_data_set_0"
    ids, mask, result = np.arange(3)[None], floats(1, 3), floats(1, 2)
    data_set(folder, input_0=ids, input_1=mask, output_0=np.array([1]), output_1=result)
    samples = load(folder, PAIR)
    np.testing.assert_array_equal(samples.feeds[0]["ids"], ids)
    np.testing.assert_array_equal(samples.feeds[0]["mask"], mask)
    np.testing.assert_array_equal(samples.targets[0], result)


def test_folder_of_test_data_sets(tmp_path: Path) -> None:
    """A folder of test_data_set_N gives one sample each, in numerical order."""
    for k in (10, 9):
        data_set(tmp_path / f"test_data_set_{k}", input_0=np.full((1, 1, 2, 2), k, np.float32))
    samples = load(tmp_path, ANY_SIZE)
    assert samples.feeds[0]["x"][:, 0, 0, 0].tolist() == [9, 10]


@pytest.mark.parametrize(
    ("declared", "fed"),
    [
        pytest.param((None, 3, None, None), (2, 3, 6, 5), id="colour"),
        pytest.param((None, 1, None, None), (2, 1, 6, 5), id="grey"),
        pytest.param((None, 6, 5, 3), (2, 6, 5, 3), id="channels-last"),
        pytest.param((None, None, None, None), (2, 3, 6, 5), id="channels-unknown"),
    ],
)
def test_folder_of_images(tmp_path: Path, declared: tuple, fed: tuple) -> None:
    """Each image is a sample in 0..1, in the channels and axis order that the model takes."""
    image = pytest.importorskip("PIL.Image")
    pixels = bytes_(6, 5, 3)
    for name in ("a.png", "b.PNG"):
        image.fromarray(pixels).save(tmp_path / name)
    x = load(tmp_path, {"x": (declared, FLOAT)}).feeds[0]["x"]
    assert x.shape == fed
    if 3 in declared[1::2]:
        expected = pixels if declared[3] == 3 else pixels.transpose(2, 0, 1)
        np.testing.assert_array_equal(x[0], expected / np.float32(255))


def test_images_without_pillow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where Pillow is missing, the error names what to install."""
    (tmp_path / "a.png").touch()
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(UsageError, match=r"pip install 'onnxprune\[images\]'"):
        load(tmp_path, COLOUR)


@pytest.mark.parametrize(
    ("mode", "declared", "message"),
    [
        pytest.param("RGB", (None, 3, 9, 9), r"shape \(3, 6, 5\), the model takes \(\?, 3, 9, 9\)", id="size"),
        pytest.param("RGB", (None, 4, None, None), "mode RGB does not fit", id="four-channels"),
        pytest.param("I;16", (None, 1, None, None), "mode I;16 does not fit.*store others as .npy", id="16-bit"),
        pytest.param("RGB", (None, 90), "images need four axes", id="no-picture-input"),
    ],
)
def test_image_that_does_not_fit(tmp_path: Path, mode: str, declared: tuple, message: str) -> None:
    """An image is never resized or squeezed into 8 bits behind the user's back."""
    image = pytest.importorskip("PIL.Image")
    image.new(mode, (5, 6)).save(tmp_path / "a.png")
    with pytest.raises(UsageError, match=message):
        load(tmp_path, {"x": (declared, FLOAT)})


# -- refusals ----------------------------------------------------------------------------------------------------------

INF = np.full((2, 1, 4, 4), 1e30, np.float32)
NAN = np.where(np.arange(3).reshape(3, 1, 1, 1) == 1, np.nan, floats(3, 1, 4, 4))
HALF: Inputs = {"x": (("n", 1, 4, 4), np.dtype(np.float16))}
WHOLE: Inputs = {"x": (("n", 2), np.dtype(np.int32))}
TWO_BATCHES: Inputs = {"a": ((2, 3), FLOAT), "b": ((4, 3), FLOAT)}


@pytest.mark.parametrize(
    ("inputs", "arrays", "options", "message"),
    [
        pytest.param(COLOUR, {"x": floats(2, 1, 4, 4)}, {}, r"shape \(1, 4, 4\), .*\(\?, 3, \?, \?\)", id="channels"),
        pytest.param(ANY_SIZE, {"x": floats(4, 4)}, {}, r"\(batch, 1, height, width\); give each sample", id="rank"),
        pytest.param(ANY_SIZE, {"x": floats(2, 1, 0, 4)}, {}, r"shape \(1, 0, 4\)", id="empty-sample"),
        pytest.param(ANY_SIZE, {"x": floats(0, 1, 4, 4)}, {}, "holds no samples", id="no-samples"),
        pytest.param(ANY_SIZE, {"x": np.array(1.0)}, {}, "'x' is a single number", id="scalar"),
        pytest.param(ANY_SIZE, {"x": NAN}, {}, "sample 1: 'x' holds NaN", id="nan"),
        pytest.param(ANY_SIZE, {"x": floats(3, 1, 4, 4), "target": NAN}, {}, "'target' holds NaN", id="nan-target"),
        pytest.param(HALF, {"x": INF}, {}, "beyond the range of float16", id="float16-overflow"),
        pytest.param(WHOLE, {"x": floats(3, 2)}, {}, "holds float32, the model takes int32", id="floats-for-integers"),
        pytest.param(WHOLE, {"x": np.full((3, 2), 2**40)}, {}, "beyond the range of int32", id="integer-overflow"),
        pytest.param(ANY_SIZE, {"x": np.ones((2, 1, 4, 4), int)}, {}, "holds int64.*give a scale", id="integers-unscaled"),
        pytest.param(COLOUR, {"x": bytes_(2, 3, 4, 4)}, {"mean": (1, 2)}, "mean 2 numbers; give one, or", id="mean"),
        pytest.param(COLOUR, {"x": bytes_(2, 3, 4, 4)}, {"std": 0}, "std 0: all must be finite", id="std-0"),
        pytest.param(COLOUR, {"x": bytes_(2, 3, 4, 4)}, {"scale": np.nan}, "scale nan", id="scale-nan"),
        pytest.param(PAIR, {"ids": np.ones((2, 3), int)}, {}, "no array for input 'mask'.*found 'ids'", id="missing"),
        pytest.param(ANY_SIZE, {"a": floats(2, 1, 4, 4), "b": floats(2, 1, 4, 4)}, {}, "found 'a'.*'b'", id="two-fit"),
        pytest.param(ANY_SIZE, {"label": np.arange(3)}, {}, "no array for input 'x'", id="only-labels"),
        pytest.param(ANY_SIZE, {"x": floats(3, 1, 4, 4), "label": np.arange(2)}, {}, "x 3, label 2", id="counts"),
        pytest.param(ANY_SIZE, {"x": floats(2, 1, 4, 4), "label": floats(2)}, {}, "labels are class numbers", id="labels"),
        pytest.param(TWO_BATCHES, {"a": floats(4, 3), "b": floats(4, 3)}, {}, r"'a' .* takes \(2, 3\)", id="two-batches"),
        pytest.param(
            {"x": ((4, 1, 4, 4), FLOAT)}, {"x_0": floats(3, 1, 4, 4)}, {}, r"\(3, 1, 4, 4\), the model", id="other-batch"
        ),
        pytest.param(ANY_SIZE, {"x": floats(2, 1, 4, 4)}, {"limit": 0}, "limit 0", id="limit-0"),
        pytest.param(ANY_SIZE, {"x": floats(2, 1, 4, 4)}, {"batch": 0}, "batch 0", id="batch-0"),
    ],
)  # fmt: skip
def test_content_that_does_not_fit(
    tmp_path: Path, inputs: Inputs, arrays: dict[str, np.ndarray], options: dict, message: str
) -> None:
    """Content that does not fit is a usage error naming the array, what was found and what is taken."""
    with pytest.raises(UsageError, match=message):
        load(npz(tmp_path, **arrays), inputs, **options)


def header(shape: tuple[int, ...], dtype: object = "<f4", fortran: bool = False) -> bytes:
    """Return the beginning of a .npy file that declares an array."""
    return written(f"{{'descr': {dtype!r}, 'fortran_order': {fortran}, 'shape': {shape}, }}")


def written(header: str) -> bytes:
    """Return the beginning of a .npy file with this header."""
    text = header.encode()
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        pytest.param("x.npy", header((10**6, 1, 1024, 1024)), "takes 3906.2 GiB, over the bound of 4", id="giant"),
        pytest.param("x.npy", header((2, 1, 4, 4)), "'x' ends early", id="cut-short"),
        pytest.param("x.npy", header((-2, 1, 4, 4)), r"shape \(-2, 1, 4, 4\)", id="negative-size"),
        pytest.param("x.npy", header((2, 1, 4, 4), "|O"), "type object; only plain numbers", id="pickled-objects"),
        pytest.param("x.npy", header((2, 1, 4, 4), "<U3"), "type <U3; only plain numbers", id="text"),
        pytest.param("x.npy", header((True, 1, 4, 4)), r"shape \(True, 1, 4, 4\)", id="truth-as-size"),
        pytest.param("x.npy", header((2, 1, 4, 4), ()), "'x' has a broken header", id="empty-type"),
        pytest.param("x.npy", written("{"), "'x' has a broken header", id="unclosed-header"),
        pytest.param("x.npy", written("{[]: 1}"), "'x' has a broken header", id="unhashable-key"),
        pytest.param("x.npy", b"\x93NUMPY\x09\x00" + bytes(100), "version", id="unknown-version"),
        pytest.param("x.npy", b"\x93NUMPY\x02\x00\xff\xff\xff\xff" + bytes(100), "damaged", id="giant-header"),
        pytest.param("x.npy", b"hello", "damaged, or not what its name says", id="not-npy"),
        pytest.param("x.npz", b"hello", "damaged, or not what its name says", id="not-npz"),
        pytest.param("x.npz", b"", "damaged, or not what its name says", id="empty"),
    ],
)
def test_unreadable_file(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    """A damaged, hostile or oversized file is refused by its header, as a file error with its path."""
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(FileError, match=message) as caught:
        load(path, ANY_SIZE)
    assert str(path) in str(caught.value)


def test_giant_array_can_be_read_in_part(tmp_path: Path) -> None:
    """The size bound counts only what limit leaves to be read."""
    first = floats(1, 1, 64, 64)
    (tmp_path / "x.npy").write_bytes(header((10**9, 1, 64, 64)) + first.tobytes())
    np.testing.assert_array_equal(load(tmp_path / "x.npy", ANY_SIZE, 1).feeds[0]["x"], first)


def test_damaged_member(tmp_path: Path) -> None:
    """A flipped byte inside an archive is a file error, not other values."""
    path = npz(tmp_path, x=floats(2, 1, 16, 16))
    content = bytearray(path.read_bytes())
    content[1000] ^= 255
    path.write_bytes(content)
    with pytest.raises(FileError, match="CRC"):
        load(path, ANY_SIZE)


@pytest.mark.parametrize("name", ["missing.npz", "missing"])
def test_missing_path(tmp_path: Path, name: str) -> None:
    """A path that does not exist ends with exit code 7."""
    with pytest.raises(FileError, match="no such file or folder") as caught:
        load(tmp_path / name, ANY_SIZE)
    assert caught.value.exit_code == 7


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (TensorProto(dims=[1], data_type=99, raw_data=bytes(4)), "not a complete ONNX tensor"),
        (TensorProto(dims=[1], data_type=-1, raw_data=bytes(4)), "not a complete ONNX tensor"),
        (TensorProto(dims=[1], data_type=TensorProto.STRING, string_data=[b"x"]), "only plain numbers"),
        (TensorProto(dims=[1], data_type=TensorProto.COMPLEX64, float_data=[1, 1]), "only plain numbers"),
    ],
    ids=["unknown-type", "negative-type", "text", "complex"],
)
def test_tensor_of_no_numbers(tensor: TensorProto, message: str, tmp_path: Path) -> None:
    """Tensor files of types that do not exist, or are no plain numbers, are file errors."""
    (tmp_path / "input_0.pb").write_bytes(tensor.SerializeToString())
    with pytest.raises(FileError, match=message):
        load(tmp_path, ANY_SIZE)


def test_array_with_a_giant_number(tmp_path: Path) -> None:
    """What follows the name of an input is a sample's number only where it can be one."""
    with pytest.raises(UsageError, match="no array for input 'x'"):
        load(npz(tmp_path, **{f"x_{'9' * 5000}": floats(1, 1, 4, 4), "x_y": floats(1, 1, 4, 4)}), ANY_SIZE)


def test_external_tensor_is_not_followed(tmp_path: Path) -> None:
    """A tensor that points to another file is refused: data must not read files of its choosing."""
    tensor = TensorProto(dims=[1, 1, 1, 1], data_type=TensorProto.FLOAT, data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="/etc/hostname")
    (tmp_path / "input_0.pb").write_bytes(tensor.SerializeToString())
    with pytest.raises(FileError, match="another file, which is not read"):
        load(tmp_path, ANY_SIZE)


@pytest.mark.parametrize(
    ("files", "inputs", "error", "message"),
    [
        pytest.param({}, ANY_SIZE, UsageError, "holds no .npy, .npz, input_0.pb or image", id="empty"),
        pytest.param({"a.npy": b"", "b.png": b""}, ANY_SIZE, UsageError, "both arrays and images", id="mixed"),
        pytest.param({"b.png": b""}, PAIR, UsageError, "images feed one input, the model has 2", id="images-for-two"),
        pytest.param({"b.png": b"x"}, COLOUR, FileError, "b.png: cannot be read", id="broken-image"),
        pytest.param({"input_0.pb": b"\xff"}, ANY_SIZE, FileError, "not an ONNX tensor", id="broken-tensor"),
        pytest.param({"input_0.pb": b""}, PAIR, FileError, "not a complete ONNX tensor", id="empty-tensor"),
    ],
)
def test_folder_that_does_not_fit(tmp_path: Path, files: dict, inputs: Inputs, error: type, message: str) -> None:
    """A folder of the wrong or damaged content is refused with the reason."""
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(error, match=message):
        load(tmp_path, inputs)


def test_test_data_set_with_too_few_inputs(tmp_path: Path) -> None:
    """A test_data_set needs a tensor for each input."""
    data_set(tmp_path / "test_data_set_0", input_0=floats(1, 3))
    with pytest.raises(UsageError, match=r"holds 1 inputs, the model takes 2 \(ids, mask\)"):
        load(tmp_path, PAIR)


def test_some_samples_without_label(tmp_path: Path) -> None:
    """Labels are for all samples or for none."""
    np.savez(tmp_path / "a.npz", x=floats(1, 4, 4), label=np.array(1))
    np.savez(tmp_path / "b.npz", x=floats(1, 4, 4))
    with pytest.raises(UsageError, match=r"b.npz has no label, others have"):
        load(tmp_path, ANY_SIZE)


def test_unknown_kind(tmp_path: Path) -> None:
    """A file of another kind is refused with the kinds that are read."""
    (tmp_path / "data.csv").touch()
    with pytest.raises(OnnxPruneError, match=r"unknown kind of data; give .npz"):
        load(tmp_path / "data.csv", ANY_SIZE)
