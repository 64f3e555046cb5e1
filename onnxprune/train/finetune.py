"""Finetune: train an artifact's student, and bring its weights back into the very same graph, proved to fit."""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import numpy as np
import onnx
import torch
from torch import Tensor

from onnxprune import data, onnx_io, pipeline, runtime
from onnxprune.errors import FileError, ModelError, UsageError
from onnxprune.manifest import Artifact, read_artifact
from onnxprune.metrics import METRICS
from onnxprune.metrics import find as find_metric
from onnxprune.options import Options
from onnxprune.passes import validate
from onnxprune.quality import Reading
from onnxprune.train import state
from onnxprune.train.batches import Batches
from onnxprune.train.losses import losses_for
from onnxprune.train.module import OnnxModule
from onnxprune.train.recipe import Recipe
from onnxprune.train.state import Epoch
from onnxprune.train.trainer import Judge, Moment, Trainer
from onnxprune.train.world import World, joined

TOLERANCE = 1e-4
"""Largest difference between what was trained and what onnxruntime computes, relative to the output's spread."""


@dataclass(frozen=True)
class Trained:
    """What ``finetune`` returns.

    Attributes
    ----------
    name, metric
        Name of the metric, and its value for the weights that were kept, on the validation data; None without.
    before
        The same before training.
    resumed
        Number of epochs that an earlier, interrupted run had done.
    """

    model: onnx.ModelProto
    history: tuple[Epoch, ...]
    name: str | None
    metric: float | None
    before: float | None
    resumed: int
    notes: tuple[str, ...]


def finetune(
    directory: str | os.PathLike, data_path: str | os.PathLike, out: str | os.PathLike, recipe: Recipe | None = None, *,
    validation: str | os.PathLike | None = None, metric: str | None = None, reading: Reading | None = None,
    folder: str | os.PathLike | None = None, force: bool = False, restart: bool = False,
    provider: str = "", threads: int = 0, moment: Callable[[Moment], None] = lambda now: None,
) -> Trained | None:  # fmt: skip
    """Train the student of an artifact and write it to ``out``.

    Under ``torchrun`` every process calls this; the first writes and returns the result, the others return None.

    Parameters
    ----------
    data_path
        Training data (see :mod:`onnxprune.data`): inputs, and labels or targets where there are any.
    validation, metric
        Data and metric that each epoch's weights are judged by; the best are kept. Without them the last are.
    reading
        How data enters the model and how its output is read.
    folder
        Where the run's state goes (default: ``OUT.training`` beside ``out``). A run that was killed goes on from there.
    restart
        Drop the state of an earlier run.
    provider, threads
        What onnxruntime judges by, as in :class:`onnxprune.Options`; the threads are PyTorch's, too.

    Raises
    ------
    UsageError
        Options contradict the data or each other, or the state belongs to another run.
    ProofError
        The trained graph is not the pruned one with other weights (a bug: weights alone have changed).
    """
    recipe, reading, options = recipe or Recipe(), reading or Reading(), Options(provider=provider, threads=threads)
    artifact, out = read_artifact(directory), pathlib.Path(out)
    if not artifact.trainable:
        raise UsageError(f"{directory}: has no weights to train; its manifest says why each constant stays")
    pipeline.check_output(artifact.student, out, force=force)
    if metric is None and artifact.metric not in (None, *METRICS):
        raise UsageError(
            f"{directory}: names the metric {artifact.metric}, which is other code; --metric allows to run it"
        )
    metric = metric or artifact.metric
    if validation is not None and metric is None:
        raise UsageError("validation data needs a metric; give --metric, for example psnr or top1")
    folder = pathlib.Path(folder) if folder is not None else out.with_name(out.name + ".training")
    with runtime.threads_limited(threads), _torch_threads(runtime.thread_limit()), joined() as world:
        if world.first:
            _open(folder, restart)
        world.agree(None)
        return _train(artifact, data_path, out, recipe, validation, metric, reading, folder, options, moment, world)


