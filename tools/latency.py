#!/usr/bin/env python3
"""Measure in onnxruntime what pruning is worth: ResNet-50, MobileNetV2, EDSR-baseline and SID at half of their MAC.

    python tools/latency.py [--models resnet50 edsr] [--threads 1 2] [--seconds 40] [--target 0.7] [--json OUT.json]

Beside each other in one run, in turn: the original, pruned with the profile ort-cpu, pruned without alignment, and a
control that was never pruned, built at the widths of the aligned one with fresh weights. With --target, each is pruned to a
share of its latency instead, and measured again afterwards.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable, Mapping

import numpy as np
import onnx
from onnx import ModelProto, numpy_helper

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "fixtures"))

import architectures
import onnxprune
from onnxprune import runtime

MODELS: dict[str, Callable[[], ModelProto]] = {
    "resnet50": architectures.resnet_bottleneck,
    "mobilenet_v2": architectures.mobilenet_v2,
    "edsr": lambda: architectures.edsr(height=256, width=256),
    "sid": lambda: architectures.sid(height=352, width=528),
}
BARS = {"resnet50": 0.56, "mobilenet_v2": 0.68, "edsr": 0.55, "sid": 0.58}
CONTROL = 0.05
"""How far the pruned model may be from one that was built at its widths."""

AGAIN = 0.03
"""How far a latency target may be missed when measured again."""


def control(pruned: ModelProto) -> ModelProto:
    """Build the same layers anew: fresh weights of the same shapes, nothing that pruning noted."""
    fresh = onnx.ModelProto()
    fresh.CopyFrom(pruned)
    rng = np.random.default_rng(1)
    for tensor in fresh.graph.initializer:
        value = numpy_helper.to_array(tensor)
        if value.dtype == np.float32 and value.ndim > 1:
            scale = float(value.std()) or 1.0
            made = (scale * rng.standard_normal(value.shape)).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(made, tensor.name))
    del fresh.graph.value_info[:]
    return onnx.shape_inference.infer_shapes(fresh)


def race(models: Mapping[str, ModelProto], threads: int, seconds: float) -> dict[str, tuple[float, float]]:
    """Run all in turn; median milliseconds of each, and the median over rounds of its ratio to the first."""
    sessions = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, model in models.items():
            path = pathlib.Path(folder) / f"{name}.onnx"
            onnx.save(model, path)
            sessions[name] = runtime.Session(str(path), threads=threads, spin=False)
    first = next(iter(sessions.values()))
    feeds = runtime.random_feeds(first.inputs, {name: shape for name, (shape, _) in first.inputs.items()})
    rounds = []
    begin = time.perf_counter()
    while len(rounds) < 7 or time.perf_counter() - begin < seconds:
        rounds.append([session.seconds(feeds) for session in sessions.values()])
    times = np.array(rounds[1:])
    ratios = times / times[:, :1]
    return {
        name: (1e3 * float(np.median(times[:, i])), float(np.median(ratios[:, i]))) for i, name in enumerate(sessions)
    }


def halved(name: str, threads: list[int], seconds: float) -> tuple[list[dict], bool]:
    """Half of a model's MAC: one row per number of threads, and whether the bars hold."""
    original = MODELS[name]()
    aligned = onnxprune.prune(original, target_mac=0.5, profile="ort-cpu", proof=False)
    free = onnxprune.prune(original, target_mac=0.5, proof=False)
    models = {
        "original": original,
        "ort-cpu": aligned.model,
        "unaligned": free.model,
        "control": control(aligned.model),
    }
    mac = aligned.report.after["mac"] / aligned.report.before["mac"]
    rows, held = [], True
    for count in threads:
        found = race(models, count, seconds)
        ratio, apart = found["ort-cpu"][1], abs(found["ort-cpu"][1] - found["control"][1])
        good = ratio <= BARS[name] and apart <= CONTROL
        held &= good
        ms, ratios = ({key: pair[i] for key, pair in found.items()} for i in (0, 1))
        rows.append(
            {"model": name, "threads": count, "mac": mac, "bar": BARS[name], "ok": good, "ms": ms, "ratio": ratios}
        )
        print(
            f"{'ok  ' if good else 'OVER'} {name:13} {count} threads  MAC {mac:.3f}  original {ms['original']:8.1f} ms  "
            f"ort-cpu {ratio:.3f} (bar {BARS[name]})  unaligned {ratios['unaligned']:.3f}  control {ratios['control']:.3f}",
            flush=True,
        )
    return rows, held


def targeted(name: str, target: float, threads: int, seconds: float) -> tuple[list[dict], bool]:
    """Prune to a share of the latency and measure it again, in sessions of its own."""
    original = MODELS[name]()
    begin = time.perf_counter()
    result = onnxprune.prune(original, target_latency=target, threads=threads, proof=False)
    taken = time.perf_counter() - begin
    achieved = result.report.targets[0].achieved
    again = race({"original": original, "pruned": result.model}, threads, seconds)["pruned"][1]
    good = abs(again - target) <= AGAIN
    mac = result.report.after["mac"] / result.report.before["mac"]
    print(
        f"{'ok  ' if good else 'OVER'} {name:13} {threads} threads  target {target}  achieved {achieved:.3f}  "
        f"again {again:.3f}  MAC {mac:.3f}  in {taken:.0f} s",
        flush=True,
    )
    return [
        {
            "model": name,
            "threads": threads,
            "target": target,
            "achieved": achieved,
            "again": again,
            "mac": mac,
            "seconds": taken,
        }
    ], good


def main() -> None:
    """Measure, print, and exit with 1 where a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seconds", type=float, default=40.0, help="of every measurement")
    parser.add_argument("--target", type=float, help="share of latency to prune to, instead of half of the MAC")
    parser.add_argument("--json", type=pathlib.Path)
    chosen = parser.parse_args()
    print(f"onnxruntime {runtime.VERSION}, blocks of {runtime.BLOCK} channels")
    rows, held = [], True
    for name in chosen.models:
        for threads in chosen.threads if chosen.target else ():
            found, good = targeted(name, chosen.target, threads, chosen.seconds)
            rows += found
            held &= good
        if not chosen.target:
            found, good = halved(name, chosen.threads, chosen.seconds)
            rows += found
            held &= good
    if chosen.json:
        chosen.json.write_text(json.dumps(rows, indent=1))
    sys.exit(0 if held else 1)


if __name__ == "__main__":
    main()
