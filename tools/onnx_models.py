#!/usr/bin/env python3
"""Prune every model of the onnx package: its backend test data, and every node test that it can generate.

    python tools/onnx_models.py [--only GLOB]... [--kind KIND]... [--save FOLDER] [-v]

Kinds: node, simple, pytorch-converted, pytorch-operator, light. Each model is judged as mutants are, by tests/mutation: it
is pruned, proved and accepted by onnx and onnxruntime, or refused in a line, in a process that is started anew where one
dies. Topologies (light) must all be pruned. The table counts, per kind, how models ended; exit code 1 where any FAILED.
"""

from __future__ import annotations

import argparse
import contextlib
import pathlib
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from fnmatch import fnmatch

import mutants
import onnx.backend.test
from mutation.judge import FAILED, PRUNED, Verdict
from onnx.backend.test.loader import load_node_model_tests

DATA = pathlib.Path(onnx.backend.test.__file__).parent / "data"
KINDS = ("node", "simple", "pytorch-converted", "pytorch-operator", "light")


def models(kind: str) -> Iterator[tuple[str, Callable[[], bytes]]]:
    """Every model of a kind by name, and what gives its bytes."""
    if kind == "node":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # their reference implementations overflow and divide by zero
            cases = load_node_model_tests()
        yield from ((case.name, case.model.SerializeToString) for case in cases if case.model is not None)
    elif kind == "light":
        yield from ((path.stem, path.read_bytes) for path in sorted((DATA / kind).glob("*.onnx")))
    else:
        yield from ((path.parent.name, path.read_bytes) for path in sorted((DATA / kind).glob("*/model.onnx")))


def judged(data: bytes, kind: str, worker: mutants.Worker) -> Verdict:
    """What becomes of a model; a topology that is refused has failed."""
    with tempfile.TemporaryDirectory(prefix="onnxprune.model.") as name:
        (pathlib.Path(name) / "in.onnx").write_bytes(data)
        verdict = worker.ask([name, mutants.LENIENT if kind == "light" else 0])
    if kind == "light" and verdict.outcome != PRUNED:
        return Verdict(FAILED, 1, f"not pruned: {verdict.text}")
    return verdict


def main() -> None:
    """Run all, print what failed and the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", action="append", default=[], metavar="GLOB", help="names of models")
    parser.add_argument("--kind", action="append", default=[], choices=KINDS)
    parser.add_argument("--save", type=pathlib.Path, metavar="FOLDER", help="for models that failed")
    parser.add_argument("--timeout", type=float, default=300)
    parser.add_argument("-v", "--verbose", action="store_true", help="a line for every model")
    chosen = parser.parse_args()
    chosen.seed, chosen.zoo, chosen.family, chosen.memory = 0, None, "case", 20
    outcomes: dict[str, Counter[str]] = {}
    begin = time.perf_counter()
    with contextlib.closing(mutants.Worker(chosen)) as worker:
        for kind in chosen.kind or KINDS:
            row = outcomes[kind] = Counter()
            for name, give in models(kind):
                if chosen.only and not any(fnmatch(name, pattern) for pattern in chosen.only):
                    continue
                verdict = judged(data := give(), kind, worker)
                row[mutants.title(verdict)] += 1
                why = verdict.text.splitlines()[-1] if verdict.text else ""
                if chosen.verbose or verdict.outcome == FAILED:
                    print(f"{name:60} {mutants.title(verdict):12} {why}", flush=True)
                if verdict.outcome == FAILED and chosen.save:
                    (chosen.save / name).mkdir(parents=True, exist_ok=True)
                    (chosen.save / name / "in.onnx").write_bytes(data)
                    (chosen.save / name / "why.txt").write_text(
                        f"0\n{name}\n{kind}\n{verdict.text}\n", encoding="utf-8"
                    )
    outcomes["all models"] = sum(outcomes.values(), Counter())
    print(*mutants.table(outcomes), sep="\n")
    print(f"{outcomes['all models'].total()} models in {time.perf_counter() - begin:.0f} s")
    sys.exit(1 if outcomes["all models"][FAILED] else 0)


if __name__ == "__main__":
    main()
