#!/usr/bin/env python3
"""Turn data sets with other keys and layouts into data that onnxprune reads: arrays named as the model's input.

    python tools/convert_data.py cifar            IN.npz OUT.npz [--n 512] [--name input] [--mean M --std S]
    python tools/convert_data.py denoise          IN.npz OUT.npz [--n 64] [--sigma 25]
    python tools/convert_data.py super-resolution IN.npz OUT.npz [--n 64] [--targets OTHER.npz] [--range 255]

``cifar`` takes ``images`` (uint8) and ``labels``; ``denoise`` clean grey ``patches`` or ``clean_000``, ... (uint8), to which
it adds noise; ``super-resolution`` ``lr_patches`` and ``hr_patches``, or ``lr_000``, ... and ``hr_000``, .... OUT holds
float32 inputs in channels-first layout, with ``label`` or ``target`` where IN tells them: numbered where sizes differ.
docs/data.md has recipes.
"""

from __future__ import annotations

import argparse
import io
import pathlib
import re
import sys
from collections.abc import Mapping, Sequence

import numpy as np

from onnxprune import onnx_io
from onnxprune.arrays import reading
from onnxprune.errors import OnnxPruneError, UsageError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
Stored = Mapping[str, np.ndarray]
Columns = dict[str, list[np.ndarray]]


def cifar(stored: Stored, chosen: argparse.Namespace) -> Columns:
    """Images become (value / 255 - mean) / std, in float32 throughout."""
    mean, std = (np.array(values, np.float32).reshape(-1, 1, 1) for values in (chosen.mean, chosen.std))
    images = pictures(stored, ("images",), chosen.n)
    if not {len(mean), len(std)} <= {1, len(images[0])} or not std.all():
        raise UsageError(
            f"mean {chosen.mean}, std {chosen.std}: give one, or one for each of {len(images[0])} channels"
        )
    columns = {chosen.name: [((image.astype(np.float32) / 255 - mean) / std).astype(np.float32) for image in images]}
    labels = stored.get("labels", stored.get("label"))
    return columns if labels is None else columns | {"label": list(labels[: len(images)].astype(np.int64))}


def denoise(stored: Stored, chosen: argparse.Namespace) -> Columns:
    """Noise is added to clean pictures in 0..1, not clipped; the clean picture is the target.

    Picture k has noise of ``numpy.random.RandomState(seeds[k])``, or of ``RandomState(k)`` where no seeds are stored.
    """
    sigma = float(stored.get("sigma", 25.0)) if chosen.sigma is None else chosen.sigma
    clean = [picture.astype(np.float32) / 255 for picture in pictures(stored, ("patches", "clean"), chosen.n)]
    seeds = stored.get("seeds", np.arange(len(clean)))
    return {chosen.name: [noisy(*pair, sigma) for pair in zip(clean, seeds, strict=False)], "target": clean}


def noisy(clean: np.ndarray, seed: int, sigma: float) -> np.ndarray:
    """Add Gaussian noise of ``sigma`` levels of 255."""
    noise = np.random.RandomState(int(seed)).standard_normal(clean.shape)
    return clean + noise.astype(np.float32) * np.float32(sigma / 255)


def super_resolution(stored: Stored, chosen: argparse.Namespace) -> Columns:
    """Levels become 0..1 (or 0..``--range``); ``levels`` and ``hr_levels`` say what stands for 1, 255 for uint8."""
    small = pictures(stored, ("lr_patches", "lr"), chosen.n)
    factor = np.float32(chosen.range / level(stored, "levels", small))
    columns = {chosen.name: [picture.astype(np.float32) * factor for picture in small]}
    if chosen.targets is None and not numbered(stored, "hr") and "hr_patches" not in stored:
        return columns
    source = stored if chosen.targets is None else read(chosen.targets)
    large = pictures(source, ("hr_patches", "hr", "patches"), len(small))
    if len(large) < len(small):
        raise UsageError(f"{len(small)} inputs, but {len(large)} targets; give as many, in the same order")
    factor = chosen.range / level(source, "hr_levels", large)
    return columns | {"target": [(picture.astype(np.float64) * factor).astype(np.float32) for picture in large]}


def pictures(stored: Stored, keys: Sequence[str], n: int | None) -> list[np.ndarray]:
    """Pictures of shape (channels, height, width) from the first of ``keys``: one array, or arrays KEY_000, KEY_001, ...."""
    for key in keys:
        found = list(stored[key][:n]) if key in stored else [stored[name] for name in numbered(stored, key)[:n]]
        if found:
            return [channels_first(picture) for picture in found]
    raise UsageError(f"holds none of {', '.join(keys)}; found {', '.join(stored)}")


