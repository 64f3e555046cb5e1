"""Prune a file through the command line, and check all that a user may rely on, whatever the file is."""

from __future__ import annotations

import json
import pathlib
import random
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass

import onnx
import onnxruntime
from onnx import ModelProto

import onnxprune
from commands import run
from onnxprune import onnx_io, runtime
from oracle import signature

from . import Files, readable

PRUNED, MET, REFUSED, FAILED = "pruned", "met already", "refused", "FAILED"
LEVELS: tuple[Callable[[ModelProto], object], ...] = (
    onnx.checker.check_model,
    lambda model: onnx.checker.check_model(model, full_check=True),
)


@dataclass(frozen=True)
class Verdict:
    """What became of a file: an outcome, the exit code of the command line, and what is wrong or why it was refused."""

    outcome: str
    code: int = 0
    text: str = ""

    def to_json(self) -> str:
        """Return a line."""
        return json.dumps(asdict(self))

    @property
    def key(self) -> str:
        """What failures of one cause have in common: the last line of the trace, without numbers and names."""
        return "".join(c for c in self.text.splitlines()[-1][:90] if not c.isdigit()) if self.text else ""


def judge(found: Files, seed: int = 0, *, api: bool | None = None) -> Verdict:
    """Prune the model of a folder to a random share of its MAC; :class:`Verdict` says how that ended.

    Every second file (or those where ``api`` says so) goes through the Python interface, as a model in memory where that is
    possible, the others through the command line.
    """
    rng = random.Random(seed)
    target, preset = rng.choice((0.9, 0.7, 0.5, 0.3)), rng.choice("dddabc")
    way = _through_python if (rng.random() < 0.5 if api is None else api) else _through_command_line
    with tempfile.TemporaryDirectory(prefix="onnxprune.mutant.") as name:
        folder = pathlib.Path(name)
        for file, data in found.items():
            (folder / file).write_bytes(data)
        try:
            verdict = way(folder, target, preset)
            for file, data in found.items():
                if (folder / file).read_bytes() != data:
                    raise AssertionError(f"{file} was changed")
        except Exception as error:  # whatever it is, it is what we look for
            return Verdict(FAILED, 1, _trace(error))
    return verdict


def _trace(error: Exception) -> str:
    frames = [
        f for f in traceback.extract_tb(error.__traceback__) if "/onnxprune/" in f.filename or "/passes/" in f.filename
    ]
    where = " < ".join(f"{pathlib.Path(f.filename).name}:{f.lineno} {f.name}" for f in frames[:-4:-1])
    message = (str(error).splitlines() or [""])[0][:300]
    return (
        "".join(traceback.format_exception(error))[-6000:] + f"\n{where or 'judge'}: {type(error).__name__}: {message}"
    )


def _through_python(folder: pathlib.Path, target: float, preset: str) -> Verdict:
    path = folder / "in.onnx"
    try:
        model = onnx_io.load(path)
        given = model.SerializeToString()
        result = onnxprune.prune(model, target_mac=target, preset=preset)
    except onnxprune.OnnxPruneError as error:
        return _refusal(error.exit_code, str(error))
    except MemoryError as error:  # the command line makes a message and exit code 3 of it
        return _refusal(3, str(error) or "out of memory")
    if model.SerializeToString() != given:
        raise AssertionError("the model that was passed in was changed")
    if not result.plan.initializers:
        return Verdict(MET)
    _check(model, result.model, result.plan, result.report.targets[0].achieved, target, verifies=preset != "d")
    return Verdict(PRUNED)


def _refusal(code: int, message: str) -> Verdict:
    lines = message.splitlines()
    if not 1 <= len(lines) <= 3 or code not in (2, 3, 4, 5, 6, 7) or "Traceback" in message or len(message) > 5000:
        raise AssertionError(
            f"no clean refusal: exit code {code}, {len(lines)} lines, {len(message)} characters: {message}"
        )
    return Verdict(REFUSED, code, message)


def _through_command_line(folder: pathlib.Path, target: float, preset: str) -> Verdict:
    path, out, plan, told = (folder / name for name in ("in.onnx", "out.onnx", "plan.json", "report.json"))
    words = (path, out, "--target-mac", target, "--preset", preset, "--no-latency", "--plan-out", plan, "--json", told)
    done = run("prune", *words)
    if done.exit_code == 1:
        _through_python(folder, target, preset)  # has the trace
        raise AssertionError(f"internal error on the command line alone: {done.stderr}")
    if done.exit_code:
        error = json.loads(told.read_text(encoding="utf-8"))["error"]
        if out.exists() or error["code"] != done.exit_code or "Traceback" in done.output:
            raise AssertionError(f"a failure that writes, or tells two codes: {done.exit_code}, {error}: {done.output}")
        return _refusal(done.exit_code, done.stderr.removeprefix("onnxprune: ").rstrip("\n"))
    report = json.loads(told.read_text(encoding="utf-8"))
    removed = json.loads(plan.read_text(encoding="utf-8"))["initializers"]
    if not removed:
        return Verdict(MET)
    _check(
        onnx_io.load(path),
        onnx_io.load(out),
        onnxprune.Plan.from_json(plan.read_text()),
        report["target"]["achieved"],
        target,
        verifies=preset != "d",
    )
    return Verdict(PRUNED)


def _check(
    model: ModelProto, pruned: ModelProto, plan: onnxprune.Plan, achieved: float, target: float, *, verifies: bool
) -> None:
    """The result meets the target, verifies, and satisfies onnx and onnxruntime wherever the original does."""
    if not achieved <= target:
        raise AssertionError(f"{achieved} of the MAC are left, {target} were asked for")
    if signature(model) != signature(pruned):
        raise AssertionError("inputs or outputs changed")
    for level, check in enumerate(LEVELS):
        if _accepts(check, model) is None and (problem := _accepts(check, pruned)) is not None:
            raise AssertionError(f"onnx.checker (level {level}) rejects the result: {problem}")
    if _accepts(_start, model) is None and (problem := _accepts(_start, pruned)) is not None:
        raise AssertionError(f"onnxruntime rejects the result: {problem}")
    if verifies:  # the proof once more, from the files alone
        onnxprune.verify(model, pruned, plan)


def _accepts(check: Callable[[ModelProto], object], model: ModelProto) -> str | None:
    """Why a check rejects a model; nothing where it accepts it."""
    try:
        check(model)
    except Exception as error:  # checkers raise types of their own
        return str(error)[:300] or repr(error)
    return None


def _start(model: ModelProto) -> None:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    with onnx_io.temporary_file(model) as path:
        onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def is_sound(found: Files) -> bool:
    """Whether onnx and onnxruntime accept the file and run it; kills the process on files that kill onnxruntime."""
    model = readable(found)
    if model is None or _accepts(LEVELS[1], model) is not None:
        return False
    session = runtime.Session(model)
    session.run(runtime.random_feeds(session.inputs, {}))
    return True
