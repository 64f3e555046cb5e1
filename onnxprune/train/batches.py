"""Batches: which samples a step sees and how they are varied, a function of seed, epoch and step alone.

So a run that was killed goes on exactly where it stopped, and every process of a distributed run knows what the others do.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from onnxprune.data import Samples
from onnxprune.errors import UsageError
from onnxprune.train.recipe import Recipe


@dataclass(frozen=True, eq=False)
class Batch:
    """Arrays with samples on axis 0; ``target`` and ``label`` are None where the data has none."""

    inputs: dict[str, np.ndarray]
    target: np.ndarray | None
    label: np.ndarray | None


@dataclass(frozen=True, eq=False)
class Pool:
    """Samples of one size."""

    inputs: dict[str, np.ndarray]
    target: np.ndarray | None
    label: np.ndarray | None

    @property
    def n(self) -> int:
        """Number of samples."""
        return len(next(iter(self.inputs.values())))


class Batches:
    """All batches of an epoch, in an order of its own.

    Parameters
    ----------
    rank, world
        This process's number and how many there are: each gets an equal share of every batch.
    """

    def __init__(self, samples: Samples, recipe: Recipe, rank: int = 0, world: int = 1) -> None:
        if not samples.batched:
            raise UsageError("the training data's axis 0 is no batch axis; training needs samples that can be batched")
        if samples.fixed_batch not in (None, 1, recipe.batch // world):
            raise UsageError(
                f"the model's batch is fixed at {samples.fixed_batch}; give --batch {samples.fixed_batch * world}"
            )
        self.recipe, self.rank, self.world = recipe, rank, world
        self.size = world if samples.fixed_batch == 1 else recipe.batch
        self.pools = _pools(samples)
        if recipe.crop or recipe.pad or recipe.flip != "none" or recipe.noise or recipe.mixup:
            _check_pictures(self.pools, recipe)
        self.steps = len(self._chunks(0))
        if not self.steps:
            raise UsageError(
                f"the data holds fewer samples of one size than processes ({world}); nothing can be trained"
            )

    def _chunks(self, epoch: int) -> list[tuple[Pool, np.ndarray]]:
        order = np.random.default_rng((self.recipe.seed, epoch))
        chunks = []
        for pool in self.pools:
            shuffled = order.permutation(pool.n)
            for begin in range(0, pool.n, self.size):
                rows = shuffled[begin : begin + self.size]
                even = len(rows) - len(rows) % self.world
                small = len(rows) < self.size and pool.n >= self.size  # a short last batch would weigh its samples more
                if even and not small:
                    chunks.append((pool, rows[:even]))
        return [chunks[k] for k in order.permutation(len(chunks))]

    def epoch(self, epoch: int, first: int = 0) -> Iterator[Batch]:
        """Batches of an epoch from number ``first`` on: this process's share of each."""
        for step, (pool, rows) in enumerate(self._chunks(epoch)):
            if step >= first:
                chance = np.random.default_rng((self.recipe.seed, epoch, step))
                yield self._vary(pool, rows, chance)

    def _vary(self, pool: Pool, rows: np.ndarray, chance: np.random.Generator) -> Batch:
        recipe = self.recipe
        inputs, target = (
            {k: v[rows] for k, v in pool.inputs.items()},
            None if pool.target is None else pool.target[rows],
        )
        label = None if pool.label is None else pool.label[rows]
        name = next(iter(inputs))
        picture = inputs[name]
        if recipe.pad or recipe.crop:
            picture, target = _cropped(picture, target, recipe, chance)
        if recipe.flip != "none":
            picture, target = _flipped(picture, target, recipe.flip, chance)
        if recipe.noise:
            target = picture if target is None and label is None else target
            picture = picture + recipe.noise * chance.standard_normal(picture.shape, np.float32)
        if recipe.mixup:
            share = chance.beta(recipe.mixup, recipe.mixup, len(picture)).astype(picture.dtype)
            share = share.reshape(-1, *[1] * (picture.ndim - 1))
            picture = share * picture + (1 - share) * picture[::-1]
        mine = slice(self.rank, None, self.world)
        inputs = {**inputs, name: picture}
        return Batch(
            {k: np.ascontiguousarray(v[mine]) for k, v in inputs.items()},
            None if target is None else np.ascontiguousarray(target[mine]),
            None if label is None else label[mine],
        )


