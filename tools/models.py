#!/usr/bin/env python3
"""Prune every model of a folder at several targets with every preset, and check what a user relies on.

    python tools/models.py FOLDER [--targets 0.8 0.6 0.4] [--presets a b c d] [--only NAME] [--json OUT.json]

Per run: the proof holds, MAC is within the target and close to it, onnx.checker accepts the file, onnxruntime runs it, and
inputs and outputs are the original's. A preset that cannot reach a target must say so with a BudgetError.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
import time

import onnx

import onnxprune
from onnxprune import onnx_io, runtime


def check(model: onnx.ModelProto, target: float, preset: str) -> dict[str, object]:
    """Prune once and return what was found; ``problem`` is None where all is well."""
    begin = time.perf_counter()
    try:
        result = onnxprune.prune(model, target_mac=target, preset=preset)
    except onnxprune.BudgetError as error:
        return {
            "outcome": "out of reach",
            "floor": error.floor,
            "problem": None,
            "seconds": time.perf_counter() - begin,
        }
    except onnxprune.OnnxPruneError as error:
        return {
            "outcome": "failed",
            "problem": f"{type(error).__name__}: {error}",
            "seconds": time.perf_counter() - begin,
        }
    seconds = time.perf_counter() - begin
    report, pruned = result.report, result.model
    share = report.after["mac"] / report.before["mac"]
    problem = None
    if share > target:
        problem = f"budget exceeded: {share}"
    if report.proof is None or not report.proof.ok:
        problem = "no proof"
    if list(pruned.graph.input) != list(model.graph.input) or list(pruned.graph.output) != list(model.graph.output):
        problem = "inputs or outputs changed"
    onnx.checker.check_model(pruned)
    session = runtime.Session(pruned.SerializeToString())
    session.run(runtime.random_feeds(session.inputs, report.input_shapes))
    recounted = onnxprune.inspect(pruned, input_shapes=report.input_shapes).before["mac"]
    if recounted != report.after["mac"]:
        problem = f"recounted {recounted} MAC, reported {report.after['mac']}"
    return {
        "outcome": "pruned",
        "share": share,
        "max_rel_err": report.proof.max_rel_err if report.proof else None,
        "tensors": report.proof.tensors if report.proof else 0,
        "insensitive": len(report.proof.insensitive) if report.proof else 0,
        "problem": problem,
        "seconds": seconds,
    }


def main() -> None:
    """Run everything and exit with 1 if anything is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--targets", type=float, nargs="+", default=[0.8, 0.6, 0.4])
    parser.add_argument("--presets", nargs="+", default=list("abcd"))
    parser.add_argument("--only", default="*", help="glob of file names without .onnx")
    parser.add_argument("--json", type=pathlib.Path)
    chosen = parser.parse_args()
    results: dict[str, dict[str, object]] = {}
    for path in sorted(chosen.folder.glob(f"{chosen.only}.onnx")):
        model = onnx_io.load(path)
        for preset in chosen.presets:
            cells = []
            for target in chosen.targets:
                found = check(model, target, preset)
                results[f"{path.stem}/{preset}/{target}"] = found
                share = found.get("share")
                text = f"{share:.4f}" if isinstance(share, float) else str(found["outcome"])
                cells.append(
                    f"{target}: {text} {found['seconds']:.2f} s"
                    + (f" PROBLEM {found['problem']}" if found["problem"] else "")
                )
            print(f"{path.stem:28} {preset}   " + "   ".join(cells), flush=True)
    wrong = [name for name, found in results.items() if found["problem"]]
    print(f"{len(results)} runs, {len(wrong)} with a problem")
    if chosen.json:
        chosen.json.write_text(json.dumps(results, indent=1))
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
