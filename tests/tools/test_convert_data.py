"""The tool that converts data sets: values, names and layouts; and the figures that the converted data must give."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from commands import ok
from onnxprune.data import Samples, load
from onnxprune.runtime import Session

ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / "shared" / "models"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"trained networks and data are not there: {SHARED}")


def module(path: Path) -> ModuleType:
    """Import a script by its path."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


TOOL = module(ROOT / "tools" / "convert_data.py")


def bytes_(*shape: int, seed: int = 0) -> np.ndarray:
    """Draw seeded uint8 values."""
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def converted(folder: Path, kind: str, stored: dict[str, np.ndarray], *options: object) -> dict[str, np.ndarray]:
    """Convert arrays and return what was written."""
    np.savez(folder / "in.npz", **stored)
    assert TOOL.main([kind, str(folder / "in.npz"), str(folder / "out.npz"), *map(str, options)]) == 0
    with np.load(folder / "out.npz") as archive:
        return {name: archive[name] for name in archive.files}


@pytest.mark.parametrize("last", [False, True], ids=["channels-first", "channels-last"])
def test_images_are_normalised(tmp_path: Path, last: bool) -> None:
    """Images become (value / 255 - mean) / std in channels-first layout, labels int64, the first n of both."""
    images = bytes_(5, 3, 8, 9)
    stored = {"images": images.transpose(0, 2, 3, 1) if last else images, "labels": np.arange(5, dtype=np.uint8)}
    made = converted(tmp_path, "cifar", stored, "--n", 4, "--name", "x", "--mean", 0.5, "--std", 0.25)
    assert set(made) == {"x", "label"}
    np.testing.assert_allclose(made["x"], (images[:4] / 255 - 0.5) / 0.25, rtol=0, atol=1e-6)
    assert (made["x"].dtype, made["label"].dtype, made["label"].tolist()) == (np.float32, np.int64, [0, 1, 2, 3])


@pytest.mark.parametrize("seeds", [None, [7, 9]], ids=["by-number", "stored-seeds"])
def test_noise_is_seeded_per_picture(tmp_path: Path, seeds: list[int] | None) -> None:
    """Picture k has unclipped noise of the stored seed, or of seed k; the clean picture is the target."""
    clean = [bytes_(8, 9), bytes_(6, 7, seed=1)]
    stored = {"clean_000": clean[0], "clean_001": clean[1], "sigma": np.float32(50)}
    made = converted(tmp_path, "denoise", stored | ({} if seeds is None else {"seeds": np.array(seeds)}))
    for k, (picture, seed) in enumerate(zip(clean, seeds or [0, 1], strict=True)):
        noise = np.random.RandomState(seed).standard_normal(picture.shape) * 50 / 255
        np.testing.assert_allclose(made[f"target_{k:03d}"][0], picture / 255, rtol=0, atol=1e-6)
        np.testing.assert_allclose(made[f"input_{k:03d}"][0], picture / 255 + noise, rtol=0, atol=1e-6)


def test_fixed_point_levels(tmp_path: Path) -> None:
    """uint16 pictures are divided by their stored levels, for networks on 0..255 multiplied by those."""
    stored = {"lr_0": np.array([[0, 65280], [256, 512]], np.uint16), "levels": np.array(65280.0)}
    stored |= {"hr_0": bytes_(4, 4), "hr_levels": np.array(255.0)}
    made = converted(tmp_path, "super-resolution", stored, "--range", 255)
    np.testing.assert_allclose(made["input"], [[[[0, 255], [1, 2]]]], rtol=1e-6)
    np.testing.assert_allclose(made["target"][0, 0], stored["hr_0"], rtol=1e-6)


