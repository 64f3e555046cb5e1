"""The command line does what contract.md says: commands, report, exit codes, and nothing left behind after an error."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import click
import numpy as np
import onnx
import pytest
from click.testing import Result
from onnx import ModelProto, TensorProto, helper, numpy_helper

import architectures
import onnxprune
from architectures import variants
from commands import ok, run
from graphs import Tiny
from onnxprune import cli, pipeline

FIXTURES = Path(__file__).parents[1] / "fixtures"
DIGITS, DENOISE = FIXTURES / "digits", FIXTURES / "denoise"
QUICK = ("--target-mac", "0.6", "--no-latency")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Write a small network to a folder of its own and return its path."""
    path = tmp_path / "in.onnx"
    onnx.save(architectures.ALL["edsr"](), path)
    return path


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Return a path for the result."""
    return tmp_path / "out.onnx"


# -- prune -------------------------------------------------------------------------------------------------------------


def test_prune_is_the_default_command(model: Path, out: Path, tmp_path: Path) -> None:
    """Without a command's name the arguments are those of ``prune``, and the same bytes come out."""
    ok(model, out, *QUICK)
    ok("prune", model, tmp_path / "second.onnx", *QUICK)
    assert out.read_bytes() == (tmp_path / "second.onnx").read_bytes()
    onnx.checker.check_model(onnx.load(out), full_check=True)
    assert out.stat().st_size < model.stat().st_size


def test_options_may_come_first(model: Path, out: Path) -> None:
    """Options before the files still mean ``prune``."""
    ok(*QUICK, model, out)
    assert out.exists()


def test_summary_says_what_happened(model: Path, out: Path) -> None:
    """The text names input, cost before and after, target, proof and where the result is; stderr stays empty."""
    result = ok(model, out, *QUICK)
    assert result.stderr == ""
    lines = result.stdout.splitlines()
    assert lines[0] == "input    image 1x3x20x24"
    for word in ("MAC", "weights", "parameters", "activations", "bandwidth"):
        (row,) = [line for line in lines if line.startswith(word + " ")]
        assert row.count("%") == 1
    (target,) = [line for line in lines if line.startswith("target")]
    assert target.startswith("target   mac 0.6000, achieved 0.5")
    (proof,) = [line for line in lines if line.startswith("proof")]
    assert "holds" in proof
    assert lines[-1] == f"written  {out}"


def first_words(result: Result) -> set[str]:
    """First word of every line of stdout."""
    return {line.split()[0] for line in result.stdout.splitlines() if line.strip()}


def test_latency_is_measured_unless_switched_off(model: Path, out: Path, tmp_path: Path) -> None:
    """By default both models are timed; --no-latency skips that."""
    report = tmp_path / "r.json"
    assert "latency" in first_words(ok(model, out, "--target-mac", "0.6", "--json", report))
    latency = json.loads(report.read_text())["latency"]
    assert set(latency) == {"before_ms", "after_ms"}
    assert 0 < latency["after_ms"] < 1000
    assert "latency" not in first_words(ok(model, out, *QUICK, "--force", "--json", report))
    assert json.loads(report.read_text())["latency"] is None


def test_quiet_prints_nothing(model: Path, out: Path) -> None:
    """With -q a run that succeeds prints nothing at all."""
    assert ok(model, out, *QUICK, "-q").output == ""


def test_verbose_shows_layers_and_groups(model: Path, out: Path) -> None:
    """With -v every layer is listed with its channels before and after."""
    text = ok(model, out, *QUICK, "-v").stdout
    assert all(name in text for name in ("head/Conv", "body2/Conv_1", "tail/Conv", "g1"))
    assert "->" in text


@pytest.mark.parametrize("command", ["prune", "inspect"])
def test_no_colour_codes_in_a_pipe(model: Path, out: Path, command: str) -> None:
    """Neither stream holds escape sequences or carriage returns where nobody watches."""
    arguments = [model, out, *QUICK, "-v"] if command == "prune" else [model]
    result = ok(command, *arguments)
    assert "\x1b" not in result.output
    assert "\r" not in result.output


def test_same_command_same_bytes(model: Path, out: Path) -> None:
    """The same command twice writes the same bytes."""
    ok(model, out, *QUICK)
    first = out.read_bytes()
    ok(model, out, *QUICK, "--force")
    assert out.read_bytes() == first


def test_force_overwrites(model: Path, out: Path) -> None:
    """--force replaces OUT."""
    out.write_text("old")
    ok(model, out, *QUICK, "--force")
    onnx.checker.check_model(onnx.load(out))


@pytest.mark.parametrize(
    ("amount", "share"),
    [("1.5M", None), ("1500K", None), ("0.0015G", None), ("1500000", None), ("0.5", 0.5), ("5e-1", 0.5)],
)
def test_amounts(model: Path, out: Path, amount: str, share: float | None, tmp_path: Path) -> None:
    """At most 1 is a share, more is absolute and takes K, M and G."""
    report = tmp_path / "r.json"
    ok(model, out, "--target-mac", amount, "--no-latency", "--no-proof", "--json", report)
    data = json.loads(report.read_text())
    assert data["target"]["requested"] == pytest.approx(share or 1.5e6)
    assert data["cost"]["after"]["mac"] <= (0.5 * data["cost"]["before"]["mac"] if share else 1.5e6)
    assert data["proof"] is None


def test_target_one_copies_the_file(model: Path, out: Path) -> None:
    """A target that is met already copies the input byte for byte and says so."""
    result = ok(model, out, "--target-mac", "1.0", "--no-latency")
    assert out.read_bytes() == model.read_bytes()
    assert "already meets the target" in result.stdout


