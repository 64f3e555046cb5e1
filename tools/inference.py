#!/usr/bin/env python3
"""Look for nodes on which onnx's shape inference, as onnxprune calls it, ends the process or takes memory without end.

    python tools/inference.py [--examples 100] [--seed 0] [--only OPERATOR]... [--save FOLDER]

Every operator that onnx knows, in every version, is given operands of unknown type, unknown shape and wrong rank, constants
that make no sense, and wild attributes. What ends the process is printed, and is to be kept from inference:
``onnxprune/validity.py`` and ``onnxprune/shapes.py``. The children are forked: not on Windows. Exit code 1 where any died.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import random
import resource
import signal
import sys
from collections.abc import Iterator
from typing import Any

import onnx
from onnx import AttributeProto, TensorProto, defs, helper

from onnxprune.errors import OnnxPruneError
from onnxprune.shapes import infer_strictly
from onnxprune.validity import require_valid

DOMAINS = ("", "ai.onnx.ml", "ai.onnx.preview.training")
BODIES = ("If", "Loop", "Scan", "SequenceMap")
INTEGERS = (-7, -1, 0, 1, 2, 3, 9, 1 << 31, 1 << 40, 1 << 62, -(1 << 62))
WORDS = ("", "a", "SAME_UPPER", "linear", "mean", "ij,jk->ik", "DCR")
KINDS = (TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL, TensorProto.STRING, TensorProto.INT32)
SECONDS, BYTES = 20, 8 << 30


def example(schema: Any, rng: random.Random) -> onnx.ModelProto:
    """A graph around one node of an operator."""
    nodes, inputs, tensors = [], [], []

    def unknown(name: str) -> None:
        nodes.append(helper.make_node("Nobody", [], [name], domain="nobody"))

    def typed(name: str) -> None:
        inputs.append(helper.make_tensor_value_info(name, rng.choice(KINDS), None))

    def shaped(name: str) -> None:
        shape = [rng.choice((0, 1, 2, 3, 4, 1 << 40, "N", None)) for _ in range(rng.randint(0, 5))]
        inputs.append(helper.make_tensor_value_info(name, rng.choice(KINDS), shape))

    def listed(name: str) -> None:
        inputs.append(helper.make_tensor_sequence_value_info(name, TensorProto.FLOAT, [2]))

    def constant(name: str) -> None:
        values = [rng.choice(INTEGERS) for _ in range(rng.randint(0, 4))]
        dims = [len(values)] if len(values) != 1 else [1] * rng.randint(0, 2)
        tensors.append(helper.make_tensor(name, TensorProto.INT64, dims, values))

    makers = (unknown, typed, shaped, listed, constant)
    favourite = rng.choice(makers)
    names = [f"i{n}" for n in range(rng.randint(schema.min_input, max(schema.min_input, min(schema.max_input, 6))))]
    for name in names:
        (favourite if rng.random() < 0.5 else rng.choice(makers))(name)
    names = [name if rng.random() < 0.95 else "" for name in names]
    outputs = [f"o{n}" for n in range(rng.randint(max(1, schema.min_output), max(1, min(schema.max_output, 3))))]
    node = helper.make_node(schema.name, names, outputs, domain=schema.domain, name="node")
    for name, formal in schema.attributes.items():
        if formal.required or rng.random() < 0.4:
            node.attribute.extend(attribute(name, int(formal.type), rng))
    declared = [helper.make_tensor_value_info("o0", TensorProto.FLOAT, None)] if rng.random() < 0.5 else []
    versions = {"": 17, "nobody": 1} | {schema.domain: schema.since_version}
    opsets = [helper.make_opsetid(domain, version) for domain, version in versions.items()]
    return helper.make_model(helper.make_graph([*nodes, node], "g", inputs, declared, tensors), opset_imports=opsets)


def attribute(name: str, kind: int, rng: random.Random) -> Iterator[AttributeProto]:
    """An attribute of a kind; none of kinds that no operator without a body has."""
    few = range(rng.randint(1, 4))
    makers = {
        AttributeProto.FLOAT: lambda: rng.choice((0.0, 1.0, -1.0)),
        AttributeProto.INT: lambda: rng.choice(INTEGERS),
        AttributeProto.STRING: lambda: rng.choice(WORDS),
        AttributeProto.TENSOR: lambda: helper.make_tensor("t", rng.choice(KINDS[:2]), [1] * rng.randint(0, 2), [1]),
        AttributeProto.FLOATS: lambda: [1.0 for _ in few],
        AttributeProto.INTS: lambda: [rng.choice(INTEGERS) for _ in few],
        AttributeProto.STRINGS: lambda: [rng.choice(WORDS) for _ in few],
    }
    if kind in makers:
        yield helper.make_attribute(name, makers[kind](), attr_type=kind)


def judge(schema: Any, seeds: list[str]) -> tuple[str, str] | None:
    """Infer for every seed in a child process: the seed on which it died and how, or None."""
    out, into = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(out)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
        signal.alarm(SECONDS)
        code = 1
        try:
            for seed in seeds:
                os.write(into, f"{seed}\n".encode())
                model = example(schema, random.Random(seed))
                try:
                    require_valid(model)
                except OnnxPruneError:
                    continue
                infer_strictly(model)
            code = 0
        finally:
            os._exit(code)
    os.close(into)
    with os.fdopen(out) as pipe:
        *_, last = pipe.read().splitlines()
    _, status = os.waitpid(child, 0)
    if status == 0:
        return None
    how = signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else "an error of Python"
    return last, how


def main() -> None:
    """Try every operator; print what ends the process."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--examples", type=int, default=100, help="nodes of every version of every operator (100)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", action="append", metavar="OPERATOR", help="of this name")
    parser.add_argument("--save", type=pathlib.Path, metavar="FOLDER", help="for models that end the process")
    chosen = parser.parse_args()
    every = [s for s in defs.get_all_schemas_with_history() if s.domain in DOMAINS and s.name not in BODIES]
    every = [s for s in every if chosen.only is None or s.name in chosen.only]
    died = 0
    for schema in every:
        title = f"{schema.domain}:{schema.name}-{schema.since_version}".lstrip(":")
        found = judge(schema, [f"{chosen.seed} {title} {number}" for number in range(chosen.examples)])
        if found is not None:
            died += 1
            seed, how = found
            model = example(schema, random.Random(seed))
            print(f"{title}: {how}\n{onnx.printer.to_text(model.graph)}", flush=True)
            if chosen.save is not None:
                chosen.save.mkdir(parents=True, exist_ok=True)
                onnx.save(model, chosen.save / f"{title.replace(':', '.')}.onnx")
    print(f"{len(every)} versions of operators, {chosen.examples} nodes each: {died} end the process")
    sys.exit(died > 0)


if __name__ == "__main__":
    main()
