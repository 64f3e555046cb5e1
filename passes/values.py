"""Values: refuse weights by which nothing can be ranked, and of which nothing can be proved.

NaN never equals NaN, so a network that computes it has no proof. Infinity is a value like others where it stays (masks of
attention hold it), but channels that hold it cannot be ranked.
"""

from __future__ import annotations

import numpy as np

from onnxprune.coupling import Coupling
from onnxprune.errors import ModelError
from onnxprune.ops.quantised import quantised

_QUANTISE = ("QuantizeLinear", "DequantizeLinear")


def check_values(coupling: Coupling) -> None:
    """Look at every constant that has channels, and at the variances of normalisations.

    Raises
    ------
    ModelError
        A constant holds NaN, or infinity in channels that could be removed; a variance makes its network compute NaN.
    """
    axes: dict[str, bool] = {}
    for member in coupling.members:
        axes[member.tensor] = axes.get(member.tensor, False) or not coupling.frozen[member.classes].all()
    for name, prunable in axes.items():
        constant = coupling.model.constants[name]
        if not constant.floating or not constant.size:
            continue
        nan, endless = _holds(constant.load())
        if nan:
            raise ModelError(f"{name}: holds NaN; train or export the model again")
        if endless and prunable:
            raise ModelError(f"{name}: holds infinity where channels could be removed; train or export the model again")
    scales = [weight.scale for weight in quantised(coupling.model).values()]
    scales += [coupling.model.constant(node.inputs[1]) for node in coupling.model.nodes if node.op in _QUANTISE]
    for scale in scales:
        if scale is not None and scale.size and any(_holds(scale.load().astype(np.float64))):
            raise ModelError(f"{scale.name}: a scale is NaN or infinite; quantise or export the model again")
    for node in coupling.model.nodes:
        if node.op != "BatchNormalization" or node.attributes.get("training_mode", 0):
            continue
        variance = coupling.model.constant(node.inputs[4])
        if variance is None:
            continue
        values = variance.load().astype(np.float64) + float(np.float32(node.attributes.get("epsilon", 1e-5)))
        if not (values > 0).all():
            raise ModelError(
                f"{node.title}: variance {values.min():.3g} of channel {int(values.argmin())} (with epsilon) is not above "
                "zero, so that it computes NaN; train or export the model again"
            )


def _holds(array: np.ndarray) -> tuple[bool, bool]:
    """Whether an array holds NaN, and whether it holds infinity."""
    if array.dtype == np.float16:  # numpy's arithmetic in half precision is ten times slower than looking at the bits
        largest = int((array.view(np.uint16) & 0x7FFF).max())
        return largest > 0x7C00, largest == 0x7C00
    ends = float(np.min(array)), float(np.max(array))  # both pass NaN on
    return bool(np.isnan(ends).any()), bool(np.isinf(ends).any())
