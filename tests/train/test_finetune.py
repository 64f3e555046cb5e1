"""Fine-tuning: better weights in the very same graph, whatever happens on the way."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

torch = pytest.importorskip("torch")

from schemas import assert_report

import onnxprune
from commands import ok, run
from onnxprune import onnx_io
from onnxprune.errors import FileError, UsageError
from onnxprune.train import Recipe, finetune
from onnxprune.train import state as states

ROOT = pathlib.Path(__file__).parents[2]
DIGITS = ROOT / "fixtures" / "digits"
DENOISE = ROOT / "fixtures" / "denoise"
CALIB, EVAL = DIGITS / "digits_calib.npz", DIGITS / "digits_eval.npz"


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """An artifact of the digits network, cut to a fifth by magnitude, which costs it most of its quality."""
    folder = tmp_path_factory.mktemp("digits")
    result = onnxprune.prune(DIGITS / "digits.onnx", target_mac=0.2)
    onnxprune.export_artifact(DIGITS / "digits.onnx", result.model, folder / "artifact", result.plan)
    return folder / "artifact"


def weights(path: pathlib.Path) -> dict[str, np.ndarray]:
    """Floating-point initializers of a file."""
    tensors = onnx_io.load(path).graph.initializer
    return {t.name: numpy_helper.to_array(t) for t in tensors if t.data_type == onnx.TensorProto.FLOAT}


def close(a: pathlib.Path, b: pathlib.Path) -> bool:
    """Whether two files hold the same weights but for rounding."""
    first, second = weights(a), weights(b)
    return first.keys() == second.keys() and all(np.allclose(first[k], second[k], atol=1e-5) for k in first)


def test_training_brings_quality_back(pruned: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """What pruning by magnitude has cost comes back by the teacher's outputs alone; the graph is the pruned one."""
    out = tmp_path / "out.onnx"
    found = ok("finetune", pruned, out, "--data", CALIB, "--val", EVAL, "--metric", "top1", "--epochs", 15,
               "--learning-rate", 2e-3, "-q", "--json", tmp_path / "told.json")  # fmt: skip
    assert found.output == ""
    assert_report("training", json.loads((tmp_path / "told.json").read_text(encoding="utf-8")))
    before = onnxprune.evaluate(pruned / "student.onnx", EVAL, "top1").value
    after = onnxprune.evaluate(out, EVAL, "top1").value
    assert after > before + 10
    differences, exact = onnx_io.compare(onnx_io.load(pruned / "student.onnx"), onnx_io.load(out))
    assert differences == ()
    assert not exact
    report = onnxprune.verify(DIGITS / "digits.onnx", out, pruned / "plan.json")
    assert report.weights == "changed"


def test_the_best_epoch_is_kept(pruned: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """With validation data the weights that measured best are written, the start's included."""
    recipe = Recipe(epochs=3, learning_rate=0.3, clip=0)  # a rate that ruins the network
    out = tmp_path / "out.onnx"
    done = finetune(pruned, CALIB, out, recipe, validation=EVAL, metric="top1")
    assert done is not None
    assert done.metric == max([done.before, *(epoch.metric for epoch in done.history)])
    assert onnxprune.evaluate(out, EVAL, "top1").value == pytest.approx(done.metric)


def test_metric_of_an_artifact_is_not_run_unasked(pruned: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """A manifest may name ``module:function``, which whoever made the artifact wrote; the command line must name it, too."""
    folder = tmp_path / "artifact"
    shutil.copytree(pruned, folder)
    manifest = folder / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"metric": null', '"metric": "evil:score"'))
    with pytest.raises(UsageError, match="names the metric evil:score, which is other code"):
        finetune(folder, CALIB, tmp_path / "out.onnx", Recipe(epochs=1))


def test_metrics_are_written_per_epoch(pruned: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """``metrics.csv`` has a row an epoch, with each term of the loss."""
    finetune(pruned, CALIB, tmp_path / "out.onnx", Recipe(epochs=2, sparsity=1e-3, features=0.1), validation=EVAL,
             metric="top1")  # fmt: skip
    header, *rows = (tmp_path / "out.onnx.training" / "metrics.csv").read_text().splitlines()
    assert header == "epoch,rate,loss,task,distill,features,sparsity,metric,seconds"
    values = [dict(zip(header.split(","), row.split(","), strict=True)) for row in rows]
    assert [value["epoch"] for value in values] == ["1", "2"]
    for value in values:
        parts = sum(float(value[name]) for name in ("task", "distill", "features", "sparsity") if value[name])
        assert parts == pytest.approx(float(value["loss"]), rel=1e-5)
        assert 0 <= float(value["metric"]) <= 100


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"optimizer": "sgd", "weight_decay": 1e-4}, id="sgd"),
        pytest.param({"optimizer": "soap"}, id="soap"),
        pytest.param({"ema": 0.9}, id="ema"),
        pytest.param({"precision": "bfloat16"}, id="bfloat16"),
        pytest.param({"features": 1.0, "distill": 0.0}, id="features"),
        pytest.param({"pad": 1, "flip": "horizontal"}, id="augmented"),
        pytest.param({"loss": "cross-entropy", "distill": 0.0}, id="labels"),
    ],
)
def test_every_way_of_training_lowers_its_loss(pruned: pathlib.Path, tmp_path: pathlib.Path, options: dict) -> None:
    """Whatever the recipe, the loss of the last epoch is below that of the first."""
    data = EVAL if options.get("loss") == "cross-entropy" else CALIB  # the calibration data has no labels
    done = finetune(pruned, data, tmp_path / "out.onnx", Recipe(epochs=6, learning_rate=1e-3, **options))
    assert done is not None
    assert done.history[-1].loss < done.history[0].loss


