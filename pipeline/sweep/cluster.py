"""Workers of a cluster, by Ray Core: who is alive, who does what.

Each worker is a Ray actor on one device. A worker gets a job once it has started, and one job at a
time: so no more results wait than there are workers. A worker that dies, or that answers no
heartbeat for ``SILENT`` seconds, is replaced, and its job is given to another. A job that has been
given out three times is a failure.

Where ``RAY_ADDRESS`` names no cluster, one is started on this machine and ends with the command.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from core.errors import AttackPlaneError
from core.progress import bar as progress_bar
from core.rows import Row
from pipeline.sweep.config import SweepConfig
from pipeline.sweep.run import reason_of
from pipeline.sweep.schedule import Job, Schedule
from pipeline.sweep.work import Done, Worker

BEAT, SILENT, STARTING = 10.0, 50.0, 600.0
"""Seconds between two heartbeats; after how many without an answer a worker counts as dead; after
how many the sweep stops if no worker has started."""
OWN_STORE = 2**28
"""Bytes that Ray may keep for a cluster on this machine: results are small."""
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
        self._actor = ray.remote(**needs)(Actor)
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
        actor = self._actor.remote(self.config, str(Path.cwd()))
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


class Actor:
    """A worker in its process on the cluster."""

    def __init__(self, config: SweepConfig, folder: str) -> None:
        if Path(folder).is_dir():  # relative paths mean what they mean to the driver
            os.chdir(folder)
        self.worker = Worker(config)

    def do(self, job: Job) -> Done:
        return self.worker.do(job)

    def alive(self) -> tuple[str, int]:
        """Its node and process."""
        ray: Any = importlib.import_module("ray")
        return ray.get_runtime_context().get_node_id(), os.getpid()
