"""Losses sent to trackers: the real packages where they are installed, else what they are told."""

import sys
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from cli import cli
from core.errors import AttackPlaneError
from core.tracking import KINDS, track, tracking


class Told:
    """A package that remembers what it was told, with the names that trackio and wandb share."""

    def __init__(self, fails_at=None):
        self.rows, self.metrics, self.ended, self.fails_at = [], [], 0, fails_at

    def init(self, **options):
        self.options = options
        return self

    def log(self, values, step=None):
        if len(self.rows) == self.fails_at:
            raise ConnectionError("no network")
        self.rows.append((step, values))

    def define_metric(self, name, step_metric):
        self.metrics.append((name, step_metric))

    def finish(self):
        self.ended += 1


@pytest.fixture
def told(monkeypatch):
    package = Told()
    for kind in ("trackio", "wandb"):
        monkeypatch.setitem(sys.modules, kind, package)
    return package


def test_nobody_listens_outside(told):
    track("gcg/cake", 1, {"loss": 1.0})
    with tracking(None, None, {}):
        track("gcg/cake", 1, {"loss": 1.0})
    assert told.rows == []


def test_trackio_is_told_steps_and_values(told, tmp_path):
    with tracking("trackio", tmp_path / "mine", {"num_steps": 2}):
        track("gcg/cake", 1, {"loss": 2.0, "best": 1.5})
    assert told.rows == [(1, {"gcg/cake/loss": 2.0, "gcg/cake/best": 1.5})] and told.ended == 1
    assert told.options["name"] == "mine" and told.options["config"] == {"num_steps": 2}


def test_each_search_has_steps_of_its_own_in_wandb(told, tmp_path):
    with tracking("wandb", tmp_path, {}):
        for series in ("gcg/a", "gcg/b"):
            for step in (0, 1):
                track(series, step, {"loss": 1.0})
    assert told.metrics == [("gcg/a/*", "gcg/a/step"), ("gcg/b/*", "gcg/b/step")]
    assert [row["gcg/b/step"] for _, row in told.rows if "gcg/b/step" in row] == [0, 1]


def test_a_tracker_that_fails_ends_no_search(monkeypatch, tmp_path, caplog):
    package = Told(fails_at=1)
    monkeypatch.setitem(sys.modules, "trackio", package)
    with tracking("trackio", tmp_path, {}):
        for step in range(4):
            track("gcg/cake", step, {"loss": 1.0})
    assert len(package.rows) == 1 and package.ended == 1
    assert caplog.text.count("nothing more is tracked") == 1


def test_a_missing_package_and_one_that_cannot_be_opened_are_told(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with (
        pytest.raises(AttackPlaneError, match="pip install wandb"),
        tracking("wandb", tmp_path, {}),
    ):
        pass
    broken = SimpleNamespace()
    monkeypatch.setitem(sys.modules, "trackio", broken)
    with (
        pytest.raises(AttackPlaneError, match="cannot be opened"),
        tracking("trackio", tmp_path, {}),
    ):
        pass


def test_of_several_processes_the_first_tracks(told, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with tracking("trackio", tmp_path, {}):
        track("train/sft", 1, {"loss": 1.0})
    assert told.rows == []


def test_searches_and_trainings_are_tracked(told, tiny_folders, tmp_path):
    model, run = str(tiny_folders["llama"]), str(tmp_path / "run")
    sizes = ["--steps", "2", "--width", "4", "--topk", "4", "--suffix-length", "3", "--limit", "1"]
    arguments = ["gcg", "--model", model, "--run", run, *sizes, "--no-baselines"]
    result = CliRunner().invoke(cli, [*arguments, "--log-to", "trackio"])
    assert result.exit_code == 0, result.output
    names = {name.rsplit("/", 1)[1] for _, row in told.rows for name in row}
    assert names == {"loss", "best"} and [step for step, _ in told.rows] == [1, 2]
    told.rows.clear()
    out = ["--model", model, "--out", str(tmp_path / "out"), "--steps", "2", "--batch-size", "2"]
    file = tmp_path / "set.csv"
    rows = "".join(f"Bake cake {n},harmless,Sure\n" for n in range(4))
    file.write_text("request,label,target\n" + rows)
    arguments = ["train", "sft", *out, "--behaviours", str(file), "--reply-tokens", "2"]
    result = CliRunner().invoke(cli, [*arguments, "--rank", "2", "--log-to", "trackio"])
    assert result.exit_code == 0, result.output
    assert [step for step, _ in told.rows] == [1, 2] and "train/sft/loss" in told.rows[0][1]


@pytest.mark.parametrize("kind", KINDS)
def test_the_real_packages_take_it(kind, tmp_path, monkeypatch):
    pytest.importorskip(kind)
    monkeypatch.setenv("WANDB_MODE", "offline")
    with tracking(kind, tmp_path / "run", {"num_steps": 2}):
        for step in range(3):
            track("gcg/cake", step, {"loss": 3.0 - step})
    if kind != "trackio":  # it chooses its folder when it is imported
        written = [p for p in tmp_path.rglob("*") if p.is_file()]
        assert written and sum(p.stat().st_size for p in written) > 0
