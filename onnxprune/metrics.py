"""Quality metrics: a name, a measure, what it compares with; and how an output is read before it is compared.

The quality of a model is the mean of a measure's values per sample (see :mod:`onnxprune.measures`). More metrics are a
function named ``module:function``, or come through Python entry points of group ``onnxprune.metrics``, each an object of
type :class:`Metric`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import wraps
from importlib.metadata import entry_points
from types import MappingProxyType
from typing import Literal, get_args

import numpy as np

from onnxprune.errors import OnnxPruneError, UsageError
from onnxprune.importing import named, told
from onnxprune.measures import agreement, cosine, decibels, mse, psnr, ssim, top1

Needs = Literal["target", "label", "reference", "original"]


@dataclass(frozen=True)
class Metric:
    """How good predictions are.

    Parameters
    ----------
    function
        Takes a prediction and what was wanted, both with samples on axis 0, and returns one value per sample.
    needs
        What predictions are compared with: ``label`` (class numbers), ``target`` (tensors like the output),
        ``original``: the outputs of the original model, or ``reference``: targets if the data has any, else the outputs
        of the original model.
    options
        Attributes of :class:`View` that the function takes as keywords.
    scores
        Whether predictions are scores of classes on axis 1, to which a :class:`View` does not apply; so they are
        wherever labels are needed.
    finish
        Turns the function's values and the data range into the metric's, once the range of the original's outputs over
        all data is known; that range is used where :class:`View` has none.
    """

    name: str
    function: Callable[..., np.ndarray]
    higher_is_better: bool
    needs: Needs
    options: tuple[str, ...] = ()
    scores: bool = False
    finish: Callable[[np.ndarray, float], np.ndarray] | None = None

    @property
    def of_classes(self) -> bool:
        """Whether predictions are read as scores of classes, not as pictures."""
        return self.scores or self.needs == "label"

    def check(self, view: View) -> None:
        """Raise :class:`UsageError` where pictures are to be changed, and there are none."""
        if self.of_classes and view.changes:
            raise UsageError(
                "residual output, clipping, cropping, luma and rounding are for pictures; "
                f"metric {self.name} reads scores of classes"
            )


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
            Metric("agreement-psnr", mse, True, "original", finish=decibels),
            Metric("agreement-top1", agreement, True, "original", scores=True),
        )
    }
)


def names() -> tuple[str, ...]:
    """Names of all metrics, built in ones first, then those of installed plug-ins."""
    plugged = sorted({entry.name for entry in entry_points(group="onnxprune.metrics")} - set(METRICS))
    return (*METRICS, *plugged)


def find(metric: str | Metric | Callable) -> Metric:
    """Find a metric: built in, ``module:function``, or a Python entry point of group ``onnxprune.metrics``.

    Parameters
    ----------
    metric
        A name; a function, as :func:`from_function` takes it; or a metric, which is returned.

    Raises
    ------
    UsageError
        No metric has that name, or what the name leads to does not load or is no metric.
    """
    if isinstance(metric, Metric):
        return metric
    if not isinstance(metric, str):
        return from_function(metric)
    if metric in METRICS:
        return METRICS[metric]
    if ":" in metric:
        found = named(metric, "metric")
        return found if isinstance(found, Metric) else from_function(found, metric)
    for entry in entry_points(group="onnxprune.metrics", name=metric):
        try:
            plugged = entry.load()
        except Exception as error:  # a plug-in's import can fail in any way
            raise UsageError(f"metric {metric}: the plug-in {entry.value} does not load: {error}") from error
        if not isinstance(plugged, Metric):
            raise UsageError(f"metric {metric}: the plug-in {entry.value} is not an onnxprune.metrics.Metric")
        return plugged
    raise UsageError(f"metric {metric}: unknown; choose from {', '.join(names())} or name a module:function")


def from_function(function: Callable, name: str = "") -> Metric:
    """Make a metric of a function of a prediction and what was wanted that returns one value per sample.

    Parameters
    ----------
    function
        Both its arguments have samples on axis 0. Its attributes say more: ``higher_is_better`` (True where it has
        none) and ``needs`` (``target``; else ``label``, ``reference`` or ``original``, as :class:`Metric` has them).

    Raises
    ------
    UsageError
        It cannot be called, or its attributes have other values. The metric raises it where the function fails.
    """
    name = name or getattr(function, "__qualname__", type(function).__name__)
    if not callable(function):
        raise UsageError(f"metric {name}: is no function but {type(function).__name__}; name a module:function")
    better: object = getattr(function, "higher_is_better", True)
    needs: Needs = getattr(function, "needs", "target")
    if not isinstance(better, bool):
        raise UsageError(f"metric {name}: its higher_is_better is {better!r}; it must be True or False")
    if needs not in get_args(Needs):
        raise UsageError(f"metric {name}: its needs is {needs!r}; it must be one of {', '.join(get_args(Needs))}")

    @wraps(function)
    def guarded(prediction: np.ndarray, wanted: np.ndarray) -> np.ndarray:
        try:
            return np.asarray(function(prediction, wanted))
        except OnnxPruneError:
            raise
        except Exception as error:  # a user's function can fail in any way
            shapes = f"a prediction of shape {prediction.shape}, wanted {wanted.shape}"
            raise UsageError(f"metric {name}: fails on {shapes}: {told(error)}") from error

    return Metric(name, guarded, better, needs)
