"""The loop: steps down to the target, back where quality falls below the floor, and on after a kill."""

from __future__ import annotations

import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from schemas import assert_report

import onnxprune
from commands import ok, run
from onnxprune import onnx_io
from onnxprune.errors import QualityError, UsageError
from onnxprune.iterate import Iterated, Pace, iterate
from onnxprune.options import Options
from onnxprune.trainers import Command

ROOT = pathlib.Path(__file__).parents[1]
DIGITS = ROOT / "fixtures" / "digits"
MODEL, CALIB, EVAL = DIGITS / "digits.onnx", DIGITS / "digits_calib.npz", DIGITS / "digits_eval.npz"
COPY = "cp {artifact}/student.onnx {out}"


@dataclass(frozen=True)
class Stub:
    """Trains by copying; remembers what it was asked for."""

    asked: list
    sparse: bool = False

    def __call__(self, artifact: pathlib.Path, out: pathlib.Path, folder: pathlib.Path, *, last: bool) -> None:
        """Copy the student."""
        self.asked.append((artifact.parent.name, last))
        onnx_io.copy(artifact / "student.onnx", out, force=True)

    def settings(self) -> dict[str, Any]:
        """Nothing decides."""
        return {"stub": True}


def loop(tmp_path: pathlib.Path, target: float | None, pace: Pace, stub: Stub | None = None, **chosen: Any) -> Iterated:
    """Run the loop on the digits network, compensated where it must stay good, with a stand-in for training."""
    guarded = pace.max_drop is not None
    options = Options(
        targets={} if target is None else {"mac": target},
        calib=str(CALIB) if guarded else None,
        criterion="l2",
        **chosen,
    )
    return iterate(MODEL, tmp_path / "out.onnx", stub or Stub([]), EVAL, "top1", options, pace)


def test_steps_lead_to_the_target_exactly(tmp_path: pathlib.Path) -> None:
    """Each step removes its share of the original's cost, and the last one meets the target as pruning at once does."""
    stub = Stub([])
    done = loop(tmp_path, 0.45, Pace(step=0.2), stub)
    assert [one.share for one in done.iterations] == pytest.approx([0.8, 0.6, 0.45])
    assert all(one.kept <= one.share for one in done.iterations)
    assert done.reached
    assert 0.44 < done.report.after["mac"] / done.report.before["mac"] <= 0.45
    assert stub.asked == [("iteration-001", False), ("iteration-002", False), ("iteration-003", True)]


def test_effective_mac_are_shares_of_the_original(tmp_path: pathlib.Path) -> None:
    """Under a profile that rounds up, steps reach what one prune of the original reaches: none counts from the last one."""
    mine = tmp_path / "mine.toml"
    mine.write_text("[array]\n'*' = 24")
    done = loop(tmp_path, 0.6, Pace(step=0.1), profile=str(mine))
    assert done.reached
    once = onnxprune.prune(MODEL, target_mac=0.6, profile=str(mine), proof=False).report
    assert abs(done.share - once.after["mac"] / once.before["mac"]) < 0.1


def test_the_plan_is_against_the_original(tmp_path: pathlib.Path) -> None:
    """After several compensated steps one plan makes the result of the original, and verify proves it."""
    done = loop(tmp_path, 0.5, Pace(step=0.3, max_drop=5.0))
    report = onnxprune.verify(MODEL, tmp_path / "out.onnx", done.plan)
    assert report.proof is not None
    assert report.proof.ok
    for number in (1, 2):
        folder = tmp_path / "out.onnx.iterations" / f"iteration-{number:03}"
        onnxprune.verify(MODEL, folder / "trained.onnx", folder / "plan.json")


