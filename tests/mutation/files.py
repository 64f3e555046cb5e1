"""Changes of files: bytes that are lost, changed or moved, and external data that is not what the model says."""

from __future__ import annotations

import random

import onnx
from onnx import ModelProto, TensorProto

from .common import Unfit, integer, pick

Files = dict[str, bytes]
DATA = "weights.bin"


def truncate(found: Files, rng: random.Random) -> Files:
    """Cut the file short."""
    data = found["in.onnx"]
    return {**found, "in.onnx": data[: rng.choice((rng.randrange(len(data) + 1), max(len(data) - 1, 0), 0))]}


def flip(found: Files, rng: random.Random) -> Files:
    """Flip a bit."""
    return {**found, "in.onnx": _flipped(found["in.onnx"], rng, 1)}


def flip_many(found: Files, rng: random.Random) -> Files:
    """Flip bits, most of them where the structure is."""
    return {**found, "in.onnx": _flipped(found["in.onnx"], rng, rng.choice((3, 10, 100)))}


def _flipped(data: bytes, rng: random.Random, times: int) -> bytes:
    if not data:
        raise Unfit
    changed = bytearray(data)
    for _ in range(times):
        changed[rng.randrange(min(len(data), rng.choice((200, 5000, len(data)))))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def splice(found: Files, rng: random.Random) -> Files:
    """Drop, repeat, overwrite or append a run of bytes."""
    data = found["in.onnx"]
    a, b = sorted((rng.randrange(len(data) + 1), rng.randrange(len(data) + 1)))
    b = min(b, a + 300)
    middle = rng.choice((b"", data[a:b] * 2, bytes(b - a), rng.randbytes(b - a)))
    return {**found, "in.onnx": rng.choice((data[:a] + middle + data[b:], data + data[a:b], data + data))}


def external(found: Files, rng: random.Random) -> Files:
    """Keep weights in a file beside the model, as they should be, or with one thing wrong."""
    try:
        model = onnx.ModelProto.FromString(found["in.onnx"])
    except Exception as error:  # another change was before
        raise Unfit from error
    data = _outside(model)
    if not data:
        raise Unfit
    tensor = pick(rng, [t for t in model.graph.initializer if t.data_location == TensorProto.EXTERNAL])
    entries = {entry.key: entry for entry in tensor.external_data}
    way = rng.randrange(9)
    if way == 0:
        entries["offset"].value = rng.choice((str(integer(rng)), "x", "-1", "1e3", "", "9" * 40))
    elif way == 1:
        entries["length"].value = rng.choice((str(integer(rng)), "x", "-1", "0", "", "9" * 40))
    elif way == 2:
        places = ("../in.onnx", "/dev/zero", "/etc/passwd", ".", "", "nowhere", "in.onnx", "a\0b", "a" * 5000)
        entries["location"].value = rng.choice(places)
    elif way == 3:
        data = data[: rng.randrange(len(data))]
    elif way == 4:
        del tensor.external_data[:]
    elif way == 5:
        tensor.external_data.add(
            key=rng.choice(("location", "offset", "checksum", "view", "stamp")), value=rng.choice(("", "1", DATA))
        )
    elif way == 6:
        tensor.raw_data = b"1234"
    return {**found, "in.onnx": model.SerializeToString(deterministic=True), DATA: data}


def _outside(model: ModelProto) -> bytes:
    """Move the values of a model's initializers out of it, and return them."""
    data = b""
    for tensor in model.graph.initializer:
        if not tensor.raw_data:
            continue
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", DATA), ("offset", len(data)), ("length", len(tensor.raw_data))):
            tensor.external_data.add(key=key, value=str(value))
        data += tensor.raw_data
        tensor.ClearField("raw_data")
    return data


CHANGES = {
    "file: truncate": truncate, "file: flip a bit": flip, "file: flip bits": flip_many, "file: splice": splice,
    "file: external data": external,
}  # fmt: skip
