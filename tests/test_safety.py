"""What must not happen: a frozen axis cut, an input overwritten, a traceback for a broken plan, a silent typing error."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto, helper, numpy_helper

from commands import ok, run
from graphs import Tiny
from onnxprune import cli, quality

QUICK = ("--target-mac", "0.75", "--no-latency")


def refused(code: int, *args: object) -> str:
    """Run a command that fails with ``code`` and a short message, and return the message."""
    result = run(*args)
    assert result.exit_code == code, result.output
    lines = result.stderr.splitlines()
    assert 1 <= len(lines) <= 3, result.stderr
    assert lines[0].startswith("onnxprune: ")
    assert "Traceback" not in result.output
    assert "internal error" not in result.output
    return result.stderr


def small() -> ModelProto:
    """Build three convolutions from ``x`` to ``z``."""
    t = Tiny()
    y = t.node("Relu", t.conv(t.input(1, 2, 4, 6), "a", 2, 8, 3))
    y = t.node("Relu", t.conv(y, "b", 8, 8, 3))
    return t.build(t.conv(y, "z", 8, 3))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Write a small network and return its path."""
    path = tmp_path / "in.onnx"
    onnx.save(small(), path)
    return path


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Return a path for the result."""
    return tmp_path / "out.onnx"


@pytest.fixture
def plan(model: Path, tmp_path: Path) -> Path:
    """Prune ``model`` to pruned.onnx and return the plan's path."""
    path = tmp_path / "plan.json"
    ok(model, tmp_path / "pruned.onnx", *QUICK, "--plan-out", path)
    return path


def rewrite(plan: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """Change a plan in place."""
    data = json.loads(plan.read_text())
    change(data)
    plan.write_text(json.dumps(data))
    return plan


# -- plans -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["apply", "verify"])
@pytest.mark.parametrize("groups", [True, False], ids=["groups", "no_groups"])
def test_plan_that_cuts_an_output_is_refused(model: Path, plan: Path, out: Path, groups: bool, command: str) -> None:
    """A plan that removes channels of the graph's output is refused with 5, whether or not it lists groups."""

    def change(data: dict[str, Any]) -> None:
        data["initializers"]["z.w"] = {**data["initializers"].get("z.w", {}), "0": [0, 1]}
        data["initializers"]["z.b"] = {"0": [0, 1]}
        for group in data["groups"]:
            if group["size"] == 3:
                group["keep"] = [True, True, False]
        if not groups:
            del data["groups"]

    rewrite(plan, change)
    other = out if command == "apply" else plan.with_name("pruned.onnx")
    assert "it is an output of the graph" in refused(5, command, model, other, "--plan", plan)
    assert not out.exists()


def _kept(indices: Sequence[int]) -> Callable[[dict[str, Any]], None]:
    return lambda data: data["initializers"].update({"b.w": {"0": list(indices)}})


def _short_group(data: dict[str, Any]) -> None:
    data["groups"][0]["keep"].pop()


def _infinite_size(data: dict[str, Any]) -> None:
    data["groups"][0]["size"] = float("inf")


@pytest.mark.parametrize("command", ["apply", "verify"])
@pytest.mark.parametrize(
    "change",
    [
        pytest.param(_kept([0, 1, 1]), id="repeated"),
        pytest.param(_kept([-1, 0, 1]), id="negative"),
        pytest.param(_kept([]), id="empty"),
        pytest.param(_kept([0, 8]), id="beyond"),
        pytest.param(_kept([float("inf")]), id="infinite_index"),
        pytest.param(_infinite_size, id="infinite_size"),
        pytest.param(_short_group, id="group_length"),
    ],
)
def test_broken_plan_is_a_model_error(
    model: Path, plan: Path, out: Path, change: Callable[[dict[str, Any]], None], command: str
) -> None:
    """A plan with indices that repeat, do not exist or are no integers, or with short groups, is refused with 3."""

    def without_groups(data: dict[str, Any]) -> None:
        change(data)
        if change not in (_short_group, _infinite_size):
            del data["groups"]

    rewrite(plan, without_groups)
    other = out if command == "apply" else plan.with_name("pruned.onnx")
    refused(3, command, model, other, "--plan", plan)
    assert not out.exists()


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("[" * 100_000, id="nested"),
        pytest.param('{"schema": 1, "initializers": ' + "[" * 100_000, id="nested_inside"),
        pytest.param("Infinity", id="infinity"),
        pytest.param("", id="empty"),
    ],
)
@pytest.mark.parametrize("command", ["apply", "verify"])
def test_text_that_is_no_plan_is_a_model_error(model: Path, out: Path, tmp_path: Path, text: str, command: str) -> None:
    """Hostile JSON is refused with 3 and one line, without a traceback."""
    path = tmp_path / "plan.json"
    path.write_text(text)
    assert "not a plan" in refused(3, command, model, out if command == "apply" else model, "--plan", path)


