"""Calibration, compensation and the guard search on the project's own trained networks, through the public ways in."""

from __future__ import annotations

import json
import pathlib

import numpy as np
import onnx
import pytest

import onnxprune
from commands import ok, run
from onnxprune import onnx_io

FIXTURES = pathlib.Path(__file__).resolve().parents[1] / "fixtures"
DIGITS = FIXTURES / "digits"
MODEL = DIGITS / "digits.onnx"
CALIB = DIGITS / "digits_calib.npz"
EVAL = DIGITS / "digits_eval.npz"


@pytest.fixture(scope="module")
def fitted() -> onnxprune.Result:
    """The digits network at half its MAC, fitted."""
    return onnxprune.prune(MODEL, target_mac=0.5, calib=CALIB)


def top1(model: onnx.ModelProto) -> float:
    return onnxprune.evaluate(model, EVAL, "top1").value


def test_calibration_keeps_a_network_useful(fitted):
    """At half the MAC the fitted network loses at most 2 points, where plain magnitude loses more than 30."""
    plain = onnxprune.prune(MODEL, target_mac=0.5).model
    assert top1(plain) < top1(onnx_io.load(MODEL)) - 30
    assert top1(fitted.model) > top1(onnx_io.load(MODEL)) - 2
    assert fitted.report.proof.ok


@pytest.mark.slow
def test_denoiser_keeps_its_quality():
    """The fixture's denoiser at 0.6 of its MAC loses far less with calibration than by magnitude."""
    folder = FIXTURES / "denoise"
    model, calib = folder / "denoise.onnx", folder / "denoise_calib.npz"

    def psnr(proto) -> float:
        return onnxprune.evaluate(proto, folder / "denoise_eval.npz", "psnr").value

    before = psnr(model)
    plain = before - psnr(onnxprune.prune(model, target_mac=0.6).model)
    kept = before - psnr(onnxprune.prune(model, target_mac=0.6, calib=calib).model)
    assert kept < 0.25 * plain


@pytest.mark.parametrize("mode", ["none", "bias"])
def test_compensation_does_not_touch_the_plan(fitted, mode):
    """The same channels stay, whatever is done to the weights afterwards."""
    other = onnxprune.prune(MODEL, target_mac=0.5, calib=CALIB, compensate=mode)
    assert other.plan.initializers == fitted.plan.initializers
    assert (other.report.compensation is None) == (mode == "none")


def test_same_input_gives_the_same_bytes(fitted):
    """Two runs write the same model."""
    again = onnxprune.prune(MODEL, target_mac=0.5, calib=CALIB)
    assert again.model.SerializeToString(deterministic=True) == fitted.model.SerializeToString(deterministic=True)


@pytest.mark.slow
def test_arrays_serve_as_calibration_data():
    """Arrays by input name serve as well as a file; the report says that they were arrays."""
    with np.load(CALIB) as arrays:
        known = {"image": arrays["image"].astype(np.float32)}
    result = onnxprune.prune(MODEL, target_mac=0.5, calib=known)
    assert result.report.proof.ok
    assert result.report.to_json()["options"]["calib"] == "arrays"


def test_little_memory_still_helps():
    """Within a tight bound samples are run again and moments are those of channels; the fit still keeps the accuracy."""
    tight = onnxprune.prune(MODEL, target_mac=0.5, calib=CALIB, calib_memory=8 << 20)
    assert top1(tight.model) > top1(onnx_io.load(MODEL)) - 5


def test_errors_on_samples_held_back_never_rise(fitted):
    """Every operator's error is at most what it was, and what stayed as it was says why."""
    rows = fitted.report.compensation.solved
    assert len(rows) >= 8
    for row in rows:
        assert row.note or row.error < row.error_before
    document = fitted.report.to_json()["compensation"]
    assert document["held_back"] > 0
    assert json.loads(json.dumps(document, allow_nan=False)) == document


