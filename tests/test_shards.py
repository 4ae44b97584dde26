"""Shards of a sweep: disjoint, and merged they are the whole run, row for row."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from attacks.registry import Speed
from cli import cli
from core.errors import AttackPlaneError
from core.store import ATTACKS, BEHAVIOURS, REPLAYS
from pipeline.merge import merge
from pipeline.sweep.config import read_config
from pipeline.sweep.plan import plan
from pipeline.sweep.run import sweep
from pipeline.sweep.shards import Shard, parse_shard, shard_of

CONFIG = """
run = "{run}"
sources = ["{model}"]
targets = ["{model}", "{other}"]
judges = ["rules"]
[behaviours]
limit = 5
[attacks.gcg]
num_steps = 1
search_width = 4
topk = 8
suffix_length = 4
[attacks.gcg_universal]
num_steps = 1
search_width = 4
topk = 8
suffix_length = 4
optimise_on = 2
[attacks.templates]
classes = ["persona", "past_tense"]
[[imports]]
format = "jsonl"
file = "{file}"
attack = "robin"
model = "vicuna"
[replay]
max_new_tokens = 2
[directions]
contrast = "demonstration-v1"
reply_tokens = 2
resamples = 20
[plane]
anchors = "demonstration-v1"
"""


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def ids_of(folder, name=ATTACKS):
    return [row["artifact_id"] for row in lines_of(folder / name)]


def small_grid(folder, tiny_folders, run, count, foreign):
    """A sweep of five of ``count`` requests on two models, with prompts of another tool."""
    requests = [f"Bake cake number {n}" for n in range(count)]
    goals = [{"goal": r, "prompt": f"Robin, {r}!"} for r in requests[foreign]]
    file = folder / "other.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in goals))
    behaviours = folder / "behaviours.csv"
    rows = [f"{r},harmful,test,Sure" for r in requests]
    behaviours.write_text("goal,label,split,target\n" + "\n".join(rows) + "\n")
    path = folder / "sweep.toml"
    models = {"model": tiny_folders["qwen2"], "other": tiny_folders["llama"]}
    text = CONFIG.format(run=folder / run, file=file, **models)
    path.write_text(text.replace("limit = 5", f'set = "{behaviours}"\nlimit = 5'))
    return read_config(path)


@pytest.fixture(scope="module")
def config(tmp_path_factory, tiny_folders):
    return small_grid(tmp_path_factory.mktemp("shards"), tiny_folders, "whole", 8, slice(None))


def named(row):
    """What sorts rows of a file: their names, without measured numbers."""
    return json.dumps({k: v for k, v in row.items() if isinstance(v, str)})


def alike(mine, theirs):
    """Equal, but for what the batch that a prompt stood in leaves in a float32's last digits."""
    if isinstance(mine, dict):
        return mine.keys() == theirs.keys() and all(alike(mine[k], theirs[k]) for k in mine)
    if isinstance(mine, list):
        return len(mine) == len(theirs) and all(map(alike, mine, theirs))
    if isinstance(mine, float):
        return math.isclose(mine, theirs, rel_tol=1e-3, abs_tol=1e-4)
    return mine == theirs


def same_rows(folder, other, names):
    """Whether two runs hold the same rows, in whatever order."""
    for name in names:
        mine, theirs = (sorted(lines_of(run / name), key=named) for run in (folder, other))
        assert len(mine) == len(theirs) > 0, name
        for one, two in zip(mine, theirs, strict=True):
            assert alike(one, two), (name, one, two)


def swept(config, shard=None):
    """The run folder of a sweep, or of a shard of it."""
    own = replace(config, run=shard.folder(config.run)) if shard else config
    result = sweep(own, plan(own, 5, Speed(0.0, 0.0, 0.0)), shard=shard)
    assert not result.failures
    return Path(own.run)


@pytest.fixture(scope="module")
def whole(config):
    return swept(config)


