"""What a worker of a cluster does: the prompts or replies of one job, given back as rows.

A job is done in a run folder of its own inside the sweep's (``jobs/NAME``), where the worker sees
that; else in a temporary one. A job that was stopped goes on there, whichever worker gets it next.
The sweep's own files are written by the driver alone.
"""

from __future__ import annotations

import json
import os
import socket
import time
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from filelock import Timeout

from core.errors import AttackPlaneError
from core.files import write_atomically
from core.models import ModelHandle
from core.records import AttackArtifact
from core.rows import Row
from core.store import ATTACKS, REPLAYS, RunFolder
from evaluation.judges import Judge
from pipeline.sweep.config import SweepConfig
from pipeline.sweep.plan import attack_steps
from pipeline.sweep.run import Progress, Sweep, SweepResult, reason_of
from pipeline.sweep.schedule import Job, place_of
from pipeline.transfer import Transfer

JOBS = "jobs"
PATIENCE = 15.0


@dataclass
class Done:
    """What came of a job: rows of the file that its stage writes, cells that failed, and where."""

    rows: list[Row] = field(default_factory=list)
    failures: list[dict[str, str]] = field(default_factory=list)
    worker: str = ""
    seconds: float = 0.0
    loaded: float = 0.0
    """Of the seconds, those that loading a model took."""


@dataclass(frozen=True)
class Chosen:
    """The cells of a job, as a shard of the sweep."""

    cells: frozenset[str]

    def holds(self, cell: str) -> bool:
        return cell in self.cells


class Worker:
    """Does jobs of a sweep one after another, with the weights of one model at a time."""

    def __init__(self, config: SweepConfig) -> None:
        self.config = config
        self._model: str | None = None
        self._handles: dict[str, ModelHandle] = {}
        self._judges: list[Judge] = []

    def do(self, job: Job) -> Done:
        """Make a job's cells. What goes wrong with them is among the failures."""
        start = time.monotonic()
        done = Done(worker=f"{socket.gethostname()}, process {os.getpid()}")
        try:
            if job.model is not None and job.model != self._model:
                self._release()
                self.open(job.model).loaded  # noqa: B018
                self._model = job.model
                done.loaded = time.monotonic() - start
            with ExitStack() as stack:
                run = self._entered(job, stack)
                (self._attack if job.stage == "attack" else self._replay)(run, job, done)
        except Exception as error:  # noqa: BLE001  the other jobs go on
            done.failures.append({**place_of(job), "reason": reason_of(error)})
        done.seconds = time.monotonic() - start
        return done

    def open(self, spec: str) -> ModelHandle:
        """The job's model or a helper of its attack; kept while the model is."""
        if spec not in self._handles:
            self._handles[spec] = ModelHandle(spec)
        return self._handles[spec]

    def _release(self) -> None:
        for handle in self._handles.values():
            handle.release()
        self._handles, self._model = {}, None

    def _entered(self, job: Job, stack: ExitStack) -> RunFolder:
        """The run folder that the job is done in; the driver removes what lies in the sweep's own.

        A worker that was given up may hold the job's folder until it is dead. After ``PATIENCE``
        seconds the job begins anew in a temporary one.
        """
        shared, end = Path(self.config.run), time.monotonic() + PATIENCE
        while (shared / "manifest.json").exists() and time.monotonic() < end:
            try:
                return stack.enter_context(RunFolder(shared / JOBS / job.name))
            except AttackPlaneError as error:
                if not isinstance(error.__cause__, Timeout):
                    raise
                time.sleep(0.5)
        own = TemporaryDirectory(prefix="attack-plane-", ignore_cleanup_errors=True)
        return stack.enter_context(RunFolder(stack.enter_context(own)))

    def _attack(self, run: RunFolder, job: Job, done: Done) -> None:
        config = replace(self.config, run=str(run.path))
        content = job.content
        step = attack_steps(self.config, with_source=content["with_source"])[content["step"]]
        with Progress([]) as progress:
            chosen = Chosen(frozenset(job.cells))
            work = Sweep(config, run, self.open, progress, SweepResult(), chosen)
            work.attack_with(step, (self.open(job.model),) if job.model else ())
        done.rows = [row for row in run.rows(ATTACKS) if row.get("artifact_id") in chosen.cells]
        made = {row["artifact_id"] for row in done.rows}
        done.failures = [row for row in work.failures.rows if row["behaviour"] in content["of"]]
        if made < chosen.cells and not done.failures:
            raise AttackPlaneError(
                "the worker makes other prompts than the driver asks for",
                where=done.worker,
                got=f"{len(chosen.cells - made)} of {len(chosen.cells)} are missing",
                remedy="give all workers the same files of the model, the behaviours and the suite",
            )

    def _replay(self, run: RunFolder, job: Job, done: Done) -> None:
        asked = [AttackArtifact.from_row(row) for row in job.content["artifacts"]]
        rows = "".join(json.dumps(artifact.to_row()) + "\n" for artifact in asked)
        write_atomically(run.path / ATTACKS, rows)
        config = self.config
        stage = Transfer(run, config.judges, config.replay, add_plain=False)
        stage.made_judges = self._judges

        def not_sent(artifact: AttackArtifact, error: Exception) -> None:
            cell = {"artifact": artifact.artifact_id, "target": job.content["target"]}
            done.failures.append({"stage": "replay", **cell, "reason": reason_of(error)})

        stage.replay_on(self.open(job.content["target"]), not_sent)
        self._judges = stage.made_judges
        done.rows = run.rows(REPLAYS)
