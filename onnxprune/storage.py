"""Models as they are stored: which tensors lie in a file of their own beside the graph, and how both are written."""

from __future__ import annotations

import hashlib
import pathlib
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO

import onnx
from onnx import TensorProto

from onnxprune.errors import FileError
from onnxprune.external import SMALL, belongs_outside, contents, every_tensor, n_bytes
from onnxprune.protos import copy_fields

LIMIT = 2_000_000_000
"""Bytes of tensors beyond which a model is stored in two files: protobuf ends at 2**31, graph included."""

ALIGNED = 4096
"""What offsets of tensors that fill a page or more are multiples of, so that they can be mapped into memory."""


@dataclass(frozen=True, eq=False)
class Stored:
    """A model as two files hold it.

    Attributes
    ----------
    graph
        The model without the values of ``outside``; it still has to be told the name of their file.
    outside
        What goes into the file beside it: the place of a tensor in ``graph``, its values, and their offset there.
    size
        Bytes of both files.
    """

    graph: onnx.ModelProto
    outside: tuple[tuple[TensorProto, TensorProto, int], ...]
    size: int

    def name(self, file: str) -> None:
        """Write into the graph how the file beside it is called."""
        for tensor, _, _ in self.outside:
            tensor.external_data[0].value = file

    def write_data(self, file: IO[bytes]) -> str:
        """Write the file beside the graph, a tensor at a time; return the hex digest of its bytes."""
        digest = hashlib.sha256()
        place = 0
        for _, source, offset in self.outside:
            for piece in (bytes(offset - place), *contents(source)):
                file.write(piece)
                digest.update(piece)
            place = offset + n_bytes(source)
        return digest.hexdigest()


def has_parts(model: onnx.ModelProto) -> bool:
    """Whether a model cannot be serialised as it is: data of its tensors lies outside, or is too much for one file."""
    inside = 0
    for tensor in every_tensor(model):
        if belongs_outside(tensor):
            return True
        inside += n_bytes(tensor)
    return inside > LIMIT


def split(model: onnx.ModelProto) -> Stored:
    """Part a model from the tensors that lie outside: those that did when it was read, or all where it is too large.

    Tensors of less than :data:`SMALL` bytes stay inside.
    """
    inside = sum(n_bytes(tensor) for tensor in every_tensor(model) if not belongs_outside(tensor))
    moved: list[tuple[TensorProto, TensorProto]] = []
    graph = onnx.ModelProto()
    copy_fields(model, graph, leave_out=("graph",))
    _part(model.graph, graph.graph, moved, every=inside > LIMIT)
    outside, end = [], 0
    for tensor, source in moved:
        size = n_bytes(source)
        unit = ALIGNED if size >= ALIGNED else 16
        offset = -(-end // unit) * unit
        for key, value in (("location", "0" * 64), ("offset", str(offset)), ("length", str(size))):
            tensor.external_data.add(key=key, value=value)
        outside.append((tensor, source, offset))
        end = offset + size
    return Stored(graph, tuple(outside), graph.ByteSize() + end)


def _part(
    source: onnx.GraphProto, target: onnx.GraphProto, moved: list[tuple[TensorProto, TensorProto]], *, every: bool
) -> None:
    """Copy a graph, but for the bytes of tensors that lie outside."""
    copy_fields(source, target, leave_out=("initializer", "node"))
    for tensor in source.initializer:
        _add(tensor, target.initializer.add(), moved, every=every)
    for node in source.node:
        copy = target.node.add()
        copy_fields(node, copy, leave_out=("attribute",))
        for attribute in node.attribute:
            added = copy.attribute.add()
            copy_fields(attribute, added, leave_out=("t", "g", "graphs"))
            if attribute.HasField("t"):
                _add(attribute.t, added.t, moved, every=every and node.op_type == "Constant")
            if attribute.HasField("g"):
                _part(attribute.g, added.g, moved, every=every)
            for body in attribute.graphs:
                _part(body, added.graphs.add(), moved, every=every)


def _add(
    tensor: TensorProto, target: TensorProto, moved: list[tuple[TensorProto, TensorProto]], *, every: bool
) -> None:
    marked = belongs_outside(tensor)
    if n_bytes(tensor) >= SMALL and (every or marked):
        copy_fields(tensor, target, leave_out=(*_VALUES, "external_data", "data_location"))
        target.data_location = TensorProto.EXTERNAL
        moved.append((target, tensor))
    else:
        copy_fields(tensor, target, leave_out=("raw_data", "external_data", "data_location") if marked else ())
        if marked:
            target.raw_data = b"".join(contents(tensor))


_VALUES = ("raw_data", "float_data", "int32_data", "int64_data", "double_data", "uint64_data")


def size_of(model: onnx.ModelProto) -> int:
    """Bytes of the files that a model is stored in."""
    return split(model).size if has_parts(model) else model.ByteSize()


def temporary_folder() -> tempfile.TemporaryDirectory[str]:
    """Make a folder for temporary files.

    Raises
    ------
    FileError
        There is no place for one.
    """
    try:
        return tempfile.TemporaryDirectory(prefix="onnxprune.")
    except OSError as error:
        raise FileError(
            f"no folder for temporary files can be made ({error.strerror}); set TMPDIR to one that can be written"
        ) from error


@contextmanager
def temporary_file(model: onnx.ModelProto) -> Iterator[str]:
    """Write a model, with its external data beside it, to a file that lasts as long as the context.

    Raises
    ------
    FileError
        The folder for temporary files cannot hold it.
    """
    with temporary_folder() as folder:
        path = pathlib.Path(folder) / "model.onnx"
        try:
            if has_parts(model):
                stored = split(model)
                stored.name("model.data")
                with path.with_name("model.data").open("wb") as file:
                    stored.write_data(file)
                model = stored.graph
            path.write_bytes(model.SerializeToString())
        except OSError as error:
            raise FileError(
                f"{folder}: cannot hold the model ({error.strerror}); set TMPDIR to a larger folder"
            ) from error
        yield str(path)
