"""A sweep on a cluster: ``sweep CONFIG --engine ray`` (extra ``cluster``).

1. The driver, which is the command itself, knows every cell by its id. It cuts what the run lacks
   into jobs, and is the only one that writes.
2. Workers hold the weights of one model at a time and do one job after another (``schedule.py``,
   ``work.py``, ``cluster.py``).
3. Directions, plane and matrix are made by the driver, as in a sweep without a cluster.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from core.errors import AttackPlaneError
from core.models import ModelHandle
from core.records import NO_SOURCE, Behaviour
from core.rows import Row
from core.store import ATTACKS, REPLAYS
from pipeline.sweep.cluster import Cluster, Take, opened
from pipeline.sweep.config import SweepConfig
from pipeline.sweep.plan import Step, attack_steps
from pipeline.sweep.run import Sweep
from pipeline.sweep.schedule import Job, place_of
from pipeline.sweep.work import JOBS, Done
from pipeline.transfer import Transfer
from transfer.replay import Sending, sendings

QUICK = 20
"""Steps of an attack that fill one job: quick attacks on several requests are made together."""
REPLIES = 96
"""Prompts whose replies are one job: a whole batch."""
LOG = "jobs.jsonl"
"""Who did which job in how many seconds."""


@contextlib.contextmanager
def cluster(config: SweepConfig, workers: int | None) -> Iterator[Callable[..., ClusterSweep]]:
    """Workers on the cluster of ``RAY_ADDRESS``, or on one on this machine while this is open.

    Gives what makes the sweep (``run.sweep``).

    Args:
        workers: None: one for each GPU, or for each core where there is no GPU.

    Raises:
        AttackPlaneError: Ray is not installed, or no cluster answers.
    """
    ray = opened(num_cpus=workers or os.cpu_count())
    try:
        there = ray.cluster_resources()
        gpus = int(there.get("GPU", 0))
        room = gpus or int(there.get("CPU", 1))
        count = workers or room
        if count > room:
            raise AttackPlaneError(
                "the cluster has no room for so many workers",
                where="--workers",
                got=f"{count}, there are {gpus} GPUs and {int(there.get('CPU', 0))} cores",
                remedy=f"give at most {room}: a worker takes a GPU, or a core where there is none",
            )
        yield partial(ClusterSweep, cluster=Cluster(ray, config, count, gpus > 0))
    finally:
        ray.shutdown()


@dataclass
class ClusterSweep(Sweep):
    """A sweep whose prompts and replies are made by workers."""

    cluster: Cluster = field(kw_only=True)
    _known: dict[str, set[str]] = field(default_factory=dict)
    _told: set[Any] = field(default_factory=set)

    def attack(self) -> None:
        jobs: list[Job] = []
        for spec in self.config.sources:
            try:
                source = self.open_model(spec)
                source.fingerprint  # noqa: B018  files that cannot be read fail here, once
            except Exception as error:  # noqa: BLE001  no attack of this source can be tried
                self.source_failed(spec, error)
            else:
                jobs += self._attacks(source)
        jobs += self._attacks(None)
        self.cluster.work(jobs, self._take(ATTACKS, "artifact_id"), self._failed)
        for what, name in list(self.progress.seconds):
            if what not in ("replays", "directions, plane"):
                self.progress.done(what, name)

    def _attacks(self, source: ModelHandle | None) -> Iterator[Job]:
        """The jobs of one source, or of the attacks that need none."""
        sources = (source,) if source else ()
        for number, step in enumerate(attack_steps(self.config, with_source=bool(source))):
            cells = self.begun(step, sources)
            if cells is None:
                continue
            fit = self.fitting(cells)
            wanted = cells.missing(fit, self.have(ATTACKS, "artifact_id"))
            if wanted and step[0].sources == "several":  # one suffix for all of them
                wanted = fit
            self.run.note_behaviours(wanted)
            for part in _parts(step, wanted):
                content: Row = {
                    "attack": step[0].name,
                    "source": source.spec if source else NO_SOURCE,
                    "with_source": bool(source),
                    "step": number,
                    "of": [b.behaviour_id for b in part],
                }
                ids = tuple(dict.fromkeys(i for b in part for i in cells.ids(b)))
                yield Job("attack", source.spec if source else None, ids, content)

    def replay(self) -> None:
        stage = Transfer(self.run, self.config.judges, self.config.replay)
        self.note_replays(stage)
        jobs: list[Job] = []
        for spec in self.config.targets:
            with self.failures.guard("replay", target=spec):
                jobs += self._replays(stage, self.open_model(spec))
        self.cluster.work(jobs, self._take(REPLAYS, "replay_id"), self._failed)
        for spec in self.config.targets:
            self.progress.done("replays", spec)

    def _replays(self, stage: Transfer, target: ModelHandle) -> Iterator[Job]:
        config = self.config.replay
        stage.begin(target)
        have = self.have(REPLAYS, "replay_id")

        def name(sending: Sending) -> str:
            return sending.replay_id(target.spec, target.fingerprint, config)

        missing = [s for s in sendings(stage.artifacts, config) if name(s) not in have]
        lacks = {s.artifact.artifact_id: s.artifact for s in missing}
        order = sorted(
            lacks.values(), key=lambda a: (config.of(a.attack).max_new_tokens or 0, len(a.prompt))
        )
        for start in range(0, len(order), REPLIES):
            part = order[start : start + REPLIES]
            ids = tuple(name(s) for s in sendings(part, config))
            content = {"target": target.spec, "artifacts": [a.to_row() for a in part]}
            yield Job("replay", target.spec, ids, content)

    def have(self, file: str, key: str) -> set[str]:
        """Ids that the run holds; read once, since only this process writes."""
        if file not in self._known:
            self._known[file] = super().have(file, key)
        return self._known[file]

    def _take(self, file: str, key: str) -> Take:
        """What the one writer does with a job's rows."""
        have = self.have(file, key)

        def take(job: Job, done: Done) -> None:
            with self.run.appending(file) as add:
                for row in done.rows:
                    if row[key] in job.cells and row[key] not in have:
                        have.add(row[key])
                        add(row)
            for row in done.failures:
                if (said := tuple(row.items())) not in self._told:
                    self._told.add(said)
                    self.failures.add(row)
            seconds = {"seconds": round(done.seconds, 3), "loading": round(done.loaded, 3)}
            self.run.append(
                LOG, {**place_of(job), "job": job.name, **seconds, "worker": done.worker}
            )
            shutil.rmtree(Path(self.config.run) / JOBS / job.name, ignore_errors=True)

        return take

    def _failed(self, job: Job, reason: str) -> None:
        self.failures.add({**place_of(job), "reason": reason})


def _parts(step: Step, behaviours: Sequence[Behaviour]) -> Iterator[list[Behaviour]]:
    """Requests whose prompts are made in one job."""
    attack, config = step
    size = max(1, QUICK // max(1, attack.steps(config)))
    if attack.sources == "several":
        size = max(1, len(behaviours))
    for start in range(0, len(behaviours), size):
        yield list(behaviours[start : start + size])
