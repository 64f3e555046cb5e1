"""Pictures of a report: where original and pruned model differ most, as PNG in data URIs."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

WINDOW = 96
"""Rows and columns that are shown of a picture."""
SHOWN = 4
"""Samples that are shown: those with the largest differences."""


@dataclass(frozen=True)
class Picture:
    """The window of one sample in which the outputs differ most.

    Attributes
    ----------
    sample, top, left
        Which sample, and the window's first row and column.
    rms, largest
        Root mean square and largest magnitude of the difference in the window, in units of the output.
    low, high
        Values that are shown as black and as white.
    gain
        What the difference is multiplied by where it is shown, around grey.
    wanted, original, pruned, difference
        ``data:image/png;base64,...``; ``wanted`` is None where the data has no targets.
    """

    sample: int
    top: int
    left: int
    rms: float
    largest: float
    low: float
    high: float
    gain: float
    original: str
    pruned: str
    difference: str
    wanted: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        return dict(vars(self))


def worst(
    samples: Iterable[tuple[np.ndarray, np.ndarray, np.ndarray | None]], peak: float | None, shown: int = SHOWN
) -> tuple[Picture, ...]:
    """Show the windows with the largest mean squared difference, the worst sample first.

    Parameters
    ----------
    samples
        Predictions of the original and of the pruned model, and what was wanted or None: each ``(channels, height, width)``
        with one or three channels. Samples of other shapes, or with infinities, are passed over.
    peak
        The value that is shown as white, with 0 as black; None for the range of what is shown of the original.
    """
    found = sorted(_windows(samples), key=lambda window: (-window[0], window[1]))[:shown]
    low, high = 0.0, peak
    if high is None and found:
        low, high = (float(end([end(window[4]) for window in found])) for end in (np.min, np.max))
    return tuple(_picture(*window[1:], low, high if high is not None and high > low else low + 1) for window in found)


Window = tuple[float, int, int, int, np.ndarray, np.ndarray, np.ndarray | None]


def _windows(samples: Iterable[tuple[np.ndarray, np.ndarray, np.ndarray | None]]) -> Iterator[Window]:
    for number, (first, second, wanted) in enumerate(samples):
        shown = is_picture(first.shape) and first.shape == second.shape
        if shown and np.isfinite(first).all() and np.isfinite(second).all():
            before, after = first.astype(np.float64), second.astype(np.float64)
            squares = np.square(after - before).mean(0)
            height, width = (min(WINDOW, n) for n in squares.shape)
            sums = np.pad(squares.cumsum(0).cumsum(1), ((1, 0), (1, 0)))
            boxes = sums[height:, width:] - sums[:-height, width:] - sums[height:, :-width] + sums[:-height, :-width]
            top, left = (int(n) for n in np.unravel_index(boxes.argmax(), boxes.shape))
            cut = (slice(None), slice(top, top + height), slice(left, left + width))
            same = wanted is not None and wanted.shape == before.shape
            yield (
                float(boxes[top, left]) / (height * width), number, top, left, before[cut].copy(), after[cut].copy(),
                wanted[cut].copy() if same and wanted is not None else None,
            )  # fmt: skip


def is_picture(shape: tuple[int, ...]) -> bool:
    """Whether an output without its batch axis is a grey or colour picture."""
    return len(shape) == 3 and shape[0] in (1, 3) and min(shape[1:]) >= 8


def _picture(
    number: int, top: int, left: int, before: np.ndarray, after: np.ndarray, wanted: np.ndarray | None,
    low: float, high: float,
) -> Picture:  # fmt: skip
    difference, peak = after - before, high - low
    largest = float(np.abs(difference).max())
    gain = 2.0 ** min(12, max(0, math.floor(math.log2(peak / largest / 2)))) if largest > 0 else 1.0
    return Picture(
        sample=number,
        top=top,
        left=left,
        rms=float(np.sqrt(np.square(difference).mean())),
        largest=largest,
        low=low,
        high=high,
        gain=gain,
        original=_uri((before - low) / peak),
        pruned=_uri((after - low) / peak),
        difference=_uri(0.5 + gain * difference / peak),
        wanted=None if wanted is None else _uri((wanted - low) / peak),
    )


def _uri(values: np.ndarray) -> str:
    """PNG of ``(channels, height, width)`` values in 0..1."""
    from PIL import Image  # noqa: PLC0415 (comes with matplotlib, which draws the charts)

    pixels = np.rint(255 * np.clip(values, 0, 1)).astype(np.uint8)
    written = io.BytesIO()
    Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0)).save(written, "png", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(written.getvalue()).decode()}"
