#!/usr/bin/env python3
"""Measure speed and memory: stages in one process, whole runs as processes of their own, against what they must stay under.

    python tools/bench.py [--zoo FOLDER] [--model MODEL.onnx] [--json OUT.json]

Without ``--model`` a ResNet-50 with seeded weights is built. ``--zoo`` is a folder of .onnx files; those that have
something to prune count.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "fixtures"))

from big_model import build

import architectures
from onnxprune import onnx_io, pipeline
from onnxprune.options import Clock, Options
from onnxprune.passes.score import score
from onnxprune.passes.select import PRESETS, Limits, lowest, select

MEASURED = """
import json, pathlib, sys, time
before = time.perf_counter()
{body}
status = pathlib.Path("/proc/self/status").read_text()
peak = 1024 * int(status.split("VmHWM:")[1].split()[0])  # ru_maxrss would count the parent's memory in
print(json.dumps({{"seconds": time.perf_counter() - before, "peak": peak}}))
"""


def stages(model: onnx.ModelProto, share: float = 0.6) -> dict[str, float] | None:
    """Seconds of reading, coupling, scoring and selecting in this process; None where nothing can be pruned."""
    begin = time.perf_counter()
    loaded = pipeline.load(model, Options(), Clock())
    coupling, cost = loaded.coupling, loaded.cost
    coupled = time.perf_counter()
    scores = score(coupling)
    scored = time.perf_counter()
    every = np.ones(coupling.n_classes, bool)
    whole = cost.of(every)["mac"]
    floor = lowest(coupling, cost, PRESETS["d"], Limits())["mac"]
    if floor >= whole:
        return None
    select(coupling, cost, scores, {"mac": max(share * whole, floor)}, PRESETS["d"], Limits())
    end = time.perf_counter()
    return {
        "nodes": coupling.model.n_nodes,
        "couple": coupled - begin,
        "score": scored - coupled,
        "select": end - scored,
        "total": end - begin,
    }


def best(model: onnx.ModelProto, runs: int = 5) -> dict[str, float] | None:
    """Stages of the fastest of several runs (the machine is noisy; the fastest says what the program needs)."""
    results = [stages(model) for _ in range(runs)]
    return None if results[0] is None else min((r for r in results if r), key=lambda r: r["total"])


def synthetic(n_nodes: int, channels: int = 32) -> onnx.ModelProto:
    """Residual blocks (Conv, Relu, Conv, Add, Relu) until the graph has ``n_nodes`` nodes."""
    nodes, weights, last = [], [], "x"
    rng = np.random.default_rng(0)

    def conv(source: str, target: str, inputs: int) -> None:
        weights.append(
            numpy_helper.from_array(rng.standard_normal((channels, inputs, 3, 3)).astype("f"), f"{target}_w")
        )
        weights.append(numpy_helper.from_array(np.zeros(channels, "f") + len(weights), f"{target}_b"))
        nodes.append(helper.make_node("Conv", [source, f"{target}_w", f"{target}_b"], [target], pads=[1, 1, 1, 1]))

    conv("x", "stem", 3)
    last = "stem"
    for block in range((n_nodes - 2) // 5):
        conv(last, f"a{block}", channels)
        nodes.append(helper.make_node("Relu", [f"a{block}"], [f"r{block}"]))
        conv(f"r{block}", f"c{block}", channels)
        nodes.append(helper.make_node("Add", [f"c{block}", last], [f"s{block}"]))
        nodes.append(helper.make_node("Relu", [f"s{block}"], [f"o{block}"]))
        last = f"o{block}"
    conv(last, "y", channels)
    shapes = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, c, 8, 8]) for n, c in (("x", 3), ("y", channels))]
    graph = helper.make_graph(nodes, "synthetic", shapes[:1], shapes[1:], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def process(body: str) -> dict[str, float]:
    """Run Python code as a process of its own; wall seconds with start-up, and peak memory."""
    begin = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", MEASURED.format(body=body)], check=True, capture_output=True, text=True
    )
    inner = json.loads(done.stdout.splitlines()[-1])
    return {"seconds": time.perf_counter() - begin, "peak": inner["peak"]}


def whole_runs(path: pathlib.Path, folder: pathlib.Path) -> dict[str, dict[str, float]]:
    """Load and save with onnx alone, then prune without and with proof."""
    out = folder / "out.onnx"
    prune = (
        "import sys; sys.argv = ['onnxprune', {!r}, {!r}, '--target-mac', '0.6', '--force', '-q', '--no-latency'{}]\n"
    )
    run = "from onnxprune.cli import main\ntry:\n    main()\nexcept SystemExit as done:\n    assert not done.code, done.code"
    bodies = {
        "load+save": f"import onnx\nonnx.save(onnx.load({str(path)!r}), {str(out)!r})",
        "without proof": prune.format(str(path), str(out), ", '--no-proof'") + run,
        "with proof": prune.format(str(path), str(out), "") + run,
    }
    return {name: min((process(body) for _ in range(3)), key=lambda r: r["seconds"]) for name, body in bodies.items()}


def line(name: str, value: float, bound: float, unit: str) -> bool:
    """Print one measurement beside its bound."""
    held = value <= bound
    print(f"{'ok  ' if held else 'OVER'}  {name:58} {value:9.3f} {unit}   (bound {bound:g})")
    return held


def main() -> None:
    """Measure everything, print it beside its bounds, and exit with 1 if one is exceeded."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--zoo", type=pathlib.Path, help="folder of .onnx files")
    parser.add_argument("--model", type=pathlib.Path, help="model for whole runs (default: ResNet-50, built)")
    parser.add_argument("--json", type=pathlib.Path, help="write all figures")
    chosen = parser.parse_args()
    figures: dict[str, object] = {}
    held = True
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        path = chosen.model or folder / "resnet50.onnx"
        if chosen.model is None:
            onnx.save(architectures.resnet_bottleneck(), path)
        size = path.stat().st_size
        model = onnx.load(path)
        found = best(model)
        figures["stages"] = found
        if found:
            held &= line(f"{path.stem}: couple + score + select", found["total"], 0.15, "s")
        del model
        runs = whole_runs(path, folder)
        figures["runs"] = runs
        plain = runs["load+save"]["seconds"]
        held &= line(
            "prune without proof / (1.5 x load+save + 1 s)",
            runs["without proof"]["seconds"] / (1.5 * plain + 1),
            1,
            "x",
        )
        print(f"      load+save {plain:.2f} s, without proof {runs['without proof']['seconds']:.2f} s, "
              f"with proof {runs['with proof']['seconds']:.2f} s")  # fmt: skip
        for kind, factor in (("without proof", 3), ("with proof", 4)):
            held &= line(
                f"peak memory {kind}", runs[kind]["peak"] / 2**20, (factor * size + (250 << 20)) / 2**20, "MiB"
            )
    linear = {}
    for n_nodes in (250, 500, 1000, 2000, 8000):
        linear[n_nodes] = (best(synthetic(n_nodes), 3) or {})["couple"] / n_nodes * 1e6
        held &= line(f"coupling, synthetic graph of {n_nodes} nodes", linear[n_nodes], 100, "us/node")
    figures["linear"] = linear
    deep = {"residual chain": (best(synthetic(10_000, 8), 3) or {})["couple"]}
    with tempfile.TemporaryDirectory() as name:
        path = pathlib.Path(name) / "deep.onnx"
        build(path, 0.0106, hidden=32, vocabulary=100, head=8)
        deep["transformer"] = (best(onnx_io.load(path), 3) or {})["couple"]
    for kind, seconds in deep.items():
        held &= line(f"coupling, {kind} of 10,000 nodes", seconds, 5, "s")
    figures["deep"] = deep
    if chosen.zoo:
        times = {}
        for file in sorted(chosen.zoo.glob("*.onnx")):
            measured = best(onnx.load(file), 3)
            if measured:
                times[file.stem] = measured["total"]
        figures["zoo"] = times
        held &= line(
            f"median of {len(times)} zoo models: couple + score + select", statistics.median(times.values()), 0.05, "s"
        )
        for name, seconds in sorted(times.items(), key=lambda item: -item[1])[:5]:
            print(f"      {name:40} {seconds:.3f} s")
    if chosen.json:
        chosen.json.write_text(json.dumps(figures, indent=1))
    sys.exit(0 if held else 1)


if __name__ == "__main__":
    main()
