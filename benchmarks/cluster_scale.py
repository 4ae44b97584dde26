"""How far does one driver carry: a sweep on a cluster, simulated with recorded times.

    python cli.py sweep CONFIG.toml --engine ray --workers 2      # records jobs.jsonl
    python -m benchmarks.cluster_scale RUN/jobs.jsonl

What is real: the seconds of jobs and of loading a model, from the run's ``jobs.jsonl``; the
schedule, which is the code of the sweep; what the driver does for each job (Ray's round trip, the
rows on disk), and how long a worker takes to start, measured here. What is simulated: the clock.
Jobs are drawn from the recorded ones with a fixed seed, and spread evenly over the models.

    efficiency  seconds of work / (workers x seconds that the sweep takes)
    writer      share of the time in which the driver is busy
    loading     share of the workers' time in which they start or load models
"""

from __future__ import annotations

import heapq
import random
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from core.errors import AttackPlaneError
from core.files import read_rows
from core.store import ATTACKS, RunFolder
from core.text import aligned
from pipeline.sweep.cluster import Actor, opened
from pipeline.sweep.cluster_sweep import LOG
from pipeline.sweep.schedule import Job, Schedule


@dataclass(frozen=True)
class Times:
    """Seconds: of jobs and of loads as recorded; of the driver per job, of a worker's start."""

    jobs: list[float]
    loads: list[float]
    driver: float
    start: float


@dataclass(frozen=True)
class Simulated:
    """Seconds that the sweep takes, and shares of time."""

    seconds: float
    efficiency: float
    writer: float
    loading: float


def simulate(times: Times, cells: int, workers: int, models: int, seed: int = 0) -> Simulated:
    """A sweep of ``cells`` jobs, evenly over ``models``, on so many workers."""
    drawn = random.Random(seed)
    jobs = [Job("attack", f"model {n % models}", (str(n),)) for n in range(cells)]
    length = {job.name: drawn.choice(times.jobs) for job in jobs}
    schedule = Schedule(jobs)
    held: dict[int, str | None] = {}
    free = busy = work = loading = 0.0  # when the driver is free; seconds of each kind
    events = [(times.start, worker) for worker in range(workers)]
    loading += times.start * workers
    end = 0.0
    while events:
        now, worker = heapq.heappop(events)
        free = max(now, free) + times.driver
        busy += times.driver
        end = max(end, free)
        job = schedule.next_for(worker)
        if job is None:
            continue
        load = 0.0 if held.get(worker) == job.model else drawn.choice(times.loads)
        held[worker] = job.model
        work += length[job.name]
        loading += load
        heapq.heappush(events, (free + load + length[job.name], worker))
    return Simulated(end, work / (workers * end), busy / end, loading / (workers * end))


def driver_seconds(ray: Any, rows: int = 200) -> float:
    """What the driver does for one job: Ray's round trip, two synced rows."""
    row = {"artifact_id": "x" * 16, "prompt": "word " * 100, "loss_history": [1.234567] * 100}
    with tempfile.TemporaryDirectory() as folder, RunFolder(folder) as run:
        start = time.perf_counter()
        for _ in range(rows):
            with run.appending(ATTACKS) as add:
                add(row)
            run.append(LOG, {"job": "x" * 16, "seconds": 1.0})
        written = (time.perf_counter() - start) / rows
    echo = ray.remote(num_cpus=0)(_Echo).remote()
    ray.get(echo.say.remote(row))
    start = time.perf_counter()
    for _ in range(rows):
        ray.wait([answer := echo.say.remote(row)])
        ray.get(answer)
    return written + (time.perf_counter() - start) / rows


class _Echo:
    def say(self, row: object) -> object:
        return row


def start_seconds(ray: Any) -> float:
    """From asking for a worker to its first heartbeat."""
    start = time.perf_counter()
    ray.get(ray.remote(num_cpus=1)(Actor).remote(None, str(Path.cwd())).alive.remote())
    return time.perf_counter() - start


def recorded(path: Path, stage: str) -> tuple[list[float], list[float]]:
    """Seconds of the jobs of one stage without loading, and of all loads."""
    rows = read_rows(path)
    jobs = [row["seconds"] - row["loading"] for row in rows if row["stage"] == stage]
    loads = [row["loading"] for row in rows if row["loading"] > 0]
    if not jobs or not loads:
        raise AttackPlaneError(
            f"no jobs of the stage {stage}",
            where=path,
            remedy=f"give the {LOG} of a run of `sweep --engine ray`",
        )
    return jobs, loads


@click.command()
@click.argument("jobs", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--stage", default="attack", show_default=True)
@click.option("--models", default=4, show_default=True, help="That the cells are spread over.")
@click.option(
    "--shorter", default=1.0, show_default=True, help="Divide the recorded times by this."
)
def main(jobs: Path, stage: str, models: int, shorter: float) -> None:
    ray = opened(num_cpus=2)
    found, loads = recorded(jobs, stage)
    times = Times([s / shorter for s in found], loads, driver_seconds(ray), start_seconds(ray))
    ray.shutdown()
    click.echo(
        f"{len(found)} jobs of {statistics.mean(times.jobs):.2f} s on average, a load "
        f"{statistics.mean(loads):.1f} s, a worker's start {times.start:.1f} s, the driver "
        f"{1000 * times.driver:.2f} ms a job; {models} models"
    )
    table = [["cells", "workers", "seconds", "efficiency", "writer", "loading"]]
    for cells in (100, 1000, 10_000, 100_000):
        for workers in (1, 4, 16, 64, 256):
            s = simulate(times, cells, workers, models)
            shares = [f"{share:.2f}" for share in (s.efficiency, s.writer, s.loading)]
            table.append([str(cells), str(workers), f"{s.seconds:.0f}", *shares])
    click.echo(aligned(table))


if __name__ == "__main__":
    main()
