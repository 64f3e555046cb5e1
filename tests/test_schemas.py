"""Reports and plans of all commands are what the JSON Schema files say, with no key that those do not know."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from jsonschema import Draft202012Validator, ValidationError
from schemas import OPEN, assert_plan, assert_report, kind_of_report, shipped

import architectures
import onnxprune
from commands import ok, run
from graphs import Tiny
from onnxprune import errors
from onnxprune.coupling import ATTENTION
from onnxprune.report.reasons import KINDS

FIXTURES = Path(__file__).parents[1] / "fixtures"
DIGITS = FIXTURES / "digits" / "digits.onnx"
DATA = DIGITS.with_name("digits_eval.npz")
QUICK = ("--target-mac", "0.6", "--no-latency")
COMPARED = ("--data", "CALIB", "--metric", "cosine")
JUDGED = ("--data", DATA, "--metric", "top1")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a network without biases and a dozen samples for it, ``calib.npz``; return the network's path."""
    folder = tmp_path_factory.mktemp("small")
    t = Tiny()
    y = t.node("Relu", t.conv(t.input(1, 3, 16, 16), "a", 3, 8, bias=False))
    onnx.save(
        t.build(t.conv(t.node("Relu", t.conv(y, "b", 8, 8, bias=False)), "z", 8, 3, bias=False)), folder / "in.onnx"
    )
    x, target = t.rng.uniform(0, 1, (2, 12, 3, 16, 16)).astype(np.float32)
    np.savez(folder / "calib.npz", x=x, target=target)
    return folder / "in.onnx"


def keys(content: Any, path: str = "") -> Iterable[str]:
    """Paths of everything that is not null or empty."""
    if isinstance(content, dict):
        for name, value in content.items():
            yield from keys(value, f"{path}.{name}")
    elif isinstance(content, list):
        for value in content:
            yield from keys(value, f"{path}[]")
    elif content is not None:
        yield path


@pytest.mark.parametrize(
    ("kind", "shown", "arguments"),
    [
        pytest.param("run", ".target.floor", ["prune", DIGITS, "OUT", *QUICK], id="prune"),
        pytest.param("run", ".latency.after_ms", ["prune", DIGITS, "OUT", "--target-mac", "0.8"], id="latency"),
        pytest.param("run", ".cost.after.mac", ["prune", DIGITS, "OUT", *QUICK, "--no-proof"], id="no-proof"),
        pytest.param("run", ".notes[]", ["prune", DIGITS, "OUT", "--target-mac", "1"], id="met"),
        pytest.param(
            "run", ".compensation.layers[].ridge", ["prune", "SMALL", "OUT", *QUICK, "--calib", "CALIB", *COMPARED],
            id="calib",
        ),
        pytest.param(
            "run", ".targets[].kind", ["prune", DIGITS, "OUT", *QUICK, "--target-size", "200K", "--align", "8"], id="size"
        ),
        pytest.param(
            "run", ".cost.after.effective_mac", ["prune", DIGITS, "OUT", *QUICK, "--profile", "generic"], id="profile"
        ),
        pytest.param(
            "run", ".probes[].quality", ["prune", "SMALL", "OUT", *COMPARED, "--max-drop", "0.5", "--no-latency"],
            id="search",
        ),
        pytest.param(
            "run",
            ".pictures[].wanted",
            ["prune", "SMALL", "OUT", *QUICK, "--data", "CALIB", "--metric", "psnr", "--html", "HTML"],
            id="pictures",
        ),
        pytest.param("run", ".curve[].score", ["inspect", DIGITS], id="inspect"),
        pytest.param("run", ".options.ignore[]", ["inspect", DIGITS, "--ignore", "*conv1*"], id="ignore"),
        pytest.param("difference", ".layers[].a.mac", ["diff", DIGITS, "SMALL"], id="diff"),
        pytest.param("evaluation", ".quality.value", ["evaluate", DIGITS, *JUDGED], id="evaluate"),
        pytest.param(
            "sensitivity", ".rows[].error",
            ["sensitivity", "SMALL", "--calib", "CALIB", "--shares", "0.5", "--jobs", "1"],
            id="sensitivity",
        ),
        pytest.param(
            "sweep", ".rows[].error.code",
            ["sweep", DIGITS, "--target-mac", "0.8", "--target-mac", "0.001", "--jobs", "1", *JUDGED],
            id="sweep",
        ),
    ],
)  # fmt: skip
def test_reports_are_what_the_schema_says(
    tmp_path: Path, small: Path, kind: str, shown: str, arguments: Sequence[object]
) -> None:
    """The report of every command has exactly the keys of its kind, and the part that the command is here for."""
    places = {
        "OUT": tmp_path / "out.onnx",
        "HTML": tmp_path / "r.html",
        "SMALL": small,
        "CALIB": small.with_name("calib.npz"),
    }
    ok(*(places.get(str(word), word) for word in arguments), "-q", "--json", tmp_path / "r.json")
    content = json.loads((tmp_path / "r.json").read_text())
    assert_report(kind, content)
    assert shown in set(keys(content))


