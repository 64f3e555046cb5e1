#!/usr/bin/env python3
"""Kill finetune and iterate at random points, go on each time, and compare the end with an undisturbed run.

    python tools/kill.py [--kills 10] [--seed 0] [--rounds 1]

Each command runs on the digits fixture, is killed with SIGKILL after a random time, started again, and so on until it has
been killed that often; then it runs to its end. At the end all files must be readable, the weights those of the undisturbed
run to 1e-5, and the plan the same. Exits with 1 where that does not hold.
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
DATA = ["--data", DIGITS / "digits_calib.npz", "--val", DIGITS / "digits_eval.npz", "--metric", "top1", "--ema", 0.9]


def commands(folder: pathlib.Path) -> dict[str, list]:
    """Command lines without their output file."""
    result = onnxprune.prune(DIGITS / "digits.onnx", target_mac=0.2)
    onnxprune.export_artifact(DIGITS / "digits.onnx", result.model, folder / "artifact", result.plan, force=True)
    loop = [
        "--target-mac",
        0.3,
        "--step",
        0.15,
        "--sparsity",
        0.1,
        "--epochs",
        40,
        "--calib",
        DIGITS / "digits_calib.npz",
    ]
    return {
        "finetune": ["finetune", folder / "artifact", *DATA, "--epochs", 300],
        "iterate": ["iterate", DIGITS / "digits.onnx", *DATA, *loop, "--criterion", "l2"],
    }


def run(words: list, out: pathlib.Path, seconds: float | None) -> bool:
    """Run a command, for so long at most; whether it was killed."""
    line = [sys.executable, "-m", "onnxprune", words[0], words[1], out, *words[2:], "-q"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(list(map(str, line)), env=environment)
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


def plans(folder: pathlib.Path) -> list:
    """Plans of all steps of a loop."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("iteration-*/plan.json"))]


def check(name: str, words: list, folder: pathlib.Path, kills: int, chance: random.Random) -> bool:
    """Kill one command again and again; whether it came to the same end."""
    whole, out = folder / f"{name}-whole.onnx", folder / f"{name}.onnx"
    begin = time.monotonic()
    run(words, whole, None)
    seconds = time.monotonic() - begin
    done = 0
    while done < kills and not out.exists():
        done += run(words, out, chance.uniform(0.5, 1.5) * min(seconds / kills + 4, seconds / 2))
    if not out.exists():
        run(words, out, None)
    first, second = weights(whole), weights(out)
    error = max(float(np.abs(first[k] - second[k]).max()) for k in first)
    same = first.keys() == second.keys() and error <= 1e-5
    equal = plans(folder / f"{whole.name}.iterations") == plans(folder / f"{out.name}.iterations")
    print(
        f"{name:9} {seconds:6.1f} s  killed {done:2}  largest difference {error:.1e}  plans equal {equal}", flush=True
    )
    return same and equal


def main() -> None:
    """Print a line per command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=1, help="chains of kills per command")
    chosen = parser.parse_args()
    good = True
    for number in range(chosen.rounds):
        with tempfile.TemporaryDirectory() as name:
            folder = pathlib.Path(name)
            for which, words in commands(folder).items():
                good &= check(which, words, folder, chosen.kills, random.Random(f"{chosen.seed} {number} {which}"))
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
