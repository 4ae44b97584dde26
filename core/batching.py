"""Batches that fit the memory: they shrink when the device runs out, and remember what fitted."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

log = logging.getLogger(__name__)
T = TypeVar("T")
R = TypeVar("R")


@dataclass
class BatchSize:
    """A batch size that shrinks when the device runs out of memory.

    ``value`` is what fits so far. It may be saved and restored.
    """

    value: int

    def over(
        self,
        items: Sequence[T],
        work: Callable[[Sequence[T]], R],
        cost: Callable[[T], int] = lambda item: 1,
    ) -> Iterator[R]:
        """Do ``work`` on consecutive slices of ``items``.

        A slice of several items costs at most ``value``.
        """
        start = 0
        while start < len(items):
            stop, total = start + 1, cost(items[start])
            while stop < len(items) and total + cost(items[stop]) <= self.value:
                total += cost(items[stop])
                stop += 1
            try:
                result = work(items[start:stop])
            except torch.OutOfMemoryError:
                if stop - start == 1:
                    raise
                self.value = max(1, min(self.value // 2, total - 1))
                log.warning("out of memory: batches of %d from here on", self.value)
                torch.cuda.empty_cache()
                continue
            yield result
            start = stop


def memory_budget(device: torch.device) -> int:
    """Bytes that one batch may take: a quarter of the device's memory, at most 2 GiB on the CPU.

    Taken from the total, not from what happens to be free, so that a resumed run makes the same
    batches.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory // 4
    return 2 << 30