def _pools(samples: Samples) -> list[Pool]:
    """Gather samples of one size, without the rows that only fill up a fixed batch."""
    found: dict[tuple, list[int]] = {}
    for k, feed in enumerate(samples.feeds):
        target = samples.targets[k].shape[1:] if samples.targets else ()
        found.setdefault((*(a.shape[1:] for a in feed.values()), target), []).append(k)

    def together(arrays: Sequence[np.ndarray] | None, which: list[int]) -> np.ndarray | None:
        return None if arrays is None else np.concatenate([arrays[k][: samples.counts[k]] for k in which])

    return [
        Pool(
            {
                name: np.concatenate([samples.feeds[k][name][: samples.counts[k]] for k in which])
                for name in samples.feeds[0]
            },
            together(samples.targets, which),
            together(samples.labels, which),
        )
        for which in found.values()
    ]


def _check_pictures(pools: list[Pool], recipe: Recipe) -> None:
    for pool in pools:
        picture = next(iter(pool.inputs.values()))
        if len(pool.inputs) > 1 or picture.ndim != 4 or picture.dtype.kind != "f":
            raise UsageError("crop, pad, flip, noise and mixup are for models with one input of pictures (N, C, H, W)")
        height, width = picture.shape[2:]
        if recipe.crop > min(height, width) + 2 * recipe.pad:
            raise UsageError(f"crop {recipe.crop} is larger than a picture of {height}x{width}")
        if pool.target is None:
            continue
        scaled = pool.target.ndim == 4 and pool.target.shape[2] % height == 0
        if not scaled or pool.target.shape[2] * width != pool.target.shape[3] * height:
            raise UsageError(
                f"targets of shape {pool.target.shape[1:]} are no multiple of pictures of {height}x{width}"
            )
        if recipe.pad:
            raise UsageError("pad is for classification; pictures with targets are cropped only")


def _cropped(
    picture: np.ndarray, target: np.ndarray | None, recipe: Recipe, chance: np.random.Generator
) -> tuple[np.ndarray, np.ndarray | None]:
    """Cut a window out of every picture, and the same out of its target, whatever the target's scale."""
    height, width = (recipe.crop or side for side in picture.shape[2:])
    if recipe.pad:
        sides = (recipe.pad, recipe.pad)
        picture = np.pad(picture, ((0, 0), (0, 0), sides, sides))
    factor = 1 if target is None else target.shape[2] // picture.shape[2]
    tops = chance.integers(0, picture.shape[2] - height + 1, len(picture))
    lefts = chance.integers(0, picture.shape[3] - width + 1, len(picture))

    def windows(array: np.ndarray, scale: int) -> np.ndarray:
        return np.stack(
            [
                one[:, top * scale : (top + height) * scale, left * scale : (left + width) * scale]
                for one, top, left in zip(array, tops, lefts, strict=True)
            ]
        )

    return windows(picture, 1), None if target is None else windows(target, factor)


def _flipped(
    picture: np.ndarray, target: np.ndarray | None, flip: str, chance: np.random.Generator
) -> tuple[np.ndarray, np.ndarray | None]:
    """Mirror every picture or not; with ``all`` upside down and across the diagonal, too (the whole batch, if square)."""
    n = len(picture)
    mirrored = chance.random(n) < 0.5
    upside = (chance.random(n) < 0.5) & (flip == "all")
    turned = bool(chance.random() < 0.5) and flip == "all" and picture.shape[2] == picture.shape[3]

    def apply(array: np.ndarray) -> np.ndarray:
        array = np.where(mirrored[:, None, None, None], array[..., ::-1], array)
        array = np.where(upside[:, None, None, None], array[..., ::-1, :], array)
        return array.swapaxes(2, 3) if turned else array

    return apply(picture), None if target is None else apply(target)