# -- files that are written --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "options"),
    [
        pytest.param("out", ["--json", "IN"], id="json_in"),
        pytest.param("out", ["--plan-out", "IN"], id="plan_in"),
        pytest.param("IN", [], id="out_in"),
        pytest.param("LINK", [], id="out_link_to_in"),
        pytest.param("HARD", [], id="out_hard_link_to_in"),
        pytest.param("out", ["--json", "LINK"], id="json_link_to_in"),
        pytest.param("out", ["--json", "out"], id="json_out"),
        pytest.param("out", ["--plan-out", "out"], id="plan_out"),
        pytest.param("out", ["--json", "both", "--plan-out", "both"], id="json_plan"),
    ],
)
def test_no_file_is_written_over_another(model: Path, tmp_path: Path, given: str, options: list[str]) -> None:
    """OUT, the report and the plan never replace IN or each other: exit 2, and no file changes."""
    for name in ("out", "both"):
        (tmp_path / name).write_bytes(b"precious")
    (tmp_path / "link.onnx").symlink_to(model)
    (tmp_path / "hard.onnx").hardlink_to(model)
    names = {"IN": model, "LINK": tmp_path / "link.onnx", "HARD": tmp_path / "hard.onnx"}
    words = [word if word.startswith("--") else names.get(word, tmp_path / word) for word in options]
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    result = run(model, names.get(given, tmp_path / given), *QUICK, "--force", *words)
    assert result.exit_code == 2, result.output
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("command", ["inspect", "apply", "verify"])
def test_reports_of_other_commands_keep_their_inputs(model: Path, plan: Path, tmp_path: Path, command: str) -> None:
    """The report of ``inspect``, ``apply`` and ``verify`` does not replace the files they read."""
    others = {"inspect": (), "apply": (tmp_path / "new.onnx",), "verify": (tmp_path / "pruned.onnx",)}[command]
    read = [model] if command == "inspect" else [model, plan]
    with_plan = () if command == "inspect" else ("--plan", plan)
    before = [path.read_bytes() for path in read]
    for path in read:
        assert run(command, model, *others, *with_plan, "--json", path).exit_code == 2
    assert [path.read_bytes() for path in read] == before


def test_failing_parse_does_not_write_the_report_over_the_model(model: Path, out: Path) -> None:
    """Even where options cannot be parsed, the error object is not written over IN."""
    before = model.read_bytes()
    assert run(model, out, "--json", model, "--target-mac", "nonsense").exit_code == 2
    assert model.read_bytes() == before


def test_failing_parse_does_not_write_the_report_over_data(tmp_path: Path) -> None:
    """The same holds for the data of a model, whatever the model is called."""
    model = stored_outside(tmp_path, in_nodes=False).rename(tmp_path / "model")
    before = (tmp_path / "weights.bin").read_bytes()
    assert run("prune", model, tmp_path / "out.onnx", "--json", tmp_path / "weights.bin", "--nonsense").exit_code == 2
    assert (tmp_path / "weights.bin").read_bytes() == before


def test_no_report_goes_over_a_sample(model: Path, out: Path, tmp_path: Path) -> None:
    """A file of a folder of data is part of what is read; other files of that folder are not."""
    (tmp_path / "data").mkdir()
    sample = tmp_path / "data" / "0.npy"
    np.save(sample, np.zeros((2, 4, 6), np.float32))
    before = sample.read_bytes()
    assert "part of a folder" in refused(2, model, out, *QUICK, "--calib", tmp_path / "data", "--json", sample)
    assert sample.read_bytes() == before
    (tmp_path / "data" / "old.json").write_text("{}")
    ok(model, out, *QUICK, "--calib", tmp_path / "data", "--json", tmp_path / "data" / "old.json")