def test_target_one_copies_external_data(tmp_path: Path) -> None:
    """The file beside the model goes along, byte for byte."""
    (tmp_path / "there").mkdir()
    source = tmp_path / "in.onnx"
    onnx.save_model(
        architectures.ALL["edsr"](), str(source), save_as_external_data=True, location="w.bin", size_threshold=128
    )
    target = tmp_path / "there" / "out.onnx"
    ok(source, target, "--target-mac", "1", "--no-latency")
    assert target.read_bytes() == source.read_bytes()
    assert (tmp_path / "there" / "w.bin").read_bytes() == (tmp_path / "w.bin").read_bytes()
    assert sorted(path.name for path in (tmp_path / "there").iterdir()) == ["out.onnx", "w.bin"]


@pytest.mark.parametrize("option", ["--ignore", "--only"])
def test_globs_limit_what_is_pruned(model: Path, out: Path, option: str) -> None:
    """--ignore leaves the named layers alone, --only prunes nothing else."""
    ok(model, out, "--target-mac", "0.8", "--no-latency", option, "body[01]/Conv")
    before, after = (
        {tensor.name: list(tensor.dims) for tensor in onnx.load(path).graph.initializer} for path in (model, out)
    )
    inner = {"body0/Conv/weight", "body1/Conv/weight", "body2/Conv/weight"}
    shrunk = {name for name in inner if before[name][0] != after[name][0]}
    named = {"body0/Conv/weight", "body1/Conv/weight"}
    assert shrunk <= (named if option == "--only" else inner - named)
    assert shrunk


def test_config_file_gives_defaults(model: Path, out: Path, tmp_path: Path) -> None:
    """Options come from a TOML file; the command line wins."""
    config = tmp_path / "onnxprune.toml"
    config.write_text('preset = "a"\n[prune]\ntarget-mac = 0.7\nlatency = false\n')
    report = tmp_path / "r.json"
    ok("prune", model, out, "--config", config, "--json", report)
    data = json.loads(report.read_text())
    assert data["options"]["preset"] == "a"
    assert data["target"]["requested"] == 0.7
    ok("prune", model, out, "--config", config, "--json", report, "--force", "--target-mac", "0.5")
    assert json.loads(report.read_text())["target"]["requested"] == 0.5


# -- report ------------------------------------------------------------------------------------------------------------

NUMBER = (int, float)
COST = dict.fromkeys(("mac", "weights", "params", "activations", "bandwidth"), NUMBER)
TIMINGS = ("load", "couple", "score", "select", "compensate", "apply", "prove", "save", "total")
SCHEMA: dict[str, Any] = {
    "schema": int,
    "onnxprune": str,
    "input": {"path": str, "sha256": str},
    "output": {"path": str, "sha256": str},
    "options": {},
    "cost": {"before": COST, "after": COST, "ratio": COST},
    "input_shapes": {},
    "target": {"kind": str, "requested": NUMBER, "achieved": NUMBER, "floor": NUMBER},
    "groups": [
        {
            "id": str,
            "name": str,
            "mac": int,
            "size": int,
            "kept": int,
            "members": [{"tensor": str, "axis": int}],
            "frozen": (str, type(None)),
            "score": [NUMBER],
        }
    ],
    "layers": [
        {
            "node": str,
            "op": str,
            "inputs": [str],
            "outputs": [str],
            "channels_before": int,
            "channels_after": int,
            "mac_before": int,
            "mac_after": int,
            "weights_before": int,
            "weights_after": int,
        }
    ],
    "frozen": [{"node": str, "op": str, "tensor": str, "reason": str, "mac": NUMBER, "kind": str, "layers": [str]}],
    "proof": {
        "ok": bool,
        "labels": bool,
        "max_rel_err": NUMBER,
        "tensors": int,
        "redefined": [str],
        "insensitive": [str],
        "weights": str,
    },
    "quality": {"metric": str, "before": NUMBER, "after": NUMBER, "drop": NUMBER, "samples": int},
    "latency": {"before_ms": NUMBER, "after_ms": NUMBER},
    "timings": dict.fromkeys(TIMINGS, NUMBER),
}
"""The report as contract.md writes it; more keys are allowed."""


def mismatches(value: Any, schema: Any, where: str = "report") -> list[str]:
    """Places where a value lacks a documented key or has another type."""
    if isinstance(schema, dict):
        if not isinstance(value, dict):
            return [f"{where} is {value!r}, no object"]
        missing = [f"{where}.{key} is missing" for key in schema if key not in value]
        inner = [m for key in schema if key in value for m in mismatches(value[key], schema[key], f"{where}.{key}")]
        return missing + inner
    if isinstance(schema, list):
        if not isinstance(value, list):
            return [f"{where} is {value!r}, no list"]
        return [m for index, item in enumerate(value) for m in mismatches(item, schema[0], f"{where}[{index}]")]
    wrong = not isinstance(value, schema) or (isinstance(value, bool) and schema is not bool)
    return [f"{where} is {value!r}"] if wrong else []


