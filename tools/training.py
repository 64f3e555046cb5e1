#!/usr/bin/env python3
"""Quality after training: prune, train on the shared train sets, score on the shared test sets.

    python tools/training.py ../shared/models RUN [RUN ...] --out FOLDER [--seeds 0 1 2] [--start compensated magnitude]
        [--preset d] [--max-prune 0.5] [--set FIELD=JSON ...]

A RUN is MODEL@SHARE, for example ``dncnn_s25@0.6``. Models, training artifacts and trained networks stay in FOLDER, and
``FOLDER/results.jsonl`` gets a line per run: drop at the start, drop after training, minutes. No epoch is
selected by the test data: the last weights are scored. Optimizers and rates of vdsr and imdn were chosen on patches held out
of the train sets, resnet20's losses and limits on images held out of its train set; dncnn's recipe by earlier test scores.
imdn's inputs are sharper than the given patches because its error on the test pictures was found far above that on the
patches. A run that stops goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import time
from typing import Any

import numpy as np
import torch
from quality import calibration, scorer
from torch.nn import functional

import onnxprune
from onnxprune import onnx_io, runtime
from onnxprune.artifact import export_artifact
from onnxprune.quality import Reading
from onnxprune.train import Recipe, finetune
from onnxprune.train.trainer import Moment

CIFAR_MEAN, CIFAR_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

RECIPES: dict[str, dict[str, Any]] = {
    "resnet20": {
        "epochs": 48, "batch": 128, "learning_rate": 1e-3, "pad": 4, "flip": "horizontal", "features": 1.0,
        "ema": 0.99,
    },
    "dncnn": {
        "epochs": 16, "batch": 16, "learning_rate": 5e-4, "crop": 40, "flip": "all", "noise": 25 / 255, "loss": "none",
        "precision": "bfloat16",
    },
    "vdsr": {
        "epochs": 36, "batch": 16, "optimizer": "soap", "learning_rate": 3e-4, "crop": 41, "flip": "all", "loss": "none",
    },
    "imdn": {
        "epochs": 32, "batch": 8, "optimizer": "soap", "learning_rate": 3e-4, "crop": 32, "flip": "all", "loss": "none",
    },
}  # fmt: skip


def training_data(folder: pathlib.Path, name: str, out: pathlib.Path) -> Reading:
    """Write the train set of a model as onnxprune reads it; returns how its output is read."""
    key = input_name(folder, name)
    if name.startswith("resnet20"):
        with np.load(folder / "cifar_train_10k.npz") as stored:
            np.savez(out, **{key: stored["images"], "label": stored["labels"]})
        return Reading(scale=1 / 255, mean=CIFAR_MEAN, std=CIFAR_STD)
    if name.startswith("dncnn"):
        with np.load(folder / "bsd_train_patches.npz") as stored:
            np.savez(out, **{key: stored["patches"][:, None]})
        return Reading(scale=1 / 255, output="residual")
    if name.startswith("vdsr"):
        with np.load(folder / "bsd_train_patches.npz") as high, np.load(folder / "vdsr_train_patches.npz") as low:
            twice = np.flatnonzero(low["scale"] == 2)  # scored at this scale
            rest = np.delete(high["patches"], twice, 0)
            np.savez(out, **{key: np.concatenate([low["lr_patches"][twice], blurred(rest)])[:, None]})
        return Reading(scale=1 / 255)
    with np.load(folder / "imdn_train_patches_x2.npz") as colour, np.load(folder / "bsd_train_patches.npz") as grey:
        low, high = colour["lr_patches"].transpose(0, 3, 1, 2), grey["patches"][:, None]
        chance = np.random.default_rng(0)
        coloured = [tinted(high, chance)[:, :, :48, :48], tinted(mosaic(halved(high)), chance)[:, :, 8:56, 8:56]]
        patches = np.concatenate([low, mosaic(halved(low)), *coloured])
        np.savez(out, **{key: patches[chance.permutation(len(patches))]})  # the teacher knows what these should be
    return Reading(scale=1 / 255)


def halved(patches: np.ndarray) -> np.ndarray:
    """Patches (uint8 [N, C, H, W]) at half their size: sharper, as inputs of super-resolution are."""
    return resized(patches, [n // 2 for n in patches.shape[2:]])


def resized(patches: np.ndarray, size: list[int]) -> np.ndarray:
    """Patches (uint8 [N, C, H, W]) at another size, bicubic."""
    x = functional.interpolate(torch.from_numpy(patches).float(), size, mode="bicubic", antialias=True)
    return np.asarray(x.round().clamp(0, 255).byte())


def mosaic(patches: np.ndarray) -> np.ndarray:
    """Four patches each, two by two."""
    n, channels, height, width = patches.shape
    four = patches[: n // 4 * 4].reshape(-1, 2, 2, channels, height, width)
    return four.transpose(0, 3, 1, 4, 2, 5).reshape(-1, channels, 2 * height, 2 * width)


def tinted(grey: np.ndarray, chance: np.random.Generator) -> np.ndarray:
    """Grey patches (uint8 [N, 1, H, W]) in shades of a random colour: white at the light end or black at the dark one."""
    gain = chance.uniform(0.5, 1, (len(grey), 3, 1, 1))
    gain /= gain.max(1, keepdims=True)
    return (grey * gain + 255 * (1 - gain) * chance.uniform(0, 1, gain.shape)).round().astype(np.uint8)


def blurred(patches: np.ndarray) -> np.ndarray:
    """Patches (uint8 [N, H, W]) reduced to half their size and enlarged again, both bicubic."""
    return resized(halved(patches[:, None]), list(patches.shape[1:]))[:, 0]


def calibrating(folder: pathlib.Path, name: str, data: pathlib.Path) -> dict[str, np.ndarray]:
    """Calibration data: what tools/quality.py takes, but for imdn, whose patches there are smooth, the training data."""
    if not name.startswith("imdn"):
        return calibration(scorer(folder), folder, name, None)
    with np.load(data) as stored:
        return {key: stored[key][:64].astype(np.float32) / 255 for key in stored.files}


def input_name(folder: pathlib.Path, name: str) -> str:
    """Name of a model's only input."""
    graph = onnx_io.load(folder / f"{name}.onnx").graph
    known = {tensor.name for tensor in graph.initializer}
    return next(value.name for value in graph.input if value.name not in known)


