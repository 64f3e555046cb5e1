#!/usr/bin/env python3
"""Disturb prune with calibration in every way that a machine can, and look at what it leaves.

    python tools/faults.py [--moments 50] [--seed 0] [--only kill]

`kill` and `interrupt` send SIGKILL and SIGINT at random moments of a run; `full` fills a small tmpfs and writes under
a limit on file size; `readonly` writes to a read-only mount; `changed` exchanges the input while it is read; `pipe` closes
standard input, output or error. OUT must be absent, the old one, or whole; the input untouched; the exit code the documented
one; and after anything but SIGKILL no temporary file is left. Prints a line per fault, exits with 1 where one does not hold.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence

import onnx

from onnxprune import pipeline

ROOT = pathlib.Path(__file__).resolve().parents[1]
DIGITS = ROOT / "fixtures" / "digits"
OPTIONS = [
    "--target-mac",
    "0.5",
    "--calib",
    DIGITS / "digits_calib.npz",
    "--no-latency",
    "--threads",
    "1",
    "-q",
    "--force",
]


def start(source: pathlib.Path, out: pathlib.Path, *more: object, **settings: object) -> subprocess.Popen:
    """Start a run in a process of its own."""
    words = [sys.executable, "-m", "onnxprune", source, out, *OPTIONS, *more]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        list(map(str, words)),
        env=environment,
        text=True,
        **{"stderr": subprocess.PIPE, "stdout": subprocess.DEVNULL} | settings,
    )


def state(out: pathlib.Path, old: bytes) -> str:
    """What lies at OUT: nothing, the old file, or a whole new model."""
    if not out.exists():
        return "absent"
    if out.read_bytes() == old:
        return "old"
    onnx.checker.check_model(onnx.load(out), full_check=True)
    return "new"


def leftovers(folder: pathlib.Path) -> list[str]:
    """Temporary files in a folder."""
    return sorted(path.name for path in folder.iterdir() if "onnxprune-" in path.name)


class Bench:
    """A folder with an input and an older OUT, and what is found wrong."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder, self.source, self.out = folder, folder / "in.onnx", folder / "out.onnx"
        shutil.copy(DIGITS / "digits.onnx", self.source)
        self.given, self.old = self.source.read_bytes(), b"an older file"
        self.wrong: list[str] = []

    def check(self, what: str, good: object) -> None:
        """Note what does not hold."""
        if not good:
            self.wrong.append(what)

    def fresh(self) -> None:
        """Put the older OUT in place."""
        self.out.write_bytes(self.old)

    def ended(self, process: subprocess.Popen) -> tuple[int, str, str]:
        """Exit code, message and what lies at OUT, once a run is over."""
        _, message = process.communicate(timeout=300)
        self.check("the input is untouched", self.source.read_bytes() == self.given)
        return process.returncode, message or "", state(self.out, self.old)