@pytest.mark.parametrize("name", ["student.onnx", "manifest.json"])
def test_no_report_goes_over_a_part_of_an_artifact(model: Path, plan: Path, tmp_path: Path, name: str) -> None:
    """What an artifact consists of is written by making it alone."""
    folder = tmp_path / "artifact"
    words = ("artifact", model, tmp_path / "pruned.onnx", folder, "--plan", plan)
    ok(*words)
    before = (folder / name).read_bytes()
    assert "part of a folder" in refused(2, *words, "--force", "--json", folder / name)
    assert (folder / name).read_bytes() == before


def test_reports_go_into_pipes_and_devices(model: Path, tmp_path: Path) -> None:
    """A pipe, a full device and an endless one are written to, or not; nothing waits for what it could read there."""
    for code, target, name in ((0, "0.75", "/dev/stdout"), (4, "0.0001", "/dev/stdout"), (4, "0.0001", "/dev/zero"),
                               (7, "0.75", "/dev/full")):  # fmt: skip
        out = tmp_path / f"{code}{name.replace('/', '-')}.onnx"
        words = (model, out, "--target-mac", target, "--no-latency", "--json", name, "-q")
        done = subprocess.run(
            [sys.executable, "-m", "onnxprune", *map(str, words)], capture_output=True, timeout=120, check=False
        )
        assert done.returncode == code, done.stderr
        if name == "/dev/stdout":
            assert json.loads(done.stdout)["schema"] == 1


def test_link_as_output_writes_its_target(model: Path, tmp_path: Path) -> None:
    """A link named as OUT stays a link; the file that it points to is replaced."""
    target, link = tmp_path / "target.onnx", tmp_path / "link.onnx"
    target.write_bytes(b"old")
    link.symlink_to(target)
    ok(model, link, *QUICK, "--force")
    assert link.is_symlink()
    onnx.checker.check_model(onnx.load(target), full_check=True)


def test_device_as_output_is_not_replaced(model: Path, tmp_path: Path) -> None:
    """A character device named as OUT is written to, and stays a device."""
    device = tmp_path / "null"
    try:
        os.mknod(device, 0o666 | stat.S_IFCHR, os.makedev(1, 3))
        device.write_bytes(b"")
    except OSError:
        pytest.skip("device nodes cannot be made here")
    run(model, device, *QUICK, "--force")
    assert stat.S_ISCHR(device.stat().st_mode)


# -- verify ------------------------------------------------------------------------------------------------------------


def with_function() -> ModelProto:
    """Put a Tanh in a local function behind a small network."""
    model = small()
    opsets = [helper.make_opsetid("", 17)]
    body = [helper.make_node("Tanh", ["v"], ["r"], name="inner")]
    model.functions.append(helper.make_function("local", "Bend", ["v"], ["r"], body, opsets))
    model.opset_import.append(helper.make_opsetid("local", 1))
    model.graph.node.append(helper.make_node("Bend", ["z"], ["bent"], domain="local", name="bend"))
    model.graph.output[0].name = "bent"
    return model


def _other_function(model: ModelProto) -> None:
    model.functions[0].node[0].op_type = "Sigmoid"


def _nan(model: ModelProto) -> None:
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == "b.w")
    values = numpy_helper.to_array(tensor).copy()
    values[0, 0, 0, 0] = np.nan
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))


def _sparse(model: ModelProto) -> None:
    values = numpy_helper.from_array(np.ones(1, np.float32), "extra")
    indices = numpy_helper.from_array(np.zeros(1, np.int64), "extra.indices")
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [4]))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        pytest.param(_other_function, "nodes differ", id="function"),
        pytest.param(_nan, "b.w holds NaN or infinity", id="nan"),
        pytest.param(_sparse, "sparse initializers differ", id="sparse"),
    ],
)
def test_verify_refuses(tmp_path: Path, change: Callable[[ModelProto], None], words: str) -> None:
    """A changed function body, NaN among the weights and a new sparse initializer are not what the plan makes: 5."""
    source, pruned, plan = tmp_path / "in.onnx", tmp_path / "pruned.onnx", tmp_path / "plan.json"
    onnx.save(with_function(), source)
    ok(source, pruned, *QUICK, "--plan-out", plan)
    ok("verify", source, pruned, "--plan", plan)
    model = onnx.load(pruned)
    change(model)
    pruned.write_bytes(model.SerializeToString())
    assert words in refused(5, "verify", source, pruned, "--plan", plan)


