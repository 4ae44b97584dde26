"""A sweep on a cluster, by Ray Core: ``sweep CONFIG --engine ray`` (extra ``cluster``).

1. The driver, which is the command itself, knows every cell by its id. It cuts what the run lacks
   into jobs, and is the only one that writes.
2. Each worker is a Ray actor on one device. It holds the weights of one model at a time and gets
   one job after another (``schedule.py``, ``work.py``). So at most one job per worker is under way,
   and no more results wait than there are workers.
3. A worker that dies, or that answers no heartbeat for ``SILENT`` seconds, is replaced, and its job
   is given to another. A job that has been given out three times is a failure.
4. Directions, plane and matrix are made by the driver, as in a sweep without a cluster.

Where ``RAY_ADDRESS`` names no cluster, one is started on this machine and ends with the command.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from core.errors import AttackPlaneError
from core.models import ModelHandle
from core.progress import bar as progress_bar
from core.records import NO_SOURCE, Behaviour
from core.rows import Row
from core.store import ATTACKS, REPLAYS
from pipeline.campaign import Cells
from pipeline.sweep.config import SweepConfig
from pipeline.sweep.plan import Step, attack_steps
from pipeline.sweep.run import Sweep, reason_of
from pipeline.sweep.schedule import Job, Schedule, place_of
from pipeline.sweep.work import JOBS, Done, Worker
from pipeline.transfer import Transfer
from transfer.replay import Sending, sendings

BEAT, SILENT, STARTING = 10.0, 50.0, 600.0
"""Seconds between two heartbeats; after how many without an answer a worker counts as dead; after
how many the sweep stops if no worker has started."""
OWN_STORE = 2**28
"""Bytes that Ray may keep for a cluster on this machine: results are small."""
QUICK = 20
"""Steps of an attack that fill one job: quick attacks on several requests are made together."""
REPLIES = 96
"""Prompts whose replies are one job: a whole batch."""
LOG = "jobs.jsonl"
"""Who did which job in how many seconds."""
Take = Callable[[Job, Done], None]
log = logging.getLogger(__name__)


def opened(**own: Any) -> Any:
    """Ray, connected to the cluster of ``RAY_ADDRESS``, or to one that is started with ``own``."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        ray: Any = importlib.import_module("ray")
    except ImportError as error:
        raise AttackPlaneError(
            "a cluster needs the package ray", remedy="pip install 'attack-plane[cluster]'"
        ) from error
    quiet: Row = {"include_dashboard": False, "log_to_driver": False, "logging_level": "ERROR"}
    started: Row = {"object_store_memory": OWN_STORE, **own}
    try:
        ray.init(**quiet, **({} if os.environ.get("RAY_ADDRESS") else started))
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise AttackPlaneError(
            "no cluster answers",
            where=f"RAY_ADDRESS={os.environ.get('RAY_ADDRESS', '')}",
            got=str(error)[:300],
            remedy="start one with `ray start --head`, or unset RAY_ADDRESS",
        ) from error
    return ray


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
class _Member:
    """A worker as the driver sees it."""

    actor: Any
    beat: Any
    """The answer to the last heartbeat, not yet there; None: no question is open."""
    job: Job | None = None
    place: tuple[str, int] | None = None
    """Its node and process; None: it has not started yet."""
    heard: float = field(default_factory=time.monotonic)


