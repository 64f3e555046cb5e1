"""Arrays in files: .npz members, .npy, ONNX tensors and pictures, checked before they are read."""

from __future__ import annotations

import io
import lzma
import math
import tokenize
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO

import numpy as np
import onnx
from onnx import numpy_helper

from onnxprune.errors import FileError, UsageError
from onnxprune.files import require_plain

MAX_ARRAY_BYTES = 4 << 30  # of one array, counting only the samples that ``limit`` leaves
SWELLING, FREE = 100, 1 << 30
"""An archive may hold so many times its own bytes; up to ``FREE`` bytes it may hold more."""

_HEADER_BYTES = 12_000  # numpy itself refuses headers of more than 10,000 characters
_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
FORMATS = ("BMP", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""What a picture may be, whatever its name says: for some other formats Pillow starts programs."""

IMAGES = frozenset([".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"])
SAMPLES = IMAGES | {".npy", ".npz", ".pb"}
"""How files of data are called."""

_DAMAGED = (zipfile.BadZipFile, zlib.error, lzma.LZMAError)

Shape = tuple[int | str | None, ...]
Inputs = Mapping[str, tuple[Shape, np.dtype]]


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn what missing, forbidden and damaged files raise into :class:`FileError`; pipes and devices are refused."""
    require_plain(path)
    try:
        yield
    except FileNotFoundError as error:
        raise FileError(f"{path}: no such file or folder") from error
    except OSError as error:
        raise FileError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (EOFError, MemoryError, RuntimeError, SyntaxError, ValueError, *_DAMAGED) as error:
        raise FileError(f"{path}: damaged, or not what its name says ({error}); write it again") from error


@dataclass(frozen=True, eq=False)
class Entry:
    """An array in a file, of which only the header has been read."""

    path: Path
    name: str
    opened: Callable[[], IO[bytes]]
    shape: tuple[int, ...]
    fortran: bool
    dtype: np.dtype
    offset: int

    def read(self, rows: int | None = None) -> np.ndarray:
        """Read the values, of the first ``rows`` entries of axis 0 where that is given."""
        shape = (min(rows, self.shape[0]), *self.shape[1:]) if rows and self.shape and not self.fortran else self.shape
        n_bytes = math.prod(shape) * self.dtype.itemsize
        if self.dtype.kind not in "biuf":
            raise FileError(f"{self.path}: array {self.name!r} has type {self.dtype}; only plain numbers are read")
        if n_bytes > MAX_ARRAY_BYTES:
            raise FileError(
                f"{self.path}: array {self.name!r} of shape {self.shape} takes {n_bytes / 2**30:.1f} GiB, over the bound "
                f"of {MAX_ARRAY_BYTES / 2**30:g}; read fewer samples or split the file"
            )
        with reading(self.path), self.opened() as stream:
            stream.read(self.offset)
            values = bytearray(stream.read(n_bytes))
            if len(values) < n_bytes:
                raise EOFError(f"array {self.name!r} ends early")
            array: np.ndarray = np.ndarray(shape, self.dtype, values, order="F" if self.fortran else "C")
        return array[:rows] if rows else array


def entry(path: Path, name: str, opened: Callable[[], IO[bytes]]) -> Entry:
    with opened() as stream:
        head = io.BytesIO(stream.read(_HEADER_BYTES))
    version = np.lib.format.read_magic(head)
    if version not in _HEADERS:
        raise ValueError(f"array {name!r} is of .npy version {version}")
    try:
        shape, fortran, dtype = _HEADERS[version](head)
    except (
        IndexError,
        TypeError,
        tokenize.TokenError,
    ) as error:  # numpy parses Python, and checks no more than it needs
        raise ValueError(f"array {name!r} has a broken header: {error}") from error
    if not all(type(size) is int and size >= 0 for size in shape):
        raise ValueError(f"array {name!r} has shape {shape}")
    return Entry(path, name, opened, shape, fortran, dtype, head.tell())


@contextmanager
def open_entries(path: Path, inputs: Inputs) -> Iterator[dict[str, Entry]]:
    """Open an .npz or .npy file; the one array of .npy takes the name of the model's one input."""
    with ExitStack() as stack:
        with reading(path):
            if path.suffix.lower() == ".npy":
                name = next(iter(inputs)) if len(inputs) == 1 else path.stem
                entries = {name: entry(path, name, lambda: path.open("rb"))}
            else:
                archive = stack.enter_context(zipfile.ZipFile(path))
                if sum(member.file_size for member in archive.infolist()) > max(FREE, SWELLING * path.stat().st_size):
                    raise FileError(
                        f"{path}: would swell to more than {SWELLING} times its size; no data does, write it again"
                    )
                members = [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]
                entries = {name: entry(path, name, partial(archive.open, f"{name}.npy")) for name in members}
        yield entries


def tensor(path: Path) -> tuple[str, np.ndarray]:
    """Name and values of an ONNX tensor file."""
    with reading(path):
        if path.stat().st_size > MAX_ARRAY_BYTES:
            raise FileError(f"{path}: over the bound of {MAX_ARRAY_BYTES / 2**30:g} GiB")
        content = path.read_bytes()
        try:
            tensor = onnx.TensorProto.FromString(content)
        except Exception as error:  # protobuf's DecodeError differs between its implementations
            raise FileError(f"{path}: not an ONNX tensor") from error
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            raise FileError(f"{path}: keeps its values in another file, which is not read; store them inside")
        if tensor.data_type in (onnx.TensorProto.STRING, onnx.TensorProto.COMPLEX64, onnx.TensorProto.COMPLEX128):
            raise FileError(f"{path}: holds texts or complex numbers; only plain numbers are read")
        try:
            return tensor.name, numpy_helper.to_array(tensor)
        except (KeyError, TypeError, ValueError) as error:  # KeyError: a data type that does not exist
            raise FileError(f"{path}: not a complete ONNX tensor ({error})") from error


@contextmanager
def _no_warning(kind: type[Warning]) -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", kind)
        yield


def picture(path: Path, shape: Shape) -> np.ndarray:
    """Pixels of an image, uint8, in the channels and axis order of a declared input shape."""
    try:
        from PIL import Image  # noqa: PLC0415 - an extra
    except ImportError as error:
        raise UsageError(f"{path}: reading images needs Pillow; pip install 'onnxprune[images]'") from error
    if len(shape) != 4:
        raise UsageError(f"{path}: a picture does not fit an input of shape {shape_text(shape)}; images need four axes")
    last = shape[3] in (1, 3) and shape[1] not in (1, 3)
    channels = shape[3 if last else 1]
    try:
        with reading(path), _no_warning(Image.DecompressionBombWarning), Image.open(path, formats=FORMATS) as image:
            if image.mode[0] in "IF" or (isinstance(channels, int) and channels not in (1, 3)):
                raise UsageError(
                    f"{path}: mode {image.mode} does not fit an input of shape {shape_text(shape)}; images are read as 8 "
                    "bits in 1 or 3 channels, store others as .npy"
                )
            grey = channels == 1 or (channels != 3 and image.mode in ("1", "L"))
            pixels = np.asarray(image.convert("L" if grey else "RGB"))
    except Image.DecompressionBombError as error:
        raise FileError(f"{path}: {error}") from error
    pixels = pixels.reshape(*pixels.shape[:2], -1)
    return pixels if last else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def shape_text(shape: Shape) -> str:
    """Write a declared shape, ? for what is not declared."""
    return f"({', '.join('?' if n is None else str(n) for n in shape)})"
