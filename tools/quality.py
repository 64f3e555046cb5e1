#!/usr/bin/env python3
"""Quality without training: drop of trained networks at several budgets, by every way of ranking and compensating.

    python tools/quality.py ../shared/models [--models resnet20_jpeg dncnn_s25 vdsr imdn_x2] [--targets 0.8 0.7 0.6]
        [--ways default | all | NAME ...] [--samples N] [--torch-pruning] [--json OUT.json]

Calibration inputs and scores are those of the folder's own evaluate.py. Every row is one run of the whole tool: pruned,
proved, compensated. Plain magnitude (criterion l2, preset d, no calibration data) stands beside each figure; with
--torch-pruning so does Torch-Pruning's magnitude pruner, where torch and torch_pruning are installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import pathlib
import sys
import tempfile
import time
from types import ModuleType
from typing import Any

import numpy as np

import onnxprune
from onnxprune import onnx_io

TASKS = {
    "resnet20": ("cifar-top1", "cifar_calib_512.npz", "cifar_eval_1k.npz", 512),
    "dncnn": ("denoise-psnr", "bsd_train_patches.npz", "set12_denoise.npz", 64),
    "vdsr": ("sr-psnr", "vdsr_train_patches.npz", "set5_y_x2.npz", 64),
    "imdn": ("sr-psnr", "imdn_train_patches_x2.npz", "set5_rgb_x2.npz", 64),
}
BARS = {
    "resnet20_jpeg": {0.8: 3.0, 0.7: 7.5, 0.6: 14.0},
    "dncnn_s25": {0.8: 0.18, 0.7: 0.33, 0.6: 0.45},
    "vdsr": {0.8: 0.02, 0.7: 0.15, 0.6: 0.35},
    "imdn_x2": {0.8: 0.30, 0.7: 0.60, 0.6: 1.0},
}
"""Drops aimed at."""

WAYS: dict[str, dict[str, Any]] = {
    "magnitude": {"calibrated": False},
    "default": {},
    "magnitude + least squares": {"criterion": "l2"},
    "activation + least squares": {"criterion": "activation"},
    "wanda + least squares": {"criterion": "wanda"},
    "obs error + least squares": {"allocation": "error"},
    "obs error/MAC + least squares": {"allocation": "error-per-mac"},
    "obs sensitivity, no compensation": {"compensate": "none"},
    "obs sensitivity, bias": {"compensate": "bias"},
}


def scorer(folder: pathlib.Path) -> ModuleType:
    """Load the folder's evaluate.py."""
    spec = importlib.util.spec_from_file_location("evaluate", folder / "evaluate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def calibration(evaluate: ModuleType, folder: pathlib.Path, name: str, count: int | None) -> dict[str, np.ndarray]:
    """Calibration inputs of a model, by input name."""
    task, data, _, n = _task(name)
    model = onnx_io.load(folder / f"{name}.onnx")
    known = {tensor.name for tensor in model.graph.initializer}
    entry = next(value.name for value in model.graph.input if value.name not in known)
    with tempfile.TemporaryDirectory() as temporary:
        out = pathlib.Path(temporary) / "calib.npz"
        evaluate.calib(task, folder / data, out, n=count or n, name=entry)
        with np.load(out) as arrays:
            return {entry: arrays[entry]}


def run(
    evaluate: ModuleType, folder: pathlib.Path, name: str, target: float, way: str, calib: dict[str, np.ndarray]
) -> dict[str, Any]:
    """Prune once and score the result."""
    task, _, data, _ = _task(name)
    chosen = dict(WAYS[way])
    if chosen.pop("calibrated", True):
        chosen["calib"] = calib
    begin = time.perf_counter()
    result = onnxprune.prune(folder / f"{name}.onnx", target_mac=target, **chosen)
    seconds = time.perf_counter() - begin
    with tempfile.TemporaryDirectory() as temporary:
        path = pathlib.Path(temporary) / "pruned.onnx"
        path.write_bytes(result.model.SerializeToString())
        value = evaluate.evaluate(task, path, folder / data)["value"]
    report = result.report
    return {
        "model": name, "target": target, "way": way, "share": report.after["mac"] / report.before["mac"],
        "quality": value, "seconds": seconds, "proof": bool(report.proof and report.proof.ok),
        "timings": dict(report.timings),
    }  # fmt: skip


def _task(name: str) -> tuple[str, str, str, int]:
    return next(task for prefix, task in TASKS.items() if name.startswith(prefix))


def main() -> None:
    """Print the table; exit with 1 where a proof fails."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--models", nargs="+", default=list(BARS))
    parser.add_argument("--targets", type=float, nargs="+", default=[0.8, 0.7, 0.6])
    parser.add_argument("--ways", nargs="+", default=["magnitude", "default"], help="all, or names of ways")
    parser.add_argument("--samples", type=int, help="calibration samples (default: 512 CIFAR images, 64 patches)")
    parser.add_argument("--torch-pruning", action="store_true", help="add Torch-Pruning's best, where it is installed")
    parser.add_argument("--json", type=pathlib.Path)
    chosen = parser.parse_args()
    ways = list(WAYS) if chosen.ways == ["all"] else chosen.ways
    if unknown := [way for way in ways if way not in WAYS]:
        parser.error(f"unknown way {unknown[0]!r}; choose from {', '.join(WAYS)}")
    evaluate = scorer(chosen.folder)
    rows = []
    for name in chosen.models:
        task, _, data, _ = _task(name)
        baseline = evaluate.evaluate(task, chosen.folder / f"{name}.onnx", chosen.folder / data)["value"]
        calib = calibration(evaluate, chosen.folder, name, chosen.samples)
        print(f"{name}: {baseline:.3f}", flush=True)
        for target in chosen.targets:
            for way in ways:
                row = run(evaluate, chosen.folder, name, target, way, calib)
                row |= {"baseline": baseline, "drop": baseline - row["quality"], "bar": BARS.get(name, {}).get(target)}
                rows.append(row)
                bar = f"  aimed at {row['bar']:g}" if row["bar"] is not None and way == "default" else ""
                print(
                    f"  {target:.2f} (MAC {row['share']:.4f}) {way:34} {row['quality']:8.3f}  drop {row['drop']:7.3f}"
                    f"  {row['seconds']:6.1f} s{'' if row['proof'] else '  NO PROOF'}{bar}",
                    flush=True,
                )
    if chosen.torch_pruning:
        _peer(chosen, rows)
    if chosen.json:
        chosen.json.write_text(json.dumps(rows, indent=1))
    sys.exit(0 if all(row.get("proof", True) for row in rows) else 1)


def _peer(chosen: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    sys.path.insert(0, str(pathlib.Path(__file__).parent))
    try:
        from torch_pruning_baseline import baseline  # noqa: PLC0415 (needs torch)
    except ImportError as error:
        print(f"Torch-Pruning is left out: {error}")
        return
    for found in baseline(chosen.folder, chosen.models, chosen.targets):
        if found.best:
            rows.append({"way": "Torch-Pruning", **vars(found)})
            print(f"  {found}")


if __name__ == "__main__":
    main()
