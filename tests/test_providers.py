"""Providers and threads: what sessions ask onnxruntime for. CUDA is a stand-in that runs on the CPU."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnxruntime
import pytest

import onnxprune
from commands import ok, run
from onnxprune import runtime, workers
from onnxprune.errors import UsageError

DIGITS = Path(__file__).parents[1] / "fixtures" / "digits"
MODEL, CALIB, EVAL = DIGITS / "digits.onnx", DIGITS / "digits_calib.npz", DIGITS / "digits_eval.npz"
ACCURACY = ("--data", EVAL, "--metric", "top1")
COPY = "cp {artifact}/student.onnx {out}"


@dataclass
class Spy:
    """Every session that was started: its threads, the provider it asked for, and whether it ran the graph as written."""

    sessions: list[tuple[int, Any, bool]] = field(default_factory=list)

    @property
    def threads(self) -> set[int]:
        """Threads of all sessions."""
        return {threads for threads, _, _ in self.sessions}

    def providers(self, *, as_written: bool) -> set[str]:
        """Names of the providers that proofs (and shapes) asked for, or all else did."""
        return {p if isinstance(p, str) else p[0] for _, p, plain in self.sessions if plain == as_written}


def spy_on(monkeypatch: pytest.MonkeyPatch, got: Callable[[str], list[str]]) -> Spy:
    """Record sessions; all run on the CPU, and ``got`` tells the providers that one says it has."""
    spy, real = Spy(), onnxruntime.InferenceSession
    plain = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL

    def start(model: Any, options: Any, providers: list[Any], enable_fallback: int) -> Any:
        assert not enable_fallback, "onnxruntime would print to stdout and go on with another provider"
        (asked,) = providers
        spy.sessions.append((options.intra_op_num_threads, asked, options.graph_optimization_level == plain))
        have = got(asked if isinstance(asked, str) else asked[0])
        session = real(model, options, providers=["CPUExecutionProvider"])
        monkeypatch.setattr(session, "get_providers", lambda: have, raising=False)
        return session

    monkeypatch.setattr(runtime.onnxruntime, "InferenceSession", start)
    return spy


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch) -> Spy:
    """Sessions on the providers that are really here."""
    return spy_on(monkeypatch, lambda asked: [asked])


@pytest.fixture
def offers_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An onnxruntime that lists CUDA."""
    monkeypatch.setattr(runtime.onnxruntime, "get_available_providers", lambda: [runtime.CUDA, runtime.CPU])
    runtime.works.cache_clear()
    yield
    runtime.works.cache_clear()


@pytest.fixture
def cuda(offers_cuda: None, monkeypatch: pytest.MonkeyPatch) -> Spy:
    """CUDA that works."""
    return spy_on(monkeypatch, lambda asked: [asked, runtime.CPU])


@pytest.fixture
def dropped(offers_cuda: None, monkeypatch: pytest.MonkeyPatch) -> Spy:
    """CUDA without a driver: onnxruntime leaves it out and says nothing."""
    return spy_on(monkeypatch, lambda asked: [runtime.CPU])