@pytest.mark.slow
def test_a_step_that_loses_too_much_is_taken_back_and_halved(tmp_path: pathlib.Path) -> None:
    """After a bad step a smaller one starts from the last good model; the result keeps the floor."""
    done = loop(tmp_path, 0.05, Pace(step=0.5, min_step=0.1, max_drop=0.5))
    statuses = [one.status for one in done.iterations]
    assert "too low" in statuses
    assert not done.reached
    good = [one for one in done.iterations if one.status == "good"]
    assert done.share == good[-1].share
    assert done.report.quality is not None
    before, after = done.report.quality
    assert before.value - after.value <= 0.5
    asks, share, step = [one.share for one in done.iterations], 1.0, 0.5
    for one, ask in zip(done.iterations, asks, strict=True):
        assert ask == pytest.approx(max(0.05, share - step))
        share, step = (ask, step) if one.status == "good" else (share, step / 2)
    assert step < 0.1


@pytest.mark.slow
def test_without_a_target_the_floor_decides(tmp_path: pathlib.Path) -> None:
    """With a floor alone the loop goes down as far as the metric allows, and that is success."""
    done = loop(tmp_path, None, Pace(step=0.4, min_step=0.2, max_drop=1.0))
    assert done.reached
    assert done.share < 1


def test_nothing_is_written_where_nothing_can_be_taken(tmp_path: pathlib.Path) -> None:
    """Where every step loses too much the command ends with 6 and leaves OUT alone."""
    with pytest.raises(QualityError, match="nothing was written"):
        loop(tmp_path, 0.3, Pace(step=0.5, min_step=0.3, min_quality=100.0))
    assert not (tmp_path / "out.onnx").exists()


@pytest.mark.slow
def test_a_regularizer_trains_before_the_first_step_and_not_in_the_last(tmp_path: pathlib.Path) -> None:
    """With a sparse trainer the original is trained first; the last training goes without the regularizer."""
    stub = Stub([], sparse=True)
    done = loop(tmp_path, 0.1, Pace(step=0.5, min_step=0.3, max_drop=1.0), stub)
    assert stub.asked[0] == ("iteration-000", False)
    assert not done.reached
    assert stub.asked[-1][1]
    assert done.iterations[-1].share == done.share


def test_a_finished_run_is_not_repeated(tmp_path: pathlib.Path) -> None:
    """Started again, the loop finds every step's result, trains nothing, and writes the same bytes."""
    stub = Stub([])
    loop(tmp_path, 0.6, Pace(step=0.2), stub)
    first, asked = (tmp_path / "out.onnx").read_bytes(), len(stub.asked)
    (tmp_path / "out.onnx").unlink()
    again = loop(tmp_path, 0.6, Pace(step=0.2), stub)
    assert len(stub.asked) == asked
    assert (tmp_path / "out.onnx").read_bytes() == first
    assert len(again.iterations) == 2


