"""The same model and options give the same bytes, wherever and however the command runs."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

import onnxprune
from onnxprune.passes.score import NAMES

ROOT = Path(__file__).resolve().parents[1]
SPEC = importlib.util.spec_from_file_location("determinism", ROOT / "tools" / "determinism.py")
determinism = importlib.util.module_from_spec(SPEC)
sys.modules["determinism"] = determinism
SPEC.loader.exec_module(determinism)
DIGITS, DENOISE = ROOT / "fixtures" / "digits", ROOT / "fixtures" / "denoise"


@pytest.fixture(scope="module")
def transformer(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A small transformer and its data."""
    folder = tmp_path_factory.mktemp("transformer")
    onnx.save(determinism.transformer(), folder / "model.onnx")
    tokens = np.random.default_rng(1).standard_normal((24, 10, 12)).astype(np.float32)
    np.savez(folder / "tokens.npz", x=tokens)
    return folder / "model.onnx", folder / "tokens.npz"


def test_everything_around_a_run_may_differ(tmp_path: Path, transformer: tuple[Path, Path]) -> None:
    """Threads, hash seed, locale, folder, spelling of paths and umask change no byte of output, plan and report."""
    plain = determinism.written(*transformer, tmp_path / "plain", determinism.Way({"PYTHONHASHSEED": "1"}))
    assert determinism.written(*transformer, tmp_path / "other", determinism.WAYS["all at once"]) == plain


@pytest.mark.parametrize(("name", "threads"), [("digits", 2), pytest.param("denoise", 3, marks=pytest.mark.slow)])
def test_threads_do_not_change_a_fit(name: str, threads: int) -> None:
    """Ranking, weighing and least squares on data give the same weights with one thread and with several."""
    folder = ROOT / "fixtures" / name
    with np.load(folder / f"{name}_calib.npz") as known:
        ((name_of_input, samples),) = known.items()
    calib = {name_of_input: samples[:16].astype(np.float32)}
    results = [
        onnxprune.prune(folder / f"{name}.onnx", target_mac=0.6, calib=calib, threads=count, proof=False)
        for count in (1, threads)
    ]
    one, many = (result.model.SerializeToString(deterministic=True) for result in results)
    assert one == many
    assert results[0].plan.to_json() == results[1].plan.to_json()


def test_order_of_files_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of data is read by name, whatever order the file system lists it in."""
    with np.load(DIGITS / "digits_calib.npz") as known:
        for number, image in enumerate(known["image"][:4]):
            np.save(tmp_path / f"{number}.npy", image.astype(np.float32))
    listed = Path.iterdir
    results = []
    for backwards in (False, True):
        monkeypatch.setattr(Path, "iterdir", lambda path, b=backwards: iter(sorted(listed(path), reverse=b)))
        options = {"target_mac": 0.6, "calib": tmp_path, "allocation": "error", "proof": False}
        results.append(onnxprune.prune(DIGITS / "digits.onnx", **options).model.SerializeToString(deterministic=True))
    assert results[0] == results[1]


@pytest.mark.parametrize("criterion", NAMES)
def test_magnitudes_do_not_depend_on_where_a_model_lies(monkeypatch: pytest.MonkeyPatch, criterion: str) -> None:
    """From a relative path, an absolute one, or memory: the same plan, for every criterion."""
    monkeypatch.chdir(DIGITS)
    options = {"target_mac": 0.6, "criterion": criterion, "proof": False}
    places = (Path("digits.onnx"), DIGITS / "digits.onnx", onnx.load(DIGITS / "digits.onnx"))
    plans = [onnxprune.prune(place, **options).plan.initializers for place in places]
    assert plans[0] == plans[1] == plans[2]


@pytest.mark.slow
@pytest.mark.parametrize("way", determinism.WAYS)
def test_every_way_gives_the_same_bytes(tmp_path: Path, way: str) -> None:
    """Each of what may differ, alone, on the denoiser."""
    model, calib = DENOISE / "denoise.onnx", DENOISE / "denoise_calib.npz"
    plain = determinism.written(model, calib, tmp_path / "plain", determinism.Way())
    assert determinism.written(model, calib, tmp_path / "other", determinism.WAYS[way]) == plain
