"""Which worker of a cluster does what next. Pure bookkeeping: no model, no process, no clock.

Loading a model takes longer than most jobs. So a worker goes on with the model that it holds while
there is work for it; else it takes the model that has the most jobs for each worker that holds it.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field

from core.records import content_hash
from core.rows import Row

TRIES = 3
"""How often a job is given out: one that its workers do not survive is a failure."""


@dataclass(frozen=True)
class Job:
    """Cells that one worker makes together.

    Attributes:
        stage: attack or replay.
        model: whose weights are read; None: nobody's.
        cells: ids of the prompts or replies that it makes.
        content: what the worker needs to know, as JSON.
    """

    stage: str
    model: str | None
    cells: tuple[str, ...]
    content: Row = field(compare=False, default_factory=dict)

    @property
    def name(self) -> str:
        """Stands for the job, in every run of the same sweep."""
        return content_hash([self.stage, self.model, list(self.cells)])


def place_of(job: Job) -> dict[str, str]:
    """What is said of a job that failed as a whole."""
    what = {k: str(v) for k, v in job.content.items() if k in ("attack", "source", "target")}
    return {"stage": job.stage, **what, "cells": str(len(job.cells))}


class Schedule:
    """The jobs of one stage, until all of them are done or have failed."""

    def __init__(self, jobs: Iterable[Job], tries: int = TRIES) -> None:
        self._waiting: dict[str | None, deque[Job]] = {}
        for job in jobs:
            self._waiting.setdefault(job.model, deque()).append(job)
        self._held: dict[Hashable, str] = {}
        self._given: Counter[str] = Counter()
        self._tries = tries

    def __len__(self) -> int:
        """Jobs that nobody works on."""
        return sum(map(len, self._waiting.values()))

    def next_for(self, worker: Hashable) -> Job | None:
        """A job for a worker that has nothing to do; None: there is none."""
        model = self._held.get(worker)
        if model is None or not self._waiting.get(model):
            left = [m for m, jobs in self._waiting.items() if jobs]
            if not left:
                return None
            holders = Counter(self._held.values())
            model = max(left, key=lambda m: len(self._waiting[m]) / (1 + holders[m or ""]))
        if model is not None:
            self._held[worker] = model
        job = self._waiting[model].popleft()
        self._given[job.name] += 1
        return job

    def lost(self, worker: Hashable, job: Job | None) -> bool:
        """A worker is gone. Its job waits again; False: it has been given out too often."""
        self._held.pop(worker, None)
        if job is None:
            return True
        if self._given[job.name] >= self._tries:
            return False
        self._waiting[job.model].appendleft(job)
        return True
