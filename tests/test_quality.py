"""Quality of models as users ask for it: by path or object, by any metric, on all data or a half."""

from pathlib import Path

import numpy as np
import onnx
import pytest

from onnxprune import quality, runtime
from onnxprune.errors import UsageError
from onnxprune.quality import Reading, compare_quality, evaluate

DIGITS = Path(__file__).parents[1] / "fixtures" / "digits"
MODEL, DATA, CALIB = (DIGITS / name for name in ("digits.onnx", "digits_eval.npz", "digits_calib.npz"))


@pytest.fixture
def sessions(monkeypatch: pytest.MonkeyPatch) -> list:
    """Every session that is made."""
    made = []

    class Noted(runtime.Session):
        def __init__(self, *args, **options) -> None:
            super().__init__(*args, **options)
            made.append(self)

    monkeypatch.setattr(runtime, "Session", Noted)
    return made


@pytest.mark.parametrize("kind", [str, Path, onnx.load], ids=["text", "path", "object"])
def test_original_as_its_own_reference_is_one_session(sessions: list, kind) -> None:
    """A model that is compared with itself is loaded once."""
    model = kind(MODEL)
    assert evaluate(model, CALIB, "agreement-top1", reference=model).value == 100
    assert len(sessions) == 1


@pytest.mark.parametrize(("metric", "perfect"), [("agreement-psnr", 100), ("agreement-top1", 100), ("mse", 0)])
def test_comparison_feeds_the_original_as_reference(sessions: list, metric: str, perfect: float) -> None:
    """Without labels and targets, the original agrees with itself and the other model less."""
    changed = onnx.load(MODEL)
    for tensor in changed.graph.initializer:
        values = onnx.numpy_helper.to_array(tensor)
        if values.ndim == 4:
            noise = np.random.default_rng(0).standard_normal(values.shape).astype(values.dtype)
            tensor.CopyFrom(onnx.numpy_helper.from_array(values + 0.3 * values.std() * noise, tensor.name))
    notes: list[str] = []
    before, after = compare_quality(MODEL, changed, CALIB, metric, note=notes.append)
    assert before.value == pytest.approx(perfect, abs=1e-9)
    assert after.value != before.value
    assert len(sessions) == 2
    assert len(notes) == (metric == "agreement-psnr")


def test_halves_make_up_the_whole() -> None:
    """The quality on all data is the mean of those on its halves, which have no sample in common."""
    whole, search, check = (evaluate(MODEL, DATA, "top1", part=part) for part in ("all", "search", "check"))
    assert (whole.samples, search.samples, check.samples) == (360, 180, 180)
    assert whole.value == pytest.approx((search.value + check.value) / 2)
    assert sorted((search.value, check.value)) == pytest.approx([100 * 179 / 180, 100])
    assert compare_quality(MODEL, MODEL, DATA, "top1", part="check") == (check, check)


def test_function_is_a_metric() -> None:
    """A function of one's own needs no registration, and its attributes say what it compares with."""

    def wrong(scores: np.ndarray, label: np.ndarray) -> np.ndarray:
        return (scores.argmax(1) != label).astype(float)

    wrong.needs, wrong.higher_is_better = "label", False
    found = evaluate(MODEL, DATA, wrong)
    assert found.value == pytest.approx(1 - evaluate(MODEL, DATA, "top1").value / 100)
    assert not found.higher_is_better
    before, after = compare_quality(MODEL, MODEL, DATA, wrong)
    assert quality.guard((before, after), 0.0, None) is None


def test_reading_is_checked_when_it_is_made() -> None:
    """A wrong option is refused before any model is loaded."""
    with pytest.raises(UsageError, match="border -1"):
        Reading(crop_border=-1)


def test_no_data_no_quality() -> None:
    """Without data or metric there is nothing to compare."""
    assert compare_quality(MODEL, MODEL, None, "top1") is None
    assert compare_quality(MODEL, MODEL, DATA, None) is None