def test_another_runs_state_is_refused(tmp_path: pathlib.Path) -> None:
    """Other settings do not go on with a folder's results; --restart begins anew; foreign folders are left alone."""
    loop(tmp_path, 0.8, Pace())
    (tmp_path / "out.onnx").unlink()
    with pytest.raises(UsageError, match="--restart"):
        loop(tmp_path, 0.7, Pace())
    options = Options(targets={"mac": 0.7})
    done = iterate(MODEL, tmp_path / "out.onnx", Stub([]), EVAL, "top1", options, Pace(), restart=True)
    assert len(done.iterations) == 3
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("words")
    with pytest.raises(UsageError, match="other files"):
        iterate(MODEL, tmp_path / "b.onnx", Stub([]), EVAL, "top1", options, Pace(), folder=tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "words"


@pytest.mark.parametrize(
    ("line", "text"),
    [
        pytest.param("false {artifact} {out}", "exit code 1", id="fails"),
        pytest.param("true {artifact} {out}", "did not write", id="writes-nothing"),
        pytest.param("no-such-command {artifact} {out}", "no command", id="absent"),
        pytest.param("cp {artifact}/student.onnx", "has no {out}", id="no-place"),
        pytest.param("cp '{artifact} {out}", "cannot be read", id="quotes"),
    ],
)
def test_trainers_that_fail_are_told_of(tmp_path: pathlib.Path, line: str, text: str) -> None:
    """A command that cannot be run, fails or writes nothing ends the loop with a message that names it."""
    found = run("iterate", MODEL, tmp_path / "out.onnx", "--target-mac", 0.8, "--data", CALIB, "--val", EVAL,
                "--trainer", line)  # fmt: skip
    assert found.exit_code == 2
    assert text in found.output
    assert not (tmp_path / "out.onnx").exists()


def test_a_trainer_that_returns_another_graph_is_refused(tmp_path: pathlib.Path) -> None:
    """What a trainer returns must be the pruned graph with other weights."""
    found = run("iterate", MODEL, tmp_path / "out.onnx", "--target-mac", 0.8, "--data", CALIB, "--val", EVAL,
                "--trainer", "cp {artifact}/teacher.onnx {out}")  # fmt: skip
    assert found.exit_code == 5
    assert not (tmp_path / "out.onnx").exists()


def test_the_command_tells_everything(tmp_path: pathlib.Path) -> None:
    """Table of steps, Table 1's row, plan, report and plot; quality by default as the data allows."""
    out, plan, report = tmp_path / "out.onnx", tmp_path / "plan.json", tmp_path / "report.json"
    found = ok("iterate", MODEL, out, "--target-mac", 0.7, "--data", EVAL, "--trainer", COPY, "--calib", CALIB,
               "--criterion", "l2", "--compensate", "bias", "--plan-out", plan, "--json", report,
               "--plot", tmp_path / "path.svg")  # fmt: skip
    assert "top1" in found.output
    assert "activations 1e6" in found.output
    assert "--val takes other data" in found.output
    told = json.loads(report.read_text())
    assert_report("run", told)
    assert told["reached"]
    assert [step["status"] for step in told["iterations"]] == ["good"] * 3
    assert told["cost"]["ratio"]["mac"] <= 0.7
    onnxprune.verify(MODEL, out, plan)
    assert (tmp_path / "path.svg").read_text().lstrip().startswith("<?xml")


@pytest.mark.slow
def test_a_target_that_the_floor_forbids_ends_with_4_and_the_best_model(tmp_path: pathlib.Path) -> None:
    """The smallest model that keeps the floor is written, and the exit code says that the target was not met."""
    out = tmp_path / "out.onnx"
    found = run("iterate", MODEL, out, "--target-mac", 0.05, "--data", EVAL, "--trainer", COPY, "--calib", CALIB,
                "--criterion", "l2", "--max-drop", 0.5, "--step", 0.5, "--min-step", 0.3)  # fmt: skip
    assert found.exit_code == 4
    assert "out of reach of the floor" in found.output
    assert out.exists()


def test_a_target_below_what_the_limits_leave_is_told_of_as_such(tmp_path: pathlib.Path) -> None:
    """Where channels run out the message speaks of limits, not of a floor; where no step is possible nothing is written."""
    found = run("iterate", MODEL, tmp_path / "a.onnx", "--target-mac", 0.001, "--step", 0.5, "--min-step", 0.5,
                "--data", EVAL, "--trainer", COPY)  # fmt: skip
    assert found.exit_code == 4
    assert "that the preset and the limits leave" in found.output
    assert (tmp_path / "a.onnx").exists()
    found = run("iterate", MODEL, tmp_path / "b.onnx", "--target-mac", 0.5, "--step", 0.5, "--min-step", 0.5,
                "--max-prune", 0, "--data", EVAL, "--trainer", COPY)  # fmt: skip
    assert found.exit_code == 4
    assert not (tmp_path / "b.onnx").exists()


@pytest.mark.parametrize("options", [[], ["--target-size", "4K"], ["--target-mac", 0.5, "--step", 0.001]],
                         ids=["no-target", "size", "step"])  # fmt: skip
def test_settings_that_lead_nowhere_are_refused(tmp_path: pathlib.Path, options: list) -> None:
    """No target and no floor, a target of another kind, a step below the smallest: usage errors before any work."""
    found = run("iterate", MODEL, tmp_path / "out.onnx", "--data", EVAL, "--trainer", COPY, *options)
    assert found.exit_code == 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("option", ["--target-latency", "--latency-table", "--target-size"])
def test_targets_that_the_loop_cannot_take_are_not_offered(option: str) -> None:
    """Help names the targets that work, and no others."""
    shown = ok("iterate", "--help").output
    assert "--target-bandwidth" in shown
    assert option not in shown


# -- what a run goes on from ---------------------------------------------------------------------------------------------


def words(out: pathlib.Path, *more: object, trainer: str = COPY, val: object = EVAL) -> list[object]:
    """One step, by a command of the user's own."""
    return ["iterate", MODEL, out, "--target-mac", 0.8, "--step", 0.2, "--data", CALIB, "--val", val, "--trainer", trainer,
            *more]  # fmt: skip


def test_all_targets_are_met(tmp_path: pathlib.Path) -> None:
    """The loop goes on until the last of several targets is met, not the first."""
    options = Options(targets={"mac": 0.4, "params": 0.8})
    done = iterate(MODEL, tmp_path / "out.onnx", Stub([]), EVAL, "top1", options, Pace(step=0.3))
    assert done.reached
    assert 0.35 < done.report.after["mac"] / done.report.before["mac"] <= 0.4
    assert done.report.after["params"] / done.report.before["params"] <= 0.8


def test_results_of_other_data_are_refused(tmp_path: pathlib.Path) -> None:
    """A file that holds something else under its old name makes another run; the message names what differs."""
    paths = {name: tmp_path / f"{name}.npz" for name in ("validation", "data", "calib")}
    for name, path in paths.items():
        path.write_bytes((EVAL if name == "validation" else CALIB).read_bytes())
    profile = tmp_path / "mine.toml"
    profile.write_text("[multiples]\nConv = 2\n")
    given = ["iterate", MODEL, tmp_path / "out.onnx", "--target-mac", 0.8, "--step", 0.2, "--trainer", COPY, "--force",
             "--metric", "cosine", "--data", paths["data"], "--val", paths["validation"], "--calib", paths["calib"],
             "--criterion", "l2", "--compensate", "bias", "--profile", profile]  # fmt: skip
    ok(*given)
    for name, path in [*paths.items(), ("profile", profile)]:
        before = path.read_bytes()
        if name == "profile":
            path.write_text("[multiples]\nConv = 1\n")
        else:
            arrays = dict(np.load(path))
            np.savez(path, **{name: array[:40] for name, array in arrays.items()})
        refused = run(*given)
        assert refused.exit_code == 2
        assert f"({name})" in refused.output
        path.write_bytes(before)
    ok(*given)
    profile.write_text("[multiples]\nConv = 1\n")
    ok(*given, "--restart")


def test_restart_removes_no_files_of_others(tmp_path: pathlib.Path) -> None:
    """A folder that no run has made keeps its files, also with --restart, and also where they have our names."""
    mine = tmp_path / "mine" / "iteration-000" / "artifact"
    mine.mkdir(parents=True)
    (mine / "thesis.txt").write_text("words")
    found = run(*words(tmp_path / "out.onnx", "--state", tmp_path / "mine", "--restart"))
    assert found.exit_code == 2
    assert (mine / "thesis.txt").read_text() == "words"


def test_a_kill_while_the_first_file_is_written_hinders_nothing(tmp_path: pathlib.Path) -> None:
    """What a killed run has left of state.json is swept, and the loop begins."""
    folder = tmp_path / "out.onnx.iterations"
    folder.mkdir()
    (folder / ".state.json.123.abc").write_text("{")
    ok(*words(tmp_path / "out.onnx"))
    assert not list(folder.glob(".*"))


def test_wrong_data_leaves_no_folder(tmp_path: pathlib.Path) -> None:
    """Data that cannot be read is told of before anything is written."""
    assert run(*words(tmp_path / "out.onnx", val=tmp_path / "none.npz")).exit_code == 7
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("line", "code"),
    [
        pytest.param('shutil.copy(sys.argv[1] + "/teacher.onnx", sys.argv[2])', 5, id="other-graph"),
        pytest.param('open(sys.argv[2], "wb").write(b"junk")', 3, id="no-model"),
    ],
)
def test_a_trainer_that_was_mended_is_asked_again(tmp_path: pathlib.Path, line: str, code: int) -> None:
    """A result that cannot be used is not kept: the same command goes on once the trainer behind it is right."""
    script = tmp_path / "trainer.py"
    trainer = f"{sys.executable} {script} {{artifact}} {{out}}"
    script.write_text(f"import shutil, sys\n{line}\n")
    found = run(*words(tmp_path / "out.onnx", trainer=trainer))
    assert found.exit_code == code
    assert "iteration 1: the trainer's result cannot be used" in found.output
    script.write_text('import shutil, sys\nshutil.copy(sys.argv[1] + "/student.onnx", sys.argv[2])\n')
    ok(*words(tmp_path / "out.onnx", trainer=trainer))