def test_the_same_run_gives_the_same_bytes(pruned: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """Same artifact, data, recipe and seed: the same file."""
    for name in ("a.onnx", "b.onnx"):
        finetune(pruned, CALIB, tmp_path / name, Recipe(epochs=1))
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()


@pytest.mark.slow
def test_sparsity_widens_the_gap_in_the_scores(pruned: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """Under the regularizer weak channels get weaker against strong ones, more than without it."""
    artifact = onnxprune.export_artifact(DIGITS / "digits.onnx", DIGITS / "digits.onnx", tmp_path / "whole")
    gaps = {}
    for strength in (0.0, 5.0):
        out = tmp_path / f"{strength}.onnx"
        finetune(artifact.directory, CALIB, out, Recipe(epochs=20, learning_rate=2e-3, sparsity=strength))
        groups = [np.array(g.score) for g in onnxprune.inspect(out).groups if g.frozen is None]
        gaps[strength] = np.mean([np.quantile(score, 0.1) / np.quantile(score, 0.9) for score in groups])
    assert gaps[5.0] < 0.8 * gaps[0.0]


# -- interruption --------------------------------------------------------------------------------------------------------


def command(artifact: pathlib.Path, out: pathlib.Path, *more: object) -> list[str]:
    """Command line of a run of about two seconds."""
    options = ["--data", CALIB, "--val", EVAL, "--metric", "top1", "--epochs", "12", "--ema", "0.9", *more]
    return [sys.executable, "-m", "onnxprune", "finetune", *map(str, (artifact, out, *options))]


def environment() -> dict[str, str]:
    """Environment in which the package is found, with one thread."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def undisturbed(pruned: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """What the command writes where nothing happens to it."""
    out = tmp_path_factory.mktemp("undisturbed") / "whole.onnx"
    subprocess.run(command(pruned, out), check=True, env=environment())
    return out


def test_a_killed_run_goes_on_to_the_same_end(
    pruned: pathlib.Path, undisturbed: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """Killed after its second epoch and started again, a run ends with the weights of one that nothing disturbed."""
    out = tmp_path / "killed.onnx"
    process = subprocess.Popen(command(pruned, out), env=environment())
    rows = out.with_name("killed.onnx.training") / "metrics.csv"
    deadline = time.monotonic() + 120
    while not (rows.exists() and len(rows.read_text().splitlines()) > 2):
        assert process.poll() is None, "ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not out.exists()
    again = subprocess.run(command(pruned, out), check=True, env=environment(), capture_output=True, text=True)
    assert "went on after epoch" in again.stdout
    assert close(undisturbed, out)
    assert len(rows.read_text().splitlines()) == 13


def test_a_state_of_another_run_is_refused(pruned: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """A checkpoint of other settings is not gone on with; --restart drops it."""
    folder = tmp_path / "state"
    folder.mkdir()
    states.save(folder, {"key": "another"})
    with pytest.raises(UsageError, match="--restart"):
        finetune(pruned, CALIB, tmp_path / "out.onnx", Recipe(epochs=1), folder=folder)
    finetune(pruned, CALIB, tmp_path / "out.onnx", Recipe(epochs=1), folder=folder, restart=True)
    assert not (folder / states.CHECKPOINT).exists()


def test_a_broken_checkpoint_says_so(pruned: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """A file that is no checkpoint is not taken for one, nor removed."""
    folder = tmp_path / "state"
    folder.mkdir()
    (folder / states.CHECKPOINT).write_bytes(b"nothing")
    with pytest.raises(FileError, match=r"checkpoint\.pt"):
        finetune(pruned, CALIB, tmp_path / "out.onnx", Recipe(epochs=1), folder=folder)
    assert (folder / states.CHECKPOINT).read_bytes() == b"nothing"


@pytest.mark.slow
def test_two_processes_train_as_one(pruned: pathlib.Path, undisturbed: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """Under torchrun with two processes over gloo the result is that of one process, but for rounding."""
    port = 29500 + os.getpid() % 2000
    start = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port)]
    words = command(pruned, tmp_path / "two.onnx")
    subprocess.run([words[0], *start, *words[1:]], check=True, env=environment(), stderr=subprocess.DEVNULL)
    assert close(undisturbed, tmp_path / "two.onnx")


# -- refusals ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "code", "text"),
    [
        pytest.param(["--loss", "l1"], 2, "needs targets", id="no-targets"),
        pytest.param(["--val", EVAL], 2, "--metric", id="no-metric"),
        pytest.param(["--crop", 99], 2, "larger than a picture", id="crop"),
        pytest.param(["--learning-rate", 1e18, "--clip-gradient", 0], 3, "lower learning rate", id="diverges"),
        pytest.param(["--distill", 1e36, "--optimizer", "soap"], 3, "gradient is inf", id="gradient-overflows"),
        pytest.param(["--val", "absent.npz", "--metric", "top1"], 7, "absent.npz", id="no-file"),
    ],
)
def test_what_cannot_be_trained_is_refused(
    pruned: pathlib.Path, tmp_path: pathlib.Path, options: list, code: int, text: str
) -> None:
    """A run that cannot succeed ends with its exit code and one message, and nothing is written."""
    out = tmp_path / "out.onnx"
    found = run("finetune", pruned, out, "--data", CALIB, "--epochs", 3, *options)
    assert found.exit_code == code, found.output
    assert text in found.output
    assert not out.exists()


def test_an_existing_file_is_not_overwritten(pruned: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """OUT stays what it is without --force."""
    out = tmp_path / "out.onnx"
    out.write_bytes(b"mine")
    assert run("finetune", pruned, out, "--data", CALIB).exit_code == 2
    assert out.read_bytes() == b"mine"


def test_a_folder_that_is_no_artifact_is_refused(tmp_path: pathlib.Path) -> None:
    """A folder without a manifest is named in the message."""
    found = run("finetune", tmp_path, tmp_path / "out.onnx", "--data", CALIB)
    assert found.exit_code in (3, 7)
    assert str(tmp_path) in found.output


def test_without_torch_the_command_says_what_to_install(pruned: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """Where PyTorch is missing everything else works, and finetune says how to get it."""
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from onnxprune.cli import commands\n"
        f"commands.main(['finetune', {str(pruned)!r}, {str(tmp_path / 'out.onnx')!r}, '--data', {str(CALIB)!r}])"
    )
    found = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=False)
    assert found.returncode == 2
    assert "pip install 'onnxprune[train]'" in found.stderr


def test_pictures_are_trained_from_noise_alone(tmp_path: pathlib.Path) -> None:
    """A denoiser learns from clean pictures: noise is added anew each time, and the clean picture is the target."""
    with np.load(DENOISE / "denoise_calib.npz") as stored:
        np.savez(tmp_path / "clean.npz", noisy=stored["noisy"])  # as good as clean: learnt is what is added to it
    result = onnxprune.prune(DENOISE / "denoise.onnx", target_mac=0.5)
    onnxprune.export_artifact(DENOISE / "denoise.onnx", result.model, tmp_path / "artifact", result.plan)
    done = finetune(
        tmp_path / "artifact", tmp_path / "clean.npz", tmp_path / "out.onnx",
        Recipe(epochs=8, noise=0.1, flip="all", crop=16, batch=8, learning_rate=2e-3),
    )  # fmt: skip
    assert done is not None
    assert done.history[-1].task < 0.8 * done.history[0].task
