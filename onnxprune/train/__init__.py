"""Training in PyTorch (extra ``train``): an ONNX graph as a module, and the reference trainer."""

from __future__ import annotations

from onnxprune.errors import UsageError

try:
    import torch  # noqa: F401
except ImportError as error:
    raise UsageError("training needs PyTorch; install it with: pip install 'onnxprune[train]'") from error

from onnxprune.train.module import OnnxModule

__all__ = ["OnnxModule"]