def test_report_has_the_documented_schema(tmp_path: Path) -> None:
    """Every key of contract.md is there with its type, and the numbers agree with each other and with the files."""
    out, path = tmp_path / "out.onnx", tmp_path / "r.json"
    data_path = DIGITS / "digits_eval.npz"
    ok(DIGITS / "digits.onnx", out, "--target-mac", "0.7", "--json", path, "--data", data_path, "--metric", "top1")
    data = json.loads(path.read_text())
    assert mismatches(data, SCHEMA) == []
    assert data["schema"] == 1
    assert data["input"]["path"] == str(DIGITS / "digits.onnx")
    assert data["output"]["path"] == str(out)
    assert data["output"]["sha256"] == pipeline.onnx_io.sha256(out)
    assert data["input_shapes"] == {"image": [1, 1, 8, 8]}
    for kind in COST:
        assert data["cost"]["ratio"][kind] == pytest.approx(data["cost"]["after"][kind] / data["cost"]["before"][kind])
    target = data["target"]
    assert (target["kind"], target["requested"]) == ("mac", 0.7)
    assert target["achieved"] == pytest.approx(data["cost"]["ratio"]["mac"])
    assert 0 < target["floor"] < target["achieved"] <= 0.7
    assert sum(layer["mac_after"] for layer in data["layers"]) == data["cost"]["after"]["mac"]
    assert all(len(group["score"]) == group["size"] >= group["kept"] >= 1 for group in data["groups"])
    assert data["proof"]["ok"] is True
    assert data["proof"]["weights"] == "exact"
    quality = data["quality"]
    assert quality["drop"] == pytest.approx(quality["before"] - quality["after"])
    assert quality["samples"] == 360
    stages = sum(seconds for stage, seconds in data["timings"].items() if stage != "total")
    assert 0 < stages <= data["timings"]["total"] * 1.001


def test_schema_check_notices() -> None:
    """The check used here finds a missing key, a wrong type, and a wrong item of a list."""
    schema = {"a": int, "b": [{"c": str}]}
    assert mismatches({"a": 1, "b": [{"c": "x"}]}, schema) == []
    assert mismatches({"b": []}, schema) == ["report.a is missing"]
    assert mismatches({"a": True, "b": [{"c": 1}]}, schema) == ["report.a is True", "report.b[0].c is 1"]


def test_json_dash_prints_the_report_alone(model: Path, out: Path) -> None:
    """``--json -`` leaves stdout to the report; the summary goes to stderr."""
    result = ok(model, out, *QUICK, "--json", "-")
    assert json.loads(result.stdout)["output"]["path"] == str(out)
    assert "written" in result.stderr


def test_inspect_shows_layers_groups_and_floor(model: Path, tmp_path: Path) -> None:
    """``inspect`` shows cost per layer, groups, what is frozen and why, and the floor; its report says the same."""
    path = tmp_path / "r.json"
    text = ok("inspect", model, "--json", path).stdout
    assert text.startswith("input    image 1x3x20x24")
    for words in ("head/Conv", "floor", "groups of channels", "frozen", "it is an output of the graph"):
        assert words in text
    data = json.loads(path.read_text())
    optional = dict.fromkeys(("target", "proof", "quality", "latency"), type(None))
    assert mismatches(data, SCHEMA | optional | {"output": {"path": type(None), "sha256": type(None)}}) == []
    assert data["cost"]["before"] == data["cost"]["after"]
    assert 0 < data["floor"]["mac"] < 0.1


# -- apply and verify --------------------------------------------------------------------------------------------------


@pytest.fixture
def plan(model: Path, out: Path, tmp_path: Path) -> Path:
    """Prune ``model`` to ``out`` and return the plan's path."""
    path = tmp_path / "plan.json"
    ok(model, out, *QUICK, "--plan-out", path)
    return path


def test_plan_replays_to_equal_bytes(model: Path, out: Path, plan: Path, tmp_path: Path) -> None:
    """``apply`` with the written plan gives the bytes that ``prune`` wrote."""
    again = tmp_path / "again.onnx"
    text = ok("apply", model, again, "--plan", plan).stdout
    assert again.read_bytes() == out.read_bytes()
    assert "proof    holds" in text
    data = json.loads(plan.read_text())
    assert data["schema"] == 1
    assert data["model"]["sha256"] == pipeline.onnx_io.sha256(model)


def test_verify_holds(model: Path, out: Path, plan: Path) -> None:
    """``verify`` proves what ``prune`` wrote, from files alone."""
    result = ok("verify", model, out, "--plan", plan, "--json", "-")
    data = json.loads(result.stdout)
    assert data["proof"]["ok"] is True
    assert data["proof"]["weights"] == "exact"


def edit(path: Path, change: Any) -> Path:
    """Change a model file and return its path."""
    changed = onnx.load(path)
    change(changed)
    onnx.save(changed, path)
    return path


def double_weights(model: ModelProto) -> None:
    """Multiply all float weights by two, as training would change them."""
    for tensor in model.graph.initializer:
        if tensor.name.endswith("weight"):
            tensor.CopyFrom(numpy_helper.from_array(2 * numpy_helper.to_array(tensor), tensor.name))


def test_verify_says_that_weights_changed(model: Path, out: Path, plan: Path, tmp_path: Path) -> None:
    """Other weight values are allowed, and both the text and the report say so."""
    edit(out, double_weights)
    report = tmp_path / "r.json"
    text = ok("verify", model, out, "--plan", plan, "--json", report).stdout
    assert json.loads(report.read_text())["proof"]["weights"] == "changed"
    assert "weight values differ" in text


def swap_activation(model: ModelProto) -> None:
    """Turn the first Relu into Sigmoid."""
    next(node for node in model.graph.node if node.op_type == "Relu").op_type = "Sigmoid"


def drop_row(model: ModelProto) -> None:
    """Remove a row of the head's weight."""
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == "head/Conv/weight")
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor)[1:], tensor.name))


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(swap_activation, id="activation"),
        pytest.param(drop_row, id="shape"),
        pytest.param(lambda model: model.graph.node.pop(4), id="node_gone"),
        pytest.param(lambda model: setattr(model.graph.output[0], "name", "other"), id="output_renamed"),
        pytest.param(lambda model: model.graph.node[1].attribute[0].ints.__setitem__(0, 2), id="attribute"),
    ],
)
def test_verify_refuses_another_structure(model: Path, out: Path, plan: Path, change: Any, tmp_path: Path) -> None:
    """Any other change of the pruned model ends with exit code 5 and says what differs."""
    report = tmp_path / "r.json"
    result = run("verify", model, edit(out, change), "--plan", plan, "--json", report)
    assert_failed(result, 5)
    assert "not what the plan makes of the original" in result.stderr
    assert json.loads(report.read_text())["error"]["code"] == 5


