#!/usr/bin/env python3
"""Prune models under other threads, hash seeds, folders, locales and paths, and compare what is written byte by byte.

    python tools/determinism.py [--only NAME ...] [--json OUT.json]

The output, the plan and the report (without times, paths and the number of threads) must be those of a plain run. Exits
with 1 where they are not.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

ROOT = pathlib.Path(__file__).resolve().parents[1]
FIXTURES = ROOT / "fixtures"
TOLD_APART = ("timings", "latency", "command")
"""What a report says of the run alone."""


@dataclass(frozen=True)
class Way:
    """How a run differs from a plain one: environment, further words, the folder it runs in, how its paths are spelled."""

    environment: Mapping[str, str] = field(default_factory=dict)
    words: Sequence[str] = ()
    spelled: str = "absolute"
    files: str = "sorted"
    umask: int = 0o022


WAYS = {
    "1 thread": Way(words=["--threads", "1"]),
    "2 threads": Way(words=["--threads", "2"]),
    "5 threads": Way(words=["--threads", "5"]),
    "OMP_NUM_THREADS=1": Way({"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}),
    "OMP_NUM_THREADS=4": Way({"OMP_NUM_THREADS": "4", "OPENBLAS_NUM_THREADS": "4"}),
    "PYTHONHASHSEED=1": Way({"PYTHONHASHSEED": "1"}),
    "PYTHONHASHSEED=4711": Way({"PYTHONHASHSEED": "4711"}),
    "LC_ALL=C, no UTF-8": Way({"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}),
    "LC_ALL=C.UTF-8": Way({"LC_ALL": "C.UTF-8", "PYTHONUTF8": "1"}),
    "LC_ALL=tr_TR.UTF-8": Way({"LC_ALL": "tr_TR.UTF-8"}),
    "LC_ALL=de_DE.UTF-8": Way({"LC_ALL": "de_DE.UTF-8"}),
    "relative paths": Way(spelled="relative"),
    "paths with .. and //": Way(spelled="detour"),
    "data written in reverse": Way(files="reversed"),
    "umask 077": Way(umask=0o077),
    "all at once": Way(
        {"OMP_NUM_THREADS": "3", "PYTHONHASHSEED": "7", "LC_ALL": "C", "PYTHONUTF8": "0"}, ["--threads", "2"], "detour",
        "reversed", 0o077,
    ),
}  # fmt: skip


def settled(report: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a report says of models: without times, paths, threads and the command line."""
    kept = {name: value for name, value in report.items() if name not in TOLD_APART}
    for end in ("input", "output"):
        kept[end] = {"sha256": report[end]["sha256"]}
    kept["options"] = {name: value for name, value in report["options"].items() if name not in ("calib", "threads")}
    return kept


