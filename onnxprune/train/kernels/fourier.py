"""Fourier transforms."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from onnxprune.errors import ModelError
from onnxprune.train.kernels import Call, computes


@computes("DFT", host=(1, 2))
def fourier_transform(call: Call, x: Tensor, length: Tensor | None = None, axis: Tensor | None = None) -> Tensor:
    """The last axis holds real and imaginary parts; the transformed axis is an input from opset 20 on."""
    where = call.get("axis", 1) if call.opset < 20 else -2 if axis is None else int(axis.item())
    where %= x.ndim
    n = x.shape[where] if length is None else int(length.item())
    if x.shape[-1] == 1:
        x = functional.pad(x, (0, 1))
    signal = torch.view_as_complex(x.contiguous())
    onesided = call.get("onesided", 0)
    if call.get("inverse", 0):
        if onesided:
            raise ModelError(f"{call.title}: an inverse one-sided transform")
        return torch.view_as_real(torch.fft.ifft(signal, n, where))
    spectrum = torch.fft.fft(signal, n, where)
    return torch.view_as_real(spectrum.narrow(where, 0, n // 2 + 1) if onesided else spectrum)
