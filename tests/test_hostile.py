"""Bad input of every kind: one message that names its place, exit 1 or 2, nothing changed.

Options, specs, TOML files, rows and files are made wrong in many ways, by lists and by hypothesis.
``make hostile`` draws thousands.
"""

import copy
import hashlib
import json
import math
import os
import shutil
import time
import tomllib
from collections import Counter
from pathlib import Path

import click
import pytest
import torch
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import cli
from commands.types import FilePath
from core.errors import AttackPlaneError
from core.models import load
from core.readings import Directions
from core.records import AttackArtifact, Behaviour, Replay
from interchange.readers import READERS
from pipeline.directions_files import directions_path, load_directions, save_directions
from training.saved import STATE, saved_state

ROOT = Path(__file__).parent.parent
EXAMPLES = int(os.environ.get("HOSTILE_EXAMPLES", "25"))
"""Drawn by hypothesis for each test of this file."""
PATIENCE = 20.0
"""Seconds that a refusal may take."""
COUNTED: Counter[str] = Counter()
"""Bad inputs that were refused, by test."""
OURS = "unexpected error"


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def content_of(folder):
    """Everything that lies in a folder, as it is."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.is_symlink() and path.name != ".lock"
    }


def run_command(arguments, *, unchanged=()):
    """The result of a command that must not fail by a fault of ours, nor change these folders."""
    before = [content_of(folder) for folder in unchanged]
    begun = time.monotonic()
    result = CliRunner().invoke(cli.cli, list(map(str, arguments)), input="y\n")
    assert time.monotonic() - begun < PATIENCE, arguments
    assert OURS not in result.output, (arguments, result.output)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert [content_of(folder) for folder in unchanged] == before, arguments
    return result


def refused(arguments, *, place=None, unchanged=(), kind=""):
    result = run_command(arguments, unchanged=unchanged)
    assert result.exit_code in (1, 2), (arguments, result.output)
    assert "rror" in result.output, (arguments, result.output)
    assert place is None or place in result.output, (arguments, place, result.output)
    COUNTED[kind or str(arguments[0])] += 1
    return result


# --- options --------------------------------------------------------------------------------------
def every_command(group=cli.cli, before=()):
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        if isinstance(command, click.Group):
            yield from every_command(command, (*before, name))
        else:
            yield (*before, name), command


def wrong_values(option):
    """Values that no option of this type takes."""
    kind = option.type
    if isinstance(kind, FilePath):
        return ["", " "]
    if isinstance(kind, click.Choice):
        return ["", "nothing-like-it"]
    if isinstance(kind, click.FloatRange):
        return ["nan", "inf", "-inf", "1e999", "x", ""]
    if isinstance(kind, click.IntRange):
        least = -(10**30) if kind.min is None else int(kind.min) - 1
        return ["nan", "1.5", "x", "", "true", "0x10", str(10**30), str(least)]
    return []


def test_no_option_takes_a_value_of_another_type(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, command in every_command():
        for option in command.params:
            for value in wrong_values(option):
                given = [value] if isinstance(option, click.Argument) else [option.opts[0], value]
                if isinstance(option, click.Option) and option.is_flag:
                    continue
                result = refused([*name, *given], kind="options")
                assert result.exit_code == 2, (name, given, result.output)
    assert COUNTED["options"] >= 400 and not list(tmp_path.iterdir())


MODEL_COMMANDS = {
    "gcg": ["--model", None],
    "autodan": ["--model", None],
    "pair": ["--model", None],
    "gcg-universal": ["--model", None],
    "transfer": ["--run", "RUN", "--target", None],
    "directions": ["--run", "RUN", "--model", None],
    "plane": ["--run", "RUN", "--target", None],
    "claims": ["--model", None],
    "layers": ["--model", None],
    "intervene": ["--model", None],
    "trajectory": ["--reference", "embedded", "--model", None],
    "evaluate": ["--run", "new", "--model", None],
    "models": [None],
}
SPECS = (
    "",
    " ",
    "nope",
    "/nowhere/at/all",
    "a/b/c",
    "embedded?dtype=int8",
    "embedded?dtype=",
    "embedded?load=8bit",
    "embedded?x=1",
    "embedded+nowhere",
    "missing.gguf",
    "FOLDER",
    "FOLDER+FOLDER",
    "../",
    "@main",
    "embedded+",
)


@pytest.mark.parametrize("command", MODEL_COMMANDS)
def test_no_command_takes_a_spec_that_names_nothing(command, house, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    empty = tmp_path / "empty"
    empty.mkdir()
    for spec in SPECS:
        told = spec.replace("FOLDER", str(empty))
        arguments = [
            {"RUN": house / "run", None: told}.get(part, part) for part in MODEL_COMMANDS[command]
        ]
        if spec == "" and command == "models":
            continue  # no spec: the list
        refused([command, *arguments], unchanged=[house], kind="specs")


# --- TOML files -----------------------------------------------------------------------------------
def leaves(table, path=()):
    """Paths of all values of nested tables and lists of tables."""
    for key, value in table.items():
        if isinstance(value, dict):
            yield from leaves(value, (*path, key))
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            for index, row in enumerate(value):
                yield from leaves(row, (*path, key, index))
        else:
            yield (*path, key)


def replaced(table, path, value):
    changed = copy.deepcopy(table)
    inner = changed
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return changed


def toml_text(value):
    """A value as TOML; tables are written inline."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return {True: "nan", False: repr(value)}[math.isnan(value)]
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(k)} = {toml_text(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml_text, value)) + "]"
    return json.dumps(value)


