"""Fitting two operators together."""

from __future__ import annotations

import numpy as np
import pytest

from onnxprune.passes.least_squares import Rectifier, Weights
from onnxprune.passes.pairs import PairRows, refine


def rows_of(seed: int, *, taps: int = 1, rank: int = 3, n: int = 800):
    """A target that is a linear map of low rank of what all taps see, and where padding is."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n * taps, 6)).astype(np.float32)
    inside = np.ones(n * taps, bool) if taps == 1 else rng.random(n * taps) > 0.1
    hidden = (x @ rng.standard_normal((6, rank)) + 8) * inside[:, None]
    target = hidden.reshape(n, -1) @ rng.standard_normal((taps * rank, 5))
    return PairRows(x, inside, target.astype(np.float32), None, n * 4 // 5)


def start(seed: int, taps: int, width: int = 3):
    rng = np.random.default_rng(seed + 100)
    first = Weights(rng.standard_normal((1, 6, width)), np.full((1, width), 8.0))
    return first, Weights(rng.standard_normal((1, taps * width, 5)), np.zeros((1, 5)))


@pytest.mark.parametrize("taps", [1, 4])
@pytest.mark.parametrize("middle", [None, Rectifier()], ids=["linear", "relu"])
def test_pairs_find_a_map_of_their_rank(taps, middle):
    """Three channels carry any map of rank three, whatever they carried before; solving the second alone cannot."""
    rows = rows_of(0, taps=taps)
    found = refine(rows, start(0, taps)[0], middle, start(0, taps)[1], None, free_offsets=(True, True))
    assert found.error_before > 0.01 * rows.target.var()
    assert found.error < 0.05 * found.error_before


@pytest.mark.parametrize("seed", range(6))
def test_pairs_never_get_worse(seed):
    """On rows held back the error never rises, with rectifiers before and behind, also where nothing can be learnt."""
    rng = np.random.default_rng(seed)
    rows = PairRows(
        rng.standard_normal((60, 6)).astype(np.float32), np.ones(60, bool),
        rng.standard_normal((60, 5)).astype(np.float32), rng.standard_normal((60, 5)).astype(np.float32), 48,
    )  # fmt: skip
    found = refine(rows, *start(seed, 1)[:1], Rectifier(0.1), start(seed, 1)[1], Rectifier(), free_offsets=(True, True))
    assert found.error <= found.error_before


def test_offsets_stay_where_they_must():
    """An operator without a bias keeps its offset."""
    rows = rows_of(1)
    first, second = start(1, 1)
    found = refine(rows, first, None, second, None, free_offsets=(False, False))
    assert np.array_equal(found.first.offset, first.offset)
    assert np.array_equal(found.second.offset, second.offset)
    assert not np.array_equal(found.first.matrix, first.matrix)