def test_training_that_diverges_is_a_bad_step(tmp_path: pathlib.Path) -> None:
    """NaN in a weight takes the step back, with or without a floor; the loop does not end there."""
    script = tmp_path / "trainer.py"
    script.write_text(
        "import sys, numpy as np, onnx\n"
        "model = onnx.load(sys.argv[1] + '/student.onnx')\n"
        "if 'iteration-001' in sys.argv[1]:\n"
        "    tensor = next(t for t in model.graph.initializer if t.data_type == 1)\n"
        "    value = np.full(tensor.dims, np.nan, np.float32)\n"
        "    tensor.CopyFrom(onnx.numpy_helper.from_array(value, tensor.name))\n"
        "onnx.save(model, sys.argv[2])\n"
    )
    report = tmp_path / "report.json"
    found = ok(
        *words(tmp_path / "out.onnx", "--json", report, trainer=f"{sys.executable} {script} {{artifact}} {{out}}")
    )
    told = json.loads(report.read_text())
    assert_report("run", told)
    steps = told["iterations"]
    assert [(step["share"], step["status"]) for step in steps] == [(0.8, "diverged"), (0.9, "good"), (0.8, "good")]
    assert steps[0]["metric"] is None
    assert "diverged" in found.output
    result = (tmp_path / "out.onnx.iterations" / "iteration-001" / "result.json").read_text()
    assert "NaN" not in result


