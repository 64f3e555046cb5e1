"""Prune, quantize, evaluate: the steps between a trained network and one that ships, on a network that comes along.

Prunes with calibration, quantizes original and pruned model with onnxruntime's static quantizer (QDQ, weights per channel),
and shows what each costs and is worth. With --simplify, onnxsim or onnxslim rewrites the pruned model, whose outputs must
stay what they are. See docs/howto/pipeline.md.
"""

from __future__ import annotations

import argparse
import importlib
import pathlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import onnx
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

import onnxprune
from onnxprune.runtime import Session

ROOT = pathlib.Path(__file__).resolve().parents[1]
DIGITS = ROOT / "fixtures" / "digits"
SIMPLIFIERS: dict[str, Callable[[Any, onnx.ModelProto], onnx.ModelProto]] = {
    "onnxsim": lambda onnxsim, model: onnxsim.simplify(model)[0],
    "onnxslim": lambda onnxslim, model: onnxslim.slim(model),
}
AGREE = 1e-5
"""Largest difference of outputs, relative to their spread, that reordering sums explains."""


class Samples(CalibrationDataReader):
    """The arrays of an ``.npz`` file, sample by sample, as the quantizer asks for them."""

    def __init__(self, path: pathlib.Path, names: list[str]) -> None:
        with np.load(path) as archive:
            self.arrays = {name: archive[name] for name in names}
        self._feeds: Iterator[dict[str, np.ndarray]] | None = None

    def feeds(self) -> Iterator[dict[str, np.ndarray]]:
        """One sample after the other."""
        for index in range(len(next(iter(self.arrays.values())))):
            yield {name: array[index : index + 1] for name, array in self.arrays.items()}

    def get_next(self) -> dict[str, np.ndarray] | None:
        """The next sample; None after the last."""
        self._feeds = self._feeds or self.feeds()
        return next(self._feeds, None)


def quantize(model: pathlib.Path, calib: pathlib.Path, out: pathlib.Path) -> pathlib.Path:
    """Write ``model`` with QuantizeLinear and DequantizeLinear around everything that runs in 8 bits."""
    prepared = out.with_suffix(".prepared.onnx")
    quant_pre_process(
        model, prepared, skip_symbolic_shape=True
    )  # folds normalizations into convolutions: they are quantized as one
    samples = Samples(calib, list(Session(str(model)).inputs))
    quantize_static(prepared, out, samples, quant_format=QuantFormat.QDQ, per_channel=True)
    prepared.unlink()
    return out


def difference(first: onnx.ModelProto, second: onnx.ModelProto, feed: dict[str, np.ndarray]) -> float:
    """Largest difference of outputs, relative to the spread of each."""
    pairs = zip(*(Session(model.SerializeToString()).run(feed) for model in (first, second)), strict=True)
    return max(float(np.abs(a - b).max() / max(float(np.std(a)), 1e-12)) for a, b in pairs)


def row(name: str, path: pathlib.Path, data: pathlib.Path, metric: str) -> str:
    """A line of the table: what a model costs and is worth."""
    macs = onnxprune.inspect(str(path)).before["mac"]
    quality = onnxprune.evaluate(str(path), data, metric).value
    return f"{name:16} {macs / 1e6:8.2f} M {path.stat().st_size:8,} {quality:10.2f}"


def simplify(name: str, pruned: pathlib.Path, calib: pathlib.Path) -> str:
    """A line on what a simplifier makes of the pruned model."""
    try:
        library = importlib.import_module(name)
    except ImportError:
        sys.exit(f"{name} is not installed: pip install {name}")
    model = onnx.load(pruned)
    simple = SIMPLIFIERS[name](library, model)
    samples = Samples(calib, list(Session(str(pruned)).inputs))
    worst = difference(model, simple, next(samples.feeds()))
    if not worst <= AGREE:
        sys.exit(f"{name} changes what the pruned model computes, by {worst:.1e}")
    return f"{name:16} {len(model.graph.node)} -> {len(simple.graph.node)} nodes, outputs agree"


def main(arguments: list[str] | None = None) -> None:
    """Run the steps and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=pathlib.Path, help="where the models go")
    parser.add_argument("--model", type=pathlib.Path, default=DIGITS / "digits.onnx")
    parser.add_argument("--calib", type=pathlib.Path, default=DIGITS / "digits_calib.npz", help=".npz of inputs")
    parser.add_argument("--data", type=pathlib.Path, default=DIGITS / "digits_eval.npz", help="evaluation data")
    parser.add_argument("--metric", default="top1")
    parser.add_argument("--simplify", action="append", default=[], choices=sorted(SIMPLIFIERS), help="repeatable")
    parser.add_argument("--target-mac", type=float, default=0.5)
    chosen = parser.parse_args(arguments)
    chosen.folder.mkdir(parents=True, exist_ok=True)
    pruned = chosen.folder / "pruned.onnx"
    result = onnxprune.prune(str(chosen.model), target_mac=chosen.target_mac, calib=str(chosen.calib))
    onnx.save(result.model, pruned)
    models = {"original": chosen.model, "pruned": pruned}
    for name, path in list(models.items()):
        models[f"{name}, QDQ"] = quantize(path, chosen.calib, chosen.folder / f"{name}-qdq.onnx")
    print(f"{'model':16} {'MAC':>10} {'bytes':>8} {chosen.metric:>10}")
    for name, path in models.items():
        print(row(name, path, chosen.data, chosen.metric))
    for name in chosen.simplify:
        print(simplify(name, pruned, chosen.calib))


if __name__ == "__main__":
    main()
