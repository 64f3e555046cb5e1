"""A random graph whose tensors know where their channels are, and can be laid out as a step needs them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from math import prod
from typing import Any

import numpy as np

from .nodes import Nodes

Step = Callable[["Net", str], str]
CHANNELS = (6, 8, 12, 4, 24, 3, 9)
MAX_ELEMENTS, MAX_RANK, MAX_DEPTH, MAX_STEPS = 1 << 12, 6, 3, 16


class Net(Nodes):
    """Nodes under construction, out of steps that transform one tensor each."""

    def __init__(self, decisions: bytes, opset: int, seed: int, steps: Sequence[Step]) -> None:
        super().__init__(decisions, opset, seed)
        self.steps = steps
        self.max_depth, self.max_steps = MAX_DEPTH, MAX_STEPS
        self.depth = self.n_steps = 0

    def step(self, x: str) -> str:
        """Let a random step transform a tensor."""
        if self.depth == self.max_depth or self.n_steps == self.max_steps:
            return x
        self.depth, self.n_steps = self.depth + 1, self.n_steps + 1
        y = self.pick(*self.steps)(self, x)
        self.depth -= 1
        return y if prod(self.shape(y)) <= MAX_ELEMENTS and len(self.shape(y)) <= MAX_RANK else x

    # -- moving --------------------------------------------------------------------------------------------------------

    def transpose(self, x: str, perm: Sequence[int]) -> str:
        """Permute axes; nothing where they stay in order."""
        if list(perm) == sorted(perm):
            return x
        return self.to(self.node("Transpose", x, perm=list(perm)), list(perm).index(self.axis[x]))

    def move(self, x: str, axis: int) -> str:
        """Move the channels to another axis."""
        order = [a for a in range(len(self.shape(x))) if a != self.axis[x]]
        order.insert(axis % (len(order) + 1), self.axis[x])
        return self.transpose(x, order)

    def front(self, x: str) -> str:
        """Move the channels to axis 1 of three to five axes."""
        x = self.move(x, 1)
        shape = self.shape(x)
        if len(shape) == 2:
            return self.reshape(x, (*shape, *self.pick((1,), (1, 1))), 1)
        return self.reshape(x, (*shape[:4], prod(shape[4:])), 1) if len(shape) > 5 else x

    def tokens(self, x: str) -> str:
        """See a tensor as (batch, positions, channels)."""
        x = self.move(x, -1) if self.axis[x] > 1 or self.chance() else x
        shape = self.shape(x)
        if self.axis[x] == 1 and len(shape) > 2:
            return self.transpose(self.reshape(x, (*shape[:2], prod(shape[2:])), 1), (0, 2, 1))
        return self.reshape(x, (shape[0], prod(shape[1:-1]), shape[-1]), 2)

    def flat(self, x: str) -> str:
        """See a tensor as (batch, features)."""
        shape = self.shape(x)
        if len(shape) == 2:
            return x
        if prod(shape[1:]) > 128 or self.chance():
            x = self.front(x)
            x = self.node(self.pick(*self.global_pools), x)
        if self.chance():
            return self.reshape(x, (self.shape(x)[0], prod(self.shape(x)[1:])), 1)
        return self.to(self.node("Flatten", x, axis=1), 1)

    def reshape(self, x: str, sizes: Sequence[int], axis: int) -> str:
        """Reshape: by literal lengths, with -1, with 0, or by shape arithmetic."""
        shape, sizes = self.shape(x), list(map(int, sizes))
        if list(shape) == sizes:
            return x
        target: list[Any] = list(sizes)
        how = self.pick("literal", "open", "copied", "computed")
        kept = [i for i, size in enumerate(sizes) if i < len(shape) and shape[i] == size]
        if how == "computed":
            target = [self._size(x, i) if i in kept else size for i, size in enumerate(sizes)]
            whole = shape[self.axis[x]]
            for i, size in enumerate(sizes):
                if i not in kept and size > 1 and whole % size == 0 and self.chance(3):
                    target[i] = self._size(x, self.axis[x], whole // size)
        elif how == "copied":
            target = [0 if i in kept else size for i, size in enumerate(sizes)]
        elif self.dynamic and 0 in kept:
            target[0] = 0
        if self.dynamic and 0 not in kept:
            target[0] = -1
        elif how == "open" or (how == "computed" and self.chance()):
            target[self.pick(*(i for i in range(len(sizes)) if i or not self.dynamic))] = -1
        return self.to(self.node("Reshape", x, self._vector(target, sizes)), axis)

    def alike(self, a: str, b: str, axis: int) -> bool:
        """Whether two tensors differ in the length of one axis at most."""
        lengths = [[size for i, size in enumerate(self.shape(x)) if i != axis] for x in (a, b)]
        return self.axis[a] == self.axis[b] and lengths[0] == lengths[1] and len(self.shape(a)) == len(self.shape(b))

    def like(self, x: str) -> str:
        """Return the shape of a tensor as an operand: computed, or literal where nothing is dynamic."""
        if self.dynamic or self.chance():
            name = self.node("Shape", x)
            self.values[name] = np.array(self.shape(x))
            return name
        return self.constant(list(self.shape(x)))

    def _size(self, x: str, axis: int, by: int = 1) -> str:
        """Length of an axis over ``by``, as a computed vector of one element."""
        vector = self.chance()
        name = self.node("Gather", self.node("Shape", x), self.constant([axis] if vector else np.array(axis)), axis=0)
        if by > 1:
            name = self.node("Div", name, self.constant(np.array(by)))
        name = name if vector else self.node("Unsqueeze", name, axes=[0])
        self.values[name] = np.array([self.shape(x)[axis] // by])
        return name

    def _vector(self, target: Sequence[int | str], value: Iterable[int]) -> str:
        """Lay lengths end to end, as a constant where all are known."""
        if all(isinstance(part, int) for part in target):
            return self.constant(target)
        parts = [self.constant([part]) if isinstance(part, int) else part for part in target]
        name = self.node("Concat", *parts, axis=0)
        self.values[name] = np.array([*value])
        return name
