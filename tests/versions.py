"""What older versions of the libraries cannot do, though onnxprune supports them: tests that are left out there."""

from __future__ import annotations

from fnmatch import fnmatchcase
from importlib.metadata import version

KERNEL = "has no kernel for it"
CRASH = "crashes on it"
WRONG = "computes it wrongly or refuses it"

LACKING: dict[tuple[str, str], dict[str, str]] = {
    ("onnxruntime", "1.32"): {
        "test_attention.py::*[[]Attention-no-bias*": CRASH,
        "test_attention.py::*[[]GroupQueryAttention-quantised*": KERNEL,
        "test_fused.py::*[[]FusedConv-residual*": WRONG,
        "test_fused.py::*[[]Skip*LayerNormalization-outputs*": WRONG,
        "test_indexing.py::*[[]ReverseSequence-*": WRONG,
        "test_indexing.py::*[[]TensorScatter-*": KERNEL,
        "test_integer.py::*[[]QAttention-*": KERNEL,
        "test_integer.py::*[[]QLinearConv-unsigned-per-channel*": WRONG,
        "test_pool.py::*[[]Resize-sizes-of-negative-axes*": CRASH,
        "test_prove.py::*integer_model*[[]residual*": WRONG,
        "test_prove.py::test_another_scale_or_zero_point_is_caught[[]*-of-an-o*": WRONG,
        "test_sampling.py::*[[]DeformConv-*": KERNEL,
        "test_shared.py::*[[]ScaledSiLU-custom-domain*": KERNEL,
    },
    ("onnx", "1.23"): {
        "test_recurrent.py::test_batch_may_come_first*": "its reference implementation " + WRONG,
    },
}
"""By package and the first version that is known to do it: patterns of tests, and what is wrong with older ones."""


def numbers(text: str) -> tuple[int, ...]:
    """Return the first two parts of a version."""
    return tuple(int(part) for part in text.split(".")[:2])


OLD = {which: why for which, why in LACKING.items() if numbers(version(which[0])) < numbers(which[1])}


def lacking(test: str) -> str:
    """Say why a test cannot pass with what is installed; nothing where it can."""
    for (package, _), patterns in OLD.items():
        for pattern, why in patterns.items():
            if fnmatchcase(test.rpartition("/")[2], pattern):
                return f"{package} {version(package)} {why}"
    return ""