# -- external data -----------------------------------------------------------------------------------------------------


def stored_outside(folder: Path, *, in_nodes: bool = False) -> Path:
    """Save a small network with its weights, or a Constant node's, in weights.bin."""
    model = small()
    if in_nodes:
        tensors = {tensor.name: tensor for tensor in model.graph.initializer}
        kept = [tensor for name, tensor in tensors.items() if name != "b.w"]
        node = helper.make_node("Constant", [], ["b.w"], value=tensors["b.w"])
        del model.graph.initializer[:]
        model.graph.initializer.extend(kept)
        nodes = [node, *model.graph.node]
        del model.graph.node[:]
        model.graph.node.extend(nodes)
        held = model.graph.node[0].attribute[0].t
        (folder / "weights.bin").write_bytes(held.raw_data)
        onnx.external_data_helper.set_external_data(held, "weights.bin", 0, len(held.raw_data))
        held.ClearField("raw_data")
        (folder / "in.onnx").write_bytes(model.SerializeToString())
    else:
        onnx.save_model(
            model, str(folder / "in.onnx"), save_as_external_data=True, location="weights.bin", size_threshold=128
        )
    return folder / "in.onnx"


def test_size_target_counts_external_data(tmp_path: Path, out: Path) -> None:
    """A share of the size is one of the graph and its weights together, wherever the weights lie."""
    source = stored_outside(tmp_path)
    ok(source, out, "--target-size", "0.8", "--no-latency", "--json", tmp_path / "r.json")
    whole = source.stat().st_size + (tmp_path / "weights.bin").stat().st_size
    assert 0.5 * whole < sum(file.stat().st_size for file in out.parent.glob("out.onnx*")) <= 0.8 * whole
    target = json.loads((tmp_path / "r.json").read_text())["target"]
    assert target["kind"] == "size"
    assert 0.5 < target["achieved"] <= 0.8


@pytest.mark.parametrize("in_nodes", [False, True], ids=["initializers", "constant_nodes"])
def test_copy_takes_all_external_data(tmp_path: Path, in_nodes: bool) -> None:
    """At target 1.0 the copy in another folder runs: data of initializers and of Constant nodes go along."""
    source = stored_outside(tmp_path, in_nodes=in_nodes)
    (tmp_path / "there").mkdir()
    target = tmp_path / "there" / "out.onnx"
    ok(source, target, "--target-mac", "1.0", "--no-latency")
    assert target.read_bytes() == source.read_bytes()
    assert (tmp_path / "there" / "weights.bin").read_bytes() == (tmp_path / "weights.bin").read_bytes()


# -- options -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        pytest.param(("--provider", "Nonsense"), "Nonsense", id="provider"),
        pytest.param(("--seed", "-1"), "--seed", id="seed"),
        pytest.param(("--ignore", "nobody*"), "nobody*", id="ignore"),
        pytest.param(("--only", "nobody*"), "nobody*", id="only"),
    ],
)
def test_options_that_mean_nothing_are_refused(model: Path, out: Path, options: tuple[str, str], words: str) -> None:
    """An unknown provider, a negative seed, and a glob that matches nothing are usage errors that name themselves."""
    assert words in refused(2, model, out, *QUICK, *options)
    assert not out.exists()


def test_misspelt_table_of_the_configuration_is_refused(model: Path, out: Path, tmp_path: Path) -> None:
    """A table that names no command is an error, for its options would be silently lost."""
    config = tmp_path / "onnxprune.toml"
    config.write_text("[prnue]\nalign = 4\n")
    assert "[prnue]" in refused(2, "prune", model, out, *QUICK, "--config", config)
    assert not out.exists()


# -- targets -----------------------------------------------------------------------------------------------------------


def test_all_targets_are_reported(model: Path, out: Path) -> None:
    """Several targets stand in ``targets``; ``target`` is the one that the result comes closest to."""
    result = ok(model, out, *QUICK, "--target-params", "0.9", "--target-bandwidth", "0.95", "--json", "-")
    data = json.loads(result.stdout)
    assert {row["kind"]: row["requested"] for row in data["targets"]} == {
        "mac": 0.75,
        "params": 0.9,
        "bandwidth": 0.95,
    }
    assert all(row["achieved"] <= row["requested"] for row in data["targets"])
    assert data["target"] == max(data["targets"], key=lambda row: row["achieved"] / row["requested"])


