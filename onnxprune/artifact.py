"""Artifact: a folder with all that training a pruned model takes, with or without onnxprune.

The student and the teacher as ONNX files, the plan between them, and a manifest that says which weights to train, which
channels belong together and what removing them would save, and where the two networks can be compared.
"""

from __future__ import annotations

import json
import os
import pathlib
import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import numpy as np
import onnx
from onnx import helper

from onnxprune import onnx_io, runtime
from onnxprune.cost import Cost
from onnxprune.errors import FileError, ProofError, UsageError
from onnxprune.manifest import FILE, KIND, SCHEMA, Artifact, artifact_of
from onnxprune.memory import peak_memory
from onnxprune.options import Clock, ModelLike, Options, Progress, silent
from onnxprune.pipeline import Loaded, keep_under, load, options_from, read_plan, verify_loaded
from onnxprune.plan import Plan, make_plan
from onnxprune.prepare import inline, prepare
from onnxprune.protos import named_tensors
from onnxprune.recover import recover
from onnxprune.supervision import feature_entries, group_entries
from onnxprune.trainable import trainable

LOSS = "distillation"


def export_artifact(
    original: ModelLike, pruned: ModelLike, directory: str | os.PathLike, plan: Plan | str | os.PathLike | None = None, *,
    loss: str = LOSS, metric: str | None = None, force: bool = False, options: Options | None = None,
    progress: Progress = silent, **chosen: Any,
) -> Artifact:  # fmt: skip
    """Write a training artifact: verify ``pruned``, then put everything that training it takes into a folder.

    Parameters
    ----------
    plan
        What made ``pruned`` of ``original``; None finds it out where the weights that stayed are unchanged.
    loss, metric
        Suggestions for the trainer, stored as they are given.
    force
        Replace the artifact that ``directory`` holds; other files in it stay.
    chosen
        Fields of :class:`Options`.

    Raises
    ------
    ProofError
        ``pruned`` is not what the plan makes of ``original``.
    UsageError
        The folder exists, or there is no plan and none can be told from the weights.
    """
    options = options or options_from(chosen)
    directory = pathlib.Path(directory)
    check_directory(directory, force=force)
    clock = Clock()
    given = None if plan is None else read_plan(plan)
    with runtime.threads_limited(options.threads):
        teacher = load(original, options, clock, given)
        known = given or _recovered(teacher, pruned)
        try:
            verify_loaded(teacher, pruned, known, options, clock, progress)
        except ProofError as error:
            if given is not None:
                raise
            raise UsageError(
                f"the plan that the weights suggest does not make one model of the other ({error}); give the plan (--plan)"
            ) from error
        student = load(pruned, options, clock, known)
    manifest = {
        "schema": SCHEMA,
        "kind": KIND,
        "onnxprune": version("onnxprune"),
        "loss": {"output": loss},
        "metric": metric,
        "data": None,
        **describe(teacher, student, known),
    }
    return _write(directory, original, pruned, known, manifest)


def check_directory(directory: pathlib.Path, *, force: bool) -> None:
    """Refuse a folder that exists: with ``force`` only one that is no artifact and not empty either."""
    if directory.exists() and not directory.is_dir():
        raise UsageError(f"{directory}: is a file; name a folder for the artifact")
    if directory.exists() and not force:
        raise UsageError(f"{directory}: exists; choose another name or use --force to replace the artifact in it")
    if directory.exists() and any(directory.iterdir()) and not (directory / FILE).is_file():
        raise UsageError(f"{directory}: holds other files and no artifact; choose another name")
    if not directory.absolute().parent.is_dir():
        raise FileError(f"{directory}: the folder {directory.absolute().parent} does not exist")


def _recovered(teacher: Loaded, pruned: ModelLike) -> Plan:
    read = pruned if isinstance(pruned, onnx.ModelProto) else onnx_io.load(pruned)
    keep = recover(teacher.coupling, prepare(inline(read))[0])
    return make_plan(teacher.coupling, keep, teacher.sha256)


def describe(teacher: Loaded, student: Loaded, plan: Plan) -> dict[str, Any]:
    """Everything in a manifest that follows from the two models and the plan."""
    graph = inline(student.source).graph
    tensors = {tensor.name: tensor for tensor in named_tensors(graph)}
    reasons = trainable(inline(student.source))
    weights = {name for name, reason in reasons.items() if not reason}
    keep = keep_under(teacher, plan)
    initial = {tensor.name for tensor in graph.initializer}
    graphs = (inline(teacher.source).graph, graph)
    return {
        "inputs": [_value_entry(value) for value in graph.input if value.name not in initial],
        "outputs": [_value_entry(value) for value in graph.output],
        "trainable": [_tensor_entry(tensors[name]) for name in reasons if name in weights],
        "constant": [{**_tensor_entry(tensors[name]), "reason": why} for name, why in reasons.items() if why],
        "cost": {"before": _total(teacher.cost), "after": _total(student.cost)},
        "regularizer": {"kind": "group-lasso", "groups": group_entries(student.cost, weights)},
        "features": feature_entries(teacher.coupling, keep, student.coupling.model.shapes, graphs),
    }


