"""The processes of a run: one, or several that ``torchrun`` has started."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed


@dataclass(frozen=True)
class World:
    """Number of this process, how many there are, and the device it computes on."""

    rank: int
    size: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this process writes files and judges."""
        return self.rank == 0

    def agree(self, value: Any) -> Any:
        """Return the first process's value everywhere."""
        if self.size == 1:
            return value
        holder = [value]
        distributed.broadcast_object_list(holder, 0)
        return holder[0]

    def mean(self, value: float) -> float:
        """Mean over all processes."""
        if self.size == 1:
            return value
        total = torch.tensor(value, device=self.device, dtype=torch.float64)
        distributed.all_reduce(total)
        return total.item() / self.size


@contextmanager
def joined() -> Iterator[World]:
    """Join the other processes that the environment tells of (``torchrun``), and part from them at the end."""
    size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    gpu = torch.cuda.is_available()
    local = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local % torch.cuda.device_count()) if gpu else torch.device("cpu")
    if size == 1:
        yield World(0, 1, device)
        return
    if gpu:
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if gpu else "gloo")
    try:
        yield World(rank, size, device)
    finally:
        distributed.destroy_process_group()
