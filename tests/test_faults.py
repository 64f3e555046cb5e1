"""What is left when the machine fails: results whole or absent, temporary files that the next run finds its way through.

``tools/faults.py`` disturbs whole runs at many moments; here is one of each kind.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import onnx
import pytest
from test_safety import QUICK, refused, small

import onnxprune
from commands import ok, run
from onnxprune import external, files, onnx_io, pipeline
from onnxprune.errors import FileError

ROOT = Path(__file__).parents[1]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Write a small network and return its path."""
    path = tmp_path / "in.onnx"
    onnx.save(small(), path)
    return path


@pytest.fixture
def dead() -> int:
    """Return the number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-S", "-c", ""])
    process.wait()
    return process.pid


def leftovers(folder: Path) -> list[str]:
    """Temporary files in a folder."""
    return sorted(path.name for path in folder.iterdir() if "onnxprune-" in path.name)


# -- temporary files ---------------------------------------------------------------------------------------------------


def test_next_run_sweeps_what_dead_runs_left(model: Path, tmp_path: Path, dead: int) -> None:
    """Files of dead owners go; those of living ones, of other machines, and what only looks alike stay."""
    mine = files.owned()
    gone = f".out.onnx.{mine}abc123".replace(f"-{os.getpid()}-", f"-{dead}-")
    living, elsewhere = f".out.onnx.{mine}abc123", f".out.onnx.onnxprune-0123456789ab-{dead}-abc123"
    others = [living, elsewhere, ".out.onnx.partial", f"out.onnx-{dead}-abc", f"notes-onnxprune-{dead}.txt"]
    for name in (gone, *others):
        (tmp_path / name).write_bytes(b"half")
    ok(model, tmp_path / "out.onnx", *QUICK)
    assert {path.name for path in tmp_path.iterdir()} == {"in.onnx", "out.onnx", *others}


def test_what_another_machine_left_goes_after_a_day(tmp_path: Path, dead: int) -> None:
    """Nobody here knows whether processes elsewhere live, but no write takes a day."""
    path = tmp_path / f".x.onnx.onnxprune-0123456789ab-{dead}-abc123"
    path.write_bytes(b"half")
    files.sweep(tmp_path)
    assert path.exists()
    os.utime(path, (0, time.time() - files.STALE_SECONDS - 1))
    files.sweep(tmp_path)
    assert not path.exists()


def test_temporary_folders_are_swept(tmp_path: Path, dead: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders with copies of models go likewise."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    left = tmp_path / f"{files.owned()}abc123".replace(f"-{os.getpid()}-", f"-{dead}-")
    left.mkdir()
    (left / "model.onnx").write_bytes(b"half")
    with files.temporary_folder() as folder:
        assert f"-{os.getpid()}-" in folder
        assert not left.exists()
    assert not leftovers(tmp_path)


# -- two at once -------------------------------------------------------------------------------------------------------


def test_results_of_two_runs_do_not_mix(tmp_path: Path) -> None:
    """While one run writes its results, another waits."""
    order = []

    def second() -> None:
        with files.alone_in(tmp_path):
            order.append("second")

    with files.alone_in(tmp_path):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join(0.2)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]


def test_results_are_written_alone(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Model, plan and report of prune and apply are all written while the folder is theirs."""
    inside, written = [False], []
    alone = files.alone_in

    class Alone:
        def __init__(self, folder: Path) -> None:
            self.lock = alone(folder)

        def __enter__(self) -> None:
            inside[0] = True
            self.lock.__enter__()

        def __exit__(self, *error: object) -> None:
            inside[0] = False
            self.lock.__exit__(*error)

    def write(path: Path | str, data: bytes) -> None:
        written.append((Path(path).name, inside[0]))
        Path(path).write_bytes(data)

    monkeypatch.setattr("onnxprune.cli.alone_in", Alone)
    monkeypatch.setattr(onnx_io, "write", write)
    out, plan, report = (tmp_path / name for name in ("out.onnx", "plan.json", "report.json"))
    ok(model, out, *QUICK, "--plan-out", plan, "--json", report)
    ok("apply", model, tmp_path / "again.onnx", "--plan", plan, "--json", tmp_path / "second.json")
    names = ["out.onnx", "plan.json", "report.json", "again.onnx", "second.json"]
    assert written == [(name, True) for name in names]


# -- input changed underneath ------------------------------------------------------------------------------------------