class Cluster:
    """Workers of a Ray cluster."""

    def __init__(self, ray: Any, config: SweepConfig, count: int, on_gpus: bool) -> None:
        self.ray, self.config, self.count = ray, config, count
        # each takes one core, and a GPU; a second thread answers heartbeats while a job is done
        needs = {"num_cpus": 1, "num_gpus": int(on_gpus), "max_concurrency": 2}
        self._actor = ray.remote(**needs)(_Actor)
        self.members = [self._new() for _ in range(count)]

    def work(self, jobs: Sequence[Job], take: Take, failed: Callable[[Job, str], None]) -> None:
        """Have all jobs done; what comes of each is given to ``take`` in this process."""
        schedule, running = Schedule(jobs), dict[Any, _Member]()

        def lost(member: _Member, reason: str) -> None:
            """A worker is gone: another takes its place, and its job is given out again."""
            for answer in [a for a, m in running.items() if m is member]:
                del running[answer]
            self.members[self.members.index(member)] = self._new()
            log.warning("a worker is lost: %s", reason[:200])
            if not schedule.lost(id(member), member.job) and member.job:
                failed(member.job, f"no worker survived it: {reason}")
                bar.update(1)

        with progress_bar(len(jobs), f"{self.count} workers", "job", leave=None) as bar:
            while len(schedule) or running:
                for member in list(self.members):
                    try:
                        self._hear(member)
                    except self.ray.exceptions.RayError as error:
                        lost(member, reason_of(error))
                        continue
                    if member.place and time.monotonic() - member.heard > SILENT:
                        self._end(member)
                        lost(member, f"no heartbeat for {SILENT:.0f} s")
                    elif member.place and not member.job and (job := schedule.next_for(id(member))):
                        member.job = job
                        running[member.actor.do.remote(job)] = member
                self._require_some()
                beats = [member.beat for member in self.members if member.beat is not None]
                for answer in self.ray.wait([*running, *beats], timeout=BEAT)[0]:
                    if (found := running.get(answer)) is None:
                        continue  # a heartbeat
                    try:
                        done = self.ray.get(answer)
                    except self.ray.exceptions.RayError as error:
                        lost(found, reason_of(error))
                        continue
                    job, found.job = running.pop(answer).job, None
                    assert job is not None
                    take(job, done)
                    bar.update(1)

    def _new(self) -> _Member:
        actor = self._actor.remote(self.config)
        return _Member(actor, actor.alive.remote())

    def _hear(self, member: _Member) -> None:
        """Take the answer to a heartbeat, or ask anew; raises what its death is told as."""
        now = time.monotonic()
        if member.beat is not None and self.ray.wait([member.beat], timeout=0)[0]:
            member.place = self.ray.get(member.beat)
            member.beat, member.heard = None, now
        if member.beat is None and now - member.heard > BEAT:
            member.beat = member.actor.alive.remote()

    def _end(self, member: _Member) -> None:
        """End a worker that does not answer, from its own node: it would keep its device."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        assert member.place is not None
        node, process = member.place
        self.ray.kill(member.actor)
        there = NodeAffinitySchedulingStrategy(node, soft=False)
        self.ray.remote(num_cpus=0)(_end_process).options(scheduling_strategy=there).remote(process)

    def _require_some(self) -> None:
        """Raise an error where no worker has started for a long time."""
        began = [member.heard for member in self.members if member.place is None]
        if len(began) == len(self.members) and time.monotonic() - max(began) > STARTING:
            raise AttackPlaneError(
                "no worker has started",
                where="--engine ray",
                got=f"{self.count} workers asked for {STARTING:.0f} s ago",
                remedy="see `ray status`: the cluster may be full, or lack the suite",
            )


def _end_process(process: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, signal.SIGKILL)


class _Actor:
    """A worker in its process on the cluster."""

    def __init__(self, config: SweepConfig) -> None:
        self.worker = Worker(config)

    def do(self, job: Job) -> Done:
        return self.worker.do(job)

    def alive(self) -> tuple[str, int]:
        """Its node and process."""
        ray: Any = importlib.import_module("ray")
        return ray.get_runtime_context().get_node_id(), os.getpid()


@dataclass
class ClusterSweep(Sweep):
    """A sweep whose prompts and replies are made by workers."""

    cluster: Cluster = field(kw_only=True)
    _known: dict[str, set[str]] = field(default_factory=dict)
    _told: set[Any] = field(default_factory=set)

    def attack(self) -> None:
        jobs: list[Job] = []
        for spec in self.config.sources:
            with self.failures.guard("attack", attack="all", source=spec):
                jobs += self._attacks(self.open_model(spec))
        jobs += self._attacks(None)
        self.cluster.work(jobs, self._take(ATTACKS, "artifact_id"), self._failed)
        for what, source in list(self.progress.seconds):
            if what not in ("replays", "directions, plane"):
                self.progress.done(what, source)

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
            for part in _parts(cells, step, wanted):
                content: Row = {"attack": step[0].name, "step": number}
                content["source"] = source.spec if source else NO_SOURCE
                content["with_source"] = bool(source)
                content["of"] = [b.behaviour_id for b in part]
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


def _parts(cells: Cells, step: Step, behaviours: Sequence[Behaviour]) -> Iterator[list[Behaviour]]:
    """Requests whose prompts are made in one job."""
    attack, config = step
    size = max(1, QUICK // max(1, attack.steps(config)))
    if attack.sources == "several":
        size = max(1, len(behaviours))
    for start in range(0, len(behaviours), size):
        yield list(behaviours[start : start + size])
