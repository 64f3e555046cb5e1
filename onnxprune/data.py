"""Calibration and evaluation data, brought into the shapes and types that a model takes.

- ``.npz``: arrays named as the model's inputs, samples on axis 0 (a ``.npy`` file likewise); or ``NAME_000``,
  ``NAME_001``, ... with one sample each, where sizes differ; class numbers as ``label``, wanted outputs as ``target``.
- A folder of ``.npy`` (models with one input) or ``.npz`` files: one sample per file, in the order of their names.
- ``test_data_set_N`` with ``input_0.pb``, ``output_0.pb``, or a folder of such; the first float output is the target.
- A folder of images: one sample per file, for models with one input of 1 or 3 channels (extra ``images``).

A sample may come with or without its batch axis. Where that axis has more than one row, the rows count as samples in
inputs of four axes or more; otherwise nothing tells that axis 0 is a batch, and they are one sample, fed as it is.
Nothing is ever unpickled, and an array's size is checked in its header before its values are read.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from onnxprune.arrays import IMAGES, Entry, Inputs, Shape, open_entries, picture, reading, shape_text, tensor
from onnxprune.errors import UsageError

Part = Literal["all", "search", "check"]
_NUMBER = r"_(\d{1,18})"  # of a sample; Python itself refuses to read numbers of thousands of digits
_WANTED = {"label": ("label", "labels"), "target": ("target", "targets")}


@dataclass(frozen=True, eq=False)
class Samples:
    """Data ready to feed.

    Parameters
    ----------
    feeds
        Arrays by input name, each feed what one run takes.
    counts
        Samples in each feed, which may hold more rows: a fixed batch is filled up by repeating the last sample.
    labels, targets
        Per feed an array whose axis 0 has ``counts[k]`` entries; None where the data has none.
    batched
        False where a feed is one sample whose axis 0 is no batch axis; its outputs are one sample as a whole, too.
    fixed_batch
        Rows that every feed must have, where the model declares its batch.
    notes
        What was decided on the user's behalf.
    """

    feeds: tuple[dict[str, np.ndarray], ...]
    counts: tuple[int, ...]
    labels: tuple[np.ndarray, ...] | None = None
    targets: tuple[np.ndarray, ...] | None = None
    batched: bool = True
    notes: tuple[str, ...] = ()
    fixed_batch: int | None = None

    @property
    def n(self) -> int:
        """Number of samples."""
        return sum(self.counts)


def load(
    path: str | Path,
    inputs: Inputs,
    limit: int | None = None,
    *,
    batch: int = 32,
    scale: float | None = None,
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
) -> Samples:
    """Load samples and arrange them in feeds for a model.

    Parameters
    ----------
    inputs
        Declared shape and type of each input, as :class:`onnxprune.runtime.Session` has them.
    limit
        Read this many samples at most.
    batch
        Samples of equal size that are fed together where the model's batch is dynamic; a fixed batch is obeyed.
    scale, mean, std
        Integers, where the model takes floats, become ``(value * scale - mean) / std``; mean and std are one number or
        one per channel. ``scale`` is 1/255 for uint8 by default and must be given for other integers. Integer targets
        are multiplied by ``scale`` alone. Float arrays are taken as they are.

    Raises
    ------
    FileError
        A file is missing, unreadable, or holds an array of more than :data:`onnxprune.arrays.MAX_ARRAY_BYTES`.
    UsageError
        The content does not fit the model, holds NaN, or needs Pillow, which is missing.
    """
    if batch < 1 or (limit is not None and limit < 1):
        raise UsageError(f"limit {limit}, batch {batch}: both must be 1 or more")
    path, notes = Path(path), list[str]()
    encoding = _Encoding(scale, mean, std)
    items = _items(path, inputs, limit, notes)
    if not items:
        raise UsageError(f"{path}: holds no samples")
    encoded = {array.dtype for item in items for array in _encoded(item, inputs)}
    if scale is None and np.dtype(np.uint8) in encoded:
        notes.append("uint8 values were divided by 255; give a scale for anything else")
    if not encoded and not (scale is None and mean is None and std is None):
        notes.append("scale, mean and std apply to integers that enter a float input; the data holds none")
    whole = any(item.whole for item in items)
    groups = list(_groups(items, max(_fixed_batches(inputs), default=batch), whole))
    return Samples(
        feeds=tuple(_feed(group, inputs, encoding, whole) for group in groups),
        counts=tuple(sum(item.count for item in group) for group in groups),
        labels=_wanted(path, groups, "label", _class_numbers),
        targets=_wanted(path, groups, "target", encoding.target),
        batched=not whole,
        notes=tuple(dict.fromkeys(notes)),
        fixed_batch=None if whole else max(_fixed_batches(inputs), default=None),
    )


def part_of(samples: Samples, part: Part) -> Samples:
    """Return all samples, or one of their :func:`halves`: the one to search with, or the one to check the result on."""
    if part == "all":
        return samples
    if part not in ("search", "check"):
        raise UsageError(f"part {part!r} of the data is unknown; choose all, search or check")
    return halves(samples)[part == "check"]


def halves(samples: Samples) -> tuple[Samples, Samples]:
    """Split samples in two that have none in common: the first, third, ..., and the second, fourth, ....

    Rows of a feed are split, too; a fixed batch is filled up again. A single sample has no halves (:class:`UsageError`).
    """
    if samples.n < 2:
        raise UsageError(
            "the data holds one sample; give two or more, so that a result is checked on others than it fits"
        )
    return _every_second(samples, 0), _every_second(samples, 1)


def _every_second(samples: Samples, first: int) -> Samples:
    """Samples number ``first``, ``first + 2``, ... as they are fed, without feeds of which nothing is left."""
    begins = itertools.accumulate(samples.counts, initial=0)
    rows = [np.arange((first - begin) % 2, count, 2) for begin, count in zip(begins, samples.counts, strict=False)]
    kept = [k for k, chosen in enumerate(rows) if len(chosen)]

    def of_those(arrays: tuple[np.ndarray, ...] | None) -> tuple[np.ndarray, ...] | None:
        return None if arrays is None else tuple(arrays[k][rows[k]] for k in kept)

    return replace(
        samples,
        feeds=tuple(_rows_of(samples, k, rows[k]) for k in kept),
        counts=tuple(len(rows[k]) for k in kept),
        labels=of_those(samples.labels),
        targets=of_those(samples.targets),
    )


def _rows_of(samples: Samples, k: int, rows: np.ndarray) -> dict[str, np.ndarray]:
    if not samples.batched:
        return samples.feeds[k]
    missing = max(0, (samples.fixed_batch or 0) - len(rows))
    return {name: array[np.append(rows, np.repeat(rows[-1:], missing))] for name, array in samples.feeds[k].items()}


# -- from files to items -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Item:
    """What is never taken apart: one sample with its batch axis, or rows that came together.

    ``wanted`` holds label and target with ``count`` entries on axis 0; ``whole``: axis 0 of the inputs is no batch.
    """

    where: str
    inputs: dict[str, np.ndarray]
    wanted: dict[str, np.ndarray]
    count: int
    whole: bool

    @property
    def alike(self) -> tuple:
        """Items can share a feed where this is equal."""
        return tuple((name, a.shape[1:], a.dtype.str) for name, a in sorted((self.inputs | self.wanted).items()))


def _items(path: Path, inputs: Inputs, limit: int | None, notes: list[str]) -> list[_Item]:
    with reading(path):
        path.stat()
        files = sorted(path.iterdir()) if path.is_dir() else []
    if path.is_dir():
        return _folder(path, files, inputs, limit, notes)
    if path.suffix.lower() not in (".npz", ".npy"):
        raise UsageError(
            f"{path}: unknown kind of data; give .npz, or a folder of .npy, .npz, images or test_data_set_N"
        )
    with open_entries(path, inputs) as entries:
        sources = _sources(path, entries, inputs, notes)
        columns = {name: column for name, array in sources.items() if (column := _column(entries, array))}
        lengths = {name: len(column) if isinstance(column, list) else _rows(column) for name, column in columns.items()}
        if len(set(lengths.values())) > 1:
            found = ", ".join(f"{name} {n}" for name, n in lengths.items())
            raise UsageError(f"{path}: arrays differ in their number of samples ({found}); axis 0 must be the samples")
        read = {name: _pieces(column, limit) for name, column in columns.items()}
    return [
        _item(f"{path}, sample {k}", dict(zip(read, pieces, strict=True)), inputs)
        for k, pieces in enumerate(zip(*read.values(), strict=True))
    ]


def _column(entries: Mapping[str, Entry], name: str) -> Entry | list[Entry] | None:
    """One array of all samples, or the arrays NAME_000, NAME_001, ..., or None."""
    if name in entries:
        return entries[name]
    pattern = re.compile(re.escape(name) + _NUMBER)
    numbered = {int(found[1]): entry for key, entry in entries.items() if (found := pattern.fullmatch(key))}
    return [numbered[number] for number in sorted(numbered)] or None


def _rows(entry: Entry) -> int:
    if not entry.shape:
        raise UsageError(f"{entry.path}: array {entry.name!r} is a single number; axis 0 must be the samples")
    return entry.shape[0]


def _pieces(column: Entry | list[Entry], limit: int | None) -> list[np.ndarray]:
    if isinstance(column, list):
        return [entry.read() for entry in column[:limit]]
    array = column.read(limit)
    return [array[k, ...] for k in range(len(array))]


def _sources(where: Path, entries: Mapping[str, Entry], inputs: Inputs, notes: list[str]) -> dict[str, str]:
    """Name of the array, or of the numbered arrays, that holds each input, and label and target where there are any."""
    keys = {kind: [key for key in keys if key not in inputs] for kind, keys in _WANTED.items() if kind not in inputs}
    wanted = {kind: key for kind in keys for key in keys[kind] if _column(entries, key)}
    missing = [name for name in inputs if not _column(entries, name)]
    if not missing:
        return {name: name for name in inputs} | wanted
    stems = {key: re.sub(f"{_NUMBER}$", "", key) for key in entries}
    reserved = {key for names in keys.values() for key in names}
    others = {stem: entries[key] for key, stem in stems.items() if not reserved & {key, stem}}
    if len(inputs) == 1:
        usable = [key for key, entry in others.items() if _could_fit(entry, inputs[missing[0]][0])] or list(others)
        if len(usable) == 1:
            notes.append(f"array {usable[0]!r} is taken as the model's input {missing[0]!r}")
            return {missing[0]: usable[0]} | wanted
    asked = ", ".join(f"{name!r} {shape_text(inputs[name][0])}" for name in missing)
    found = ", ".join(f"{name!r} {entry.shape}" for name, entry in entries.items()) or "none"
    raise UsageError(f"{where}: no array for input {asked}; found {found[:300]}; name the arrays as the model's inputs")


def _could_fit(entry: Entry, shape: Shape) -> bool:
    inner = shape[1:]
    tail = entry.shape[len(entry.shape) - len(inner) :]
    return (
        entry.dtype.kind in "biuf"
        and abs(len(entry.shape) - len(shape)) <= 1
        and all(not isinstance(want, int) or want == n for want, n in zip(inner, tail, strict=True))
    )


def _folder(path: Path, files: list[Path], inputs: Inputs, limit: int | None, notes: list[str]) -> list[_Item]:
    sets = [path] if (path / "input_0.pb").exists() else _numbered(path, "test_data_set_*")
    if sets:
        return [_test_data_set(folder, inputs) for folder in sets[:limit]]
    arrays = [file for file in files if file.suffix.lower() in (".npy", ".npz")]
    images = [file for file in files if file.suffix.lower() in IMAGES]
    if bool(arrays) == bool(images):
        kinds = "both arrays and images" if arrays else "no .npy, .npz, input_0.pb or image"
        raise UsageError(f"{path}: holds {kinds}; give a folder of one kind")
    if arrays:
        return [_one_sample(file, inputs, notes) for file in arrays[:limit]]
    if len(inputs) != 1:
        raise UsageError(f"{path}: images feed one input, the model has {len(inputs)} ({', '.join(inputs)}); use .npz")
    ((name, (shape, _)),) = inputs.items()
    return [_item(str(file), {name: picture(file, shape)}, inputs) for file in images[:limit]]


def _numbered(folder: Path, pattern: str) -> list[Path]:
    return sorted(folder.glob(pattern), key=lambda path: (int((re.findall(r"\d+", path.stem) or [0])[-1]), path.name))


def _test_data_set(folder: Path, inputs: Inputs) -> _Item:
    tensors = [tensor(file) for file in _numbered(folder, "input_*.pb")]
    if len(tensors) != len(inputs):
        raise UsageError(f"{folder}: holds {len(tensors)} inputs, the model takes {len(inputs)} ({', '.join(inputs)})")
    by_name = dict(tensors)
    arrays = by_name if set(by_name) == set(inputs) else dict(zip(inputs, (a for _, a in tensors), strict=True))
    outputs = (tensor(file)[1] for file in _numbered(folder, "output_*.pb"))
    target = next((array for array in outputs if array.dtype.kind == "f"), None)
    return _item(str(folder), arrays if target is None else {**arrays, "target": target}, inputs)


def _one_sample(file: Path, inputs: Inputs, notes: list[str]) -> _Item:
    with open_entries(file, inputs) as entries:
        sources = _sources(file, entries, inputs, notes)
        sources |= {k: key for k, keys in _WANTED.items() if k not in inputs for key in keys if key in entries}
        if numbered := [array for array in sources.values() if array not in entries]:
            raise UsageError(f"{file}: numbered arrays {numbered[0]}_...; in a folder each file is one sample")
        return _item(str(file), {name: entries[array].read() for name, array in sources.items()}, inputs)


def _item(where: str, arrays: Mapping[str, np.ndarray], inputs: Inputs) -> _Item:
    """Give one sample its batch axis and check it against the declared shapes."""
    for name, array in arrays.items():
        if array.dtype.kind == "f" and np.isnan(array).any():
            raise UsageError(f"{where}: {name!r} holds NaN; correct or remove that sample")
    fed = {name: arrays[name] for name in inputs}
    bare = [name for name, (shape, _) in inputs.items() if fed[name].ndim == len(shape) - 1]
    fed |= {name: fed[name][None] for name in bare}
    rows = {array.shape[:1] for array in fed.values()}
    count = max((n for lead in rows for n in lead), default=1)
    whole = len(rows) > 1 or () in rows or (count > 1 and min(array.ndim for array in fed.values()) < 4)
    for name, (shape, _) in inputs.items():
        as_fed = whole or count > 1 or len(_fixed_batches(inputs)) > 1
        fixed = shape if as_fed else (None, *shape[1:])
        if not _fits(fed[name].shape, fixed):
            raise UsageError(
                f"{where}: input {name!r} has shape {arrays[name].shape}, the model takes {shape_text(shape)}; "
                "give each sample that shape, with or without the batch axis"
            )
    count = 1 if whole else count
    wanted = {}
    for kind in _WANTED:
        if kind in arrays and kind not in inputs:
            value = arrays[kind]
            has_axis = not whole and not bare and value.shape[:1] == (count,)
            if not has_axis and count > 1:
                raise UsageError(
                    f"{where}: {kind} has shape {value.shape} for {count} samples; axis 0 must be the samples"
                )
            wanted[kind] = value if has_axis else value[None]
    return _Item(where, fed, wanted, count, whole)


def _fits(shape: tuple[int, ...], declared: Shape) -> bool:
    return (
        len(shape) == len(declared)
        and 0 not in shape
        and all(not isinstance(want, int) or want == n for want, n in zip(declared, shape, strict=True))
    )


# -- from items to feeds -----------------------------------------------------------------------------------------------


def _fixed_batches(inputs: Inputs) -> set[int]:
    return {shape[0] for shape, _ in inputs.values() if shape and isinstance(shape[0], int)}


def _groups(items: list[_Item], size: int, whole: bool) -> Iterator[list[_Item]]:
    """Items that are fed together: neighbours of equal shapes, ``size`` at most."""
    for _, run in itertools.groupby(items, key=lambda item: (item.alike, item.count)):
        same = list(run)
        step = 1 if whole or same[0].count > 1 else size
        yield from (same[k : k + step] for k in range(0, len(same), step))


def _feed(items: list[_Item], inputs: Inputs, encoding: _Encoding, whole: bool) -> dict[str, np.ndarray]:
    feed = {}
    for name, (_, dtype) in inputs.items():
        array = items[0].inputs[name] if len(items) == 1 else np.concatenate([item.inputs[name] for item in items])
        array = encoding.input(f"{items[0].where}: input {name!r}", array, dtype)
        if not whole and (missing := max(_fixed_batches(inputs), default=0) - len(array)) > 0:
            array = np.concatenate([array, np.repeat(array[-1:], missing, axis=0)])
        feed[name] = np.asarray(array, order="C")
    return feed


def _wanted(
    path: Path, groups: list[list[_Item]], kind: str, convert: Callable[[str, np.ndarray], np.ndarray]
) -> tuple[np.ndarray, ...] | None:
    lacking = [item.where for group in groups for item in group if kind not in item.wanted]
    if len(lacking) == sum(map(len, groups)):
        return None
    if lacking:
        raise UsageError(f"{path}: {lacking[0]} has no {kind}, others have; give all samples one, or none")
    return tuple(
        convert(f"{group[0].where}: {kind}", np.concatenate([item.wanted[kind] for item in group])) for group in groups
    )


# -- values ------------------------------------------------------------------------------------------------------------


def _encoded(item: _Item, inputs: Inputs) -> list[np.ndarray]:
    """Integers that become floats."""
    floats = [array for name, array in item.inputs.items() if inputs[name][1].kind == "f"]
    targets = [array for kind, array in item.wanted.items() if kind == "target"]
    return [array for array in floats + targets if array.dtype.kind in "iu"]


@dataclass(frozen=True)
class _Encoding:
    """How integers become the floats that a model takes: ``(value * scale - mean) / std``."""

    scale: float | None
    mean: float | Sequence[float] | None
    std: float | Sequence[float] | None

    def __post_init__(self) -> None:
        scale = 1.0 if self.scale is None else self.scale
        std = np.asarray(1.0 if self.std is None else self.std, np.float64)
        mean = np.asarray(0.0 if self.mean is None else self.mean, np.float64)
        if not (np.isfinite([scale, std.sum(), mean.sum()]).all() and scale and std.all()):
            raise UsageError(
                f"scale {self.scale}, mean {self.mean}, std {self.std}: all must be finite, scale and std not 0"
            )

    def input(self, where: str, array: np.ndarray, dtype: np.dtype) -> np.ndarray:
        """Return values of the type that the model takes."""
        if dtype.kind == "f" and array.dtype.kind in "iu":
            array = self._scaled(where, array, np.promote_types(dtype, np.float32))
            array = array if self.mean is None else array - _per_channel(where, "mean", self.mean, array)
            array = array if self.std is None else array / _per_channel(where, "std", self.std, array)
        elif dtype.kind != "f" and array.dtype.kind == "f":
            raise UsageError(f"{where} holds {array.dtype}, the model takes {dtype}; store whole numbers")
        with np.errstate(over="ignore"):
            cast = array.astype(dtype, copy=False)
        kept = np.array_equal(np.isinf(cast), np.isinf(array)) if dtype.kind == "f" else np.array_equal(cast, array)
        if not kept:
            raise UsageError(f"{where} holds values beyond the range of {dtype}, which the model takes; rescale them")
        return cast

    def target(self, where: str, array: np.ndarray) -> np.ndarray:
        """Return targets as floats."""
        if array.dtype.kind in "iu":
            return self._scaled(where, array, np.dtype(np.float32))
        return array.astype(np.float32) if array.dtype.kind == "b" else array

    def _scaled(self, where: str, array: np.ndarray, dtype: np.dtype) -> np.ndarray:
        scale = 1 / 255 if self.scale is None and array.dtype == np.uint8 else self.scale
        if scale is None:
            raise UsageError(
                f"{where} holds {array.dtype} where floats are taken; give a scale, 1 to take values as they are"
            )
        return array.astype(dtype) / dtype.type(1 / scale)  # division by 255 is exact where the factor 1/255 is not


def _per_channel(where: str, name: str, value: float | Sequence[float], array: np.ndarray) -> np.ndarray:
    """Shape ``value`` to broadcast along the channels, axis 1 or the last."""
    values = np.asarray(value, array.dtype).reshape(-1)
    if len(values) == 1:
        return values
    axis = next(
        (axis for axis in (1, array.ndim - 1) if 1 <= axis < array.ndim and array.shape[axis] == len(values)), 0
    )
    if not axis:
        raise UsageError(f"{where} has shape {array.shape}, {name} {len(values)} numbers; give one, or one per channel")
    return values.reshape([-1 if k == axis else 1 for k in range(array.ndim)])


def _class_numbers(where: str, array: np.ndarray) -> np.ndarray:
    if array.dtype.kind not in "iu":
        raise UsageError(f"{where} holds {array.dtype}; labels are class numbers, store integers from 0")
    return array.astype(np.int64)
