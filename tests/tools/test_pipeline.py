"""The script that prunes, quantizes and evaluates: its table tells what shipping costs, and what it must not cost."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import pytest

ROOT = Path(__file__).parents[2]


def script() -> ModuleType:
    """Import the script."""
    spec = importlib.util.spec_from_file_location("pipeline_script", ROOT / "tools" / "pipeline.py")
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def few(folder: Path, tool: ModuleType) -> Path:
    """Eight of the calibration inputs."""
    with np.load(tool.DIGITS / "digits_calib.npz") as archive:
        np.savez(folder / "calib.npz", image=archive["image"][:8])
    return folder / "calib.npz"


def test_the_table_of_the_digits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Pruning halves MAC, quantizing leaves them; both make the file smaller, and together cost less than 2 points."""
    script().main([str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()[1:]
    rows = {}
    for line in lines:
        name, macs, size, quality = re.fullmatch(r"(.{16}) +([\d.]+) M +([\d,]+) +([\d.]+)", line).groups()
        rows[name.strip()] = (float(macs), int(size.replace(",", "")), float(quality))
    assert list(rows) == ["original", "pruned", "original, QDQ", "pruned, QDQ"]
    macs, sizes, qualities = ([row[i] for row in rows.values()] for i in range(3))
    assert macs[0] == macs[2] >= 2 * macs[1] - 0.01
    assert macs[1] == macs[3]
    assert sizes[3] < sizes[2] < sizes[1] < sizes[0]
    assert min(qualities) > qualities[0] - 2
    written = onnx.load(tmp_path / "pruned-qdq.onnx")
    assert sum(node.op_type == "QuantizeLinear" for node in written.graph.node) >= 8


@pytest.mark.parametrize("name", ["onnxsim", "onnxslim"])
def test_simplifiers_leave_outputs_alone(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The script rewrites the pruned model and says that its outputs agree."""
    pytest.importorskip(name, reason=f"{name} is not installed: nothing was simplified")
    tool = script()
    tool.main([str(tmp_path / "out"), "--calib", str(few(tmp_path, tool)), "--simplify", name])
    found = re.fullmatch(rf"{name} +(\d+) -> (\d+) nodes, outputs agree", capsys.readouterr().out.splitlines()[-1])
    assert int(found[2]) < int(found[1])


def test_a_simplifier_that_is_wrong_is_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rewriting that changes what is computed ends the script; so does one that is not installed."""
    found = script()

    def wrong(_: ModuleType, model: onnx.ModelProto) -> onnx.ModelProto:
        changed = onnx.ModelProto()
        changed.CopyFrom(model)
        tensor = next(t for t in changed.graph.initializer if len(t.dims) == 4)
        tensor.CopyFrom(onnx.numpy_helper.from_array(1.01 * onnx.numpy_helper.to_array(tensor), tensor.name))
        return changed

    monkeypatch.setitem(found.SIMPLIFIERS, "numpy", wrong)
    monkeypatch.setitem(found.SIMPLIFIERS, "nosuchsimplifier", wrong)
    words = [str(tmp_path / "out"), "--calib", str(few(tmp_path, found))]
    with pytest.raises(SystemExit, match="numpy changes what the pruned model computes"):
        found.main([*words, "--simplify", "numpy"])
    with pytest.raises(SystemExit, match="nosuchsimplifier is not installed"):
        found.main([*words, "--simplify", "nosuchsimplifier"])
