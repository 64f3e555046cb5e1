"""Training in PyTorch (extra ``train``): an ONNX graph as a module, and the reference trainer."""

from __future__ import annotations

from onnxprune.errors import UsageError

try:
    import torch  # noqa: F401
except ImportError as error:
    raise UsageError("training needs PyTorch; install it with: pip install 'onnxprune[train]'") from error

from onnxprune.train.finetune import Trained, finetune
from onnxprune.train.module import OnnxModule
from onnxprune.train.recipe import Recipe
from onnxprune.train.sparsity import GroupLasso

__all__ = ["GroupLasso", "OnnxModule", "Recipe", "Trained", "finetune"]
