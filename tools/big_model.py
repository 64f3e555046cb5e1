"""Build a large float16 transformer with external data, and measure what pruning it takes.

    python tools/big_model.py FOLDER --gb 6 --files 3          build only
    python tools/big_model.py FOLDER --gb 6 --files 3 --run    build, prune at --target-mac 0.6, verify, print a table

The model is a decoder: embedding, blocks of attention (q, k, v, o; heads by Reshape and Transpose) and a gated or plain MLP
behind layer norms, a final product with the vocabulary. Weights are drawn tensor by tensor and go straight to disk.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import re
import resource
import subprocess
import sys
import time
from dataclasses import dataclass, field

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

ALIGNED = 4096
RATIO = 4  # channels of the MLP over those of the stream


@dataclass
class Weights:
    """Tensors that are drawn from a seed and written to one of several files as they are declared."""

    folder: pathlib.Path
    name: str
    n_files: int
    rng: np.random.Generator
    tensors: list[TensorProto] = field(default_factory=list)
    begun: int = 0

    def draw(self, name: str, *shape: int) -> str:
        """Add a matrix of normal values, scaled by its inputs; one row block at a time is in memory."""
        location = f"{self.name}.{self.begun % self.n_files}.bin"
        self.begun += 1
        with (self.folder / location).open("ab") as file:
            file.write(bytes(-file.tell() % ALIGNED))
            offset = file.tell()
            # Channels of different importance: otherwise no criterion has anything to tell apart.
            importance = self.rng.uniform(0.2, 1.0, shape[-1]).astype(np.float32)
            for begin in range(0, shape[0], 1024):
                rows = min(1024, shape[0] - begin)
                block = self.rng.standard_normal((rows, shape[1]), np.float32) * importance / np.sqrt(shape[0])
                file.write(block.astype(np.float16).data)
            length = file.tell() - offset
        tensor = TensorProto(name=name, data_type=TensorProto.FLOAT16, dims=shape, data_location=TensorProto.EXTERNAL)
        for key, value in (("location", location), ("offset", offset), ("length", length)):
            tensor.external_data.add(key=key, value=str(value))
        self.tensors.append(tensor)
        return name

    def small(self, name: str, value: np.ndarray) -> str:
        """Add a tensor that lies inside the model's file."""
        self.tensors.append(numpy_helper.from_array(value, name))
        return name


