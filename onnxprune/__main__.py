"""``python -m onnxprune``, which torchrun needs."""

from onnxprune.cli import main

main()