def test_targets_of_another_file(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Targets may lie in another file that holds more; without any, the data is for calibration only, and that is said."""
    small, large = bytes_(3, 4, 4), bytes_(5, 4, 4, seed=1)
    made = converted(tmp_path, "super-resolution", {"lr_patches": small})
    assert set(made) == {"input"}
    assert "for calibration and agreement only" in capsys.readouterr().out
    np.savez(tmp_path / "large.npz", patches=large)
    options = ("--targets", tmp_path / "large.npz", "--force")
    made = converted(tmp_path, "super-resolution", {"lr_patches": small}, *options)
    np.testing.assert_allclose(made["target"][:, 0], large[:3] / 255, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "stored", "options", "code", "message"),
    [
        pytest.param("cifar", {"photos": bytes_(1, 3, 4, 4)}, (), 2, "none of images; found photos", id="other-key"),
        pytest.param("cifar", {"images": bytes_(1, 4, 4)}, (), 2, "one for each of 1 channels", id="mean-of-colour"),
        pytest.param("denoise", {"patches": bytes_(1, 4, 4, 7)}, (), 2, r"shape (4, 4, 7)", id="seven-channels"),
        pytest.param("super-resolution", {"lr_0": np.zeros((4, 4), np.uint16)}, (), 2, "'levels'", id="no-levels"),
        pytest.param(
            "super-resolution", {"lr_patches": bytes_(2, 4, 4), "hr_patches": bytes_(1, 4, 4)}, (), 2,
            "2 inputs, but 1 targets", id="too-few-targets",
        ),
        pytest.param(
            "super-resolution", {"lr_patches": bytes_(2, 4, 4)}, ("--targets", "gone.npz"), 7, "no such file",
            id="no-targets-file",
        ),
        pytest.param("cifar", None, (), 7, "no such file", id="no-file"),
    ],
)  # fmt: skip
def test_data_that_does_not_convert(
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    kind: str,
    stored: dict | None,
    options: tuple,
    code: int,
    message: str,
) -> None:
    """What cannot be converted is told in one line with an exit code, and nothing is written."""
    if stored is not None:
        np.savez(tmp_path / "in.npz", **stored)
    assert TOOL.main([kind, str(tmp_path / "in.npz"), str(tmp_path / "out.npz"), *options]) == code
    told = capsys.readouterr().err
    assert message in told
    assert len(told.splitlines()) == 1
    assert not (tmp_path / "out.npz").exists()


def test_files_are_not_overwritten(tmp_path: Path) -> None:
    """An existing file is overwritten with --force only, and the source never."""
    source, out = tmp_path / "in.npz", tmp_path / "out.npz"
    np.savez(source, images=bytes_(1, 3, 4, 4))
    out.touch()
    assert TOOL.main(["cifar", str(source), str(out)]) == 2
    assert TOOL.main(["cifar", str(source), str(source), "--force"]) == 2
    assert TOOL.main(["cifar", str(source), str(out), "--force"]) == 0
    assert out.stat().st_size > 0


# -- with the trained networks -----------------------------------------------------------------------------------------


def shared(folder: Path, kind: str, name: str, model: str, *options: object) -> Samples:
    """Convert one of the shared data sets and load it for a model."""
    out = folder / f"{name}.npz"
    assert TOOL.main([kind, str(SHARED / f"{name}.npz"), str(out), *map(str, options)]) == 0
    return load(out, Session(str(SHARED / f"{model}.onnx")).inputs)


@needs_shared
@pytest.mark.parametrize(
    ("kind", "name", "model", "options", "n", "wanted"),
    [
        pytest.param("cifar", "cifar_calib_512", "resnet20_jpeg", (), 512, "labels", id="cifar_calib_512"),
        pytest.param("cifar", "cifar_eval_1k", "resnet20_jpeg", (), 1000, "labels", id="cifar_eval_1k"),
        pytest.param("cifar", "cifar_train_10k", "resnet20_jpeg", ("--n", 100), 100, "labels", id="cifar_train_10k"),
        pytest.param("denoise", "bsd_train_patches", "dncnn_s25", ("--n", 64), 64, "targets", id="bsd_train_patches"),
        pytest.param("denoise", "set12_denoise", "dncnn_s25", (), 12, "targets", id="set12_denoise"),
        pytest.param(
            "super-resolution", "vdsr_train_patches", "vdsr",
            ("--targets", SHARED / "bsd_train_patches.npz"), 1000, "targets", id="vdsr_train_patches",
        ),
        pytest.param("super-resolution", "vdsr_train_patches", "vdsr", ("--n", 9), 9, None, id="vdsr_calibration"),
        pytest.param("super-resolution", "imdn_train_patches_x2", "imdn_x2", (), 180, "targets", id="imdn_train"),
        pytest.param("super-resolution", "set5_y_x2", "vdsr", (), 5, "targets", id="set5_y_x2"),
        pytest.param("super-resolution", "set5_y_x3", "vdsr", (), 5, "targets", id="set5_y_x3"),
        pytest.param("super-resolution", "set5_y_x4", "vdsr", (), 5, "targets", id="set5_y_x4"),
        pytest.param("super-resolution", "set5_rgb_x2", "imdn_x2", (), 5, "targets", id="set5_rgb_x2"),
    ],
)  # fmt: skip
def test_every_shared_set_converts(
    tmp_path: Path, kind: str, name: str, model: str, options: tuple, n: int, wanted: str | None
) -> None:
    """Each data set loads for its network without a note, with labels or targets where it has any."""
    samples = shared(tmp_path, kind, name, model, *options)
    assert samples.n == n
    assert samples.notes == ()
    assert [kind for kind in ("labels", "targets") if getattr(samples, kind) is not None] == (
        [wanted] if wanted else []
    )


@needs_shared
@pytest.mark.parametrize(
    ("task", "kind", "name", "options"),
    [
        pytest.param("cifar-top1", "cifar", "cifar_calib_512", (), id="cifar"),
        pytest.param("denoise-psnr", "denoise", "bsd_train_patches", (), id="denoise"),
        pytest.param("sr-psnr", "super-resolution", "vdsr_train_patches", (), id="vdsr"),
        pytest.param("sr-psnr", "super-resolution", "imdn_train_patches_x2", ("--range", 255), id="imdn-255"),
    ],
)
def test_inputs_are_those_of_the_reference(tmp_path: Path, task: str, kind: str, name: str, options: tuple) -> None:
    """Converted inputs are bit for bit what the script beside the networks makes for calibration."""
    model = "imdn_x2" if "imdn" in name else {"cifar": "resnet20_jpeg", "denoise": "dncnn_s25"}.get(kind, "vdsr")
    samples = shared(tmp_path, kind, name, model, "--n", 32, *options)
    script = module(SHARED / "evaluate.py")
    script.calib(task, SHARED / f"{name}.npz", tmp_path / "expected.npz", 32, "input", *options[1:])
    with np.load(tmp_path / "expected.npz") as expected:
        np.testing.assert_array_equal(np.concatenate([feed["input"] for feed in samples.feeds]), expected["input"])


LUMA = ("--channels", "y", "--round-bits", "8")


@needs_shared
@pytest.mark.parametrize(
    ("task", "kind", "name", "model", "n", "options"),
    [
        pytest.param("cifar-top1", "cifar", "cifar_eval_1k", "resnet20_jpeg", 1000, (), id="resnet20_jpeg"),
        pytest.param(
            "denoise-psnr", "denoise", "set12_denoise", "dncnn_s25", 2, ("--output", "residual", "--clip"), id="dncnn"
        ),
        pytest.param(
            "sr-psnr",
            "super-resolution",
            "set5_y_x3",
            "vdsr",
            1,
            ("--clip", "--crop-border", 3),
            id="vdsr-x3",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "sr-psnr",
            "super-resolution",
            "set5_rgb_x2",
            "imdn_x2",
            2,
            ("--clip", "--crop-border", 2, *LUMA),
            id="imdn",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_figures_are_those_of_the_reference(
    tmp_path: Path, task: str, kind: str, name: str, model: str, n: int, options: tuple
) -> None:
    """Quality on converted data is what the script beside the networks measures, to 0.001."""
    expected = module(SHARED / "evaluate.py").evaluate(task, SHARED / f"{model}.onnx", SHARED / f"{name}.npz", limit=n)
    shared(tmp_path, kind, name, model, "--n", n)
    metric = ("--metric", "top1" if kind == "cifar" else "psnr")
    data = ("--data", tmp_path / f"{name}.npz", *metric, *options)
    found = json.loads(ok("evaluate", SHARED / f"{model}.onnx", *data, "--json", "-").stdout)["quality"]
    assert found["samples"] == n
    assert found["value"] == pytest.approx(expected["value"], abs=0.001)


SESSIONS = re.findall(r"```console\n(.*?)```", (ROOT / "docs" / "data.md").read_text(encoding="utf-8"), flags=re.DOTALL)


@needs_shared
@pytest.mark.slow
@pytest.mark.parametrize("session", SESSIONS, ids=range(len(SESSIONS)))
def test_recipes_print_what_the_page_shows(tmp_path: Path, session: str) -> None:
    """Each recipe of docs/data.md prints the figure of the network's baseline."""
    (tmp_path / "models").symlink_to(SHARED)
    (tmp_path / "tools").symlink_to(ROOT / "tools")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    for command, shown in re.findall(r"^\$ ([^\n]*)\n((?:[^$\n][^\n]*\n)*)", session, flags=re.MULTILINE):
        program, *words = shlex.split(command)
        run = {"python": [], "onnxprune": ["-c", "from onnxprune.cli import main; main()"]}[program]
        words = [sys.executable, *run, *words]
        done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False, env=environment)
        assert done.stdout + done.stderr == shown
