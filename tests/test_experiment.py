"""A whole experiment from one file: read with all its faults told, and run on a tiny model."""

import json
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

import cli
from attacks.registry import Speed
from core.errors import AttackPlaneError
from core.files import read_rows
from study.experiment_file import read_experiment
from study.experiment_plan import Costs, measured, stages

ROOT = Path(__file__).parent.parent
FILE = """
run = "{run}"
reference = "{model}"
fixed_behaviours = 2
source_behaviours = 1

[[trainings]]
arm = "sft"
seeds = [0, 1]
num_steps = 2
checkpoints = [1]
batch_size = 2

[[trainings]]
arm = "sft"
name = "other"
num_steps = 1
checkpoints = []

[attacks.templates]
classes = ["persona"]

[transfer.gcg]
num_steps = 1
search_width = 4

[sources]
sft = [2]

[claims]
other = [1]

[anchors]
sft = [2]

[evaluate]
plain = 2
adaptive = 0
instructions = 2
kl_prompts = 2
max_new_tokens = 4

[options]
prompts = 4
resamples = 20
controls = 2
"""


def written(tmp_path, text=FILE, model="embedded"):
    path = tmp_path / "experiment.toml"
    path.write_text(text.format(run=tmp_path / "run", model=model))
    return path


def test_an_experiment_knows_its_checkpoints_and_its_plan(tmp_path):
    e = read_experiment(written(tmp_path, model="embedded?dtype=bfloat16"))
    run = tmp_path / "run" / "training"
    assert e.checkpoints() == [
        *(f"embedded+{run}/sft-{s}/step-{n}?dtype=bfloat16" for s in (0, 1) for n in (1, 2)),
        f"embedded+{run}/other-0/step-1?dtype=bfloat16",
    ]
    sources = e.checkpoints(e.sources, first=True)
    assert sources == [f"embedded+{run}/sft-0/step-2?dtype=bfloat16"]
    assert e.trainings[0].config.learning_rate == 1e-3  # the preset small
    speed = Speed(token=0.01, gradient=1.0, decoding_step=0.1)
    rows = stages(e, Costs(speed, trajectory=50.0, claims=100.0))
    assert (rows[0].step, rows[0].what, rows[0].count) == ("train", "sft, seeds 0, 1", 2)
    # two updates of two sequences of 60 tokens, forward and backward like three passes
    assert rows[0].seconds == pytest.approx(2 * 2 * 2 * 60 * 3 * 0.01)
    counts = {row.step: (row.count, row.each) for row in rows}
    assert counts["trajectory"] == (6, 50.0) and counts["claims"] == (1, 100.0)
    assert counts["evaluate"][0] == 6 and counts["evaluate"][1] > 0


def test_a_plan_is_estimated_on_the_reference_here(tmp_path, tiny_folders):
    path = written(tmp_path, model=tiny_folders["qwen2"])
    costs = measured(read_experiment(path))
    assert costs.claims > costs.trajectory > 0
    shown = CliRunner().invoke(cli.cli, ["study", str(path), "--dry-run"])
    assert shown.exit_code == 0, shown.output
    assert "hours (calibrated on the reference)" in shown.output
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("reference", ["embedded", "embedded?dtype=bfloat16"])
def test_what_is_trained_is_the_reference_as_it_is_stored(reference, tmp_path):
    assert read_experiment(written(tmp_path, model=reference)).base == "embedded"


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ('arm = "sft"\nseeds', 'arm = "stf"\nseeds', "did you mean 'sft'"),
        ("batch_size = 2", "batch_sise = 2", "batch_size"),
        ('name = "other"', "", "two trainings of one name"),
        ("sft = [2]", "sft = [3]", "no such checkpoint"),
        ("seeds = [0, 1]", 'seeds = ["a"]', "seeds.0: input should be a valid integer"),
        ("[transfer.gcg]\nnum_steps = 1\nsearch_width = 4", "", "sources without attacks"),
        ("prompts = 4", "promts = 4", "prompts"),
        ("fixed_behaviours = 2", "fixed_behaviors = 2", "fixed_behaviours"),
    ],
)
def test_faults_of_an_experiment_are_told_with_their_place(old, new, says, tmp_path):
    assert old in FILE
    with pytest.raises(AttackPlaneError) as error:
        read_experiment(written(tmp_path, FILE.replace(old, new, 1)))
    assert says in str(error.value) and "experiment.toml" in str(error.value)


STAGES = ("train", "attack", "evaluate", "trajectory", "claims")


@pytest.mark.slow
def test_a_study_that_is_killed_in_every_stage_ends_as_one_that_was_not(tmp_path, tiny_folders):
    text = FILE.replace("adaptive = 0", "adaptive = 1\nadaptive_steps = 2\nadaptive_width = 4")
    text = text.format(run="run", model=tiny_folders["qwen2"])

    def start(name):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        (folder / "experiment.toml").write_text(text)
        command = [sys.executable, ROOT / "cli.py", "study", "experiment.toml"]
        return subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True)

    whole = start("whole")
    whole.communicate()
    assert whole.returncode == 0
    draw, killed = random.Random(0), []
    for stage in STAGES:
        process = start("killed")
        for line in process.stdout:
            if line == f"{stage} ...\n":
                time.sleep(draw.uniform(0.2, 1.5))
                break
        if process.poll() is None:
            process.kill()
            killed.append(stage)
        process.communicate()
    assert killed == list(STAGES)
    last = start("killed")
    last.communicate()
    assert last.returncode == 0
    expected, found = (_results(tmp_path / name / "run") for name in ("whole", "killed"))
    assert expected.keys() == found.keys()
    assert [name for name in expected if expected[name] != found[name]] == []


def _results(run):
    """What a study leaves: rows without times, and the weights of checkpoints."""
    timed = {"seconds", "wall_seconds", "created", "timestamp", "environment", "time"}
    found = {}
    for path in sorted(run.rglob("*.jsonl")):
        rows = [
            json.dumps({k: v for k, v in row.items() if k not in timed}, sort_keys=True)
            for row in read_rows(path)
        ]
        found[str(path.relative_to(run))] = sorted(rows)
    for path in sorted(run.rglob("*.safetensors")):
        found[str(path.relative_to(run))] = path.read_bytes()
    return found


@pytest.mark.slow
def test_a_whole_experiment_runs_and_runs_again_without_work(tmp_path, tiny_folders):
    path = written(tmp_path, model=tiny_folders["qwen2"])
    runs = [CliRunner().invoke(cli.cli, ["study", str(path)]) for _ in range(2)]
    for result in runs:
        assert result.exit_code == 0, result.output
    run = tmp_path / "run"
    report = (run / "REPORT.md").read_text()
    for title in (
        "How checkpoints behave",
        "What changes inside",
        "Aligned anchors",
        "Claims about trainings",
    ):
        assert f"## {title}" in report
    rows = read_rows(run / "checkpoints" / "trajectory.jsonl")
    assert len({r["model"] for r in rows}) == 6
    transfers = read_rows(run / "checkpoints" / "trajectory_transfers.jsonl")
    assert len(transfers) == 6 and all(r["behaviours"] == 1 for r in transfers)
    for name in ("trajectory_coupling.png", "trajectory_transfers.png", "tradeoff.png"):
        assert (run / "checkpoints" / name).stat().st_size > 5_000
        assert f"checkpoints/{name}" in report
