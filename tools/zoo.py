#!/usr/bin/env python3
"""Couple, prune, prove and run every model of a folder, each in a process of its own, and print a table.

    python tools/zoo.py [FOLDER] [--fill ZOO] [--only GLOB] [--json OUT.json [--resume]] [--golden GOLDEN.json] [-v]

FOLDER holds .onnx files. ZOO holds stored models (NAME.onnx.gz) and the fill.py that gives them weights: what FOLDER lacks
is filled into a temporary folder and removed after its run. Preset d prunes to half of the MAC, or to the middle between
floor and original where half is out of reach.

verdict   ``pass``: pruned, proved, and onnxruntime runs the result. ``refuse``: onnxprune said why it writes nothing.
          ``fail``: all else, be it a ProofError, a crash, or a run beyond ``--timeout`` or ``--memory``.
prunable  share of MAC that touches a prunable channel: one minus what is left with every channel of every unfrozen group
          removed, the last ones too. A layer counts in full where one of its sides does, whatever freezes the other.
floor     share of MAC left with everything removed that preset d may remove.
channels  unfrozen classes over all groups: each can be removed without the others.
seconds   ``couple`` (with reading; the faster of two runs, as is us/node), score and select, prove, and ``total`` of
          ``onnxprune.prune``, or of the whole process where it did not return.
MiB       largest resident memory of the process.

Exit code 1: a model failed, or differs from the golden file in verdict, channels or floor (to 4 decimals).
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import pathlib
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from importlib.metadata import version
from typing import Any

import numpy as np

import onnxprune
from onnxprune import onnx_io, pipeline, report, runtime
from onnxprune.options import Clock, Options

TARGET = 0.5
POLL = 0.05  # seconds between two looks at a process
GOLDEN = ("verdict", "channels", "floor")
COLUMNS = {  # width and format of a figure
    "nodes": (5, ""), "prunable": (8, ".1%"), "floor": (6, ".4f"), "achieved": (8, ".4f"), "channels": (8, ""),
    "couple": (6, ".2f"), "score+select": (12, ".2f"), "prove": (6, ".2f"), "total": (6, ".2f"), "us/node": (7, ".0f"),
    "MiB": (5, ".0f"),
}  # fmt: skip
Record = dict[str, Any]


# -- in the process of one model -------------------------------------------------------------------------------------


def examine(path: pathlib.Path) -> None:
    """Tell every figure of one model as soon as it is known: a process that is killed has told some."""
    try:
        result = prune(path)
    except (onnxprune.BudgetError, onnxprune.ModelError) as error:
        tell(verdict="refuse", why=str(error))
    else:
        with onnx_io.temporary_file(result.model) as file:
            session = runtime.Session(file)
            session.run(runtime.random_feeds(session.inputs, result.report.input_shapes))
        tell(verdict="pass")
    tell(MiB=peak_memory("self"))


def prune(path: pathlib.Path) -> onnxprune.Result:
    """Couple a model to learn its floor, then prune it as far as is in reach."""
    clock = Clock()
    loaded = pipeline.load(path, Options(), clock)
    coupling, cost = loaded.coupling, loaded.cost
    keep = np.ones(coupling.n_classes, bool)
    whole = cost.total("mac", cost.counts(keep))
    for group in coupling.groups:
        if group.frozen is None:
            keep[group.classes] = False
    nodes, seconds = coupling.model.n_nodes, clock.seconds["couple"]
    frozen = [(row.node or row.tensor, row.op, row.reason, row.mac) for row in report.frozen_rows(cost)]
    floor = pipeline.floor(loaded, Options())["mac"] / whole if whole else 1.0
    left = cost.total("mac", cost.counts(keep)) / whole if whole else 1.0
    tell(nodes=nodes, mac=whole, prunable=1 - left, floor=floor, channels=int((~keep).sum()), frozen=frozen)
    tell(**{"couple": seconds, "us/node": 1e6 * seconds / max(1, nodes)})
    if floor >= 1:
        raise onnxprune.BudgetError("nothing prunable", whole)
    del loaded, coupling, cost
    gc.collect()
    target = TARGET if floor <= TARGET else (1 + floor) / 2
    result = pipeline.prune(path, target_mac=target)
    took, proof, achieved = result.report.timings, result.report.proof, result.report.targets[0].achieved
    if proof is None or not proof.ok or achieved > target:
        raise RuntimeError(f"not proved, or {achieved} of MAC kept where {target} was asked for")
    seconds = min(seconds, took["couple"])
    tell(target=target, achieved=achieved, insensitive=len(proof.insensitive), prove=took["prove"], total=took["total"])
    tell(**{"couple": seconds, "us/node": 1e6 * seconds / nodes, "score+select": took["score"] + took["select"]})
    return result


def tell(**figures: object) -> None:
    """Print figures as a line of JSON for the parent process."""
    print(json.dumps(figures), flush=True)


def peak_memory(process: int | str) -> float:
    """Largest resident memory of a process so far, in MiB; zero where the system does not tell."""
    try:
        found = re.search(r"VmHWM:\s+(\d+) kB", pathlib.Path(f"/proc/{process}/status").read_text(encoding="utf-8"))
    except OSError:
        return 0.0
    return int(found[1]) / 1024 if found else 0.0


# -- in the process of them all --------------------------------------------------------------------------------------


def bounded(command: Sequence[object], chosen: argparse.Namespace) -> Record:
    """Run Python on a command; return the figures it told and, where it did not end well, the verdict and why."""
    begin, peak, why = time.perf_counter(), 0.0, ""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        with subprocess.Popen([sys.executable, *map(str, command)], stdout=out, stderr=errors) as process:
            while process.poll() is None:
                peak = max(peak, peak_memory(process.pid))
                if time.perf_counter() - begin > chosen.timeout:
                    why = f"killed after {chosen.timeout:g} s"
                elif peak > chosen.memory:
                    why = f"killed beyond {chosen.memory:g} MiB"
                if why or chosen.stop.is_set():
                    process.kill()
                    break
                chosen.stop.wait(POLL)
        record: Record = {"total": time.perf_counter() - begin, "MiB": peak}
        out.seek(0)
        for line in out:
            if line.startswith("{") and line.endswith("}\n"):
                record |= json.loads(line)
        errors.seek(0)
        trace = errors.read().strip()
    code = process.returncode
    if code and not why:
        last = (trace.splitlines() or [f"exit code {code}"])[-1]
        why = f"ended by {signal.Signals(-code).name}" if code < 0 else last
        record["trace"] = trace[-4000:]
    return record | ({"verdict": "fail", "why": why} if why else {})


def examined(source: pathlib.Path, chosen: argparse.Namespace) -> Record:
    """Run one model, filled before that where ``source`` is a stored one."""
    if source.suffix != ".gz":
        record = bounded([__file__, "--examine", source], chosen)
        return record if "verdict" in record else record | {"verdict": "fail", "why": "told no verdict"}
    with tempfile.TemporaryDirectory(prefix="onnxprune.") as folder:
        path = pathlib.Path(folder) / f"{model_name(source)}.onnx"
        record = bounded([source.with_name("fill.py"), model_name(source), path], chosen)
        if path.is_file() and "why" not in record:
            return examined(path, chosen)
    return record | {"verdict": "fail", "why": f"fill.py: {record.get('why', 'wrote nothing')}"}


def examine_all(known: Mapping[str, Record], chosen: argparse.Namespace) -> Iterator[tuple[str, Record]]:
    """Yield every name with its record, in order; ``known`` ones of the same file and program are not run again."""
    done, lock, now = dict(known), threading.Lock(), state()

    def task(name: str) -> tuple[str, Record]:
        made_of = [onnx_io.sha256(chosen.sources[name]), now, chosen.timeout, chosen.memory]
        old = known.get(name, {"verdict": None, "made_of": ()})
        matter = 4 if old["verdict"] == "fail" else 2  # only a failure may be due to the bounds
        if old["made_of"][:matter] == made_of[:matter]:
            return name, old
        record = examined(chosen.sources[name], chosen) | {"made_of": made_of}
        with lock:
            done[name] = record
            if chosen.json and not chosen.stop.is_set():
                write_json(chosen.json, done)
        return name, record

    with ThreadPoolExecutor(chosen.jobs) as pool:
        try:
            yield from pool.map(task, chosen.sources)
        finally:
            chosen.stop.set()
            pool.shutdown(cancel_futures=True)


def model_name(path: pathlib.Path) -> str:
    """Name of a model in a file NAME.onnx or NAME.onnx.gz."""
    return path.name.removesuffix(".gz").removesuffix(".onnx")


def state() -> str:
    """Version and sources of the program, and of this file: figures of another state are not taken over."""
    folders = [pathlib.Path(str(sys.modules[name].__file__)).parent for name in ("onnxprune", "onnxprune.passes")]
    files = {pathlib.Path(__file__), *(file for folder in folders for file in folder.rglob("*.py"))}
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in sorted(files)))
    return f"{version('onnxprune')} {digest.hexdigest()[:16]}"


def read_json(path: pathlib.Path | None) -> dict[str, Record]:
    """Read what an earlier run wrote; nothing where there is no file."""
    return json.loads(path.read_text(encoding="utf-8")) if path and path.exists() else {}


def write_json(path: pathlib.Path, content: Mapping[str, Any]) -> None:
    """Write all of a file or nothing of it."""
    onnx_io.write(path, json.dumps(content, indent=1, sort_keys=True).encode() + b"\n")


def row(name: str, record: Mapping[str, Any]) -> str:
    """Write one line of the table, with a minus where a figure is missing."""
    cells = ((format(record[f], style) if f in record else "-").rjust(width) for f, (width, style) in COLUMNS.items())
    return "  ".join((f"{name:28}", f"{record['verdict']:7}", *cells))


def reasons(name: str, record: Mapping[str, Any]) -> Iterator[str]:
    """Say why a model was not pruned, and what is frozen in it."""
    yield f"\n{name}: {record.get('why', record['verdict'])}"
    for where, op, why, mac in record.get("frozen", ()):
        yield f"    {mac / max(1, record['mac']):6.1%} of MAC  {where} ({op}): {why}"


def summary(records: Mapping[str, Record]) -> Iterator[str]:
    """Count verdicts, and name what took longest and most."""
    found = [record["verdict"] for record in records.values()]
    yield f"\n{len(found)} models: " + ", ".join(f"{found.count(v)} {v}" for v in ("pass", "refuse", "fail"))
    for figure in ("couple", "us/node", "total", "MiB"):
        style = COLUMNS[figure][1]
        values = sorted(((record[figure], name) for name, record in records.items() if figure in record), reverse=True)
        if values:
            most = ", ".join(f"{name} {value:{style}}" for value, name in values[:4])
            yield f"{figure:8} median {statistics.median(value for value, _ in values):{style}}, most: {most}"


def differences(golden: Mapping[str, Record], ours: Mapping[str, Record]) -> Iterator[str]:
    """Say what is not as in the golden file."""
    for name in sorted(golden.keys() | ours.keys()):
        if name not in golden or name not in ours:
            yield f"{name}: {'in the golden file only' if name in golden else 'not in the golden file'}"
            continue
        for figure in GOLDEN:
            old, new = golden[name].get(figure), ours[name].get(figure)
            if old != new:
                yield f"{name}: {figure} is {new}, was {old}"


def folder(text: str) -> pathlib.Path:
    """Take a folder from the command line."""
    if not pathlib.Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"{text}: no such folder; the zoo is not part of the project")
    return pathlib.Path(text)


def arguments() -> argparse.Namespace:
    """Read the command line; ``sources`` are the chosen files by name, ``stop`` ends every process."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=folder, help="folder of .onnx files")
    parser.add_argument("--fill", type=folder, metavar="ZOO", help="folder of stored models and their fill.py")
    parser.add_argument("--only", action="append", metavar="GLOB", help="names without .onnx; may be repeated")
    parser.add_argument("--json", type=pathlib.Path, help="write all figures, again after every model")
    parser.add_argument("--resume", action="store_true", help="take over what --json has of the same file and program")
    parser.add_argument("--jobs", type=int, default=1, help="models at a time")
    parser.add_argument("--timeout", type=float, default=300, metavar="SECONDS", help="for each model (default: 300)")
    parser.add_argument("--memory", type=float, default=8192, metavar="MIB", help="for each model (default: 8192)")
    parser.add_argument("--golden", type=pathlib.Path, help="compare verdicts, channels and floors with this file")
    parser.add_argument("--update-golden", action="store_true", help="write --golden instead")
    parser.add_argument("-v", "--verbose", action="store_true", help="say what is frozen in every model")
    parser.add_argument("--examine", type=pathlib.Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.examine:
        return chosen
    if not chosen.folder and not chosen.fill:
        parser.error("give a FOLDER of .onnx files, or --fill ZOO")
    if (chosen.resume and not chosen.json) or (chosen.update_golden and not chosen.golden):
        parser.error("--resume needs --json, and --update-golden needs --golden")
    files = sorted(chosen.fill.glob("*.onnx.gz")) if chosen.fill else []
    files += sorted(chosen.folder.glob("*.onnx")) if chosen.folder else []  # replace stored ones of the same name
    chosen.wanted = lambda name: any(fnmatch(name, glob) for glob in chosen.only or "*")
    chosen.sources = {model_name(file): file for file in files if chosen.wanted(model_name(file))}
    chosen.stop = threading.Event()
    if not chosen.sources:
        parser.error("no such model")
    return chosen


def main() -> None:
    """Run everything and exit with 1 if a model fails or differs."""
    chosen = arguments()
    if chosen.examine:
        examine(chosen.examine)
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that temporary folders go, and no process stays
    print("  ".join((f"{'model':28}", "verdict", *(figure.rjust(width) for figure, (width, _) in COLUMNS.items()))))
    records: dict[str, Record] = {}
    for name, record in examine_all(read_json(chosen.json) if chosen.resume else {}, chosen):
        records[name] = record
        print(row(name, record), flush=True)
    shown = (name for name, record in records.items() if chosen.verbose or record["verdict"] != "pass")
    print(*(line for name in shown for line in reasons(name, records[name])), *summary(records), sep="\n")
    wrong = any(record["verdict"] == "fail" for record in records.values())
    golden = {name: record for name, record in read_json(chosen.golden).items() if chosen.wanted(name)}
    ours = {name: {figure: record.get(figure) for figure in GOLDEN} for name, record in records.items()}
    for figures in ours.values():
        figures["floor"] = round(figures["floor"], 4) if figures["floor"] is not None else None
    if chosen.update_golden:
        write_json(chosen.golden, {n: r for n, r in read_json(chosen.golden).items() if n not in golden} | ours)
    elif chosen.golden:
        changed = list(differences(golden, ours))
        print(f"\n{len(changed)} differences from {chosen.golden}", *changed, sep="\n")
        wrong |= bool(changed)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
