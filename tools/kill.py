#!/usr/bin/env python3
"""Kill finetune and iterate at random points, go on each time, and compare the end with an undisturbed run.

    python tools/kill.py [--kills 10] [--seed 0] [--epochs 60]

Each command runs on the digits fixture, is killed with SIGKILL after a random time, and started again until it comes to its
end; such chains follow each other until that many kills have happened. At the end of each chain all files must be readable,
the weights those of the undisturbed run to 1e-6, and every step's plan the same. Exits with 1 where that does not hold.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time

import numpy as np
import onnx
from onnx import numpy_helper

import onnxprune

ROOT = pathlib.Path(__file__).resolve().parents[1]
DIGITS = ROOT / "fixtures" / "digits"
MODEL, CALIB, EVAL = DIGITS / "digits.onnx", DIGITS / "digits_calib.npz", DIGITS / "digits_eval.npz"
TOLERANCE = 1e-6


def commands(folder: pathlib.Path, epochs: int) -> dict[str, list]:
    """Command lines without their output file: training alone, and the loop with its regularizer and calibration."""
    result = onnxprune.prune(MODEL, target_mac=0.2)
    onnxprune.export_artifact(MODEL, result.model, folder / "artifact", result.plan)
    data = ["--data", CALIB, "--val", EVAL, "--metric", "top1", "--ema", 0.9]
    steps = ["--target-mac", 0.4, "--step", 0.3, "--sparsity", 0.1, "--calib", CALIB, "--epochs", max(1, epochs // 6)]
    return {
        "finetune": ["finetune", folder / "artifact", *data, "--epochs", epochs],
        "iterate": ["iterate", MODEL, *data, *steps],
    }


def run(words: list, out: pathlib.Path, seconds: float | None) -> bool:
    """Run a command, for so long at most; whether it was killed."""
    line = [sys.executable, "-m", "onnxprune", words[0], words[1], out, *words[2:], "-q"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(list(map(str, line)), env=environment, stdout=subprocess.DEVNULL)
    try:
        code = process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.wait()
        return True
    if code:
        raise SystemExit(f"{words[0]} ended with exit code {code}")
    return False


def weights(path: pathlib.Path) -> dict[str, np.ndarray]:
    """Floating-point initializers of a file that must be a valid model."""
    model = onnx.load(path)
    onnx.checker.check_model(model)
    return {t.name: numpy_helper.to_array(t) for t in model.graph.initializer if t.data_type == onnx.TensorProto.FLOAT}


def plans(out: pathlib.Path) -> list:
    """Plans of all steps of a loop."""
    return [
        json.loads(path.read_text()) for path in sorted(out.parent.glob(f"{out.name}.iterations/iteration-*/plan.json"))
    ]


def difference(first: pathlib.Path, second: pathlib.Path) -> float:
    """Largest difference of a weight; infinite where the models have others."""
    one, two = weights(first), weights(second)
    if {name: value.shape for name, value in one.items()} != {name: value.shape for name, value in two.items()}:
        return float("inf")
    return max(float(np.abs(one[name] - two[name]).max()) for name in one)


def check(name: str, words: list, folder: pathlib.Path, kills: int, chance: random.Random) -> bool:
    """Kill one command that often, in as many chains as it takes; whether every chain came to the same end."""
    whole = folder / f"{name}-whole.onnx"
    begin = time.monotonic()
    run(words, whole, None)
    seconds = time.monotonic() - begin
    good, left, number = True, kills, 0
    while left:
        number += 1
        out, delays = folder / f"{name}-{number}.onnx", []
        while left and not out.exists():
            delay = chance.uniform(0.1, 0.9) * seconds
            if not run(words, out, delay):
                break
            left -= 1
            delays.append(delay)
        if not delays:
            continue  # it was faster than the first kill
        if not out.exists():
            run(words, out, None)
        error, same = difference(whole, out), plans(whole) == plans(out)
        good = good and same and error <= TOLERANCE
        times = " ".join(f"{delay:.1f}" for delay in delays)
        print(
            f"{name:9} chain {number}  largest difference {error:.1e}  plans {'equal' if same else 'DIFFER'}  "
            f"killed {len(delays)} times, after {times} s (undisturbed {seconds:.1f} s)",
            flush=True,
        )
    return good


def main() -> None:
    """Print a line per chain."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=10, help="kills per command")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=60, help="epochs of finetune; steps of iterate have a sixth")
    chosen = parser.parse_args()
    good = True
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        for which, words in commands(folder, chosen.epochs).items():
            good &= check(which, words, folder, chosen.kills, random.Random(f"{chosen.seed} {which}"))
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
