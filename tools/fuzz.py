#!/usr/bin/env python3
"""Prune random graphs (tests/random_graphs.py), shrink what fails, and save it.

    python tools/fuzz.py [--deep] [--examples 500] [--seed N] [--property prune|units] [--singles N] [--frozen]
                         [--save FOLDER]

The seed is printed: the same seed runs the same graphs again. ``--deep`` makes graphs of nested control flow, local
functions, shared weights and streams of several alignments. ``--frozen`` also frees, one at a time, channels that coupling
froze, and counts per reason how often their removal proves all the same: what stands there often may be frozen too much.
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import secrets
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator

import hypothesis
import numpy as np
import onnx
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "tests"))

import test_random_graphs as properties

import oracle
import random_graphs
from onnxprune.prepare import inline
from onnxprune.protos import every_node
from random_graphs import measured

OUTCOMES = {
    "pruned": "pruned and proved",
    "met": "left as they are, within the target",
    "out of reach": "refused: the target is out of reach, and the floor that is named is higher",
    "nothing prunable": "refused: nothing can be pruned, and a reason is given for all of it",
    "single prunings": "prunings of single units and of several, each proved and equal to its masked original",
}
"""What can become of a graph, in words."""


def text(model: onnx.ModelProto) -> str:
    """A graph in a line per node: operator, inputs, attributes, outputs with their shapes; bodies stand farther right."""
    shapes = {name: "x".join(map(str, value.shape)) or "scalar" for name, value in measured(model).items()}
    stored = dict(oracle.constants_of(model))
    shapes |= {name: "x".join(map(str, value.shape)) or "scalar" for name, value in stored.items()}
    small = {n: v.ravel().tolist() for n, v in stored.items() if v.size <= 8 and v.dtype != np.float32}

    def lines(nodes: Iterable[onnx.NodeProto], margin: str = "") -> Iterator[str]:
        for node in nodes:
            given_ = [f"{name}={small[name]}" if name in small else f"{name}:{shapes[name]}" if name in stored else name
                      for name in node.input]  # fmt: skip
            plain = [a for a in node.attribute if a.name != "value" and not a.HasField("g")]
            values = [f"{a.name}={onnx.helper.get_attribute_value(a)}" for a in plain]
            made = ", ".join(f"{name}:{shapes[name]}" if name in shapes else name for name in node.output if name)
            yield f"{margin}{made} = {node.op_type}({', '.join([*given_, *values])})"
            for body in (a for a in node.attribute if a.HasField("g")):
                results = ", ".join(output.name for output in body.g.output)
                yield f"{margin}  {body.name}({', '.join(i.name for i in body.g.input)}) -> {results}:"
                yield from lines(body.g.node, margin + "    ")

    inputs = ", ".join(
        f"{name} {'x'.join(map(str, shape))}" for name, shape in random_graphs.input_shapes(model).items()
    )
    parts = [f"opset {model.opset_import[0].version}, inputs {inputs}"]
    for function in model.functions:
        parts += [f"{function.name}({', '.join(function.input)}) -> {', '.join(function.output)}:"]
        parts += lines(function.node, "    ")
    return "\n".join([*parts, *lines(model.graph.node), f"outputs {', '.join(o.name for o in model.graph.output)}"])


def elements(model: onnx.ModelProto) -> int:
    """Number of elements of all constants, those of functions once for every call."""
    return sum(value.size for _, value in oracle.constants_of(inline(model)))


def overfrozen(model: onnx.ModelProto, seed: int) -> tuple[set[str], set[str]]:
    """Reasons for which channels are frozen here, and those of them without which removing a channel proves."""
    loaded, rng = oracle.load(model, random_graphs.input_shapes(model)), np.random.default_rng(seed)
    coupling = loaded.coupling
    tried, needless = set(), set()
    for number in rng.permutation(np.flatnonzero(coupling.frozen)).tolist():
        cause = coupling.reasons[coupling.reason[number]]
        title = f"{cause.op}: {cause.text}"
        if title in tried or cause.op == "output":
            continue
        tried.add(title)
        open_reason = coupling.reason.copy()
        open_reason[coupling.reason == coupling.reason[number]] = -1
        loose = dataclasses.replace(coupling, reason=open_reason)
        try:
            for single in properties.alone(loose):
                keep = oracle.random_keep(single, rng, share=0.0)
                if not coupling.frozen[~keep].any():
                    continue
                pruned = oracle.prune_loaded(loaded, keep, loose)
                if elements(pruned.model) >= elements(loaded.proto):
                    continue  # what a loop reads stays whole
                oracle.check(pruned.model)
                if pruned.proof.ok and oracle.signature(pruned.model) == oracle.signature(model):
                    measured(pruned.model)
                    needless.add(title)
        except Exception:  # whatever goes wrong shows that the reason holds
            pass
    return tried, needless


def main() -> None:
    """Run the examples; print what happened, and the smallest failing graph."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--examples", type=int, default=500)
    parser.add_argument("--seed", type=int, default=secrets.randbelow(1 << 32))
    parser.add_argument("--property", choices=["prune", "units"], help="default: both")
    parser.add_argument(
        "--deep", action="store_true", help="graphs of nested scopes, and streams that are cut differently"
    )
    parser.add_argument("--singles", type=int, default=20, metavar="N", help="single prunings of a graph at most (20)")
    parser.add_argument("--frozen", action="store_true", help="count what seems frozen without need")
    parser.add_argument(
        "--save", type=pathlib.Path, default=pathlib.Path(), metavar="FOLDER", help="for failing graphs"
    )
    chosen = parser.parse_args()
    print(f"--seed {chosen.seed} --examples {chosen.examples}")
    outcomes, operators, frozen, needless = Counter[str](), Counter[str](), Counter[str](), Counter[str]()
    failing: dict[str, object] = {}
    strategy = random_graphs.deep_graphs() if chosen.deep else random_graphs.graphs()
    begin = time.perf_counter()

    @hypothesis.seed(chosen.seed)
    @settings(max_examples=chosen.examples, deadline=None, database=None, print_blob=False, report_multiple_bugs=False,
              suppress_health_check=list(HealthCheck), phases=[Phase.generate, Phase.shrink])  # fmt: skip
    @given(strategy, st.floats(0.2, 1.0), st.sampled_from("abcd"), st.integers(0, 99))
    def run(model: onnx.ModelProto, target: float, preset: str, seed: int) -> None:
        operators.update({node.op_type for node in every_node(model.graph)})
        try:
            if chosen.property != "units":
                outcomes[properties.check_prune(model, target, preset)] += 1
            if chosen.property != "prune":
                outcomes["single prunings"] += properties.check_units(model, seed, most=chosen.singles)
        except Exception:
            failing.update(model=model, target=target, preset=preset, seed=seed)
            raise
        if chosen.frozen:
            reasons, open_reasons = overfrozen(model, seed)
            frozen.update(reasons)
            needless.update(open_reasons)

    problem = None
    try:
        run()
    except Exception as error:  # whatever it is, it is what we look for
        problem = error
    made, good = sum(random_graphs.rejected.values()), random_graphs.rejected[""]
    seconds = time.perf_counter() - begin
    print(f"{good} of {made} graphs used, {1000 * seconds / max(good, 1):.0f} ms each")
    for title, words in OUTCOMES.items():
        print(f"{outcomes[title]:8} {words}")
    print("rejected:", {why: n for why, n in random_graphs.rejected.items() if why})
    seen = {op for domain, op in properties.onnxprune.ops.supported() if not domain} - operators.keys()
    print("operators never seen:", *sorted(seen))
    if chosen.frozen:
        tried, proved = sum(frozen.values()), sum(needless.values())
        print(f"{tried:8} frozen channels removed, one for each reason of a graph: {proved} proved")
    for title, times in needless.most_common():
        print(f"frozen {frozen[title]} times, {times} without need: {title}")
    if problem is not None:
        path = chosen.save / f"fuzz-{chosen.seed}.onnx"
        chosen.save.mkdir(parents=True, exist_ok=True)
        onnx.save(failing["model"], path)
        rest = {key: value for key, value in failing.items() if key != "model"}
        print(f"\nFAILED with {rest}: {type(problem).__name__}: {problem}\n\n{text(failing['model'])}\n\nsaved {path}")
        sys.exit(1)


if __name__ == "__main__":
    main()
