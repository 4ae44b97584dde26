"""A sweep on a cluster: the schedule, what a worker does, and Ray's processes, killed or not."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from core.errors import AttackPlaneError
from core.records import AttackArtifact, Replay
from core.store import ATTACKS, FAILURES, REPLAYS, RunFolder
from pipeline.sweep.run import sweep
from pipeline.sweep.schedule import Job, Schedule
from pipeline.sweep.work import JOBS, Worker
from tests.test_shards import lines_of, same_rows, small_grid

HERE = Path(__file__).parents[1]


def jobs_of(model, count):
    return [Job("attack", model, (f"{model}-{n}",)) for n in range(count)]


# --- who does what --------------------------------------------------------------------------------
def test_a_worker_stays_with_its_model_while_there_is_work_for_it():
    schedule = Schedule([*jobs_of("a", 4), *jobs_of("b", 2)])
    given = [schedule.next_for(worker).model for worker in ("one", "two", "one", "two", "one")]
    assert given == ["a", "b", "a", "b", "a"]
    assert schedule.next_for("two").model == "a" and schedule.next_for("one") is None


def test_workers_are_spread_over_models_by_the_work_that_is_left():
    schedule = Schedule([*jobs_of("a", 30), *jobs_of("b", 10), *jobs_of(None, 2)])
    held = Counter(schedule.next_for(worker).model for worker in range(4))
    assert held == {"a": 3, "b": 1}


def test_a_lost_job_is_given_out_again_but_not_for_ever():
    (job,) = jobs_of("a", 1)
    schedule = Schedule([job], tries=2)
    assert schedule.next_for("one") == job and len(schedule) == 0
    assert schedule.lost("one", job) and len(schedule) == 1
    assert schedule.next_for("two") == job
    assert not schedule.lost("two", job) and len(schedule) == 0
    assert schedule.lost("three", None)  # an idle worker's death costs nothing


def test_every_job_is_done_once_whatever_the_workers_do():
    schedule = Schedule([*jobs_of("a", 9), *jobs_of("b", 7), *jobs_of(None, 5)])
    done = []
    for turn in range(100):
        worker = turn % 3
        if job := schedule.next_for(worker):
            if turn % 4 == 1:
                assert schedule.lost(worker, job)
            else:
                done.append(job.cells)
    assert len(done) == len(set(done)) == 21


def test_the_simulation_gives_what_can_be_worked_out_by_hand():
    from benchmarks.cluster_scale import Times, simulate

    times = Times([2.0], [3.0], driver=0.0, start=1.0)
    one = simulate(times, cells=4, workers=1, models=2)
    # a start, two loads and four jobs
    assert one.seconds == 1 + 2 * 3 + 4 * 2 and one.efficiency == 8 / 15
    two = simulate(times, cells=4, workers=2, models=2)
    assert two.seconds == 1 + 3 + 2 * 2 and two.loading == 8 / 16
    # a driver that is busy for half a second per job gives out two jobs a second, however many work
    slow = simulate(Times([1.0], [0.0], driver=0.5, start=0.0), cells=200, workers=50, models=1)
    assert 100 <= slow.seconds < 140 and slow.writer > 0.95


# --- what a worker does ---------------------------------------------------------------------------
@pytest.fixture(scope="module")
def config(tmp_path_factory, tiny_folders):
    folder = tmp_path_factory.mktemp("cluster")
    return small_grid(folder, tiny_folders, "plain", 5, slice(3, 4))


@pytest.fixture(scope="module")
def plain(config):
    result = sweep(config, [])
    assert not result.failures
    return Path(config.run)


def same(folder, plain):
    same_rows(folder, plain, (ATTACKS, REPLAYS, "matrix.jsonl", "plane.jsonl"))


def test_a_worker_says_what_it_cannot_do(config, tmp_path):
    worker = Worker(replace(config, run=str(tmp_path / "elsewhere")))
    job = Job("replay", str(tmp_path), ("x",), {"target": str(tmp_path), "artifacts": []})
    done = worker.do(job)
    assert not done.rows and done.failures[0]["target"] == str(tmp_path)
    assert "no model (no config.json)" in done.failures[0]["reason"]
    content = {"attack": "gcg", "step": 0, "with_source": True, "of": [], "source": "x"}
    done = worker.do(Job("attack", config.sources[0], ("unknown",), content))
    assert "other prompts than the driver asks for" in done.failures[0]["reason"]
    assert not (tmp_path / "elsewhere").exists()


def test_a_folder_that_a_dying_worker_holds_costs_a_job_its_state_alone(
    config, plain, tmp_path, monkeypatch
):
    monkeypatch.setattr("pipeline.sweep.work.PATIENCE", 0.2)
    run = Path(shutil.copytree(plain, tmp_path / "run"))
    asked = lines_of(plain / ATTACKS)[:2]
    target = config.targets[0]
    job = Job("replay", target, ("x",), {"target": target, "artifacts": asked})
    worker = Worker(replace(config, run=str(run)))
    with RunFolder(run / JOBS / job.name):
        done = worker.do(job)
    assert not done.failures and len(done.rows) == 2
    assert not (run / JOBS / job.name / REPLAYS).exists()
    assert len(worker.do(job).rows) == 2
    assert (run / JOBS / job.name / REPLAYS).exists()


# --- Ray ------------------------------------------------------------------------------------------
def command(config, run, workers=2):
    text = Path(config.run).parent.joinpath("sweep.toml").read_text()
    file = run.parent / f"{run.name}.toml"
    file.write_text(text.replace(f'run = "{config.run}"', f'run = "{run}"'))
    arguments = ["sweep", str(file), "--engine", "ray", "--workers", str(workers)]
    return [sys.executable, str(HERE / "cli.py"), *arguments]


def test_a_cluster_gives_what_one_process_gives_row_for_row(config, plain, tmp_path):
    pytest.importorskip("ray")
    run = tmp_path / "run"
    result = subprocess.run(command(config, run), capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    same(run, plain)
    assert not list((run / JOBS).glob("*")) and not lines_of(run / FAILURES)


def workers_of(driver):
    """Process ids of Ray's actors of this driver."""
    found = subprocess.run(["pgrep", "-f", "ray::Actor"], capture_output=True, text=True)
    return [int(p) for p in found.stdout.split() if driver.poll() is None]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_nothing_is_lost_or_doubled_when_workers_and_driver_are_killed(
    config, plain, tmp_path, seed
):
    """Five kills each, the driver's own process among them; 20 in all."""
    pytest.importorskip("ray")
    import random

    drawn, run, kills = random.Random(seed), tmp_path / "run", 0
    for _ in range(12):
        driver = subprocess.Popen(
            command(config, run), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        while driver.poll() is None and kills < 5:
            time.sleep(drawn.uniform(1, 4))
            victims = workers_of(driver) if drawn.random() < 0.6 else [driver.pid]
            if victims and driver.poll() is None:
                os.kill(drawn.choice(victims), signal.SIGKILL)
                kills += 1
        if driver.wait(timeout=300) == 0:
            break
    assert kills == 5 and driver.returncode == 0
    same(run, plain)
    with RunFolder(run) as folder:
        artifacts = folder.records(ATTACKS, AttackArtifact, lambda a: a.artifact_id)
        replays = folder.records(REPLAYS, Replay, lambda r: r.replay_id)
    assert len(artifacts) == len(lines_of(plain / ATTACKS))
    assert len(replays) == len(lines_of(plain / REPLAYS))


@pytest.mark.slow
def test_a_worker_that_is_alive_and_silent_is_given_up(config, plain, tmp_path, monkeypatch):
    pytest.importorskip("ray")
    from pipeline.sweep import cluster
    from pipeline.sweep.cluster_sweep import cluster as on_cluster

    monkeypatch.setattr(cluster, "BEAT", 1.0)
    monkeypatch.setattr(cluster, "SILENT", 6.0)
    monkeypatch.setattr(cluster, "STARTING", 60.0)
    own, stopped = replace(config, run=str(tmp_path / "run")), []

    def stop_one():
        while not stopped:
            time.sleep(1)
            found = subprocess.run(["pgrep", "-f", "ray::Actor.do"], capture_output=True, text=True)
            if pids := [int(p) for p in found.stdout.split()]:
                stopped.append(pids[0])
                os.kill(pids[0], signal.SIGSTOP)

    thread = threading.Thread(target=stop_one, daemon=True)
    with on_cluster(own, 2) as make:
        thread.start()
        result = sweep(own, [], make=make)
    assert stopped and not result.failures
    same(tmp_path / "run", plain)
    with contextlib.suppress(ProcessLookupError):
        os.kill(stopped[0], signal.SIGKILL)


def test_a_cluster_that_does_not_answer_is_told(config, monkeypatch):
    pytest.importorskip("ray")
    from pipeline.sweep.cluster_sweep import cluster

    monkeypatch.setenv("RAY_ADDRESS", "ray://127.0.0.1:1")
    with pytest.raises(AttackPlaneError, match="RAY_ADDRESS"), cluster(config, 1):
        pass
