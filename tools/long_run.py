#!/usr/bin/env python3
"""Prune many times in one process and in several at once: memory must not grow, and all must end.

    python tools/long_run.py [--runs 200] [--processes 8]

Every run calibrates, compensates and proves the digits fixture. The slope of resident memory is fitted over the last three
quarters of the runs. Prints a table, exits with 1 where memory grows by more than 20 KB a run or a process fails.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import subprocess
import sys
import tempfile
import time

import numpy as np

import onnxprune

ROOT = pathlib.Path(__file__).resolve().parents[1]
DIGITS = ROOT / "fixtures" / "digits"
MODEL, CALIB = DIGITS / "digits.onnx", DIGITS / "digits_calib.npz"
SLOPE_KB = 20.0


def resident_kb() -> float:
    """Resident memory of this process, as Linux tells it."""
    pages = int(pathlib.Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1024


def repeated(runs: int) -> np.ndarray:
    """Resident memory after each run, float64 ``(runs,)`` in KB."""
    sizes = []
    for _ in range(runs):
        result = onnxprune.prune(MODEL, target_mac=0.5, calib=CALIB, threads=1)
        assert result.report.proof is not None
        assert result.report.proof.ok
        del result
        sizes.append(resident_kb())
    return np.array(sizes)


def side_by_side(processes: int) -> list[int]:
    """Exit codes of runs that write into one folder at once."""
    with tempfile.TemporaryDirectory(prefix="long_run.") as folder:
        words = [
            sys.executable,
            "-m",
            "onnxprune",
            MODEL,
            "OUT",
            "--target-mac",
            "0.5",
            "--calib",
            CALIB,
            "-q",
            "--threads",
            "1",
        ]
        outs = [pathlib.Path(folder) / f"{number}.onnx" for number in range(processes)]
        started = [subprocess.Popen([str(out) if word == "OUT" else str(word) for word in words]) for out in outs]
        codes = [process.wait() for process in started]
        same = len({out.read_bytes() for out in outs if out.exists()}) == 1
        left = [path.name for path in pathlib.Path(folder).iterdir() if path not in outs]
    if not same or left:
        raise SystemExit(f"the results differ, or files are left: {left}")
    return codes


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--processes", type=int, default=8)
    chosen = parser.parse_args()
    begin = time.monotonic()
    sizes = repeated(chosen.runs)
    late = sizes[len(sizes) // 4 :]
    slope = float(np.polyfit(np.arange(len(late)), late, 1)[0])
    for number in sorted({0, *range(len(sizes) // 4 - 1, len(sizes), max(1, len(sizes) // 4))}):
        print(f"run {number + 1:4}  {sizes[number] / 1024:7.1f} MB")
    print(f"slope over the last {len(late)} runs: {slope:.1f} KB a run ({time.monotonic() - begin:.0f} s)", flush=True)
    begin = time.monotonic()
    codes = side_by_side(chosen.processes)
    print(f"{len(codes)} processes at once: exit codes {codes}, equal results ({time.monotonic() - begin:.0f} s)")
    sys.exit(0 if slope <= SLOPE_KB and not any(codes) else 1)


if __name__ == "__main__":
    main()
