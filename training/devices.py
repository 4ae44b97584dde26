"""Several devices: the micro-batches of an update are shared out among processes.

Started by ``accelerate launch cli.py train ...`` (or torchrun), each process holds the whole model
and takes every so manieth micro-batch; gradients are added up before the optimiser's step. Random
streams belong to micro-batches and not to processes, so an update is the same on one device or on
several, but for the order in which numbers are added.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from core.errors import AttackPlaneError

T = TypeVar("T")


class Devices:
    """The processes of this training; one, unless a launcher says otherwise."""

    def __init__(self) -> None:
        self._accelerator: Any = None
        self.rank, self.count = 0, 1
        count = os.environ.get("WORLD_SIZE", "1")
        if not count.isdecimal():
            raise AttackPlaneError(
                "no number of processes",
                where="the environment variable WORLD_SIZE",
                got=repr(count),
                remedy="unset it, or start the training by `accelerate launch`",
            )
        if int(count) > 1:
            from accelerate import Accelerator

            self._accelerator = Accelerator(cpu=not torch.cuda.is_available())
            self.rank = self._accelerator.process_index
            self.count = self._accelerator.num_processes

    @property
    def first(self) -> bool:
        """Whether this process writes the files."""
        return self.rank == 0

    def refuse_several(self, where: str) -> None:
        """Refuse a launcher, for an arm that is fitted in one process."""
        if self.count > 1:
            raise AttackPlaneError(
                "this arm is fitted in one process",
                where=where,
                got=f"{self.count} processes",
                remedy="run the command without a launcher",
            )

    def check(self, accumulation: int) -> None:
        """Refuse what cannot be shared out evenly."""
        if accumulation % self.count:
            raise AttackPlaneError(
                "the micro-batches of an update cannot be shared out evenly",
                where="train",
                got=f"accumulation {accumulation}, {self.count} processes",
                remedy=f"give --accumulation a multiple of {self.count}",
            )

    def share(self, micro_batches: Sequence[int]) -> list[int]:
        """Those of an update that are this process's."""
        return list(micro_batches[self.rank :: self.count])

    def add_up(self, parameters: Sequence[Tensor]) -> None:
        """Replace gradients by their sums over processes."""
        if self._accelerator:
            for parameter in parameters:
                own = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                parameter.grad = self._accelerator.reduce(own, "sum")

    def everyones(self, rows: Sequence[T]) -> list[T]:
        """The rows of all processes, in one order."""
        if not self._accelerator:
            return list(rows)
        from accelerate.utils import gather_object

        return gather_object(list(rows))

    def wait(self) -> None:
        """Until all processes are here."""
        if self._accelerator:
            self._accelerator.wait_for_everyone()