def test_apply_and_verify_report_as_prune_does(tmp_path: Path, small: Path) -> None:
    """A plan with added biases is what the schema says; so are the reports of replaying and of verifying it."""
    plan, out, report = (tmp_path / name for name in ("plan.json", "out.onnx", "r.json"))
    ok(small, out, *QUICK, "--calib", small.with_name("calib.npz"), "--plan-out", plan, "-q")
    content = json.loads(plan.read_text())
    assert content["added"]
    assert_plan(content)
    for command in (["apply", small, tmp_path / "again.onnx"], ["verify", small, out]):
        ok(*command, "--plan", plan, "--json", report, "-q")
        kind_of_report("run").validate(json.loads(report.read_text()))


@pytest.mark.parametrize(
    ("code", "arguments"),
    [
        pytest.param(2, [DIGITS, "OUT"], id="usage"),
        pytest.param(2, [DIGITS, "OUT", "--preset", "e"], id="unknown-choice"),
        pytest.param(3, ["inspect", FIXTURES / "README.md"], id="model"),
        pytest.param(4, [DIGITS, "OUT", "--target-mac", "0.001"], id="out-of-reach"),
        pytest.param(6, [DIGITS, "OUT", *QUICK, *JUDGED, "--max-drop", "0"], id="guard"),
        pytest.param(7, ["inspect", FIXTURES / "nowhere.onnx"], id="file"),
    ],
)
def test_failures_are_what_the_schema_says(tmp_path: Path, code: int, arguments: Sequence[object]) -> None:
    """A run that fails reports its code and its message, and no more."""
    report = tmp_path / "r.json"
    result = run(*(tmp_path / "out.onnx" if word == "OUT" else word for word in arguments), "--json", report)
    assert result.exit_code == code
    content = json.loads(report.read_text())
    assert_report("failure", content)
    assert content["error"]["code"] == code


def test_grouped_and_shared_tensors_in_plans() -> None:
    """Lists in lists for blocks that keep different inputs, and slices by reader of a shared vector, are in the schema."""
    t = Tiny()
    y = t.conv(t.conv(t.input(1, 3, 6, 6), "a", 3, 8), "b", 8, 8, group=2)
    blocks = onnxprune.prune(t.build(t.conv(y, "z", 8, 2)), target_mac=0.7)
    shared = onnxprune.prune(shared_vector(), target_mac=0.6)
    for result in (blocks, shared):
        assert_plan(json.loads(json.dumps(result.plan.to_json())))
    kept = [indices for axes in blocks.plan.to_json()["initializers"].values() for indices in axes.values()]
    assert any(isinstance(indices[0], list) for indices in kept)
    assert any("@" in name for name in shared.plan.initializers)


