#!/usr/bin/env python3
"""Measure what Torch-Pruning's magnitude pruner costs four trained networks, without retraining, at the same shares of MAC.

    python tools/torch_pruning_baseline.py --shared FOLDER [--models NAME ...] [--targets 0.8 0.7 0.6] [--json OUT.json]

FOLDER holds the ONNX files, the evaluation sets and ``evaluate.py``, whose protocol decides the quality. A mode is one way
to use the pruner: a scope (``whole`` network, or ``inner`` layers only: none that writes into a residual stream; a chain has
no such layer), a ranking (``local`` or ``global``) and a form of the weights (``bn`` or ``folded``). Each mode tries every
pruning ratio that changes a channel count and scores the network that runs with the largest share of MAC within the target.
The output layer is never pruned. A star marks the best mode of a model and target, chosen by the very quality it is judged
by, which favours the peer. Needs torch and torch_pruning (exit code 2 without).
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import importlib.util
import itertools
import json
import pathlib
import sys
import types
from collections.abc import Callable, Iterable, Iterator
from importlib import metadata
from typing import Any

import numpy as np

try:
    import torch
    import torch_networks
    import torch_pruning
    from torch import nn
    from torch_networks import Network
except ImportError as missing:
    if __name__ != "__main__":
        raise
    print(f"torch_pruning_baseline: {missing}; install torch and torch-pruning to measure this peer", file=sys.stderr)
    sys.exit(2)

TARGETS = (0.8, 0.7, 0.6)
TOLERANCE = 1e-4  # of a module's output against its ONNX file's


@dataclasses.dataclass(frozen=True)
class Subject:
    """One network: its module, its file per form of the weights, how it is scored, and its inputs.

    MAC is counted at ``shape``; ``traced`` is smaller where a network takes any size.
    """

    build: Callable[[type[nn.Module]], Network]
    forms: dict[str, str]
    task: str
    data: str
    shape: tuple[int, ...]
    traced: tuple[int, ...]


SUBJECTS = {
    "resnet20_jpeg": Subject(
        torch_networks.ResNet20,
        {"bn": "resnet20_jpeg_bn.onnx", "folded": "resnet20_jpeg.onnx"},
        "cifar-top1",
        "cifar_eval_1k.npz",
        (1, 3, 32, 32),
        (1, 3, 32, 32),
    ),
    "dncnn_s25": Subject(
        torch_networks.DnCNN,
        {"bn": "dncnn_s25_bn.onnx", "folded": "dncnn_s25.onnx"},
        "denoise-psnr",
        "set12_denoise.npz",
        (1, 1, 64, 64),
        (1, 1, 16, 16),
    ),
    "vdsr": Subject(
        torch_networks.VDSR, {"folded": "vdsr.onnx"}, "sr-psnr", "set5_y_x2.npz", (1, 1, 64, 64), (1, 1, 16, 16)
    ),
    "imdn_x2": Subject(
        torch_networks.IMDN, {"folded": "imdn_x2.onnx"}, "sr-psnr", "set5_rgb_x2.npz", (1, 3, 64, 64), (1, 3, 16, 16)
    ),
}


@dataclasses.dataclass(frozen=True)
class Mode:
    """One way to use the pruner."""

    scope: str
    ranking: str
    form: str

    def __str__(self) -> str:
        return f"{self.scope} {self.ranking} {self.form}"


@dataclasses.dataclass(frozen=True)
class Row:
    """What one mode reaches at one target; ``error`` says what failed, and figures are None where everything did."""

    model: str
    mode: str
    target: float
    baseline: float
    ratio: float | None = None
    share: float | None = None
    quality: float | None = None
    drop: float | None = None
    error: str | None = None
    best: bool = False


class TorchSession:
    """A module that answers like an onnxruntime session; ``reference`` also runs, and ``difference`` keeps the maximum."""

    def __init__(self, module: nn.Module, reference: Any = None) -> None:
        self.module, self.reference, self.difference = module, reference, 0.0

    def get_inputs(self) -> list[types.SimpleNamespace]:
        """Name the one input."""
        return [types.SimpleNamespace(name="input")]

    def run(self, _outputs: None, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
        """Run once."""
        with torch.inference_mode():
            output = self.module(torch.from_numpy(feeds["input"])).numpy()
        if self.reference is not None:
            expected = self.reference.run(None, feeds)[0]
            self.difference = max(self.difference, float(np.abs(output - expected).max()))
        return [output]


class Scorer:
    """The evaluation script of the shared folder, run on modules."""

    def __init__(self, shared: pathlib.Path) -> None:
        spec = importlib.util.spec_from_file_location("shared_evaluate", shared / "evaluate.py")
        if spec is None or spec.loader is None:
            raise ImportError(f"no evaluate.py in {shared}")
        script: Any = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(script)
        self.shared, self.script = shared, script
        self.open_onnx = self.script.session
        # The protocol stays the script's; only what it calls a session is ours.
        self.script.session = lambda model: model

    def score(self, subject: Subject, module: nn.Module) -> float:
        """Return top-1 in percent or PSNR in dB."""
        return float(self.script.evaluate(subject.task, TorchSession(module), self.shared / subject.data)["value"])

    def load(self, subject: Subject, form: str) -> Network:
        """Load a module and check it against its ONNX file on one input of the evaluation set."""
        path = self.shared / subject.forms[form]
        module = torch_networks.load(subject.build, path)
        pair = TorchSession(module, self.open_onnx(path))
        self.script.evaluate(subject.task, pair, self.shared / subject.data, limit=1)
        if not pair.difference <= TOLERANCE:
            raise ValueError(f"{path.name}: the module's output differs by {pair.difference:.3g}")
        return module


class Counter:
    """Multiply-accumulates of a module's convolutions and linear layers, from output positions that pruning keeps."""

    def __init__(self, module: nn.Module, example: torch.Tensor) -> None:
        self.positions: dict[str, int] = {}
        layers = {name: m for name, m in module.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
        hooks = [layer.register_forward_hook(self._record(name)) for name, layer in layers.items()]
        with torch.inference_mode():
            module(example)
        for hook in hooks:
            hook.remove()

    def _record(self, name: str) -> Callable[[Any, object, torch.Tensor], None]:
        def record(layer: Any, _: object, output: torch.Tensor) -> None:
            self.positions[name] = output.numel() // layer.weight.shape[0]

        return record

    def macs(self, module: nn.Module) -> int:
        """Count one inference of the example."""
        weights = dict(module.named_parameters())
        return sum(count * weights[f"{name}.weight"].numel() for name, count in self.positions.items())


def prepare(module: Network, mode: Mode, ratio: float, example: torch.Tensor) -> Any:
    """Build the peer's pruner for a copy of the module, with its defaults but for what the mode says."""
    network = copy.deepcopy(module)
    return torch_pruning.pruner.MagnitudePruner(
        network,
        example,
        importance=torch_pruning.importance.MagnitudeImportance(p=2, group_reduction="mean"),
        global_pruning=mode.ranking == "global",
        pruning_ratio=ratio,
        ignored_layers=[network.last(), *(network.streams() if mode.scope == "inner" else [])],
    )


def pruned(module: Network, mode: Mode, ratio: float, example: torch.Tensor) -> Network:
    """Prune a copy in one step and run it once."""
    pruner = prepare(module, mode, ratio, example)
    pruner.step()
    with torch.inference_mode():
        pruner.model(example)
    return pruner.model


def ratios(module: Network, mode: Mode, example: torch.Tensor) -> list[float]:
    """Every ratio at which a channel count changes, ascending.

    The peer keeps ``int(total * (1 - ratio))`` of the channels it ranks together, so a little less than ``k / total``
    removes ``k`` of them.
    """
    if mode.ranking == "global":
        totals = {prepare(module, mode, 0.0, example).initial_total_channels}
    else:
        totals = {layer.out_channels for layer in module.modules() if isinstance(layer, nn.Conv2d)}
    return sorted({(k - 1e-6) / total for total in totals for k in range(1, total)})


@dataclasses.dataclass(frozen=True)
class Sweep:
    """Share of MAC by ratio, of the networks that run, and what the other ratios raised."""

    shares: dict[float, float]
    failure: str | None


def one_line(error: Exception) -> str:
    """Name the exception and the first line of its message."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


def sweep(module: Network, mode: Mode, subject: Subject, lowest: float) -> Sweep:
    """Prune at every ratio until the share of MAC is well below the lowest target."""
    example = torch.zeros(subject.traced)
    counter = Counter(module, torch.zeros(subject.shape))
    before, shares, failures = counter.macs(module), dict[float, float](), list[str]()
    try:
        for ratio in ratios(module, mode, example):
            try:
                shares[ratio] = counter.macs(pruned(module, mode, ratio, example)) / before
            except Exception as error:  # whatever the peer raises is a result
                failures.append(one_line(error))
            else:
                if shares[ratio] < lowest / 2:
                    break
    except Exception as error:
        return Sweep({}, one_line(error))
    tried = len(shares) + len(failures)
    return Sweep(shares, f"{len(failures)} of {tried} ratios fail, the first with {failures[0]}" if failures else None)


def modes(form: str, module: Network) -> Iterator[Mode]:
    """List the modes that differ: a network without streams has one scope."""
    scopes = ["whole", "inner"] if module.streams() else ["whole"]
    for scope, ranking in itertools.product(scopes, ["local", "global"]):
        yield Mode(scope, ranking, form)


def measure(
    scorer: Scorer, name: str, module: Network, mode: Mode, baseline: float, targets: Iterable[float]
) -> Iterator[Row]:
    """Score one mode at every target."""
    subject, targets = SUBJECTS[name], list(targets)
    found = sweep(module, mode, subject, min(targets))
    for target in targets:
        row = Row(name, str(mode), target, baseline, error=found.failure)
        fitting = {ratio: share for ratio, share in found.shares.items() if share <= target}
        if fitting:
            ratio = max(fitting, key=lambda r: fitting[r])
            quality = scorer.score(subject, pruned(module, mode, ratio, torch.zeros(subject.traced)))
            yield dataclasses.replace(row, ratio=ratio, share=fitting[ratio], quality=quality, drop=baseline - quality)
        elif found.shares:
            yield dataclasses.replace(row, error=f"out of reach, the lowest share is {min(found.shares.values()):.4f}")
        else:
            yield row


def mark_best(rows: list[Row]) -> list[Row]:
    """Star the mode with the smallest drop of every model and target."""
    best: dict[tuple[str, float], Row] = {}
    for row in sorted((row for row in rows if row.drop is not None), key=lambda row: row.drop or 0.0):
        best.setdefault((row.model, row.target), row)
    return [dataclasses.replace(row, best=best.get((row.model, row.target)) is row) for row in rows]


def baseline(
    shared: pathlib.Path, models: Iterable[str] = tuple(SUBJECTS), targets: Iterable[float] = TARGETS
) -> list[Row]:
    """Measure every mode of the named models at every target.

    Parameters
    ----------
    shared
        Folder with the ONNX files, the evaluation sets and ``evaluate.py``.
    models
        Names from ``SUBJECTS``.
    targets
        Upper bounds on the share of the whole model's MAC.

    Returns
    -------
    list of Row
        Percentage points of top-1 for a classifier, dB of PSNR for the others; ``best`` marks one row per model and target.

    Raises
    ------
    ValueError
        A module does not reproduce its ONNX file.
    """
    scorer, rows = Scorer(shared), list[Row]()
    targets = list(targets)
    for name in models:
        subject = SUBJECTS[name]
        for form in subject.forms:
            module = scorer.load(subject, form)
            quality = scorer.score(subject, module)
            for mode in modes(form, module):
                rows += measure(scorer, name, module, mode, quality, targets)
                print(f"{name} {mode}: measured", file=sys.stderr, flush=True)
    return mark_best(rows)


def line(row: Row) -> str:
    """Write one row of the table."""
    head = f"{row.model:14} {row.mode:20} {row.target:6.2f}"
    if row.quality is None:
        return f"{head}        -         - {row.baseline:9.3f}         -         -   {row.error}"
    return (
        f"{head} {row.ratio:8.4f} {row.share:9.4f} {row.baseline:9.3f} {row.quality:9.3f} {row.drop:9.3f}"
        f" {'*' if row.best else ' '} {row.error or ''}".rstrip()
    )


def main() -> None:
    """Measure, print the table and write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shared", type=pathlib.Path, required=True, help="folder with models, sets and evaluate.py")
    parser.add_argument("--models", nargs="+", choices=list(SUBJECTS), default=list(SUBJECTS))
    parser.add_argument("--targets", type=float, nargs="+", default=list(TARGETS))
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--json", type=pathlib.Path)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    rows = baseline(chosen.shared, chosen.models, chosen.targets)
    versions = {name: metadata.version(name) for name in ("torch", "torch-pruning")}
    print(", ".join(f"{name} {version}" for name, version in versions.items()))
    print(f"{'model':14} {'mode':20} target    ratio MAC share  baseline   quality      drop")
    for row in rows:
        print(line(row))
    if chosen.json:
        found = {"versions": versions, "rows": [dataclasses.asdict(row) for row in rows]}
        chosen.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