def as_toml(table):
    return "".join(f"{json.dumps(key)} = {toml_text(value)}\n" for key, value in table.items())


def of_another_type(value):
    """Values that cannot stand where ``value`` does."""
    others = ["x", 5, -1, 1.5, True, math.nan, [], [1], {}, {"a": 1}, [True], "", 10**30]
    if isinstance(value, bool):
        return [v for v in others if not isinstance(v, bool)]
    if isinstance(value, int):
        return [
            v for v in others if isinstance(v, (str, bool, list, dict, float)) or v in (-1, 10**30)
        ]
    if isinstance(value, float):
        return [v for v in others if isinstance(v, (str, bool, list, dict)) or v != v]
    if isinstance(value, list) and all(isinstance(v, int) for v in value):
        return [7, 1.5, True, math.nan, "x", {"a": 1}, ["x"], [True], [-1], [1.5]]
    if isinstance(value, list):
        return [5, 1.5, True, math.nan, {"a": 1}, [1], [True], ["nothing like it"]]
    return [5, 1.5, True, math.nan, [], {"a": 1}, [1]]


SWEEP = """
run = "runs/hostile"
sources = ["embedded"]
targets = ["embedded"]
judges = ["rules"]
seed = 0
[behaviours]
set = "demonstration"
label = "harmful"
splits = ["test"]
every = 1
limit = 4
[attacks.gcg]
num_steps = 15
search_width = 32
topk = 64
[attacks.autodan_ga]
num_steps = 5
population = 12
mutation = 0.1
[attacks.templates]
classes = ["persona"]
[replay]
max_new_tokens = 32
temperature = 0.5
seed = 0
[directions]
contrast = "demonstration"
splits = ["train"]
reply_tokens = 8
resamples = 40
seed = 0
judge = "rules"
[plane]
anchors = "demonstration"
anchor_splits = ["test"]
estimator = "harc"
layer = 3
"""