@pytest.fixture
def raising(offers_cuda: None, monkeypatch: pytest.MonkeyPatch) -> Spy:
    """CUDA with a driver that is too old."""

    def got(asked: str) -> list[str]:
        if asked == runtime.CUDA:
            raise RuntimeError("CUDA failure 35: driver version is insufficient")
        return [asked]

    return spy_on(monkeypatch, got)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a pruned model, its plan and its artifact."""
    folder = tmp_path_factory.mktemp("made")
    ok(MODEL, folder / "pruned.onnx", "--target-mac", 0.7, "--plan-out", folder / "plan.json", "--no-latency")
    ok("artifact", MODEL, folder / "pruned.onnx", folder / "artifact", "--plan", folder / "plan.json")
    return folder


# -- threads -------------------------------------------------------------------------------------------------------------


def commands(made: Path, out: Path) -> dict[str, tuple[object, ...]]:
    """A line of every command that runs a model."""
    pruned, plan = made / "pruned.onnx", ("--plan", made / "plan.json")
    return {
        "prune": ("prune", MODEL, out, "--target-mac", 0.7, "--calib", CALIB, *ACCURACY),
        "search": ("prune", MODEL, out, *ACCURACY, "--max-drop", 0.1, "--no-latency"),
        "apply": ("apply", MODEL, out, *plan),
        "verify": ("verify", MODEL, pruned, *plan),
        "evaluate": ("evaluate", pruned, *ACCURACY, "--reference", MODEL),
        "inspect": ("inspect", MODEL),
        "sensitivity": ("sensitivity", MODEL, *ACCURACY, "--shares", "0.5", "--jobs", 1),
        "sweep": ("sweep", MODEL, "--target-mac", 0.7, *ACCURACY, "--jobs", 1),
        "artifact": ("artifact", MODEL, pruned, out, *plan),
        "iterate": ("iterate", MODEL, out, "--target-mac", 0.8, "--step", 0.2, "--data", EVAL, "--trainer", COPY),
        "finetune": (
            "finetune",
            made / "artifact",
            out,
            "--data",
            EVAL,
            "--val",
            EVAL,
            "--metric",
            "top1",
            "--epochs",
            1,
        ),
    }


@pytest.mark.parametrize(("command", "threads"), [("prune", 1), *((name, 2) for name in commands(Path(), Path()))])
def test_threads_reach_every_session(command: str, threads: int, made: Path, tmp_path: Path, spy: Spy) -> None:
    """No session of any command uses more threads than the user allows, and none is left to onnxruntime's choice."""
    if command == "finetune":
        pytest.importorskip("torch", reason="PyTorch is not installed: finetune was not run")
    ok(*commands(made, tmp_path / "out")[command], "--threads", threads)
    assert spy.threads <= {1, threads}  # what gains nothing by threads has one
    if command != "inspect":
        assert threads in spy.threads


@pytest.mark.parametrize("command", ["prune", "evaluate", "verify"])
def test_by_itself_onnxruntime_chooses(command: str, made: Path, tmp_path: Path, spy: Spy) -> None:
    """Without the option, threads are left to onnxruntime."""
    ok(*commands(made, tmp_path / "out")[command])
    assert 0 in spy.threads


def test_threads_are_a_keyword_too(made: Path, spy: Spy) -> None:
    """In Python ``threads`` limits a call, and nothing after it."""
    onnxprune.prune(str(MODEL), target_mac=0.7, threads=1)
    onnxprune.verify(str(MODEL), str(made / "pruned.onnx"), str(made / "plan.json"), threads=1)
    onnxprune.evaluate(str(MODEL), EVAL, "top1", threads=1)
    onnxprune.sensitivity(str(MODEL), EVAL, "top1", shares=[0.5], jobs=1, options=onnxprune.Options(threads=1))
    assert spy.threads == {1}
    onnxprune.evaluate(str(MODEL), EVAL, "top1")
    assert spy.threads == {0, 1}


def test_fewer_threads_than_none_are_refused() -> None:
    """A negative number is a usage error."""
    with pytest.raises(UsageError, match="threads -1"):
        onnxprune.Options(threads=-1)