def test_unreachable_size_speaks_of_size(model: Path, out: Path) -> None:
    """A size that cannot be reached is refused with 4, in per cent of the size."""
    message = refused(4, model, out, "--target-size", "0.01", "--no-latency")
    assert "1 % of the original's size requested" in message
    assert not out.exists()


# -- interruption ------------------------------------------------------------------------------------------------------


def interrupt(*_: object, **__: object) -> None:
    """Stand in for a stage during which the user presses Ctrl-C."""
    raise KeyboardInterrupt


def test_interruption_after_writing_says_so(model: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while latency is measured ends with 130 and tells that OUT is there; the JSON holds the error."""
    monkeypatch.setattr(quality, "with_latency", interrupt)
    result = run(model, out, "--target-mac", "0.75", "--json", "-")
    assert result.exit_code == 130
    assert f"interrupted; {out} was written" in result.stderr
    error = json.loads(result.stdout)["error"]
    assert "was written" in error["message"]
    onnx.checker.check_model(onnx.load(out), full_check=True)


def test_interruption_before_writing_says_so(model: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C before OUT is written ends with 130 and tells that nothing was written."""
    monkeypatch.setattr(cli.pipeline, "prune", interrupt)
    result = run(model, out, *QUICK, "--json", "-")
    assert result.exit_code == 130
    assert "nothing was written" in result.stderr
    assert "nothing was written" in json.loads(result.stdout)["error"]["message"]
    assert not out.exists()


# -- paths -------------------------------------------------------------------------------------------------------------


PLACES = {
    "in": ["P", "out.onnx", *QUICK],
    "out": ["in.onnx", "P", *QUICK],
    "json": ["in.onnx", "out.onnx", *QUICK, "--json", "P"],
    "plan_out": ["in.onnx", "out.onnx", *QUICK, "--plan-out", "P"],
    "html": ["in.onnx", "out.onnx", *QUICK, "--html", "P"],
    "calib": ["in.onnx", "out.onnx", *QUICK, "--calib", "P"],
    "plan": ["apply", "in.onnx", "out.onnx", "--plan", "P"],
    "report": ["report", "P"],
    "page": ["report", "in.onnx", "-o", "P"],
    "state": ["finetune", "art", "out.onnx", "--data", "d.npz", "--state", "P"],
    "wrong": ["in.onnx", "--json", "P"],
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", ["long", "circle"])
def test_paths_that_lead_nowhere_are_refused(
    kind: str, place: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name that is too long and a link to itself are refused in a line, wherever they stand; nothing is written."""
    monkeypatch.chdir(tmp_path)
    path = "x" * 300 if kind == "long" else "circle"
    (tmp_path / "circle").symlink_to("circle")
    told = refused(2 if place == "wrong" else 7, *(path if word == "P" else word for word in PLACES[place]))
    assert len(told.splitlines()) == 1
    assert sorted(each.name for each in tmp_path.iterdir()) == ["circle", model.name]


def test_current_folder_that_is_gone(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Results are not written relative to it; the message is one line."""
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert "out.onnx" in refused(7, model, "out.onnx", *QUICK)
    assert "r.json" in refused(7, model, tmp_path / "out.onnx", *QUICK, "--json", "r.json")


def test_report_that_cannot_be_written_is_told_once(model: Path, out: Path, tmp_path: Path) -> None:
    """The failure and the failed attempt to report it are one line."""
    assert len(refused(7, model, out, *QUICK, "--json", tmp_path / "nowhere" / "r.json").splitlines()) == 1


def test_paths_that_are_no_utf8(model: Path, tmp_path: Path) -> None:
    """They are read and written like any other, and stand in reports and pages as escapes."""
    out = os.fsdecode(os.fsencode(tmp_path) + b"/b\xff.onnx")
    shown = ok(model, out, *QUICK, "--html", tmp_path / "r.html", "--json", tmp_path / "r.json").output
    assert "b?.onnx" in shown
    assert "\\udcff" in (tmp_path / "r.html").read_text(encoding="utf-8")