def test_verify_accepts_a_fitted_model_and_its_biases(tmp_path):
    """From files alone: weights may differ, biases may be those that the plan lists; others may not."""
    model = FIXTURES / "digits" / "digits.onnx"
    out, plan = tmp_path / "out.onnx", tmp_path / "plan.json"
    ok(model, out, "--target-mac", "0.5", "--calib", CALIB, "--plan-out", plan, "-q", "--no-latency")
    ok("verify", model, out, "--plan", plan, "-q")
    data = json.loads(plan.read_text())
    tampered = onnx_io.load(out)
    conv = next(node for node in tampered.graph.node if node.op_type == "Conv" and len(node.input) == 2)
    size = next(t.dims[0] for t in tampered.graph.initializer if t.name == conv.input[1])
    conv.input.append("sneaked")
    tampered.graph.initializer.append(onnx.numpy_helper.from_array(np.zeros(size, np.float32), "sneaked"))
    onnx.save(tampered, tmp_path / "tampered.onnx")
    assert run("verify", model, tmp_path / "tampered.onnx", "--plan", plan, "-q").exit_code == 5
    entry = {"node": conv.output[0], "input": 2, "replaces": "", "size": size}
    plan.write_text(json.dumps(data | {"added": {**data["added"], "sneaked": entry}}))
    ok("verify", model, tmp_path / "tampered.onnx", "--plan", plan, "-q")
    assert run("verify", model, out, "--plan", plan, "-q").exit_code == 3  # the plan lists what is not there


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (["--criterion", "obs"], 2, "--calib"),
        (["--compensate", "least-squares"], 2, "--calib"),
        (["--calib", "nowhere.npz"], 7, "nowhere.npz"),
        (["--calib", str(FIXTURES / "denoise" / "denoise_calib.npz")], 2, "shape"),
        (["--calib", str(CALIB), "--calib-memory", "1K"], 2, "calib-memory"),
        (["--calib", str(CALIB), "--sensitivity", "nowhere.json"], 7, "nowhere.json"),
    ],
)
def test_bad_options_are_refused(tmp_path, words, code, told):
    """What is missing or does not fit is named, with the right exit code, and nothing is written."""
    result = run(MODEL, tmp_path / "out.onnx", "--target-mac", "0.5", *words)
    assert result.exit_code == code
    assert told in result.output
    assert not list(tmp_path.iterdir())


def test_overflowing_data_is_refused(tmp_path):
    """Inputs so large that the network overflows are an error that names the place, not a ranking without it."""
    with np.load(CALIB) as arrays:
        np.savez(tmp_path / "huge.npz", image=np.full((4, *arrays["image"].shape[1:]), 3e38, np.float32))
    result = run(MODEL, tmp_path / "out.onnx", "--target-mac", "0.5", "--calib", tmp_path / "huge.npz")
    assert result.exit_code == 3
    assert "calibration data" in result.output
    assert not (tmp_path / "out.onnx").exists()


def test_hint_without_calibration_data(tmp_path):
    """One line says what calibration data would buy; not where it is given."""
    assert "--calib" in ok(MODEL, tmp_path / "a.onnx", "--target-mac", "0.9", "--no-latency").output
    given = ok(MODEL, tmp_path / "b.onnx", "--target-mac", "0.9", "--no-latency", "--calib", CALIB)
    assert "would keep far more quality" not in given.output


GUARD = ["--data", EVAL, "--metric", "top1"]


def test_search_finds_a_small_model_that_passes(tmp_path):
    """Without a target: every probe is told, the result passes on samples that the search did not see, and is proved."""
    out, report = tmp_path / "out.onnx", tmp_path / "r.json"
    # magnitude alone, because that is fast
    result = ok(MODEL, out, *GUARD, "--max-drop", "3", "--json", report, "--no-latency")
    content = json.loads(report.read_text())
    assert 5 <= len(content["probes"]) <= 8
    assert sum(line.startswith("probe ") for line in result.output.splitlines()) == len(content["probes"])
    assert content["quality"]["drop"] <= 3
    assert content["quality"]["samples"] == 180
    assert content["proof"]["ok"]
    passed = [probe["target"] for probe in content["probes"] if probe["ok"]]
    failed = [probe["target"] for probe in content["probes"] if not probe["ok"]]
    assert passed
    assert min(passed) - max(failed, default=0) <= 0.011
    assert content["target"]["achieved"] <= content["target"]["requested"] < 1


def test_search_refuses_what_the_original_lacks(tmp_path):
    """A quality that the original itself does not have is refused with exit code 6, and nothing is written."""
    result = run(MODEL, tmp_path / "out.onnx", *GUARD, "--min-quality", "100.5")
    assert result.exit_code == 6
    assert "original" in result.output
    assert not list(tmp_path.iterdir())


def test_search_keeps_the_original_where_nothing_smaller_passes(tmp_path):
    """Where every removal costs too much, a copy of the original is written, and a note says so."""
    out = tmp_path / "out.onnx"
    result = ok(MODEL, out, "--data", EVAL, "--metric", "agreement-psnr", "--max-drop", "0.0001", "--no-latency")
    assert "no smaller model passes" in result.output
    assert out.read_bytes() == MODEL.read_bytes()


def test_no_target_and_no_guard_is_a_usage_error(tmp_path):
    """Something must say how far to go."""
    assert run(MODEL, tmp_path / "out.onnx", *GUARD).exit_code == 2