def build(
    path: pathlib.Path, gigabytes: float, *, hidden: int = 2560, vocabulary: int = 50_000, head: int = 128, n_files: int = 1,
    seed: int = 0,
) -> int:  # fmt: skip
    """Write a model of about the given size (1 GB is 10**9 bytes); return its number of blocks.

    ``hidden`` is the number of channels of the residual stream, ``head`` of each head.
    """
    matrices = 2 * (4 + 2 * RATIO) * hidden * hidden  # bytes of a block
    n_blocks = max(1, round((gigabytes * 1e9 - 4 * vocabulary * hidden) / matrices))
    for old in path.parent.glob(f"{path.name}.*.bin"):
        old.unlink()
    weights = Weights(path.parent, path.name, n_files, np.random.default_rng(seed))
    nodes: list[onnx.NodeProto] = []

    def add(op: str, inputs: list[str], output: str, **attributes: object) -> str:
        nodes.append(helper.make_node(op, inputs, [output], name=output, **attributes))
        return output

    def product(source: str, output: str, inputs: int, outputs: int) -> str:
        return add("MatMul", [source, weights.draw(f"{output}.weight", inputs, outputs)], output)

    def norm(source: str, output: str) -> str:
        scale = weights.small(f"{output}.scale", np.ones(hidden, np.float16))
        bias = weights.small(f"{output}.bias", np.zeros(hidden, np.float16))
        return add("LayerNormalization", [source, scale, bias], output, axis=-1)

    weights.small("heads", np.array([0, 0, hidden // head, head], np.int64))
    weights.small("merged", np.array([0, 0, hidden], np.int64))
    weights.small("scale", np.array(head**-0.5, np.float16))
    stream = add("Gather", [weights.draw("embedding", vocabulary, hidden), "tokens"], "embedded", axis=0)
    for block in range(n_blocks):
        at = f"blocks.{block}"
        normed = norm(stream, f"{at}.norm1")
        heads = {}
        for name, order in (("q", (0, 2, 1, 3)), ("k", (0, 2, 3, 1)), ("v", (0, 2, 1, 3))):
            flat = product(normed, f"{at}.{name}", hidden, hidden)
            split = add("Reshape", [flat, "heads"], f"{at}.{name}.split")
            heads[name] = add("Transpose", [split], f"{at}.{name}.heads", perm=order)
        scores = add("MatMul", [heads["q"], heads["k"]], f"{at}.scores")
        scaled = add("Mul", [scores, "scale"], f"{at}.scaled")
        weighted = add("MatMul", [add("Softmax", [scaled], f"{at}.softmax", axis=-1), heads["v"]], f"{at}.weighted")
        turned = add("Transpose", [weighted], f"{at}.turned", perm=(0, 2, 1, 3))
        attended = product(add("Reshape", [turned, "merged"], f"{at}.merged"), f"{at}.o", hidden, hidden)
        stream = add("Add", [stream, attended], f"{at}.mid")
        up = product(norm(stream, f"{at}.norm2"), f"{at}.up", hidden, RATIO * hidden)
        down = product(add("Relu", [up], f"{at}.relu"), f"{at}.down", RATIO * hidden, hidden)
        stream = add("Add", [stream, down], f"{at}.out")
    product(norm(stream, "norm"), "logits", hidden, vocabulary)
    graph = helper.make_graph(
        nodes, "decoder", [helper.make_tensor_value_info("tokens", TensorProto.INT64, ["batch", "sequence"])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT16, ["batch", "sequence", vocabulary])], weights.tensors,
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path.write_bytes(model.SerializeToString())
    return n_blocks


# The command runs in a process of its own, which reports the largest resident set that the kernel saw of it.
CHILD = """
import re, sys
from onnxprune.cli import main
code = 0
try:
    main()
except SystemExit as done:
    code = done.code or 0
print("VmHWM", re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1], file=sys.stderr)
sys.exit(code)
"""


def measured(*arguments: str | pathlib.Path) -> dict[str, float]:
    """Run onnxprune; wall seconds and peak memory in GB (pages of mapped files count while they are mapped)."""
    begin = time.perf_counter()
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, *map(str, arguments)], stderr=subprocess.PIPE, stdout=sys.stderr, text=True
    )
    assert child.stderr is not None
    told = child.stderr.read()
    if child.wait():
        raise SystemExit(f"onnxprune {arguments[0]} ended with {child.returncode}:\n{told}")
    peak = float(re.findall(r"VmHWM (\d+)", told)[-1]) * 1024
    return {"seconds": time.perf_counter() - begin, "peak_gb": peak / 1e9}


def size(path: pathlib.Path) -> float:
    """GB of a model's files."""
    return sum(file.stat().st_size for file in path.parent.glob(f"{path.name}*")) / 1e9


def run(path: pathlib.Path, target: float) -> dict[str, object]:
    """Prune the model and verify the result from files alone."""
    out, plan, told = path.with_name("pruned.onnx"), path.with_name("plan.json"), path.with_name("report.json")
    rows: dict[str, object] = {"gb": size(path)}
    rows["prune"] = measured(
        "prune", path, out, "--target-mac", str(target), "--plan-out", plan, "--json", told, "--force", "-q"
    )
    rows["gb_after"] = size(out)
    rows["verify"] = measured("verify", path, out, "--plan", plan, "-q")
    report = json.loads(told.read_text())
    rows["mac"] = report["cost"]["ratio"]["mac"]
    rows["proof"] = {key: report["proof"][key] for key in ("ok", "tensors", "max_rel_err")}
    rows["insensitive"] = len(report["proof"]["insensitive"])
    rows["timings"] = report["timings"]
    rows["notes"] = report["notes"]
    rows["children_gb"] = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e9
    return rows


def main() -> None:
    """Build a model, and measure where that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=pathlib.Path, help="where the model goes (and stays)")
    parser.add_argument("--gb", type=float, default=6.0, help="size of the weights, in 10**9 bytes")
    parser.add_argument("--hidden", type=int, default=2560, help="channels of the residual stream, a multiple of 128")
    parser.add_argument("--vocabulary", type=int, default=50_000)
    parser.add_argument("--files", type=int, default=1, help="number of external files")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--run", action="store_true", help="prune and verify the model, each in a process of its own")
    parser.add_argument("--target-mac", type=float, default=0.6)
    parser.add_argument("--json", type=pathlib.Path, help="write all figures")
    chosen = parser.parse_args()
    chosen.folder.mkdir(parents=True, exist_ok=True)
    path = chosen.folder / "big.onnx"
    n_blocks = build(
        path, chosen.gb, hidden=chosen.hidden, vocabulary=chosen.vocabulary, n_files=chosen.files, seed=chosen.seed
    )
    print(f"{path}: {size(path):.2f} GB, {n_blocks} blocks of {chosen.hidden} channels")
    if not chosen.run:
        return
    rows = run(path, chosen.target_mac)
    for command in ("prune", "verify"):
        print(f"{command:8} {rows[command]['seconds']:8.1f} s   peak {rows[command]['peak_gb']:6.2f} GB")  # type: ignore[index]
    for key in ("mac", "gb_after", "proof", "insensitive", "timings", "notes", "children_gb"):
        print(f"{key:12} {rows[key]}")
    if chosen.json:
        chosen.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