@contextmanager
def _torch_threads(threads: int) -> Iterator[None]:
    """Let PyTorch compute with so many threads; 0 leaves that to it."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _train(
    artifact: Artifact, data_path: str | os.PathLike, out: pathlib.Path, recipe: Recipe,
    validation: str | os.PathLike | None, metric: str | None, reading: Reading, folder: pathlib.Path,
    options: Options, moment: Callable[[Moment], None], world: World,
) -> Trained | None:  # fmt: skip
    source = onnx_io.load(artifact.student)
    session = runtime.Session(str(artifact.student))
    samples = _load(data_path, session, reading)
    classes = metric is not None and find_metric(metric).of_classes
    losses = losses_for(
        recipe, labels=samples.labels is not None, targets=samples.targets is not None or recipe.noise > 0,
        output=reading.output, classes=classes,
    )  # fmt: skip
    batches = Batches(samples, recipe, world.rank, world.size)
    judge = None
    if validation is not None and metric is not None:
        judge = _judge(artifact, source, pathlib.Path(validation), metric, reading, options.provider)
    key = _key(artifact, data_path, validation, metric, recipe, reading)
    trainer = Trainer(artifact, batches, losses, recipe, world, folder, key, judge, moment)
    resumed = trainer.progress.epoch
    weights = trainer.run()
    if not world.first:
        return None
    trained = OnnxModule(source, artifact.trainable).to_onnx(weights)
    _prove(artifact, trained, weights, batches, options)
    onnx_io.save(trained, out)
    state.clear(folder)
    now = trainer.progress
    name = None if judge is None else metric
    return Trained(trained, tuple(now.history), name, now.best_metric, now.before, resumed, samples.notes)


def _open(folder: pathlib.Path, restart: bool) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileError(f"{folder}: cannot be made ({error.strerror})") from error
    state.sweep(folder)
    if restart:
        state.clear(folder)


def _load(path: str | os.PathLike, session: runtime.Session, reading: Reading) -> data.Samples:
    return data.load(pathlib.Path(path), session.inputs, scale=reading.scale, mean=reading.mean, std=reading.std)


def _judge(
    artifact: Artifact, source: onnx.ModelProto, path: pathlib.Path, metric: str, reading: Reading, provider: str
) -> Judge:
    """Judge weights as users will run them: written back, in onnxruntime."""
    chosen = find_metric(metric)
    chosen.check(reading)
    reference = runtime.Session(str(artifact.teacher), provider)
    samples = _load(path, reference, reading)
    module = OnnxModule(source, artifact.trainable)

    def measure(weights: Mapping[str, Tensor]) -> float:
        session = runtime.Session(module.to_onnx(weights), provider)
        return validate.evaluate(session, samples, chosen, reference=reference, view=reading).value

    return Judge(measure, chosen.higher_is_better)


def _key(artifact: Artifact, *settings: object) -> str:
    """What a run is: a digest of the student, the data and all settings."""
    told = [asdict(s) if hasattr(s, "__dataclass_fields__") else str(s) for s in settings]  # type: ignore[call-overload]
    content = json.dumps([artifact.manifest["files"], told], default=str, sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def _prove(
    artifact: Artifact, trained: onnx.ModelProto, weights: Mapping[str, Tensor], batches: Batches, options: Options
) -> None:
    """The graph is the pruned one but for its weights, and onnxruntime computes with them what was trained."""
    pipeline.verify(artifact.teacher, trained, artifact.plan, options)
    inputs = {name: array[:1] for name, array in batches.pools[0].inputs.items()}
    module = OnnxModule(trained, artifact.trainable)
    with torch.no_grad():
        module.load_state_dict({name: value.cpu() for name, value in weights.items()})
        results = module(*(torch.from_numpy(np.ascontiguousarray(inputs[name])) for name in module.inputs))
    mine = results if isinstance(results, tuple) else (results,)
    session = runtime.Session(trained)
    for name, computed, have in zip(module.outputs, session.run(inputs), mine, strict=True):
        want = np.asarray(computed)
        if want.dtype != np.float32:
            continue  # half precision is trained in float32, integers follow floats
        error = np.abs(want - have.numpy()).max() / max(float(want.std()), 1e-12)
        if not error <= TOLERANCE:
            raise ModelError(
                f"output {name} in onnxruntime differs from the trained module by {error:.1e} of its spread"
            )
