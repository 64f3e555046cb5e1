"""The tool that runs a folder of models: verdicts, bounds, resuming, the golden file."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import onnx
import pytest

import architectures
from graphs import Tiny

ROOT = Path(__file__).parents[2]


def zoo(*args: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the tool."""
    command = [sys.executable, str(ROOT / "tools" / "zoo.py"), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | environment)


def made(path: Path) -> dict[str, dict]:
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three models: one that can be pruned, one with nothing to prune, one that is broken."""
    folder = tmp_path_factory.mktemp("zoo")
    onnx.save(architectures.ALL["layer_norm_mlp"](), folder / "mlp.onnx")
    t = Tiny()
    onnx.save(t.build(t.conv(t.input(1, 2, 4, 4), "a", 2, 3)), folder / "single.onnx")
    (folder / "torn.onnx").write_bytes(b"not a model")
    return folder


@pytest.fixture(scope="module")
def done(folder: Path) -> subprocess.CompletedProcess[str]:
    """A run over the whole folder that writes figures and a golden file."""
    files = ("--json", folder / "figures.json", "--golden", folder / "golden.json", "--update-golden")
    return zoo(folder, *files, "--jobs", 2)


def test_verdicts(folder, done):
    """What can be pruned passes with every figure; what cannot is refused with the reason, and none of that is a failure."""
    assert done.returncode == 0, done.stdout + done.stderr
    figures = made(folder / "figures.json")
    passed, refused = figures["mlp"], figures["single"]
    assert {name: record["verdict"] for name, record in figures.items()} == {
        "mlp": "pass", "single": "refuse", "torn": "refuse",
    }  # fmt: skip
    assert passed["floor"] < passed["achieved"] <= 0.5 < passed["prunable"] <= 1
    assert passed["channels"] > 0
    assert all(passed[figure] > 0 for figure in ("nodes", "couple", "prove", "total", "us/node", "MiB"))
    assert (refused["prunable"], refused["floor"], refused["channels"]) == (0, 1, 0)
    assert refused["why"] == "nothing prunable"
    assert "output of the graph" in done.stdout
    assert "3 models: 1 pass, 2 refuse, 0 fail" in done.stdout


@pytest.mark.parametrize(
    ("bound", "why"), [("--timeout", "killed after 0.01 s"), ("--memory", "killed beyond 0.01 MiB")]
)
def test_bounds(folder, bound, why):
    """A run beyond a bound is killed and fails."""
    run = zoo(folder, "--only", "mlp", bound, 0.01)
    assert run.returncode == 1
    assert why in run.stdout


@pytest.mark.usefixtures("done")
def test_resume_takes_over_what_is_known(folder, tmp_path):
    """A known model is not run again, not even under a bound that it would break; changed and failed ones are."""
    known = shutil.copy(folder / "figures.json", tmp_path)
    models = shutil.copytree(folder, tmp_path / "models")
    onnx.save(architectures.ALL["audio_1d"](), models / "single.onnx")
    before = made(Path(known))
    run = zoo(models, "--only", "mlp", "--only", "single", "--json", known, "--resume", "--timeout", 0.01)
    after = made(Path(known))
    assert run.returncode == 1
    assert after["single"]["verdict"] == "fail"
    assert {name: after[name] for name in ("mlp", "torn")} == {name: before[name] for name in ("mlp", "torn")}
    assert zoo(models, "--only", "single", "--json", known, "--resume").returncode == 0
    assert made(Path(known))["single"]["verdict"] == "pass"


@pytest.mark.usefixtures("done")
def test_golden_differences(folder, tmp_path):
    """Exit code 0 where all is golden, else 1 and what differs; models that were not chosen do not count."""
    golden = Path(shutil.copy(folder / "golden.json", tmp_path))
    given = (folder, "--json", folder / "figures.json", "--resume", "--golden", golden)
    assert zoo(*given).returncode == 0
    content = made(golden)
    content["mlp"]["channels"] += 1
    content["gone"] = content.pop("single")
    golden.write_text(json.dumps(content))
    run = zoo(*given)
    assert run.returncode == 1
    assert run.stdout.splitlines()[-4:] == [
        f"3 differences from {golden}",
        "gone: in the golden file only",
        f"mlp: channels is {content['mlp']['channels'] - 1}, was {content['mlp']['channels']}",
        "single: not in the golden file",
    ]
    assert zoo(*given, "--only", "torn").returncode == 0


def test_stored_models_are_filled_for_their_run_only(folder, tmp_path):
    """What is stored is filled where no filled file is there, and nothing of that stays."""
    store, temporary = tmp_path / "store", tmp_path / "temporary"
    store.mkdir()
    temporary.mkdir()
    (store / "fill.py").write_text(f"import shutil, sys\nshutil.copy({str(folder)!r} + '/mlp.onnx', sys.argv[2])\n")
    (store / "stored.onnx.gz").write_bytes(b"")
    run = zoo("--fill", store, TMPDIR=str(temporary))
    assert run.returncode == 0, run.stdout + run.stderr
    assert "1 models: 1 pass" in run.stdout
    assert list(temporary.glob("onnxprune*")) == []


def test_absent_zoo(tmp_path):
    """A folder that is not there is named."""
    run = zoo("--fill", tmp_path / "absent")
    assert run.returncode == 2
    assert "absent: no such folder" in run.stderr