def listening() -> None:
    """Take SIGINT, which what a shell runs in the background leaves out."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def signalled(bench: Bench, kind: signal.Signals, moments: int, chance: random.Random) -> str:
    """Send a signal at random moments of a run."""
    begin = time.monotonic()
    bench.fresh()
    bench.ended(start(bench.source, bench.out))
    whole, counts = time.monotonic() - begin, Counter[str]()
    for _ in range(moments):
        bench.fresh()
        process = start(bench.source, bench.out, preexec_fn=listening)
        try:
            process.wait(chance.uniform(0.02, 1.02) * whole)
        except subprocess.TimeoutExpired:
            process.send_signal(kind)
        code, message, found = bench.ended(process)
        counts[f"{code}:{found}"] += 1
        if kind == signal.SIGINT:
            # While libraries load, Python itself is interrupted, or an extension makes another error of it.
            early = code == -signal.SIGINT or (code == 1 and "onnxprune:" not in message and found == "old")
            bench.check(f"exit code 130 or 0, not {code}: {message[-200:]}", code in (0, 130) or early)
            bench.check(f"one line, not {message!r}", code != 130 or early or message.count("\n") == 1)
            bench.check("no temporary file is left", not leftovers(bench.folder))
        else:
            bench.check(f"exit code {code}", code in (0, -signal.SIGKILL))
    bench.check("some runs were ended", any(not what.startswith("0:") for what in counts))
    n_left = len(leftovers(bench.folder))
    bench.ended(start(bench.source, bench.out))
    bench.check("the next run sweeps", not leftovers(bench.folder))
    told = ", ".join(f"{n} x {what}" for what, n in sorted(counts.items()))
    return (
        f"{moments} moments of {whole:.1f} s; exit code:OUT {told}; {n_left} temporary files left, 0 after the next run"
    )


def kill(bench: Bench, moments: int, chance: random.Random) -> str:
    """SIGKILL."""
    return signalled(bench, signal.SIGKILL, moments, chance)


def interrupt(bench: Bench, moments: int, chance: random.Random) -> str:
    """SIGINT."""
    return signalled(bench, signal.SIGINT, moments, chance)


def mounted(folder: pathlib.Path, options: str) -> bool:
    """Mount a tmpfs, where that is allowed."""
    folder.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    return shutil.which("mount") is not None and subprocess.run(words, capture_output=True, check=False).returncode == 0


def limited() -> None:
    """Let files of this process have 64 KiB at most."""
    import resource  # noqa: PLC0415 (not on every system)

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))


def full(bench: Bench, *_: object) -> str:
    """Disk full: by a small tmpfs, and by a limit on the size of files."""
    ways: dict[str, Callable[[], tuple[int, str, str]]] = {}
    small = bench.folder / "small"
    tmpfs = mounted(small, "size=64k")

    def on_tmpfs() -> tuple[int, str, str]:
        done = start(bench.source, small / "out.onnx")
        _, message = done.communicate(timeout=300)
        bench.check("nothing is left on the full disk", not list(small.iterdir()))
        return done.returncode, message, "absent"

    if tmpfs:
        ways["tmpfs"] = on_tmpfs
    ways["limit"] = lambda: bench.ended(start(bench.source, bench.out, "--no-proof", preexec_fn=limited))
    bench.fresh()
    told = []
    try:
        for name, way in ways.items():
            code, message, found = way()
            bench.check(f"{name}: exit code 7, not {code}: {message}", code == 7)
            bench.check(f"{name}: OUT {found}", found in ("absent", "old"))
            told.append(f"{name}: exit code {code}, {message.strip()}")
    finally:
        if tmpfs:
            subprocess.run(["umount", str(small)], check=True)
    bench.check("no temporary file is left", not leftovers(bench.folder))
    return "; ".join(told) + ("" if tmpfs else "; no tmpfs can be mounted here")


def readonly(bench: Bench, *_: object) -> str:
    """A folder that cannot be written, for the superuser either."""
    folder = bench.folder / "readonly"
    if not mounted(folder, "ro"):
        return "skipped: nothing can be mounted here, and permissions do not bind the superuser"
    try:
        done = start(bench.source, folder / "out.onnx")
        _, message = done.communicate(timeout=300)
    finally:
        subprocess.run(["umount", str(folder)], check=True)
    bench.check(f"exit code 7, not {done.returncode}: {message}", done.returncode == 7)
    return f"exit code {done.returncode}, {message.strip()}"


def changed(bench: Bench, moments: int, chance: random.Random) -> str:
    """The input is exchanged at random moments: OUT must be made of the file that the report names."""
    other = bench.folder / "other.onnx"
    pipeline.write(pipeline.prune(bench.source, target_mac=0.8), bench.source, other)
    models = {hashlib.sha256(data).hexdigest(): data for data in (bench.given, other.read_bytes())}
    made, counts = {}, Counter[str]()
    for digest, data in models.items():
        bench.source.write_bytes(data)
        start(bench.source, bench.out).communicate(timeout=300)
        made[digest] = bench.out.read_bytes()
    for _ in range(max(2, moments // 5)):
        bench.source.write_bytes(bench.given)
        process = start(bench.source, bench.out, "--json", bench.folder / "r.json")
        time.sleep(chance.uniform(0.3, 4))
        shutil.copy(other, bench.folder / "next.onnx")
        (bench.folder / "next.onnx").replace(bench.source)
        process.communicate(timeout=300)
        told = json.loads((bench.folder / "r.json").read_text())["input"]["sha256"]
        bench.check("OUT is made of the file that the report names", made[told] == bench.out.read_bytes())
        counts["first" if told == next(iter(models)) else "second"] += 1
    bench.source.write_bytes(bench.given)
    return f"{counts['first']} runs of the first file, {counts['second']} of the second, each as its report says"


def pipe(bench: Bench, *_: object) -> str:
    """Standard input, output or error closed; the reader of standard output gone."""
    reader, writer = os.pipe()
    os.close(reader)
    ways: Sequence[tuple[str, int, Callable[[], subprocess.Popen]]] = (
        ("stdin closed", 0, lambda: start(bench.source, bench.out, preexec_fn=lambda: os.close(0))),
        ("stdout closed", 0, lambda: start(bench.source, bench.out, preexec_fn=lambda: os.close(1))),
        ("stderr closed", 0, lambda: start(bench.source, bench.out, stderr=None, preexec_fn=lambda: os.close(2))),
        ("broken pipe", 7, lambda: start(bench.source, bench.out, "--json", "-", stdout=writer)),
    )
    told = []
    for name, wanted, begin in ways:
        bench.fresh()
        code, message, found = bench.ended(begin())
        bench.check(f"{name}: exit code {wanted}, not {code}: {message}", code == wanted)
        bench.check(f"{name}: OUT is new, not {found}", found == "new")
        told.append(f"{name} {code}")
    os.close(writer)
    return ", ".join(told)


FAULTS = {each.__name__: each for each in (kill, interrupt, full, readonly, changed, pipe)}


def main() -> None:
    """Print a line per fault."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--moments", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=FAULTS, action="append")
    chosen = parser.parse_args()
    good = True
    for name in chosen.only or FAULTS:
        with tempfile.TemporaryDirectory(prefix="faults.") as folder:
            bench = Bench(pathlib.Path(folder))
            begin = time.monotonic()
            told = FAULTS[name](bench, chosen.moments, random.Random(f"{chosen.seed} {name}"))
        verdict = "holds" if not bench.wrong else "DOES NOT HOLD: " + "; ".join(dict.fromkeys(bench.wrong))
        print(f"{name:10} {time.monotonic() - begin:6.0f} s  {told}; {verdict}", flush=True)
        good &= not bench.wrong
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