@pytest.mark.parametrize("kind", ["sweep", "study"])
def test_no_file_of_settings_takes_a_value_of_another_type(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = SWEEP if kind == "sweep" else (ROOT / "examples/safety_geometry.toml").read_text()
    table = tomllib.loads(text)
    file = tmp_path / "settings.toml"
    for path in leaves(table):
        inner = table
        for key in path:
            inner = inner[key]
        for value in of_another_type(inner):
            file.write_text(as_toml(replaced(table, path, value)))
            refused([kind, file, "--dry-run"], place="settings.toml", kind=kind)
        file.write_text(as_toml(replaced(table, (*path[:-1], f"{path[-1]}x"), inner)))
        refused([kind, file, "--dry-run"], place="settings.toml", kind=kind)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["settings.toml"]


# --- rows -----------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def house(tmp_path_factory):
    """A folder of a user's: a run with prompts and replies, and files beside it."""
    folder = tmp_path_factory.mktemp("house")
    made = CliRunner().invoke(
        cli.cli,
        ["templates", "--run", str(folder / "run"), "--limit", "2", "--class", "persona"],
    )
    assert made.exit_code == 0, made.output
    rows = lines_of(folder / "run" / "attacks.jsonl")
    replays = [
        Replay(
            replay_id=f"r{n}",
            artifact_id=row["artifact_id"],
            behaviour_id=row["behaviour_id"],
            attack=row["attack"],
            source_model=row["source_model"],
            target_model="embedded",
            reply="I cannot help with that.",
            judgements={"rules": 0.0},
            jailbroken=False,
            config_hash="c",
            outcome="refused",
            d=0.5,
            log_odds=1.0,
        ).to_row()
        for n, row in enumerate(rows)
    ]
    lines = "".join(json.dumps(row) + "\n" for row in replays)
    (folder / "run" / "replays.jsonl").write_text(lines)
    (folder / "theirs.json").write_text('{"mine": true}')
    (folder / "goals.csv").write_text("goal,label\nBake a cake,harmless\nForge a pass,harmful\n")
    return folder


RECORDS = {"attacks.jsonl": AttackArtifact, "replays.jsonl": Replay, "behaviours.jsonl": Behaviour}
READERS_OF_RUNS = ("show", "export")


def copied(house, folder):
    """The run, to be spoilt."""
    run = folder / "run"
    run.mkdir(parents=True, exist_ok=True)
    for path in (house / "run").iterdir():
        if path.is_file():
            (run / path.name).write_bytes(path.read_bytes())
    return run


def show_of(run):
    return ["show", "--run", run]


def wrong_for(value):
    """Values that are of another type than this one."""
    wrong = [5, "x", True, [5], {"a": 5}, math.nan, None]
    if isinstance(value, bool):
        return [v for v in wrong if not isinstance(v, bool) and v is not None]
    if isinstance(value, str):
        return [v for v in wrong if not isinstance(v, str)]
    if isinstance(value, (int, float)):
        return ["x", True, [5], {"a": 5}, math.nan]
    if isinstance(value, list):
        return [5, "x", True, {"a": 5}, None]
    if isinstance(value, dict):
        return [5, "x", True, [5], None]
    return []


@pytest.mark.parametrize("name", RECORDS)
def test_no_row_of_a_run_takes_a_value_of_another_type(name, house, tmp_path):
    run = copied(house, tmp_path)
    rows = lines_of(run / name)

    def spoilt(row):
        lines = [json.dumps(r) for r in (row, *rows[1:])]
        (run / name).write_text("\n".join(lines) + "\n")
        refused(show_of(run), place=name, unchanged=[tmp_path], kind="rows")

    nullable = {"target_string", "split", "pair_id", "suffix", "suffix_ids", "loss", "best_step"}
    nullable |= {"token_fidelity", "system_prompt", "variant", "rendering", "jailbroken"}
    nullable |= {"outcome", "d", "log_odds"}
    for key, value in rows[0].items():
        for wrong in wrong_for(value):
            if not (wrong is None and key in nullable):
                spoilt({**rows[0], key: wrong})
    spoilt(dict(list(rows[0].items())[1:]))  # without its id
    spoilt({**rows[0], "behaviour_idd": "x"})
    spoilt({**rows[0], "schema_version": 99})
    spoilt(rows[1] if name != "behaviours.jsonl" else {**rows[0], "label": "nice"})


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=4,
)
hostile = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@hostile
@given(data=st.data())
def test_drawn_rows_are_taken_or_refused_by_name(house, tmp_path, data):
    name = data.draw(st.sampled_from(sorted(RECORDS)))
    run = copied(house, tmp_path)
    rows = lines_of(run / name)
    key = data.draw(st.sampled_from(sorted(rows[0])))
    rows[0][key] = data.draw(anything)
    (run / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = run_command(show_of(run), unchanged=[tmp_path])
    if result.exit_code:
        assert name in result.output
        COUNTED["drawn rows"] += 1


# --- files ----------------------------------------------------------------------------------------
@hostile
@given(data=st.data())
def test_broken_files_of_a_run_are_one_error(house, tmp_path, data):
    run = copied(house, tmp_path)
    name = data.draw(st.sampled_from(sorted(p.name for p in run.iterdir() if p.suffix)))
    content = (run / name).read_bytes()
    cut = data.draw(st.integers(0, len(content)))
    other = data.draw(st.sampled_from([b"", b"\x00\xff\xfe", b"[" * 100_000, b"{}", b"null\n"]))
    (run / name).write_bytes(content[:cut] + other)
    result = run_command(show_of(run), unchanged=[tmp_path])
    if result.exit_code:
        assert name in result.output or "no run here" in result.output
        COUNTED["broken files"] += 1


@hostile
@given(data=st.data())
def test_drawn_files_are_imported_or_refused(house, tmp_path, data):
    kind = data.draw(st.sampled_from(sorted(READERS)))
    content = data.draw(
        st.binary(max_size=60)
        | anything.map(lambda value: json.dumps(value).encode())
        | st.lists(
            st.dictionaries(st.sampled_from(["prompt", "goal", "id"]), anything), max_size=3
        ).map(lambda rows: "\n".join(map(json.dumps, rows)).encode())
    )
    file = tmp_path / "foreign.json"
    file.write_bytes(content)
    arguments = ["import", "--run", tmp_path / "imported", file, "--format", kind]
    result = run_command([*arguments, "--prompt", "x", "--model", "m"], unchanged=[house])
    assert file.read_bytes() == content
    COUNTED["drawn imports"] += result.exit_code == 1


@hostile
@given(data=st.data())
def test_drawn_behaviours_are_taken_or_refused(house, tmp_path, data):
    ending = data.draw(st.sampled_from(["csv", "json", "jsonl", "txt"]))
    content = data.draw(
        st.binary(max_size=60)
        | st.text(max_size=60).map(str.encode)
        | anything.map(lambda value: json.dumps(value).encode())
    )
    file = tmp_path / f"goals.{ending}"
    file.write_bytes(content)
    arguments = ["templates", "--class", "persona", "--behaviours", file, "--limit", 1]
    run = tmp_path / f"run-{hashlib.sha256(content).hexdigest()[:8]}-{ending}"
    result = run_command([*arguments, "--run", run, "--label-of-file", "harmful"])
    assert file.read_bytes() == content
    COUNTED["drawn behaviours"] += result.exit_code == 1


@hostile
@given(data=st.data())
def test_drawn_labels_are_taken_or_refused(house, tmp_path, data):
    rows = st.dictionaries(st.sampled_from(["replay_id", "label", "key", "part"]), anything)
    content = data.draw(
        st.binary(max_size=60)
        | st.lists(rows, max_size=3).map(lambda own: "\n".join(map(json.dumps, own)).encode())
    )
    file = tmp_path / "labels.jsonl"
    file.write_bytes(content)
    arguments = ["judge", "calibrate", "--run", copied(house, tmp_path), "--labels", file]
    result = run_command([*arguments, "--judge", "rules"], unchanged=[house])
    assert file.read_bytes() == content and (result.exit_code == 0 or "rror" in result.output)
    COUNTED["drawn labels"] += result.exit_code == 1


@hostile
@given(data=st.data())
def test_broken_directions_and_states_of_trainings_are_one_error(tmp_path, data):
    zeros = {name: torch.zeros(2, 4) for name in Directions.TENSORS}
    about = {"model": "m", "estimator": "harc", "sample_counts": {}, "settings": {}}
    save_directions(Directions(**zeros, **about, statistics={}), tmp_path, {})
    tensors = directions_path(tmp_path, "m", "harc")
    state = tmp_path / STATE
    torch.save({"step": 1, "tensors": zeros}, state)
    path = data.draw(st.sampled_from([tensors, tensors.with_suffix(".json"), state]))
    content = path.read_bytes()
    cut = data.draw(st.integers(0, len(content) - 1))
    path.write_bytes(content[:cut] + data.draw(st.binary(max_size=40)))
    try:
        saved_state(path) if path == state else load_directions(tmp_path, "m", "harc")
    except AttackPlaneError as error:
        assert path.name in str(error)
        COUNTED["broken tensors"] += 1


@hostile
@given(data=st.data())
def test_settings_of_a_model_are_taken_or_refused(tiny_folders, tmp_path, data):
    folder = tmp_path / "model"
    shutil.copytree(tiny_folders["llama"], folder, dirs_exist_ok=True)
    name = data.draw(st.sampled_from(["config", "tokenizer_config", "generation_config"]))
    file = folder / f"{name}.json"
    values = json.loads(file.read_text())
    values[data.draw(st.sampled_from(sorted(values)))] = data.draw(
        anything | st.just(10**30) | st.just(-1)
    )
    file.write_text(json.dumps(values))
    content = file.read_bytes()
    begun = time.monotonic()
    try:
        load(str(folder), "cpu")
    except AttackPlaneError as error:
        assert str(folder) in str(error)
        COUNTED["settings of models"] += 1
    assert time.monotonic() - begun < PATIENCE and file.read_bytes() == content


@pytest.mark.parametrize("opening", ["[", '{"a":'])
def test_deep_documents_fail_at_once(house, tmp_path, opening):
    deep = tmp_path / "deep.json"
    deep.write_text(opening * 200_000)
    for kind in sorted(READERS):
        arguments = ["import", "--run", tmp_path / "run", deep, "--format", kind]
        refused([*arguments, "--prompt", "x", "--model", "m"], kind="deep")
    for arguments in (
        ["templates", "--behaviours", deep, "--run", tmp_path / "run"],
        ["judge", "calibrate", "--run", house / "run", "--labels", deep],
    ):
        refused(arguments, unchanged=[house], kind="deep")


def test_huge_and_endless_files_of_settings_fail_at_once(house, tmp_path):
    run = copied(house, tmp_path)
    with open(run / "manifest.json", "r+b") as file:
        file.truncate(2**40)  # a hole: it takes no room
    refused(show_of(run), place="manifest.json", kind="huge")
    shutil.rmtree(run)
    run = copied(house, tmp_path)
    with open(run / "attacks.jsonl", "ab") as file:
        file.truncate(2**32)
    refused(show_of(run), place="attacks.jsonl", kind="huge")


def test_pipes_devices_and_folders_are_no_files(house, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pipe = tmp_path / "pipe.csv"
    os.mkfifo(pipe)
    for path in (pipe, Path("/dev/zero"), house):
        for arguments in (
            ["templates", "--behaviours", path],
            ["import", "--run", "new", path, "--format", "csv"],
            ["sweep", path],
            ["study", path],
            ["judge", "calibrate", "--run", house / "run", "--labels", path],
        ):
            refused(arguments, unchanged=[house], kind="no files")


def test_what_the_user_has_is_never_written_over(house, tmp_path):
    run, theirs = house / "run", house / "theirs.json"
    export = ["export", "--run", run, "--format", "harmbench", "--out"]
    for out in (theirs, run / "attacks.jsonl", run / "new.json", house):
        refused([*export, out], place=str(out), unchanged=[house], kind="theirs")
    refused([*export, run / "new.json", "--force"], unchanged=[house], kind="theirs")
    link = tmp_path / "link.json"
    link.symlink_to(theirs)
    refused([*export, link, "--force"], place="link.json", unchanged=[house], kind="theirs")
    own = ["import", "--run", run, run / "attacks.jsonl", "--format", "jsonl"]
    refused(own, place="attacks.jsonl", unchanged=[house], kind="theirs")
    refused(["show", "--run", ""], unchanged=[house], kind="theirs")
    assert link.is_symlink() and theirs.read_text() == '{"mine": true}'


def test_what_matches_nothing_says_so(house):
    run = house / "run"
    for arguments in (
        ["report", "--run", run, "--attack", "nothing"],
        ["report", "--run", run, "--target", "nothing"],
        ["export", "--run", run, "--format", "harmbench", "--out", "x", "--attack", "nothing"],
        ["claims", "--model", "embedded", "--claims", "99"],
    ):
        assert refused(arguments, unchanged=[house], kind="nothing").exit_code == 1


def test_a_file_without_labels_asks_for_one(tmp_path):
    file = tmp_path / "goals.csv"
    file.write_text("goal\nBake a cake\nBrew tea\nBake a cake\n")
    base = ["templates", "--class", "persona", "--behaviours", file, "--run", tmp_path / "run"]
    refused(base, place="--label-of-file", kind="labels")
    named = [*base, "--label-of-file", "harmful"]
    refused(named, place="--merge-duplicates", kind="labels")
    merged = run_command([*named, "--merge-duplicates"])
    assert merged.exit_code == 0, merged.output
    rows = lines_of(tmp_path / "run" / "behaviours.jsonl")
    assert [row["label"] for row in rows] == ["harmful"] * 2


def test_so_many_bad_inputs_were_refused():
    """The last test of this file: what the others counted, where all of them have run."""
    if not {"drawn rows", "broken files", "labels"} <= set(COUNTED):
        pytest.skip("not all tests of this file have run")
    print(dict(COUNTED))
    assert sum(COUNTED.values()) >= (5000 if EXAMPLES >= 1000 else 400)