TESTS = {
    "resnet20": ("cifar-top1", "cifar_eval_1k.npz"), "dncnn": ("denoise-psnr", "set12_denoise.npz"),
    "vdsr": ("sr-psnr", "set5_y_x2.npz"), "imdn": ("sr-psnr", "set5_rgb_x2.npz"),
}  # fmt: skip


def score(folder: pathlib.Path, name: str, model: pathlib.Path) -> float:
    """Quality of a model file on the test set, by the folder's own evaluate.py."""
    task, data = next(test for prefix, test in TESTS.items() if name.startswith(prefix))
    return float(scorer(folder).evaluate(task, model, folder / data)["value"])


def paired(folder: pathlib.Path, name: str, trained: list[pathlib.Path]) -> dict[str, Any]:
    """Drop of top-1 in points, mean over the trained networks, with the 95 % interval over the test images (paired)."""
    with np.load(folder / TESTS["resnet20"][1]) as stored:
        images, labels = stored["images"].astype(np.float32) / 255, stored["labels"]
    mean, std = (np.array(values, np.float32)[:, None, None] for values in (CIFAR_MEAN, CIFAR_STD))

    def correct(model: pathlib.Path) -> np.ndarray:
        scores = runtime.Session(str(model)).run({input_name(folder, name): (images - mean) / std})[0]
        return np.asarray(scores.argmax(1) == labels, float)

    lost = 100 * (correct(folder / f"{name}.onnx") - np.mean([correct(model) for model in trained], 0))
    half = 1.96 * lost.std(ddof=1) / len(lost) ** 0.5
    return {
        "model": name,
        "networks": len(trained),
        "drop": lost.mean(),
        "interval": [lost.mean() - half, lost.mean() + half],
    }


