"""Quality metrics: a name, a measure, what it compares with; and how an output is read before it is compared.

The quality of a model is the mean of a measure's values per sample (see :mod:`onnxprune.measures`). More metrics come
through Python entry points of group ``onnxprune.metrics``, each an object of type :class:`Metric`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from types import MappingProxyType
from typing import Literal

import numpy as np

from onnxprune.errors import UsageError
from onnxprune.measures import cosine, mse, psnr, ssim, top1


@dataclass(frozen=True)
class Metric:
    """How good predictions are.

    Parameters
    ----------
    function
        Takes a prediction and what was wanted, both with samples on axis 0, and returns one value per sample.
    needs
        What predictions are compared with: ``label`` (class numbers), ``target`` (tensors like the output), or
        ``reference``: targets if the data has any, else the outputs of a reference model (fidelity to the original).
    options
        Fields of :class:`View` that the function takes as keywords.
    """

    name: str
    function: Callable[..., np.ndarray]
    higher_is_better: bool
    needs: Literal["target", "label", "reference"]
    options: tuple[str, ...] = ()


@dataclass(frozen=True)
class View:
    """How an output is read as a picture before it is compared.

    Parameters
    ----------
    output
        ``residual`` where the network predicts what is wrong with its input (DnCNN: the noise), so that the prediction
        is input minus output.
    clip
        Limit predictions to 0..``peak``.
    data_range
        The largest value of a picture, as PSNR and SSIM take it; 1 where it is not given.
    crop_border
        Rows and columns cut off at each side, as is usual in super-resolution.
    channels
        ``y`` compares the luma of RGB pictures (:func:`luma`) in the place of all their channels.
    round_bits
        Round pictures, and the luma made of them, to the values that so many bits can hold, as 8-bit files do.

    Raises
    ------
    UsageError
        A value is out of range.
    """

    output: Literal["direct", "residual"] = "direct"
    clip: bool = False
    data_range: float | None = None
    crop_border: int = 0
    channels: Literal["rgb", "y"] = "rgb"
    round_bits: int | None = None

    def __post_init__(self) -> None:
        if self.output not in ("direct", "residual"):
            raise UsageError(f"output {self.output!r} is unknown; choose direct or residual")
        if self.channels not in ("rgb", "y"):
            raise UsageError(f"channels {self.channels!r} is unknown; choose rgb or y")
        if not 0 < self.peak < np.inf:
            raise UsageError(
                f"data range {self.peak} is not above 0; give the largest value of a picture, such as 1 or 255"
            )
        if self.crop_border < 0:
            raise UsageError(f"border {self.crop_border} is below 0; give the number of rows and columns to cut off")
        if self.round_bits is not None and not 1 <= self.round_bits <= 16:
            raise UsageError(f"round bits {self.round_bits}: pictures have 1 to 16 bits; give 8 for 8-bit files")

    @property
    def peak(self) -> float:
        """The largest value of a picture: ``data_range``, or 1."""
        return 1.0 if self.data_range is None else self.data_range

    @property
    def changes(self) -> bool:
        """Whether pictures are changed before they are compared."""
        reads = (self.output, self.channels) != ("direct", "rgb")
        return reads or self.clip or bool(self.crop_border) or self.round_bits is not None

    def predict(self, values: np.ndarray, entered: np.ndarray) -> np.ndarray:
        """Turn the model's output ``values`` on the input ``entered`` into the prediction, not yet cropped."""
        if self.output == "residual":
            if values.shape != entered.shape:
                raise UsageError(
                    f"output residual: the output has shape {values.shape}, the input {entered.shape}; "
                    "only a model whose output is shaped like its first input predicts a residual"
                )
            values = entered - values
        return np.clip(values, 0, self.peak) if self.clip else values

    def crop(self, picture: np.ndarray) -> np.ndarray:
        """Cut the border off the last two axes."""
        if not self.crop_border:
            return picture
        if picture.ndim < 3 or min(picture.shape[-2:]) <= 2 * self.crop_border:
            raise UsageError(f"border {self.crop_border} leaves nothing of a picture of shape {picture.shape[1:]}")
        inside = slice(self.crop_border, -self.crop_border)
        return picture[..., inside, inside]

    def compared(self, picture: np.ndarray) -> np.ndarray:
        """Return what of a prediction, or of what was wanted, is compared: cropped, rounded, its luma."""
        picture = self._rounded(self.crop(picture))
        return self._rounded(luma(picture, self.peak)) if self.channels == "y" else picture

    def _rounded(self, picture: np.ndarray) -> np.ndarray:
        if self.round_bits is None:
            return picture
        steps = 2**self.round_bits - 1
        return np.rint(picture.astype(np.float64) * (steps / self.peak)) * (self.peak / steps)


def luma(picture: np.ndarray, peak: float = 1.0) -> np.ndarray:
    """Luma of RGB pictures in 0..``peak``: ITU-R BT.601, studio range, so that black is 16/255 and white 235/255 of peak.

    Parameters
    ----------
    picture
        ``(samples, 3, height, width)``; the result has one channel.
    """
    if picture.ndim < 4 or picture.shape[-3] != 3:
        raise UsageError(
            f"channels y: a picture has shape {picture.shape[1:]}, luma is made of 3 channels (RGB, height, width); "
            "a picture of one channel is compared as it is"
        )
    weights = np.array([65.481, 128.553, 24.966]) / 255
    return np.einsum("c,...chw->...hw", weights, picture.astype(np.float64))[..., None, :, :] + 16 / 255 * peak


METRICS: Mapping[str, Metric] = MappingProxyType(
    {
        metric.name: metric
        for metric in (
            Metric("psnr", psnr, True, "target", ("peak",)),
            Metric("ssim", ssim, True, "target", ("peak",)),
            Metric("top1", top1, True, "label"),
            Metric("cosine", cosine, True, "reference"),
            Metric("mse", mse, False, "reference"),
        )
    }
)


def names() -> tuple[str, ...]:
    """Names of all metrics, built in ones first, then those of installed plug-ins."""
    plugged = sorted({entry.name for entry in entry_points(group="onnxprune.metrics")} - set(METRICS))
    return (*METRICS, *plugged)


def find(name: str) -> Metric:
    """Find a metric by name: built in, or a Python entry point of group ``onnxprune.metrics``.

    Raises
    ------
    UsageError
        No metric has that name, or the plug-in that has it does not load or is no :class:`Metric`.
    """
    if name in METRICS:
        return METRICS[name]
    for entry in entry_points(group="onnxprune.metrics", name=name):
        try:
            metric = entry.load()
        except Exception as error:  # a plug-in's import can fail in any way
            raise UsageError(f"metric {name}: the plug-in {entry.value} does not load: {error}") from error
        if not isinstance(metric, Metric):
            raise UsageError(f"metric {name}: the plug-in {entry.value} is not an onnxprune.metrics.Metric")
        return metric
    raise UsageError(f"metric {name}: unknown; choose from {', '.join(names())}")