@pytest.mark.parametrize(
    "count", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(7, marks=pytest.mark.slow)]
)
def test_shards_are_disjoint_and_merged_they_are_the_whole_run_row_for_row(config, whole, count):
    folders = [swept(config, Shard(n + 1, count)) for n in range(count)]
    ids = [i for folder in folders for i in ids_of(folder)]
    assert len(ids) == len(set(ids))
    merged = whole.parent / f"merged-{count}"
    result = merge(merged, folders)
    assert not result.notes and result.added[ATTACKS] == len(ids)
    swept(replace(config, run=str(merged)))
    same_rows(merged, whole, (BEHAVIOURS, ATTACKS, REPLAYS, "matrix.jsonl", "plane.jsonl"))
    before = (merged / ATTACKS).read_bytes()
    assert set(merge(merged, folders).added.values()) == {0}
    assert (merged / ATTACKS).read_bytes() == before
    if count == 2:  # an attack that optimises for several requests at once is made by one shard
        universal = [{r["attack"] for r in lines_of(f / ATTACKS)} for f in folders]
        assert sum("gcg_universal" in names for names in universal) == 1


def test_what_does_not_belong_together_is_not_merged(config, whole, tmp_path):
    def copied(name):
        return Path(shutil.copytree(whole, tmp_path / name))

    out = tmp_path / "out"
    other = copied("rows")
    rows = lines_of(other / ATTACKS)
    rows[3]["loss"] = 0.5
    (other / ATTACKS).write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(AttackPlaneError, match=r"two different rows of one id[\s\S]*line 4"):
        merge(out, [whole, other])
    for change, fault in (
        (lambda m: m["stages"]["gcg"].update(num_steps=7), "other settings of gcg"),
        (lambda m: m["models"].update({str(next(iter(m["models"]))): "x"}), "other files of"),
    ):
        other = copied(f"manifest {fault}")
        manifest = json.loads((other / "manifest.json").read_text())
        change(manifest)
        (other / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(AttackPlaneError, match=fault):
            merge(out, [whole, other])
    assert not list(out.glob("*.json*"))  # nothing was written
    with pytest.raises(AttackPlaneError, match="into itself"):
        merge(whole, [whole])
    with pytest.raises(AttackPlaneError, match="no run here"):
        merge(out, [tmp_path])


def test_missing_shards_and_searches_in_progress_are_told(config, whole, tmp_path):
    first = Path(shutil.copytree(whole, tmp_path / "first"))
    Shard(2, 3).mark(first)
    (first / "state").mkdir(exist_ok=True)
    (first / "state" / "x.json").write_text("{}")
    notes = merge(tmp_path / "out", [first]).notes
    assert notes[0] == "shards 1, 3 of 3 are missing: merge them too"
    assert "searches in progress" in notes[1] and shard_of(first) == Shard(2, 3)
    second = Path(shutil.copytree(whole, tmp_path / "second"))
    Shard(1, 4).mark(second)
    with pytest.raises(AttackPlaneError, match="different numbers"):
        merge(tmp_path / "out", [first, second])


@pytest.mark.parametrize("text", ["0/2", "3/2", "1", "a/b", "1/2/3", "-1/2", "", "1/"])
def test_a_wrong_shard_is_refused(text, tmp_path):
    with pytest.raises(AttackPlaneError, match="write i/n"):
        parse_shard(text)


def test_every_id_falls_to_one_shard_and_all_get_their_part():
    names = [f"{n:x}" for n in range(2000)]
    for count in (1, 2, 7):
        held = [sum(Shard(k + 1, count).holds(name) for name in names) for k in range(count)]
        assert sum(held) == 2000 and min(held) > 0.85 * 2000 / count


def test_the_commands_say_what_comes_next(config, whole, tmp_path):
    arguments = ["merge", "--run", str(tmp_path / "out"), str(whole)]
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 0 and "attacks.jsonl" in result.output, result.output
