"""What a training artifact says of itself: ``manifest.json``, read and checked."""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from onnxprune import onnx_io
from onnxprune.errors import FileError, ModelError

SCHEMA = 1
KIND = "onnxprune-artifact"
FILE = "manifest.json"
FILES = ("student", "teacher", "plan")
PARTS = ("student.onnx", "teacher.onnx", "plan.json", "README.md")
"""What an artifact consists of beside the manifest and data of its models."""


@dataclass(frozen=True, slots=True, eq=False)
class GroupMember:
    """One axis of a trainable tensor, and which channel of the group each index carries.

    ``channels`` int64 of shape ``(size,)``, -1 where an index carries none of them; ``(rows, size)`` where every block of
    axis 0 has channels of its own there (weights of a grouped convolution).
    """

    tensor: str
    axis: int
    channels: np.ndarray


@dataclass(frozen=True, slots=True, eq=False)
class WeightedGroup:
    """Channels that can only be removed together with their slices of all members; ``weight`` is 1 on average."""

    id: str
    size: int
    weight: float
    members: tuple[GroupMember, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Feature:
    """A tensor of both graphs: the student's is the teacher's at ``kept`` on ``axis`` (None: all of it)."""

    tensor: str
    axis: int
    kept: np.ndarray | None


@dataclass(frozen=True, eq=False)
class Artifact:
    """A training artifact on disk: a folder, its files, and its manifest.

    Attributes
    ----------
    manifest
        ``manifest.json`` as plain data; docs/artifact.md describes every field.
    """

    directory: pathlib.Path
    student: pathlib.Path
    teacher: pathlib.Path
    plan: pathlib.Path
    manifest: Mapping[str, Any]

    @property
    def loss(self) -> str:
        """Suggested loss."""
        return str(self.manifest["loss"]["output"])

    @property
    def metric(self) -> str | None:
        """Suggested metric."""
        return self.manifest["metric"]

    @cached_property
    def trainable(self) -> tuple[str, ...]:
        """Names of the student's weights."""
        return tuple(entry["name"] for entry in self.manifest["trainable"])

    @cached_property
    def groups(self) -> tuple[WeightedGroup, ...]:
        """The student's prunable groups: what the regulariser drives to zero."""
        return tuple(
            WeightedGroup(
                group["id"],
                int(group["size"]),
                float(group["weight"]),
                tuple(
                    GroupMember(member["tensor"], int(member["axis"]), np.array(member["channels"], np.int64))
                    for member in group["members"]
                ),
            )
            for group in self.manifest["regularizer"]["groups"]
        )

    @cached_property
    def features(self) -> tuple[Feature, ...]:
        """Tensors in which the student can be compared with the teacher."""
        return tuple(
            Feature(
                entry["tensor"],
                int(entry["axis"]),
                None if entry["kept"] is None else np.array(entry["kept"], np.int64),
            )
            for entry in self.manifest["features"]
        )


def read_artifact(directory: str | os.PathLike) -> Artifact:
    """Read an artifact that ``export_artifact`` wrote, and check that its files are those it was written with.

    Raises
    ------
    FileError
        The folder or a file in it is missing or cannot be read.
    ModelError
        It is no artifact, one of another schema, or a file of it has changed since.
    """
    directory = pathlib.Path(directory)
    manifest = _manifest(directory)
    for path, digest in _digests(directory, manifest):
        onnx_io.require_file(path)
        if onnx_io.sha256(path) != digest:
            raise ModelError(f"{path}: is not the file that the artifact was written with; export the artifact again")
    artifact = artifact_of(directory, manifest)
    try:
        _ = artifact.trainable, artifact.groups, artifact.features, artifact.loss, artifact.metric
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise _malformed(directory, error) from error
    return artifact


def artifact_of(directory: pathlib.Path, manifest: Mapping[str, Any]) -> Artifact:
    """Name the files of an artifact."""
    student, teacher, plan = (directory / manifest["files"][name]["path"] for name in FILES)
    return Artifact(directory, student, teacher, plan, manifest)


def _manifest(directory: pathlib.Path) -> dict[str, Any]:
    if not directory.exists():
        raise FileError(f"{directory}: no such folder")
    path = directory / FILE
    if not path.is_file():
        raise ModelError(f'{directory}: is not a training artifact (no {FILE} in it); "onnxprune artifact" makes one')
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if manifest["kind"] != KIND:
            raise ModelError(f"{path}: is not the manifest of a training artifact")
        schema = manifest["schema"]
    except OSError as error:
        raise FileError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise _malformed(directory, error) from error
    if schema != SCHEMA:
        raise ModelError(f"{path}: schema {schema} is unknown to this version; it reads schema {SCHEMA}")
    return manifest


def _digests(directory: pathlib.Path, manifest: Mapping[str, Any]) -> Iterator[tuple[pathlib.Path, str]]:
    """Every file of an artifact with the digest it was written with; none may lie outside."""
    try:
        listed = [manifest["files"][name] for name in FILES]
        listed += [external for entry in listed for external in entry.get("external", ())]
        files = [(directory / str(entry["path"]), str(entry["sha256"])) for entry in listed]
        places = [path.resolve() for path, _ in files]
    except (KeyError, TypeError, ValueError, AttributeError) as error:  # ValueError: no system has files of such a name
        raise _malformed(directory, error) from error
    for (path, digest), place in zip(files, places, strict=True):
        if not place.is_relative_to(directory.resolve()):
            raise ModelError(f"{directory / FILE}: names {path}, which lies outside the artifact")
        yield path, digest


def _malformed(directory: pathlib.Path, error: Exception) -> ModelError:
    return ModelError(f"{directory / FILE}: not a manifest written by onnxprune ({error!r})")