# -- evaluate ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("folder", "metric", "value", "tolerance", "samples"),
    [
        pytest.param(DIGITS, "top1", 100 * 359 / 360, 0.3, 360, id="digits"),
        pytest.param(DENOISE, "psnr", 30.62, 0.02, 8, id="denoise"),
    ],
)
def test_evaluate_agrees_with_the_readme(
    folder: Path, metric: str, value: float, tolerance: float, samples: int
) -> None:
    """The trained networks are as good as fixtures/README.md says, in text and report."""
    arguments = (folder / f"{folder.name}.onnx", "--data", folder / f"{folder.name}_eval.npz", "--metric", metric)
    data = json.loads(ok("evaluate", *arguments, "--json", "-").stdout)
    assert data["schema"] == 1
    assert data["quality"]["metric"] == metric
    assert data["quality"]["samples"] == samples
    assert data["quality"]["value"] == pytest.approx(value, abs=tolerance)
    text = ok("evaluate", *arguments).stdout
    assert text.split()[0] == metric
    assert f"over {samples} samples" in text


@pytest.mark.parametrize(
    ("options", "change"),
    [
        pytest.param(("--data-range", "255"), 20 * math.log10(255), id="data_range"),
        pytest.param(("--crop-border", "8"), None, id="crop_border"),
        pytest.param(("--clip",), None, id="clip"),
        pytest.param(("--round-bits", "4"), None, id="round_bits"),
        pytest.param(("--output", "residual"), None, id="output"),
    ],
)
def test_options_of_pictures_reach_the_metric(options: tuple[str, ...], change: float | None) -> None:
    """Each option of how a picture is read changes the quality, by as much as can be told beforehand."""
    arguments = (DENOISE / "denoise.onnx", "--data", DENOISE / "denoise_eval.npz", "--metric", "psnr", "--json", "-")
    plain, other = (json.loads(ok("evaluate", *arguments, *more).stdout)["quality"]["value"] for more in ((), options))
    assert other != plain
    assert change is None or other - plain == pytest.approx(change, abs=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(("--crop-border", "-1"), id="crop_border"),
        pytest.param(("--channels", "hsv"), id="channels"),
        pytest.param(("--channels", "y"), id="luma_of_grey"),
        pytest.param(("--data-range", "0"), id="data_range"),
        pytest.param(("--data-range", "nan"), id="data_range_nan"),
        pytest.param(("--round-bits", "0"), id="round_bits"),
    ],
)
def test_wrong_options_of_pictures(options: tuple[str, ...]) -> None:
    """A value out of range, or one that does not fit the pictures, is a usage error."""
    data = ("--data", DENOISE / "denoise_eval.npz", "--metric", "psnr")
    assert_failed(run("evaluate", DENOISE / "denoise.onnx", *data, *options), 2)


def test_wrong_metric_is_told_before_pruning(model: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A metric that is unknown, or cannot go with an option, is refused before any work."""
    monkeypatch.setattr(pipeline, "prune", None)
    data = ("--target-mac", "0.5", "--data", DIGITS / "digits_eval.npz", "--metric")
    assert_failed(run(model, out, *data, "top1", "--clip"), 2)
    assert_failed(run(model, out, *data, "agreement-top1", "--crop-border", "2"), 2)
    assert_failed(run(model, out, *data, "no_such_module:score"), 2)


@pytest.mark.parametrize("metric", ["agreement-psnr", "agreement-top1"])
def test_agreement_with_the_original(metric: str, out: Path, tmp_path: Path) -> None:
    """Pruning needs no labels to say how far a model still agrees with the original; evaluate says the same later."""
    report = tmp_path / "r.json"
    data = ("--data", DIGITS / "digits_calib.npz", "--metric", metric)
    ok(DIGITS / "digits.onnx", out, "--target-mac", "0.5", *data, "--no-latency", "--json", report)
    written = json.loads(report.read_text())
    assert written["quality"]["before"] == 100
    assert 0 < written["quality"]["after"] < 100
    assert any("the range of the original" in note for note in written["notes"]) == (metric == "agreement-psnr")
    later = json.loads(ok("evaluate", out, *data, "--reference", DIGITS / "digits.onnx", "--json", "-").stdout)
    assert later["quality"]["value"] == pytest.approx(written["quality"]["after"], abs=1e-6)
    assert_failed(run("evaluate", out, *data), 2)


def test_metric_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A function in a module of the current folder is a metric; a name that leads nowhere is a usage error."""
    code = ("def worst(one, other):", "    return abs(one - other).reshape(len(one), -1).max(1)")
    (tmp_path / "cli_metric.py").write_text("\n".join((*code, "worst.higher_is_better = False")))
    monkeypatch.chdir(tmp_path)
    data = (DENOISE / "denoise.onnx", "--data", DENOISE / "denoise_eval.npz", "--metric")
    quality = json.loads(ok("evaluate", *data, "cli_metric:worst", "--json", "-").stdout)["quality"]
    assert quality["metric"] == "cli_metric:worst"
    assert 0 < quality["value"] < 1
    assert_failed(run("evaluate", *data, "cli_metric:best"), 2)
    assert_failed(run("evaluate", *data, "no_such_module:worst"), 2)


@pytest.mark.parametrize(
    ("limit", "keep_going", "code", "written"),
    [
        pytest.param(("--max-drop", "100"), False, 0, True, id="met"),
        pytest.param(("--max-drop", "0.5"), False, 6, False, id="max_drop"),
        pytest.param(("--min-quality", "99.9"), False, 6, False, id="min_quality"),
        pytest.param(("--max-drop", "0.5"), True, 6, True, id="keep_going"),
    ],
)
def test_quality_guard(
    out: Path, limit: tuple[str, str], keep_going: bool, code: int, written: bool, tmp_path: Path
) -> None:
    """A guard that is not met ends with 6 and writes nothing, unless told to go on."""
    report = tmp_path / "r.json"
    options = ("--data", DIGITS / "digits_eval.npz", "--metric", "top1", "--target-mac", "0.2", "--no-latency")
    result = run(
        DIGITS / "digits.onnx", out, *options, *limit, "--json", report, *(["--keep-going"] if keep_going else [])
    )
    assert result.exit_code == code, result.output
    assert out.exists() == written
    data = json.loads(report.read_text())
    assert ("error" in data) == (code == 6)


# -- errors ------------------------------------------------------------------------------------------------------------


def assert_failed(result: Result, code: int) -> None:
    """The exit code is the expected one; the message has one to three lines on stderr and no traceback."""
    assert result.exit_code == code, result.output
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert 1 <= len(lines) <= 3, result.stderr
    assert "Traceback" not in result.output
    assert "internal error" not in result.output


def broken(path: Path) -> Path:
    """Put NaN into a weight."""

    def change(model: ModelProto) -> None:
        tensor = next(tensor for tensor in model.graph.initializer if tensor.name == "body0/Conv/weight")
        value = numpy_helper.to_array(tensor).copy()
        value[0, 0, 0, 0] = np.nan
        tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))

    return edit(path, change)