def test_report_names_the_bytes_that_were_pruned(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file exchanged once it was read does not change the hash in the report."""
    before, attach = hashlib.sha256(model.read_bytes()).hexdigest(), external.attach

    def exchange(proto: onnx.ModelProto, path: Path) -> None:
        attach(proto, path)
        model.write_bytes(b"another")

    monkeypatch.setattr(external, "attach", exchange)
    assert onnxprune.prune(model, target_mac=0.75).report.input["sha256"] == before


def test_copy_of_a_changed_file_is_refused(model: Path, tmp_path: Path) -> None:
    """Where nothing is to be removed OUT is a copy of what was read, or nothing."""
    result = onnxprune.prune(model, target_mac=1.0)
    pipeline.write(result, model, tmp_path / "same.onnx")
    other = small()
    other.doc_string = "another"
    onnx.save(other, model)
    with pytest.raises(FileError, match="has changed since it was read"):
        pipeline.write(result, model, tmp_path / "out.onnx")
    assert not (tmp_path / "out.onnx").exists()


# -- disks, pipes and signals ------------------------------------------------------------------------------------------


def test_folder_that_cannot_be_written(model: Path, tmp_path: Path) -> None:
    """A folder without permission is told with 7, by the folder's name."""
    folder = tmp_path / "readonly"
    folder.mkdir()
    folder.chmod(0o555)
    if os.access(folder, os.W_OK):
        pytest.skip("permissions do not bind the superuser; tools/faults.py mounts a folder read-only")
    assert str(folder) in refused(7, model, folder / "out.onnx", *QUICK)


def test_reader_of_standard_output_that_is_gone(model: Path, tmp_path: Path) -> None:
    """A summary that nobody reads any more is no bug: 7, and OUT is there."""
    out, (reader, writer) = tmp_path / "out.onnx", os.pipe()
    os.close(reader)
    done = command(model, out, *QUICK, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert done.returncode == 7
    assert done.stderr == f"onnxprune: standard output: its reader is gone; {out} was written before\n"
    onnx.checker.check_model(onnx.load(out), full_check=True)


def command(*args: object, **streams: object) -> subprocess.CompletedProcess[str]:
    """Run a command in a process of its own."""
    line = [sys.executable, "-m", "onnxprune", *map(str, args)]
    return subprocess.run(line, check=False, text=True, timeout=120, **streams)


@pytest.mark.parametrize(
    ("args", "unbuffered"),
    [
        (["--help"], ""), (["--version"], "1"), (["schema", "plan"], ""), (["completion", "bash"], "1"), (["prune"], ""),
        (["prune"], "1"),
    ],
)  # fmt: skip
def test_standard_output_on_a_full_disk(
    args: list[str], unbuffered: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is told with 7 in a line, with the name of what was written before."""
    monkeypatch.setenv("PYTHONUNBUFFERED", unbuffered)
    out = tmp_path / "out.onnx"
    with Path("/dev/full").open("w") as full:
        done = command(*args, *([model, out, *QUICK] if args == ["prune"] else []), stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 7, done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert "standard output: cannot be" in done.stderr
    if args == ["prune"]:
        assert f"{out} was written before" in done.stderr


def test_matplotlib_that_does_not_start(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A setting of its own that is nonsense is told with 2 before anything is written."""
    monkeypatch.setenv("MPLBACKEND", "nonsense")
    done = command(model, tmp_path / "out.onnx", *QUICK, "--html", tmp_path / "r.html", stderr=subprocess.PIPE)
    assert done.returncode == 2
    assert done.stderr.startswith("onnxprune: an HTML report: matplotlib does not start; check MPLBACKEND")
    assert len(done.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == [model]


def test_streams_that_do_not_know_a_character(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They show it as an escape."""
    monkeypatch.setenv("PYTHONIOENCODING", "latin-1")
    named = small()
    named.graph.node[0].name = "\u2192conv"
    onnx.save(named, tmp_path / "in.onnx")
    done = command("inspect", tmp_path / "in.onnx", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert done.returncode == 0, done.stderr
    assert "\\u2192conv" in done.stdout


def test_standard_error_on_a_full_disk(model: Path, tmp_path: Path) -> None:
    """What it does not take is lost; exit codes and results are what they are without."""
    with Path("/dev/full").open("w") as full:
        assert command(tmp_path / "gone.onnx", tmp_path / "out.onnx", *QUICK, "-v", stderr=full).returncode == 7
        assert command("--wrong", stderr=full).returncode == 2
        json_ = command("inspect", model, "--json", "-", stderr=full, stdout=subprocess.PIPE)
    assert json_.returncode == 0
    assert json.loads(json_.stdout)["schema"] == 1


def test_memory_that_runs_out(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No memory left is told as such, not as a bug."""

    def exhausted(*_: object, **__: object) -> None:
        raise MemoryError("Unable to allocate 9 TiB")

    monkeypatch.setattr(pipeline, "prune", exhausted)
    assert "out of memory (Unable to allocate 9 TiB)" in refused(3, model, tmp_path / "out.onnx", *QUICK)


@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGINT], ids=["kill", "interrupt"])
def test_signal_during_a_run(model: Path, tmp_path: Path, kind: signal.Signals) -> None:
    """A signal while OUT is written leaves the old one; an interrupt leaves no temporary file and ends with 130."""
    out = tmp_path / "out.onnx"
    out.write_bytes(b"old")
    script = (
        "import sys, time, onnxprune.onnx_io as io\n"
        "from onnxprune import cli\n"
        "real = io.pathlib.Path.chmod\n"
        "io.pathlib.Path.chmod = lambda self, mode: (print('ready', flush=True), time.sleep(60), real(self, mode))\n"
        "cli.main()\n"
    )
    words = [sys.executable, "-c", script, str(model), str(out), *QUICK, "--force", "-q"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(kind)
    _, message = process.communicate(timeout=60)
    assert out.read_bytes() == b"old"
    if kind == signal.SIGINT:
        assert (process.returncode, message) == (130, "onnxprune: interrupted; nothing was written\n")
        assert not leftovers(tmp_path)
    else:
        assert len(leftovers(tmp_path)) == 1
        ok(model, out, *QUICK, "--force")
        assert not leftovers(tmp_path)


def test_report_of_a_failed_run_is_whole(model: Path, tmp_path: Path) -> None:
    """A run that fails replaces an older report by one that tells of the failure, whole."""
    report = tmp_path / "r.json"
    report.write_text("{old")
    assert run(model, tmp_path / "out.onnx", "--target-mac", "0.00001", "--json", report).exit_code == 4
    assert json.loads(report.read_text())["error"]["code"] == 4


def resident() -> int:
    """Bytes of memory that this process holds, as Linux tells it."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is not told here")
def test_many_runs_keep_no_memory(model: Path) -> None:
    """Memory does not grow from run to run; ``tools/long_run.py`` looks at 200 with calibration."""
    sizes = []
    for _ in range(40):
        onnxprune.prune(model, target_mac=0.6)
        sizes.append(resident())
    assert sizes[-1] - sizes[19] < 2 << 20, [size >> 10 for size in sizes]