def _total(cost: Cost) -> dict[str, int]:
    every = np.ones(cost.coupling.n_classes, bool)
    return cost.of(every) | {"peak_memory": peak_memory(cost.coupling, every)}


def _tensor_entry(tensor: onnx.TensorProto) -> dict[str, Any]:
    return {"name": tensor.name, "shape": list(tensor.dims), "dtype": _dtype(tensor.data_type)}


def _value_entry(value: onnx.ValueInfoProto) -> dict[str, Any]:
    kind = value.type.tensor_type
    shape = [dim.dim_value if dim.HasField("dim_value") else dim.dim_param or None for dim in kind.shape.dim]
    return {"name": value.name, "shape": shape if kind.HasField("shape") else None, "dtype": _dtype(kind.elem_type)}


def _dtype(data_type: int) -> str:
    return helper.tensor_dtype_to_np_dtype(data_type).name if data_type else "unknown"


# -- files -----------------------------------------------------------------------------------------------------------


def _write(
    directory: pathlib.Path, original: ModelLike, pruned: ModelLike, plan: Plan, manifest: dict[str, Any]
) -> Artifact:
    """Write all files into a folder beside the artifact's, then give it that name; into an artifact they move one by one."""
    parent = directory.absolute().parent
    try:
        with tempfile.TemporaryDirectory(prefix=f".{directory.name[:100]}.", dir=parent) as temporary:
            staging = pathlib.Path(temporary) / "artifact"
            staging.mkdir()
            files = {
                "student": _add_model(pruned, staging / "student.onnx"),
                "teacher": _add_model(original, staging / "teacher.onnx"),
            }
            onnx_io.write(staging / "plan.json", json.dumps(plan.to_json(), indent=1).encode())
            files["plan"] = _file_entry(staging / "plan.json")
            full = {**{k: manifest[k] for k in ("schema", "kind", "onnxprune")}, "files": files, **manifest}
            onnx_io.write(staging / "README.md", _readme(full).encode())
            onnx_io.write(staging / FILE, json.dumps(full, indent=1).encode())
            if directory.exists() and any(directory.iterdir()):
                _replace(staging, directory)
            else:
                staging.replace(directory)
    except OSError as error:
        raise FileError(f"{directory}: cannot be written ({error.strerror})") from error
    return artifact_of(directory, full)


def _replace(staging: pathlib.Path, directory: pathlib.Path) -> None:
    """Move files over those of an older artifact, the manifest last: until then its digests tell of the mixture."""
    files = sorted((path for path in staging.rglob("*") if path.is_file()), key=lambda path: path.name == FILE)
    for path in files:
        target = directory / path.relative_to(staging)
        target.parent.mkdir(parents=True, exist_ok=True)
        path.replace(target)


def _add_model(model: ModelLike, path: pathlib.Path) -> dict[str, Any]:
    """Copy a model's file as it is, with its external data, or save a model that is in memory."""
    if isinstance(model, onnx.ModelProto):
        onnx_io.save(model, path)
    else:
        source = pathlib.Path(model)
        for location, file in onnx_io.data_of(source).items():
            twin = path.parent / location
            if twin.exists() and onnx_io.sha256(twin) != onnx_io.sha256(file):
                raise UsageError(f"both models keep their data in a file {location}; save one of them in a single file")
        onnx_io.copy(source, path, force=True)
    entry = _file_entry(path)
    if data := onnx_io.data_of(path):
        entry["external"] = [{**_file_entry(file), "path": name} for name, file in data.items()]
    return entry


def _file_entry(path: pathlib.Path) -> dict[str, Any]:
    return {"path": path.name, "sha256": onnx_io.sha256(path)}


def _readme(manifest: Mapping[str, Any]) -> str:
    before, after = (manifest["cost"][when]["mac"] for when in ("before", "after"))
    share = f"{100 * after / before:.1f} % of" if before else "as many as"
    return README.format(share=share, version=manifest["onnxprune"], n_weights=len(manifest["trainable"]))


README = """\
# Training artifact

Made by onnxprune {version}. The student needs {share} the teacher's multiply-accumulates.

| file | |
|---|---|
| `student.onnx` | the pruned network, to be trained: {n_weights} of its tensors are weights |
| `teacher.onnx` | the network before pruning, to learn from |
| `plan.json` | which channels of the teacher the student has |
| `manifest.json` | which tensors to train, which channels belong together, where the two networks can be compared |

Train it with onnxprune:

    onnxprune finetune DIR --data TRAIN.npz OUT.onnx

Or without: both networks are plain ONNX files. `manifest.json` names the student's weights (`trainable`), tensors in which
the student should do as the teacher at the channels `kept` (`features`), and groups of channels for a group lasso
(`regularizer`); all names are names of tensors in the ONNX graphs, after local functions have been inlined. The weights:

    import json, onnx
    from onnx import numpy_helper
    manifest = json.load(open("manifest.json"))
    student = onnx.load("student.onnx")
    values = {{t.name: numpy_helper.to_array(t) for t in student.graph.initializer}}
    weights = {{w["name"]: values.get(w["name"]) for w in manifest["trainable"]}}  # None: a Constant node holds it

After training write the values back under the same names and shapes, and have the result proved:

    onnxprune verify teacher.onnx OUT.onnx --plan plan.json
"""