def transformer(width: int = 32, heads: int = 4, tokens: int = 10) -> onnx.ModelProto:
    """Build an attention block and a perceptron, each behind a layer normalisation and beside a shortcut."""
    rng, nodes, weights = np.random.default_rng(0), [], []

    def constant(name: str, value: np.ndarray) -> str:
        weights.append(numpy_helper.from_array(value, name))
        return name

    def node(op: str, name: str, *inputs: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(op, inputs, [name], name=name, **attributes))
        return name

    def linear(x: str, name: str, size: int, out: int) -> str:
        matrix = (rng.standard_normal((size, out)) * size**-0.5).astype(np.float32)
        product = node("MatMul", f"{name}/product", x, constant(f"{name}.weight", matrix))
        return node("Add", name, product, constant(f"{name}.bias", rng.standard_normal(out).astype(np.float32)))

    def normed(x: str, name: str) -> str:
        scale, bias = (constant(f"{name}.{role}", rng.random(width).astype(np.float32)) for role in ("scale", "bias"))
        return node("LayerNormalization", name, x, scale, bias)

    split, joined = constant("split", np.array([0, 0, heads, -1])), constant("joined", np.array([0, 0, -1]))
    x = linear("x", "embed", 12, width)
    y = normed(x, "norm1")
    q, k, v = (
        node("Transpose", f"{n}/heads", node("Reshape", f"{n}/split", linear(y, n, width, width), split), perm=perm)
        for n, perm in (("q", [0, 2, 1, 3]), ("k", [0, 2, 3, 1]), ("v", [0, 2, 1, 3]))
    )
    seen = node("Softmax", "seen", node("MatMul", "scores", q, k))
    y = node("Transpose", "mixed/tokens", node("MatMul", "mixed", seen, v), perm=[0, 2, 1, 3])
    x = node("Add", "attended", x, linear(node("Reshape", "mixed/joined", y, joined), "project", width, width))
    y = node("Relu", "hidden", linear(normed(x, "norm2"), "up", width, 2 * width))
    linear(node("Add", "last", x, linear(y, "down", 2 * width, width)), "y", width, 5)
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", tokens, size])
        for name, size in (("x", 12), ("y", 5))
    ]
    graph = helper.make_graph(nodes, "transformer", values[:1], values[1:], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def cases(folder: pathlib.Path) -> dict[str, tuple[pathlib.Path, pathlib.Path | None]]:
    """Models, and what they are calibrated with."""
    from onnxruntime.quantization import quantize_dynamic  # noqa: PLC0415  (slow to import, and tests do without)

    onnx.save(transformer(), folder / "transformer.onnx")
    np.savez(folder / "tokens.npz", x=np.random.default_rng(1).standard_normal((48, 10, 12)).astype(np.float32))
    quantize_dynamic(folder / "transformer.onnx", folder / "quantised.onnx")
    (folder / "images").mkdir()
    with np.load(FIXTURES / "digits" / "digits_calib.npz") as known:
        np.savez(folder / "images.npz", image=known["image"][:40].astype(np.float32) / np.float32(255))
    return {
        "digits": (FIXTURES / "digits" / "digits.onnx", FIXTURES / "digits" / "digits_calib.npz"),
        "digits, a folder of data": (FIXTURES / "digits" / "digits.onnx", folder / "images.npz"),
        "digits, no data": (FIXTURES / "digits" / "digits.onnx", None),
        "denoise": (FIXTURES / "denoise" / "denoise.onnx", FIXTURES / "denoise" / "denoise_calib.npz"),
        "transformer": (folder / "transformer.onnx", folder / "tokens.npz"),
        "quantised": (folder / "quantised.onnx", None),
    }


def spread(archive: pathlib.Path, folder: pathlib.Path, order: str) -> pathlib.Path:
    """Write the samples of an ``.npz`` file as a file each, the last one first where ``order`` says so."""
    folder.mkdir()
    with np.load(archive) as known:
        (samples,) = known.values()
    places = range(len(samples))
    for place in reversed(places) if order == "reversed" else places:
        np.save(folder / f"{place:03}.npy", samples[place])
    return folder


def written(
    model: pathlib.Path, calib: pathlib.Path | None, folder: pathlib.Path, way: Way, *words: str
) -> dict[str, str]:
    """Run one prune in a process of its own; hashes of the output, the plan and the settled report."""
    folder.mkdir()
    own = shutil.copy(model, folder / "in.onnx")
    if calib is not None:
        calib = spread(calib, folder / "data", way.files) if words else pathlib.Path(shutil.copy(calib, folder))
    spell = {
        "absolute": str,
        "relative": lambda path: os.path.relpath(path, folder),
        "detour": lambda path: f"{folder}//../{folder.name}/./{os.path.relpath(path, folder)}",
    }[way.spelled]
    line = [sys.executable, "-m", "onnxprune", spell(own), spell(folder / "out.onnx"), "--target-mac", "0.6"]
    line += ["--no-latency", "-q", "--plan-out", spell(folder / "plan.json"), "--json", spell(folder / "report.json")]
    line += [*(["--calib", spell(calib)] if calib is not None else []), *way.words]
    environment = {"PYTHONPATH": str(ROOT), **{k: v for k, v in os.environ.items() if k != "PYTHONPATH"}}
    subprocess.run(line, cwd=folder, env=environment | dict(way.environment), check=True, umask=way.umask)
    report = settled(json.loads((folder / "report.json").read_text(encoding="utf-8")))
    contents = {
        "output": (folder / "out.onnx").read_bytes(),
        "plan": (folder / "plan.json").read_bytes(),
        "report": json.dumps(report).encode(),
    }
    return {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", help="cases by name")
    parser.add_argument("--json", type=pathlib.Path, help="also write the hashes here")
    chosen = parser.parse_args()
    found: dict[str, dict[str, dict[str, str]]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary).resolve()
        known = cases(folder)
        wrong = 0
        for name, (model, calib) in known.items():
            if chosen.only and name not in chosen.only:
                continue
            words = ["folder"] if "folder" in name else []
            runs = {"plain": Way()} | WAYS
            found[name] = {}
            for number, (way, how) in enumerate(runs.items()):
                place = folder / f"{name.replace(' ', '_')}-{number}"
                hashes = found[name][way] = written(model, calib, place, how, *words)
                plain = found[name]["plain"]
                marks = ["same" if hashes[part] == plain[part] else "DIFFERS" for part in hashes]
                wrong += marks.count("DIFFERS")
                text = "  ".join(
                    f"{part} {hashes[part][:10]} {mark:7}" for part, mark in zip(hashes, marks, strict=True)
                )
                print(f"{name:26}{way:26}{text}", flush=True)
    if chosen.json:
        chosen.json.write_text(json.dumps(found, indent=1), encoding="utf-8")
    print(f"{sum(map(len, found.values()))} runs, {wrong} differences")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