def shared_vector() -> onnx.ModelProto:
    """Two layers of equal width that read one bias, as exporters that remove duplicates leave it."""
    t = Tiny()
    t.random(6, name="bias")
    x = t.input(1, 3, 6, 6)
    for name, channels in (("a", 3), ("b", 6)):
        x = t.node(
            "Relu", t.node("Conv", x, t.random(6, channels, 3, 3, name=f"{name}.w"), "bias", pads=[1] * 4, name=name)
        )
    return t.build(t.conv(x, "z", 6, 2))


@pytest.mark.parametrize("name", ["resnext", "c2f_detector", "layer_norm_mlp", "dynamic_reshape_constant"])
def test_plans_of_networks(name: str) -> None:
    """Plans and reports of other kinds of networks are what the schema says."""
    result = onnxprune.prune(architectures.ALL[name](), target_mac=0.7, proof=False)
    assert_plan(json.loads(json.dumps(result.plan.to_json())))
    kind_of_report("run").validate(json.loads(json.dumps(result.report.to_json())))


def test_a_plan_may_be_written_by_hand() -> None:
    """The contract's least plan, the slices alone, is one, and the program reads it."""
    text = json.dumps({"schema": 1, "initializers": {"conv.weight": {"0": [0, 2]}}})
    OPEN["plan"].validate(json.loads(text))
    assert onnxprune.Plan.from_json(text).initializers == {"conv.weight": {0: [0, 2]}}


@pytest.mark.parametrize(
    "plan",
    [
        pytest.param({"schema": 2, "initializers": {}}, id="schema"),
        pytest.param({"schema": 1}, id="no-initializers"),
        pytest.param({"schema": 1, "initializers": {"w": {"x": [0]}}}, id="axis"),
        pytest.param({"schema": 1, "initializers": {"w": {"0": []}}}, id="nothing-kept"),
        pytest.param({"schema": 1, "initializers": {"w": {"0": [1, 1]}}}, id="twice"),
        pytest.param({"schema": 1, "initializers": {"w": {"0": [0, [1]]}}}, id="mixed"),
        pytest.param({"schema": 1, "initializers": {}, "attention": "most"}, id="attention"),
    ],
)
def test_wrong_plans_are_refused(plan: dict[str, Any]) -> None:
    """The schema refuses what the program refuses, or what could not be meant."""
    with pytest.raises(ValidationError):
        OPEN["plan"].validate(plan)


def test_unknown_keys_are_for_later_versions() -> None:
    """The files that ship let unknown keys pass; these tests do not."""
    report = json.loads(json.dumps(onnxprune.inspect(DIGITS).to_json()))
    newer = report | {"groups": [{**report["groups"][0], "colour": "red"}]}
    OPEN["report"].validate(newer)
    kind_of_report("run").validate(report)
    with pytest.raises(ValidationError, match="colour"):
        kind_of_report("run").validate(newer)
    with pytest.raises(ValidationError):
        OPEN["report"].validate({name: value for name, value in report.items() if name != "cost"})


def test_closed_lists_are_those_of_the_program() -> None:
    """Kinds of reasons, exit codes of errors and ways to treat attention stand in the schema as in the program."""
    parts = shipped("report")["$defs"]
    assert parts["frozen"]["properties"]["kind"]["enum"] == list(KINDS)
    tree = [value for value in vars(errors).values() if isinstance(value, type)]
    assert parts["error"]["properties"]["code"]["enum"] == sorted({130, *(each.exit_code for each in tree)})
    assert sorted(shipped("plan")["properties"]["attention"]["enum"]) == sorted(ATTENTION)


@pytest.mark.parametrize("name", ["report", "plan"])
def test_schema_is_printed(name: str) -> None:
    """``onnxprune schema`` prints the file that ships, which is a valid schema."""
    printed = json.loads(ok("schema", name).stdout)
    assert printed == shipped(name)
    Draft202012Validator.check_schema(printed)