def single(node: onnx.NodeProto, *weights: onnx.TensorProto) -> bytes:
    """A model of one node from x to y."""
    image = [helper.make_tensor_value_info(name, TensorProto.FLOAT, (1, 3, 4, 4)) for name in ("x", "y")]
    graph = helper.make_graph([node], "one", image[:1], image[1:], list(weights))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return model.SerializeToString()


def random_bytes(seed: int) -> bytes:
    """Seeded noise."""
    return np.random.default_rng(seed).bytes(5000)


WHOLE = architectures.ALL["edsr"]().SerializeToString()
FROZEN = single(
    helper.make_node("Conv", ["x", "w"], ["y"]), numpy_helper.from_array(np.ones((3, 3, 1, 1), np.float32), "w")
)
CYCLE = single(helper.make_node("Relu", ["y"], ["y"]))
FILES: dict[str, tuple[bytes, int]] = {
    "empty": (b"", 3),
    "text": (b"this is not a model\n" * 50, 3),
    "json": (b'{"graph": []}', 3),
    "random_1": (random_bytes(1), 3),
    "random_2": (random_bytes(2), 3),
    "random_3": (random_bytes(3), 3),
    "cut_at_10_percent": (WHOLE[: len(WHOLE) // 10], 3),
    "cut_at_half": (WHOLE[: len(WHOLE) // 2], 3),
    "cut_at_the_end": (WHOLE[:-1], 3),
    "cycle": (CYCLE, 3),
    "without_weights": (single(helper.make_node("Relu", ["x"], ["y"])), 4),
    "without_prunable_channels": (FROZEN, 4),
}
"""Content of IN and the exit code. A model without weights has nothing to reduce: the target is out of reach."""


def attempt(folder: Path, args: Sequence[object], code: int) -> dict[str, Any]:
    """Run a command that fails: the right code, a short message, an error report, and no file left behind."""
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    report = folder / "report.json"
    result = run(*args, "--json", report)
    assert_failed(result, code)
    data = json.loads(report.read_text())
    report.unlink()
    assert data["schema"] == 1
    assert set(data["error"]) >= {"code", "message"}
    assert data["error"]["code"] == code
    assert data["error"]["message"]
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    return data


@pytest.mark.parametrize("name", FILES)
def test_bad_model(name: str, model: Path, out: Path, tmp_path: Path) -> None:
    """A file that is no model, a broken one, and one without anything to prune have their exit codes."""
    content, code = FILES[name]
    model.write_bytes(content)
    message = attempt(tmp_path, (model, out, *QUICK), code)["error"]["message"]
    if code == 3 and name != "cycle":
        assert str(model) in message


@pytest.mark.parametrize("command", ["inspect", "evaluate"])
@pytest.mark.parametrize("name", ["empty", "text", "random_1", "cut_at_half", "cycle"])
def test_bad_model_in_other_commands(name: str, command: str, model: Path, tmp_path: Path) -> None:
    """The other commands refuse the same files with exit code 3."""
    model.write_bytes(FILES[name][0])
    more = ("--data", DIGITS / "digits_eval.npz", "--metric", "top1") if command == "evaluate" else ()
    attempt(tmp_path, (command, model, *more), 3)


def test_nan_weights(model: Path, out: Path, tmp_path: Path) -> None:
    """NaN among the weights is exit code 3 and names the tensor."""
    broken(model)
    assert "body0/Conv/weight" in attempt(tmp_path, (model, out, *QUICK), 3)["error"]["message"]


def test_missing_file(tmp_path: Path, out: Path) -> None:
    """A missing model is exit code 7 and named."""
    gone = tmp_path / "gone.onnx"
    assert str(gone) in attempt(tmp_path, (gone, out, *QUICK), 7)["error"]["message"]


def test_folder_as_model(tmp_path: Path, out: Path) -> None:
    """A folder in the place of the model is exit code 7."""
    attempt(tmp_path, (tmp_path, out, *QUICK), 7)


@pytest.mark.parametrize("force", [(), ("--force",)], ids=["plain", "force"])
def test_output_is_the_input(model: Path, tmp_path: Path, force: tuple[str, ...]) -> None:
    """OUT may not be IN, not even by another name or with --force: exit code 2."""
    attempt(tmp_path, (model, model, *QUICK, *force), 2)
    attempt(tmp_path, (model, tmp_path / ".." / tmp_path.name / "in.onnx", *QUICK, *force), 2)
    (tmp_path / "link.onnx").symlink_to(model)
    attempt(tmp_path, (model, tmp_path / "link.onnx", *QUICK, *force), 2)


def test_output_exists(model: Path, out: Path, tmp_path: Path) -> None:
    """An existing OUT is exit code 2 and stays; the message names --force."""
    out.write_text("precious")
    assert "--force" in attempt(tmp_path, (model, out, *QUICK), 2)["error"]["message"]


def test_output_is_a_folder(model: Path, tmp_path: Path) -> None:
    """A folder as OUT is exit code 2, --force or not."""
    (tmp_path / "there").mkdir()
    attempt(tmp_path, (model, tmp_path / "there", *QUICK, "--force"), 2)


@pytest.mark.parametrize("parent", ["nowhere", "in.onnx"], ids=["missing_folder", "below_a_file"])
def test_unwritable_output(model: Path, tmp_path: Path, parent: str) -> None:
    """A folder that cannot be written to is exit code 7, before any work is done."""
    attempt(tmp_path, (model, tmp_path / parent / "out.onnx", *QUICK), 7)


def test_disk_full(model: Path, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When OUT cannot be written to its end, exit code 7, and neither half a file nor a temporary one stays."""
    real = os.fdopen

    def full(handle: int, *args: Any, **options: Any) -> Any:
        if ".out.onnx." in str(Path(f"/proc/self/fd/{handle}").readlink()):
            os.close(handle)
            raise OSError(28, "No space left on device")
        return real(handle, *args, **options)

    monkeypatch.setattr(pipeline.onnx_io.os, "fdopen", full)
    assert "No space left" in attempt(tmp_path, (model, out, *QUICK), 7)["error"]["message"]


USAGE: dict[str, tuple[str, ...]] = {
    "target_zero": ("--target-mac", "0"),
    "target_negative": ("--target-mac", "-1"),
    "target_text": ("--target-mac", "abc"),
    "target_nan": ("--target-mac", "nan"),
    "target_inf": ("--target-mac", "inf"),
    "target_empty": ("--target-mac", ""),
    "no_target": (),
    "unknown_option": (*QUICK, "--frobnicate"),
    "option_without_value": ("--no-latency", "--target-mac"),
    "unknown_preset": (*QUICK, "--preset", "z"),
    "unknown_criterion": (*QUICK, "--criterion", "z"),
    "align_zero": (*QUICK, "--align", "0"),
    "max_prune_above_one": (*QUICK, "--max-prune", "1.5"),
    "shape_of_unknown_input": (*QUICK, "--input-shape", "nobody:1,3,20,24"),
    "shape_malformed": (*QUICK, "--input-shape", "image"),
    "shape_contradicts": (*QUICK, "--input-shape", "image:1,3,21,24"),
    "metric_without_data": (*QUICK, "--metric", "psnr"),
    "guard_without_data": (*QUICK, "--max-drop", "0.1"),
    "third_file": ("more.onnx", *QUICK),
}


@pytest.mark.parametrize("name", USAGE)
def test_wrong_usage(name: str, model: Path, out: Path, tmp_path: Path) -> None:
    """Options that make no sense are exit code 2, with the error in the JSON report too."""
    report = tmp_path / "report.json"
    result = run(model, out, "--json", report, *USAGE[name])
    assert_failed(result, 2)
    assert json.loads(report.read_text())["error"]["code"] == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.onnx", "report.json"]


def test_missing_arguments(model: Path, tmp_path: Path) -> None:
    """Without OUT, exit code 2."""
    assert_failed(run(model, *QUICK), 2)
    assert list(tmp_path.iterdir()) == [model]


def test_target_out_of_reach(model: Path, out: Path, tmp_path: Path) -> None:
    """A target below the floor is exit code 4; the message says the floor and where to look."""
    message = attempt(tmp_path, (model, out, "--target-mac", "0.001", "--no-latency"), 4)["error"]["message"]
    assert "out of reach" in message
    assert "inspect" in message


def test_nothing_is_a_share_of_nothing(out: Path, tmp_path: Path) -> None:
    """A model without MAC or parameters keeps all of them, also where hardware rounds; less than all is out of reach."""
    t, model = Tiny(), tmp_path / "relu.onnx"
    onnx.save(t.build(t.node("Relu", t.input(1, 2, 4, 6))), model)
    for target in ("--target-mac", "--target-params", "--target-bandwidth", "--target-latency", "--target-size"):
        assert "already meets" in ok(model, out, target, "1.0", "--no-latency", "--force").output
        assert_failed(run(model, out, target, "0.9", "--no-latency", "--force"), 4)
    ok(model, out, "--target-mac", "1K", "--profile", "ascend", "--no-latency", "--force")


@pytest.mark.parametrize("option", ["--align", "--min-channels", "--threads"])
@pytest.mark.parametrize("value", [1 << 31, 10**20])
def test_numbers_have_a_bound(option: str, value: int, model: Path, out: Path) -> None:
    """What no machine has is exit code 2; what one might have is taken."""
    assert_failed(run(model, out, *QUICK, option, value), 2)
    with pytest.raises(onnxprune.UsageError):
        onnxprune.prune(model, target_mac=0.6, **{option[2:].replace("-", "_"): value})
    if option != "--threads":
        assert "internal error" not in run(model, out, *QUICK, option, cli.CHANNELS.max).output


PLANS: dict[str, tuple[str, int]] = {
    "text": ("not json", 3),
    "empty": ("", 3),
    "list": ("[]", 3),
    "no_schema": ("{}", 3),
    "other_schema": ('{"schema": 99, "initializers": {}}', 3),
    "unknown_tensor": ('{"schema": 1, "initializers": {"nowhere": {"0": [0]}}}', 3),
    "index_too_large": ('{"schema": 1, "initializers": {"head/Conv/weight": {"0": [99]}}}', 3),
    "axis_too_large": ('{"schema": 1, "initializers": {"head/Conv/weight": {"7": [0]}}}', 3),
}


@pytest.mark.parametrize("command", ["apply", "verify"])
@pytest.mark.parametrize("name", PLANS)
def test_bad_plan(name: str, command: str, model: Path, out: Path, tmp_path: Path) -> None:
    """A file that is no plan, or one of another model, is exit code 3 and named."""
    text, code = PLANS[name]
    path = tmp_path / "plan.json"
    path.write_text(text)
    other = out if command == "apply" else model
    attempt(tmp_path, (command, model, other, "--plan", path), code)


def test_missing_plan(model: Path, out: Path, tmp_path: Path) -> None:
    """A plan file that is missing is exit code 7."""
    attempt(tmp_path, ("apply", model, out, "--plan", tmp_path / "gone.json"), 7)


@pytest.mark.parametrize(
    ("content", "code"), [("target-mac = [", 2), ("nonsense = 3", 2), (None, 7)], ids=["syntax", "unknown", "missing"]
)
def test_bad_config(model: Path, out: Path, content: str | None, code: int, tmp_path: Path) -> None:
    """A config file that is not TOML or has unknown keys is exit code 2, a missing one 7."""
    config = tmp_path / "c.toml"
    if content is not None:
        config.write_text(content)
    attempt(tmp_path, ("prune", model, out, "--config", config, *QUICK), code)


@pytest.mark.parametrize(
    "line",
    [
        "calib = 5", 'calib = ["a"]', "json = true", "json = 1979-05-27", 'json = ["a"]', 'calib = "a\\u0000b"', "quiet = 5",
        'quiet = "yes"', "verbose = [1]", "profile = 5", "ignore = [1]", "ignore = [[1]]", "align = inf", "align = [1]",
        "align = true", "target-mac = [1]", "seed = 1.5", 'mean = ["a"]', "input-shape = 3",
    ],
)  # fmt: skip
def test_config_value_of_another_kind_is_refused(line: str, model: Path, out: Path, tmp_path: Path) -> None:
    """A value that the option cannot mean is exit code 2 and named."""
    config = tmp_path / "c.toml"
    config.write_text(line)
    attempt(tmp_path, ("prune", model, out, "--config", config, *QUICK), 2)


def test_config_values_are_read_as_on_the_command_line(model: Path, out: Path, tmp_path: Path) -> None:
    """Numbers, lists, several values of one option, and switches, also those that say no."""
    config, report = tmp_path / "c.toml", tmp_path / "r.json"
    config.write_text('seed = 3\nmean = [0.5, 1]\nonly = ["*", "*"]\nno-new-nodes = true\nquiet = true')
    assert ok("prune", model, out, "--config", config, *QUICK, "--json", report).output == ""
    options = json.loads(report.read_text())["options"]
    assert [options[name] for name in ("seed", "only", "new_nodes")] == [3, ["*", "*"], False]


@pytest.mark.parametrize(
    ("command", "line"),
    [
        ("prune", 'metric = "config_code:score"'), ("evaluate", 'metric = "config_code:score"'),
        ("sweep", 'metric = ["top1", "config_code:score"]'), ("iterate", 'metric = "config_code:score"'),
        ("iterate", 'trainer = "touch ran {artifact} {out}"'), ("sweep", 'scheduler = "tcp://10.0.0.1:8786"'),
        ("prune", 'out = "other.onnx"'), ("prune", 'model = "other.onnx"'),
    ],
)  # fmt: skip
def test_config_runs_no_code(
    command: str, line: str, model: Path, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file of options names no metric of one's own, no trainer, no scheduler and no arguments."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config_code.py").write_text("import pathlib\npathlib.Path('ran').touch()\n")
    (tmp_path / "c.toml").write_text(line)
    models = (model,) if command in ("evaluate", "sweep") else (model, out)
    given = () if command == "sweep" else ("--data", DIGITS / "digits_eval.npz")
    result = run(command, *models, *given, *(() if command == "evaluate" else QUICK[:2]), "--config", "c.toml")
    assert_failed(result, 2)
    assert "give it on the command line" in result.stderr
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("problem", ["missing", "no_labels", "unknown_metric"])
def test_bad_data(problem: str, tmp_path: Path) -> None:
    """Missing data is exit code 7; data that lacks what a metric needs, and unknown metrics, are 2."""
    metric = "top2000" if problem == "unknown_metric" else "top1"
    data = DIGITS / "digits_calib.npz" if problem == "no_labels" else DIGITS / "digits_eval.npz"
    if problem == "missing":
        data = tmp_path / "gone.npz"
    arguments = ("evaluate", DIGITS / "digits.onnx", "--data", data, "--metric", metric)
    attempt(tmp_path, arguments, 7 if problem == "missing" else 2)


def test_interrupt(model: Path, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Control-C ends with 130, one line, and no file."""

    def interrupted(*_: object, **__: object) -> NoReturn:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "prune", interrupted)
    assert_failed(run(model, out, *QUICK), 130)
    assert list(tmp_path.iterdir()) == [model]


def test_internal_error(model: Path, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bug is exit code 1, says how to report it, and shows its traceback with -v alone."""

    def crashed(*_: object, **__: object) -> NoReturn:
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr(pipeline, "prune", crashed)
    report = tmp_path / "r.json"
    result = run(model, out, *QUICK, "--json", report)
    assert result.exit_code == 1
    assert "internal error: ZeroDivisionError: division by zero" in result.stderr
    assert "report it" in result.stderr
    assert len(result.stderr.splitlines()) <= 3
    assert "Traceback" not in result.stderr
    assert json.loads(report.read_text())["error"]["code"] == 1
    assert "Traceback" in run(model, out, *QUICK, "-v").stderr


def test_failed_json_dash_prints_the_error_alone(tmp_path: Path, out: Path) -> None:
    """``--json -`` of a failed run puts the error object on stdout and the message on stderr."""
    result = run(tmp_path / "gone.onnx", out, *QUICK, "--json", "-")
    assert_failed(result, 7)
    assert json.loads(result.stdout)["error"]["code"] == 7


# -- the real command --------------------------------------------------------------------------------------------------


def command(*args: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the installed command in its own process."""
    executable = Path(sys.executable).parent / "onnxprune"
    return subprocess.run(
        [str(executable), *map(str, args)], capture_output=True, text=True, check=False, timeout=120,
        env={**os.environ, **environment},
    )  # fmt: skip


def test_command_prunes(model: Path, out: Path) -> None:
    """The installed command prunes, prints plain text, and leaves nothing but the result."""
    done = command(model, out, *QUICK, TERM="xterm-256color")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert f"written  {out}" in done.stdout
    assert "\x1b" not in done.stdout
    assert sorted(path.name for path in out.parent.iterdir()) == ["in.onnx", "out.onnx"]


def test_command_gives_equal_bytes_in_another_process(model: Path, out: Path, tmp_path: Path) -> None:
    """Two processes with different hash seeds write the same bytes and the same plan."""
    plans = [tmp_path / "p1.json", tmp_path / "p2.json"]
    outs = [out, tmp_path / "second.onnx"]
    for seed, (path, plan) in enumerate(zip(outs, plans, strict=True), 1):
        assert command(model, path, *QUICK, "--plan-out", plan, PYTHONHASHSEED=str(seed)).returncode == 0
    assert outs[0].read_bytes() == outs[1].read_bytes()
    assert plans[0].read_bytes() == plans[1].read_bytes()


def test_command_fails_with_its_code(model: Path, out: Path) -> None:
    """Exit codes reach the shell: wrong options 2, a missing file 7, a target out of reach 4."""
    assert command(model, out, "--target-mac", "abc").returncode == 2
    assert command(out, model, *QUICK, "--force").returncode == 7
    failed = command(model, out, "--target-mac", "0.0001")
    assert failed.returncode == 4
    assert failed.stdout == ""
    assert 1 <= len(failed.stderr.splitlines()) <= 3


def test_command_knows_its_version_and_help() -> None:
    """``--version`` prints the version; every command of this release has help with an example."""
    assert pipeline.version("onnxprune") in command("--version").stdout
    for name in cli.commands.commands:
        text = ok(name, "--help").output
        assert "Example:" in text, name


def test_dynamic_input_is_shown(tmp_path: Path, out: Path) -> None:
    """What was assumed about a dynamic axis stands in the summary."""
    path = tmp_path / "dynamic.onnx"
    onnx.save(variants.with_dynamic_batch(architectures.ALL["edsr"]()), path)
    text = ok(path, out, *QUICK).stdout
    assert "image taken as [1, 3, 20, 24]" in text


# -- files -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", sorted(cli.commands.commands))
def test_every_path_is_known_to_the_check_of_files(command: str) -> None:
    """No command takes a file that the check against overwriting does not know; folders of runs and config are apart."""
    paths = {p.name for p in cli.commands.commands[command].params if isinstance(p.type, click.Path)}
    assert paths <= {*cli.MODELS, *cli.FILES, *cli.OUTPUTS, *cli.FOLDERS, "config"}


@pytest.mark.parametrize("content", ["[multiples]\n'*' = 4\n", "[broken"])
def test_reports_go_over_no_file_that_is_read(tmp_path: Path, content: str) -> None:
    """Profiles, latency tables, calibration data and configurations outlive a report of their name, whole or broken."""
    toml, table, calib = tmp_path / "p.toml", tmp_path / "t.csv", tmp_path / "c.npz"
    toml.write_text(content)
    table.write_text("layer,inputs,outputs,ms\n")
    calib.write_bytes((DIGITS / "digits_calib.npz").read_bytes())
    before = [path.read_bytes() for path in (toml, table, calib)]
    loop = (
        "iterate",
        DIGITS / "digits.onnx",
        tmp_path / "o.onnx",
        "--target-mac",
        0.6,
        "--data",
        DIGITS / "digits_eval.npz",
    )
    for words in (
        ("inspect", DIGITS / "digits.onnx", "--profile", toml, "--json", toml),
        ("inspect", DIGITS / "digits.onnx", "--config", toml, "--json", toml),
        ("sweep", DIGITS / "digits.onnx", "--target-mac", 0.6, "--calib", calib, "--json", calib, "--force"),
        ("sweep", DIGITS / "digits.onnx", "--target-latency", 0.6, "--latency-table", table, "--csv", table, "--force"),
        ("sensitivity", DIGITS / "digits.onnx", "--calib", calib, "--profile", toml, "--csv", toml, "--force"),
        (*loop, "--profile", toml, "--plan-out", toml),
        (*loop, "--calib", calib, "--sensitivity", table, "--json", table),
    ):
        assert run(*words).exit_code == 2
        assert [path.read_bytes() for path in (toml, table, calib)] == before