def one(folder: pathlib.Path, out: pathlib.Path, name: str, share: float, start: str, chosen: argparse.Namespace,
        seed: int) -> dict[str, Any]:  # fmt: skip
    """Prune, train, score."""
    limit = "" if chosen.max_prune == 1 else f"-{chosen.max_prune:g}"
    base = out / f"{name}-{share:g}-{start}-{chosen.preset}{limit}"
    original = folder / f"{name}.onnx"
    recipe = next(recipe for prefix, recipe in RECIPES.items() if name.startswith(prefix))
    recipe = {**recipe, **{k: json.loads(v) for k, v in (item.split("=") for item in chosen.set)}, "seed": seed}
    data = out / f"{name}.npz"
    reading = training_data(folder, name, data)
    artifact = base.with_name(f"{base.name}.artifact")
    if not artifact.exists():
        calib = {"calib": calibrating(folder, name, data)} if start == "compensated" else {}
        result = onnxprune.prune(original, target_mac=share, preset=chosen.preset, max_prune=chosen.max_prune, **calib)
        export_artifact(original, result.model, artifact, result.plan)
    if chosen.go_on is not None:
        earlier = base.with_name(f"{base.name}-{seed}{chosen.go_on}.onnx")
        again = base.with_name(f"{base.name}-{seed}{chosen.go_on}.artifact")
        if not again.exists():
            export_artifact(original, earlier, again, artifact / "plan.json")
        artifact = again
    trained = base.with_name(f"{base.name}-{seed}{chosen.tag}.onnx")
    begin = time.perf_counter()
    finetune(artifact, data, trained, Recipe(**recipe), reading=reading, force=True, moment=chosen.show)
    minutes = (time.perf_counter() - begin) / 60
    quality = {"original": score(folder, name, original), "pruned": score(folder, name, artifact / "student.onnx")}
    quality["trained"] = score(folder, name, trained)
    return {
        "model": name, "share": share, "start": start, "preset": chosen.preset,
        "max_prune": chosen.max_prune, "seed": seed, "tag": chosen.tag, "go_on": chosen.go_on, "recipe": recipe, **quality,
        "drop_pruned": quality["original"] - quality["pruned"], "drop": quality["original"] - quality["trained"],
        "minutes": minutes, "file": str(trained),
    }  # fmt: skip


def main() -> None:
    """Run every RUN from every start with every seed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("runs", nargs="+", metavar="MODEL@SHARE")
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--start", nargs="+", choices=["compensated", "magnitude"], default=["compensated"])
    parser.add_argument("--preset", default="d", choices=list("abcd"))
    parser.add_argument("--max-prune", type=float, default=1.0, help="largest share of a group's channels that may go")
    parser.add_argument("--set", nargs="*", default=[], metavar="FIELD=JSON", help="change the recipe")
    parser.add_argument("--tag", default="", help="part of the trained model's name")
    parser.add_argument("--go-on", metavar="TAG", help="train what an earlier run with this tag has trained once more")
    parser.add_argument("--every", type=int, default=200, help="steps between lines of progress")
    chosen = parser.parse_args()
    begin = time.perf_counter()

    def show(now: Moment) -> None:
        if now.step % chosen.every == 0:
            told = f"{now.step}/{now.steps} loss {now.loss:.5g} {(time.perf_counter() - begin) / 60:.1f} min"
            print(told, flush=True)

    chosen.show = show
    chosen.out.mkdir(parents=True, exist_ok=True)
    for run in chosen.runs:
        name, _, share = run.partition("@")
        for start in chosen.start:
            rows = []
            for seed in chosen.seeds:
                rows.append(one(chosen.folder, chosen.out, name, float(share), start, chosen, seed))
                print(json.dumps(rows[-1]), flush=True)
                with (chosen.out / "results.jsonl").open("a") as file:
                    file.write(json.dumps(rows[-1]) + "\n")
            if name.startswith("resnet20"):
                print(json.dumps(paired(chosen.folder, name, [pathlib.Path(row["file"]) for row in rows])), flush=True)


if __name__ == "__main__":
    main()
