"""Which samples a step sees and how they are varied follows from seed, epoch and step alone."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("torch")

from onnxprune.data import Samples
from onnxprune.errors import UsageError
from onnxprune.train.batches import Batch, Batches
from onnxprune.train.recipe import Recipe


def samples(n: int = 20, size: int = 8, scale: int = 0, labels: bool = False) -> Samples:
    """Pictures whose pixels say sample, row and column; targets are the same picture, ``scale`` times as large."""
    grid = np.arange(size * size, dtype=np.float32).reshape(1, 1, size, size)
    pictures = grid + 1000 * np.arange(n, dtype=np.float32)[:, None, None, None]
    large = pictures.repeat(scale, 2).repeat(scale, 3) if scale else None
    cuts = list(range(0, n, 7))
    part = lambda array: tuple(array[a : a + 7] for a in cuts)  # noqa: E731
    return Samples(
        tuple({"x": piece} for piece in part(pictures)),
        tuple(len(piece) for piece in part(pictures)),
        part(np.arange(n)) if labels else None,
        None if large is None else part(large),
    )


def seen(batch: Batch) -> list[int]:
    """Numbers of the samples in a batch."""
    return [int(one.flat[0]) // 1000 for one in batch.inputs["x"]]


def test_an_epoch_shows_every_sample_once() -> None:
    """Every sample is in one batch of an epoch, whichever feed it was loaded in."""
    batches = Batches(samples(), Recipe(batch=5))
    assert sorted(n for batch in batches.epoch(0) for n in seen(batch)) == list(range(20))


def test_a_short_last_batch_is_left_out() -> None:
    """Samples of a short batch would weigh more than others, so it waits for another epoch's order."""
    batches = Batches(samples(), Recipe(batch=8))
    assert [len(seen(batch)) for batch in batches.epoch(0)] == [8, 8]
    missing = [set(range(20)) - {n for b in batches.epoch(e) for n in seen(b)} for e in range(4)]
    assert len(set(map(frozenset, missing))) > 1


def test_fewer_samples_than_a_batch_are_one_batch() -> None:
    """Data smaller than a batch is trained on all the same."""
    assert [len(seen(batch)) for batch in Batches(samples(3), Recipe(batch=8)).epoch(0)] == [3]


def test_going_on_within_an_epoch_changes_nothing() -> None:
    """Batch number 2 is the same whether the epoch is run from the start or gone on with from there."""
    batches = Batches(samples(), Recipe(batch=5, crop=4, flip="all", noise=0.5))
    whole, rest = list(batches.epoch(3)), list(batches.epoch(3, 2))
    assert len(rest) == len(whole) - 2
    for a, b in zip(whole[2:], rest, strict=True):
        np.testing.assert_array_equal(a.inputs["x"], b.inputs["x"])


def test_epochs_and_seeds_differ() -> None:
    """Another epoch, or another seed, has another order."""
    first = [seen(b) for b in Batches(samples(), Recipe(batch=5)).epoch(0)]
    assert first != [seen(b) for b in Batches(samples(), Recipe(batch=5)).epoch(1)]
    assert first != [seen(b) for b in Batches(samples(), Recipe(batch=5, seed=1)).epoch(0)]


@pytest.mark.parametrize("world", [2, 3])
def test_processes_share_a_batch(world: int) -> None:
    """All processes together see what one process sees, and each as many samples."""
    recipe = Recipe(batch=6, crop=4, flip="all")
    alone = list(Batches(samples(), recipe).epoch(0))
    shares = [list(Batches(samples(), recipe, rank, world).epoch(0)) for rank in range(world)]
    for step, whole in enumerate(alone):
        parts = [share[step].inputs["x"] for share in shares]
        assert len({len(part) for part in parts}) == 1
        together = np.empty_like(whole.inputs["x"])
        for rank, part in enumerate(parts):
            together[rank::world] = part
        np.testing.assert_array_equal(together, whole.inputs["x"])


@pytest.mark.parametrize("scale", [1, 2, 3])
@pytest.mark.parametrize("flip", ["none", "horizontal", "all"])
def test_pictures_and_targets_are_varied_alike(scale: int, flip: str) -> None:
    """A crop or mirror image of the input is that of the target, at the target's scale."""
    for batch in Batches(samples(scale=scale), Recipe(batch=5, crop=4, flip=flip)).epoch(0):
        assert batch.target is not None
        assert batch.inputs["x"].shape == (5, 1, 4, 4)
        np.testing.assert_array_equal(batch.target, batch.inputs["x"].repeat(scale, 2).repeat(scale, 3))


def test_all_eight_symmetries_occur() -> None:
    """``all`` shows a square picture in each of its eight symmetries."""
    batches = Batches(samples(4, 3), Recipe(batch=1, flip="all"))
    views = {(batch.inputs["x"] % 1000).tobytes() for epoch in range(30) for batch in batches.epoch(epoch)}
    assert len(views) == 8


def test_padding_keeps_the_size_and_shifts() -> None:
    """Zeros around a picture, cropped back: the size stays, the content moves."""
    batches = list(Batches(samples(labels=True), Recipe(batch=20, pad=2)).epoch(0))
    assert batches[0].inputs["x"].shape == (20, 1, 8, 8)
    assert (batches[0].inputs["x"] == 0).any()
    assert batches[0].label is not None


def test_noise_is_new_each_time_and_the_clean_picture_is_the_target() -> None:
    """Without targets the picture before noise is what is wanted; noise has the deviation asked for."""
    batches = Batches(samples(), Recipe(batch=20, noise=0.5))
    first, second = (next(batches.epoch(epoch)) for epoch in range(2))
    noises = []
    for batch in (first, second):
        assert batch.target is not None
        noises.append(batch.inputs["x"] - batch.target)
        assert abs(noises[-1].std() - 0.5) < 0.05
    assert not np.allclose(noises[0], noises[1])


@pytest.mark.parametrize(
    ("recipe", "data", "text"),
    [
        pytest.param(Recipe(crop=9), samples(), "larger than a picture", id="crop"),
        pytest.param(Recipe(pad=1), samples(scale=1), "classification", id="pad-with-target"),
        pytest.param(Recipe(batch=8), Samples(({"x": np.zeros((4, 2), np.float32)},), (4,), batched=False), "batch axis",
                     id="unbatched"),
        pytest.param(Recipe(flip="all"), Samples(({"x": np.zeros((4, 2), np.float32)},), (4,)), "pictures", id="rows"),
        pytest.param(Recipe(batch=8), Samples(({"x": np.zeros((4, 2), np.float32)},), (4,), fixed_batch=4), "--batch 4",
                     id="fixed-batch"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(recipe: Recipe, data: Samples, text: str) -> None:
    """Options that the data cannot follow are refused before any step, with what to do."""
    with pytest.raises(UsageError, match=text):
        Batches(data, recipe)


def test_mixup_blends_two_samples_of_the_batch() -> None:
    """Every input lies between two samples of its batch, each elsewhere."""
    (batch,) = Batches(samples(4, 2), Recipe(batch=4, mixup=1.0, loss="none")).epoch(0)
    shares = batch.inputs["x"][:, 0, 0, 0] / 1000
    assert ((shares >= 0) & (shares <= 3)).all()
    assert not np.allclose(shares, np.rint(shares))
    pixels = batch.inputs["x"] - 1000 * shares[:, None, None, None]
    np.testing.assert_allclose(pixels, np.broadcast_to(np.arange(4.0).reshape(1, 1, 2, 2), (4, 1, 2, 2)), atol=2e-3)