def test_torch_gets_its_threads_back(made: Path, tmp_path: Path) -> None:
    """The limit holds for training, too, and ends with it."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: finetune was not run")
    from onnxprune.train import finetune  # noqa: PLC0415 (needs torch)
    from onnxprune.train.recipe import Recipe  # noqa: PLC0415

    before, seen = torch.get_num_threads(), set()
    finetune(
        made / "artifact", EVAL, tmp_path / "out.onnx", Recipe(epochs=1), threads=before + 1,
        moment=lambda now: seen.add(torch.get_num_threads()),
    )  # fmt: skip
    assert seen == {before + 1}
    assert torch.get_num_threads() == before


# -- providers -----------------------------------------------------------------------------------------------------------


def test_cuda_runs_everything_but_the_proof(tmp_path: Path, cuda: Spy) -> None:
    """Where CUDA works, calibration, evaluation and whole runs take it unasked; the proof and shapes stay on the CPU."""
    report = tmp_path / "r.json"
    ok(*commands(Path(), tmp_path / "out")["prune"], "--json", report)
    assert cuda.providers(as_written=False) == {runtime.CUDA}
    assert cuda.providers(as_written=True) == {runtime.CPU}
    told = json.loads(report.read_text())
    assert told["options"]["provider"] == runtime.CUDA
    assert any(note.startswith("models ran on CUDAExecutionProvider") for note in told["notes"])


def test_a_provider_that_is_named_proves_too(made: Path, cuda: Spy) -> None:
    """Whoever names a provider gets the proof on it, in float32 proper: TF32 has ten bits and fails what is right."""
    ok("verify", MODEL, made / "pruned.onnx", "--plan", made / "plan.json", "--provider", "cuda")
    asked = [asked for _, asked, _ in cuda.sessions if asked != runtime.CPU]
    assert cuda.providers(as_written=True) == {runtime.CUDA}
    assert all(settings["use_tf32"] == "0" for _, settings in asked)


def test_the_cpu_can_be_named(made: Path, cuda: Spy) -> None:
    """``--provider CPU`` leaves CUDA alone."""
    ok("evaluate", made / "pruned.onnx", *ACCURACY, "--provider", "CPU")
    assert {asked for _, asked, _ in cuda.sessions} == {runtime.CPU}


@pytest.mark.parametrize("broken", ["dropped", "raising"])
def test_cuda_that_does_not_work_is_passed_over_with_a_note(
    broken: str, made: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """A driver that is missing costs nobody a run who did not ask for CUDA, and the report says where models ran."""
    request.getfixturevalue(broken)
    ok("evaluate", made / "pruned.onnx", *ACCURACY, "--json", tmp_path / "r.json")
    told = json.loads((tmp_path / "r.json").read_text())
    assert (told["provider"], told["threads"]) == (runtime.CPU, 0)
    assert told["notes"] == ["CUDAExecutionProvider is installed but does not work here; models ran on the CPU"]


@pytest.mark.parametrize(
    ("broken", "why"), [("dropped", "onnxruntime took CPUExecutionProvider instead"), ("raising", "CUDA failure 35")]
)
def test_cuda_that_is_named_and_does_not_work_is_an_error(
    broken: str, why: str, made: Path, request: pytest.FixtureRequest
) -> None:
    """Nothing runs somewhere else than where the user said; the error says what to look at."""
    request.getfixturevalue(broken)
    found = run("evaluate", made / "pruned.onnx", *ACCURACY, "--provider", "CUDA")
    assert found.exit_code == 2
    assert found.output.startswith(
        f"onnxprune: provider CUDAExecutionProvider is installed but does not work here ({why}"
    )
    assert "--provider CPU" in found.output


def test_a_model_that_fails_on_a_working_provider_names_it(offers_cuda: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The provider is no suspect where another model runs on it; the message says where the model failed."""
    spy_on(monkeypatch, lambda asked: [asked])
    with pytest.raises(onnxprune.ModelError, match="cannot load the model on CUDAExecutionProvider"):
        runtime.Session(b"no model", "CUDA")


def test_a_provider_that_is_not_here_is_a_usage_error() -> None:
    """The message lists those that are."""
    with pytest.raises(UsageError, match=r"provider Nonsense is not available here; available: .*CPUExecutionProvider"):
        runtime.Session(MODEL.read_bytes(), "Nonsense")


@pytest.mark.skipif(
    "AzureExecutionProvider" not in onnxruntime.get_available_providers(), reason="this onnxruntime has the CPU alone"
)
def test_another_provider_than_the_cpu_runs_and_is_reported(tmp_path: Path) -> None:
    """A whole run on a real provider that leaves its work to the CPU; the report has its full name and the threads."""
    report = tmp_path / "r.json"
    ok(*commands(Path(), tmp_path / "out.onnx")["prune"], "--provider", "azure", "--threads", 1, "--json", report)
    told = json.loads(report.read_text())
    assert told["proof"]["ok"]
    assert (told["options"]["provider"], told["options"]["threads"]) == ("AzureExecutionProvider", 1)


def test_a_gpu_is_not_shared_by_processes_unasked(cuda: Spy) -> None:
    """By default one process where CUDA runs the models, and one per core where the CPU does."""
    assert workers.processes("") == 1
    assert workers.processes("CPU") == workers.cores()


def test_threads_of_a_table_make_no_other_table(tmp_path: Path) -> None:
    """A sensitivity table, and a sweep's, go on with another number of threads."""
    for command in ("sensitivity", "sweep"):
        words = commands(Path(), Path())[command]
        table = tmp_path / f"{command}.json"
        ok(*words, "--threads", 1, "--json", table)
        ok(*words, "--threads", 2, "--json", table, "--resume")