def numbered(stored: Stored, key: str) -> list[str]:
    """Names KEY_000, KEY_001, ... in the order of their numbers."""
    found = {name: re.fullmatch(rf"{re.escape(key)}_(\d+)", name) for name in stored}
    return sorted((name for name, match in found.items() if match), key=lambda name: int(name.rpartition("_")[2]))


def channels_first(picture: np.ndarray) -> np.ndarray:
    """Give a picture the shape (channels, height, width)."""
    if picture.ndim == 2:
        return picture[None]
    if picture.ndim != 3 or not {picture.shape[0], picture.shape[-1]} & {1, 3}:
        raise UsageError(
            f"a picture has shape {picture.shape}; it must be (height, width), with 1 or 3 channels or none"
        )
    return picture if picture.shape[0] in (1, 3) else np.ascontiguousarray(picture.transpose(2, 0, 1))


def level(stored: Stored, key: str, found: list[np.ndarray]) -> float:
    """Integer that stands for 1."""
    if key not in stored and found[0].dtype != np.uint8:
        raise UsageError(f"pictures are {found[0].dtype}, and no array {key!r} says what stands for 1")
    return float(stored.get(key, 255.0))


def read(path: str) -> Stored:
    """Read all arrays of a file; nothing is unpickled."""
    with reading(pathlib.Path(path)), np.load(path, allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}


def arranged(columns: Columns) -> dict[str, np.ndarray]:
    """One array for each name where all samples have one size, else one per sample: NAME_000, NAME_001, ...."""
    if all(len({array.shape for array in arrays}) == 1 for arrays in columns.values()):
        return {name: np.stack(arrays) for name, arrays in columns.items()}
    return {f"{name}_{k:03d}": array for name, arrays in columns.items() for k, array in enumerate(arrays)}


def summary(columns: Columns) -> str:
    """Tell what was written, a part per name."""
    shapes = {name: sorted({array.shape for array in arrays}) for name, arrays in columns.items()}
    parts = [
        f"{len(columns[name])} x {name} {columns[name][0].dtype}"
        + (f" {list(found[0])}" if len(found) == 1 else f" of {len(found)} sizes")
        for name, found in shapes.items()
    ]
    return ", ".join(parts) + (
        "" if len(columns) > 1 else "; no label or target, so for calibration and agreement only"
    )


KINDS = {"cifar": cifar, "denoise": denoise, "super-resolution": super_resolution}


def main(arguments: Sequence[str] | None = None) -> int:
    """Convert one file and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="kind", required=True)
    for kind in KINDS:
        command = kinds.add_parser(kind)
        command.add_argument("source", metavar="IN.npz")
        command.add_argument("out", metavar="OUT.npz")
        command.add_argument("--n", type=int, help="take the first N samples")
        command.add_argument("--name", default="input", help="name of the model's input")
        command.add_argument("--force", action="store_true", help="overwrite OUT")
        if kind == "cifar":
            command.add_argument("--mean", type=float, nargs="+", default=MEAN, help="per channel, of values in 0..1")
            command.add_argument("--std", type=float, nargs="+", default=STD)
        elif kind == "denoise":
            command.add_argument(
                "--sigma", type=float, help="of the noise, in levels of 255 (default: as stored, or 25)"
            )
        else:
            command.add_argument(
                "--targets", metavar="OTHER.npz", help="file that holds the targets, in the same order"
            )
            command.add_argument(
                "--range", type=float, default=1.0, help="largest value that the model takes: 1 or 255"
            )
    chosen = parser.parse_args(arguments)
    if chosen.n is not None and chosen.n < 1:
        parser.error("--n must be 1 or more")
    try:
        out = pathlib.Path(chosen.out)
        if out.exists() and (not chosen.force or out.resolve() == pathlib.Path(chosen.source).resolve()):
            raise UsageError(f"{out} exists; --force overwrites any file but IN.npz")
        columns = KINDS[chosen.kind](read(chosen.source), chosen)
        archive = io.BytesIO()
        np.savez(archive, **arranged(columns))
        onnx_io.write(out, archive.getvalue())
    except OnnxPruneError as error:
        print(f"convert_data: {chosen.source}: {error}", file=sys.stderr)
        return error.exit_code
    print(f"{out}: {summary(columns)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