def test_what_a_trainer_prints_is_no_part_of_the_report(tmp_path: pathlib.Path) -> None:
    """With --json - stdout holds the report alone."""
    trainer = 'sh -c "echo hello; cp {artifact}/student.onnx {out}"'
    line = [sys.executable, "-m", "onnxprune", *map(str, words(tmp_path / "out.onnx", "--json", "-", trainer=trainer))]
    found = subprocess.run(
        line, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True
    )
    assert json.loads(found.stdout)["reached"]
    assert "hello" in found.stderr


def test_a_trainer_that_outlives_its_loop_disturbs_no_other(tmp_path: pathlib.Path) -> None:
    """Each training writes into a folder of its own, so that one left behind by a kill cannot write into the next."""
    seen = []

    def record(line: list[str], **_: Any) -> subprocess.CompletedProcess:
        seen.append(pathlib.Path(line[-1]))
        onnx_io.copy(MODEL, seen[-1])
        return subprocess.CompletedProcess(line, 0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subprocess, "run", record)
        for _ in range(2):
            Command("true {artifact} {out}", "a.npz")(tmp_path, tmp_path / "trained.onnx", tmp_path, last=False)
    assert seen[0] != seen[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["trained.onnx"]


@pytest.mark.parametrize("limit", [{"max_drop": float("nan")}, {"min_quality": float("inf")}], ids=["nan", "infinite"])
def test_floors_are_numbers(limit: dict) -> None:
    """A floor that nothing could meet, or that means nothing, is refused."""
    with pytest.raises(UsageError, match="finite"):
        Pace(**limit)


# -- kills ---------------------------------------------------------------------------------------------------------------


def command(out: pathlib.Path, *more: object) -> list[str]:
    """A run of three steps."""
    options = ["--target-mac", "0.5", "--step", "0.2", "--data", CALIB, "--val", EVAL, "--metric", "top1", *more]
    return [sys.executable, "-m", "onnxprune", "iterate", *map(str, (MODEL, out, *options))]


def killed(words: list[str], after: float) -> bool:
    """Run a command and kill it; whether it was still running."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(words, env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    try:
        process.wait(after)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.wait()
        return True
    return False


def test_a_loop_that_is_killed_again_and_again_ends_the_same(tmp_path: pathlib.Path) -> None:
    """Killed at growing intervals until it comes to its end, the loop writes what an undisturbed one does."""
    trainer = ("--trainer", COPY)
    begin = time.monotonic()
    assert not killed(command(tmp_path / "whole.onnx", *trainer), 300)
    seconds = time.monotonic() - begin
    kills = 0
    while killed(command(tmp_path / "killed.onnx", *trainer), seconds * (0.5 + 0.1 * kills)):
        kills += 1
        assert kills < 20
        if (tmp_path / "killed.onnx").exists():
            break
    assert kills
    assert (tmp_path / "killed.onnx").read_bytes() == (tmp_path / "whole.onnx").read_bytes()
    plans = [json.loads((tmp_path / f"{name}.onnx.iterations" / "iteration-003" / "plan.json").read_text())
             for name in ("whole", "killed")]  # fmt: skip
    assert plans[0] == plans[1]


@pytest.mark.slow
def test_training_and_loop_survive_kills_at_random_points() -> None:
    """After kill -9 at seeded random points finetune and iterate end with the weights and plans of undisturbed runs."""
    pytest.importorskip("torch")
    words = [sys.executable, str(ROOT / "tools" / "kill.py"), "--kills", "2", "--epochs", "24"]
    found = subprocess.run(
        words, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stdout + found.stderr
    assert {line.split()[0] for line in found.stdout.splitlines()} == {"finetune", "iterate"}


# -- the reference trainer -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_training_between_steps_keeps_what_magnitude_alone_loses(tmp_path: pathlib.Path) -> None:
    """With the trainer that comes along, by the teacher's outputs alone, steps by magnitude keep the digits network good."""
    pytest.importorskip("torch")
    out = tmp_path / "out.onnx"
    ok("iterate", MODEL, out, "--target-mac", 0.5, "--step", 0.25, "--data", CALIB, "--val", EVAL, "--metric", "top1",
       "--epochs", 8, "--learning-rate", 1e-3, "--sparsity", 0.1, "-q")  # fmt: skip
    at_once = onnxprune.prune(MODEL, target_mac=0.5)
    assert onnxprune.evaluate(out, EVAL, "top1").value > 98
    assert onnxprune.evaluate(at_once.model, EVAL, "top1").value < 90


def test_without_torch_a_trainer_of_ones_own_works(tmp_path: pathlib.Path) -> None:
    """Where PyTorch is missing the loop runs with a command; without one it says what to install, before any work."""
    for trainer, code in ((["--trainer", COPY], 0), ([], 2)):
        words = ["iterate", MODEL, tmp_path / f"{code}.onnx", "--target-mac", "0.8", "--data", EVAL, *trainer]
        start = "import sys; sys.modules['torch'] = None\nfrom onnxprune.cli import commands\n"
        script = f"{start}commands.main({[*map(str, words)]!r})"
        found = subprocess.run([sys.executable, "-c", script], env={**os.environ, "PYTHONPATH": str(ROOT)},
                               capture_output=True, text=True, check=False)  # fmt: skip
        assert found.returncode == code, found.stderr
        assert ("pip install 'onnxprune[train]'" in found.stderr) == bool(code)
    assert not (tmp_path / "2.onnx.iterations").exists()


def test_the_command_is_part_of_the_settings() -> None:
    """Another command is another run."""
    first = Command(COPY, "a.npz")
    assert first.settings() != replace(first, line=f"{COPY} ").settings()
    assert np.array_equal([first.sparse], [False])
