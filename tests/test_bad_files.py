"""Bad files that a stranger threw at the suite: each is told by what it is."""

import json
import os
import shutil
import stat
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from attacks.templates import TemplatesConfig
from cli import cli
from commands.study import refuse_foreign_report
from core.errors import AttackPlaneError
from core.files import require_possible
from core.models import load
from core.prompt import Renderer
from core.readings import Directions
from core.records import Behaviour
from core.specs import parse_spec
from core.store import RunFolder
from evaluation.behaviours import read_file
from pipeline.directions_files import directions_path, load_directions, save_directions
from pipeline.toml_file import read_toml
from study.experiment_file import read_experiment
from tests.test_inspect_log import artifact, replay


def told(tmp_path, name, content):
    """What is said of a file of behaviours."""
    file = tmp_path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(AttackPlaneError) as error:
        read_file(file, "harmful")
    assert name in str(error.value)
    return str(error.value)


def test_behaviours_that_cannot_be_read_say_why(tmp_path):
    half = '[{"request": "\\ud800"}]'
    assert "no Unicode text" in told(tmp_path, "a.json", half)
    assert "or an object with one such list" in told(tmp_path, "b.json", '{"request": "x"}')
    assert "line 2: 7 is no text" in told(tmp_path, "c.jsonl", '{"request": "a"}\n7\n')
    assert "'request' stands twice" in told(tmp_path, "d.json", '[{"request":"a","request":"b"}]')
    assert "'request' stands twice" in told(tmp_path, "e.jsonl", '{"request":"a","request":"b"}')
    assert "two columns of one name" in told(tmp_path, "f.csv", "goal,goal\na,b\n")
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(AttackPlaneError, match="a folder, no behaviours file"):
        read_file(tmp_path / "folder.csv", "harmful")


def test_a_long_csv_field_is_read(tmp_path):
    file = tmp_path / "long.csv"
    file.write_text(f"goal\n{'a' * 300_000}\n")
    assert len(read_file(file, "harmful")[0].request) == 300_000


@pytest.mark.parametrize("content", [f"n = {'9' * 6000}", "a = " + "[" * 100_000])
def test_toml_that_python_cannot_hold_is_no_toml(tmp_path, content):
    file = tmp_path / "x.toml"
    file.write_text(content)
    with pytest.raises(AttackPlaneError, match="not a TOML file"):
        read_toml(file, "sweep")
    file.write_bytes(b"\xef\xbb\xbfa = 1\n")
    assert read_toml(file, "sweep") == {"a": 1}


@pytest.mark.parametrize(
    "content,kind,fault",
    [
        ('{"a": 1}', "json", "no rows of the format json"),
        ("7", "json", "no rows of the format json"),
        ("", "jsonl", "no rows of the format jsonl"),
        ("prompt,prompt,request\na,b,c\n", "csv", "two columns of one name"),
        ('{"prompt": "a", "prompt": "b", "request": "c"}\n', "jsonl", "stands twice"),
    ],
)
def test_an_import_of_nothing_says_why(tmp_path, content, kind, fault):
    file = tmp_path / "file"
    file.write_text(content)
    arguments = ["import", "--run", tmp_path / "run", "--format", kind, file]
    assert fault in said(*arguments, "--label-of-file", "harmful")


def test_what_is_given_twice_is_refused(tmp_path):
    for spec in ("embedded?dtype=float32&dtype=bfloat16", "http://h/v1#m?tries=1&tries=2"):
        with pytest.raises(AttackPlaneError, match="given twice"):
            parse_spec(spec)
    arguments = ["import", "--run", str(tmp_path / "run"), "--format", "json", __file__]
    result = CliRunner().invoke(cli, [*arguments, "--map", "prompt=a", "--map", "prompt=b"])
    assert result.exit_code == 2 and "each once" in result.output


def test_no_remedy_says_that_hand_made_rows_are_made_anew(tmp_path):
    labels = tmp_path / "labels.jsonl"
    labels.write_text("[1]\n")
    (tmp_path / "manifest.json").write_text(
        json.dumps({"schema_version": 1, "stages": {}, "models": {}, "history": []})
    )
    arguments = ["judge", "calibrate", "--run", str(tmp_path), "--labels", str(labels)]
    result = CliRunner().invoke(cli, arguments)
    assert "mend or remove that line" in result.output, result.output


def run_folder(path, **files):
    path.mkdir()
    manifest = {"schema_version": 1, "stages": {}, "models": {}, "history": []}
    (path / "manifest.json").write_text(json.dumps(manifest))
    for name, text in files.items():
        (path / f"{name}.jsonl").write_text(text)
    return path


def said(*arguments):
    """What the command line says where it refuses."""
    result = CliRunner().invoke(cli, [str(a) for a in arguments])
    assert result.exit_code == 1, result.output
    assert "unexpected" not in result.output
    return " ".join(result.output.split())


def test_control_characters_are_no_part_of_a_request(tmp_path):
    assert "'\\r'" in told(tmp_path, "mac.txt", "first\rsecond\r")
    assert "'\\x00'" in told(tmp_path, "nul.json", '[{"request": "a\\u0000b"}]')
    assert "nested too deeply" in told(tmp_path, "deep.json", "[" * 100_000)
    windows = tmp_path / "windows.txt"
    windows.write_bytes(b"first\r\nsecond\r\n")
    assert [b.request for b in read_file(windows, "harmful")] == ["first", "second"]


def test_a_link_to_itself_is_told(tmp_path):
    (tmp_path / "loop.json").symlink_to("loop.json")
    with pytest.raises(AttackPlaneError, match="a symbolic link that leads to no file"):
        read_file(tmp_path / "loop.json", "harmful")


def test_an_empty_spec_is_no_list_of_models():
    assert "model spec ''" in said("models", "")


def test_a_run_is_never_merged_into_a_folder_in_it(tmp_path):
    source = run_folder(tmp_path / "run", attacks="")
    before = sorted(source.iterdir())
    assert "into a folder in it" in said("merge", "--run", source / "inner", source)
    assert sorted(source.iterdir()) == before


def test_rows_without_an_id_and_broken_manifests_say_what_to_do(tmp_path):
    source = run_folder(tmp_path / "run", attacks='{"artifact_id": null}\n')
    words = said("merge", "--run", tmp_path / "other", source)
    assert "lacks its artifact_id" in words and "attacks.jsonl, line 1" in words
    assert "mend or remove that line" in words
    (source / "manifest.json").write_text("{}")
    words = said("show", "--run", source)
    assert "got: no stages" in words and "restore the file" in words
    (tmp_path / "file").write_text("x")
    words = said("merge", "--run", tmp_path / "file", run_folder(tmp_path / "third"))
    assert "got: a file" in words and "name a folder" in words


def test_ids_that_an_import_can_not_keep_are_told(tmp_path):
    rows = [
        {"prompt": "p1", "request": "Do a thing", "behaviour_id": "one"},
        {"prompt": "p2", "request": "do a thing.", "behaviour_id": "two"},
        {"prompt": "p3", "request": "Do another thing", "behaviour_id": "one"},
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["import", "--run", str(tmp_path / "run"), "--format", "jsonl", str(file)]
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 0 and "3 prompts imported" in result.output, result.output
    assert "two is jsonl-one, one is jsonl-" in result.output
    again = CliRunner().invoke(cli, arguments)
    assert "3 already there" in again.output


# --- a second round ----------------------------------------------------------------------------
@pytest.fixture
def whole(tmp_path):
    """A run with one prompt and one reply, in which everything is right."""
    behaviour = Behaviour("cake", "Bake a cake", "Sure", "food", "harmful", "own")
    with RunFolder(tmp_path / "whole") as run:
        run.begin_stage("transfer", {"judges": ["rules"]}, {})
        run.note_behaviours([behaviour])
        run.append("attacks.jsonl", artifact("a").to_row())
        run.append("replays.jsonl", replay("a", "one", "complied").to_row())
    said_well(tmp_path / "whole")
    return tmp_path / "whole"


def said_well(run):
    result = CliRunner().invoke(cli, ["show", "--run", str(run)])
    assert result.exit_code == 0, result.output


def changed(run, file, **values):
    """The run with another value in the last row of a file."""
    rows = [json.loads(line) for line in (run / file).read_text().splitlines()]
    rows[-1].update(values)
    (run / file).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run


@pytest.mark.parametrize(
    "values,fault",
    [
        ({"outcome": "maybe"}, "outcome must be one of"),
        ({"judgements": {"rules": 7.0}}, "between 0 and 1"),
        ({"jailbroken": False}, "jailbroken is what outcome says"),
        ({"sample": -1}, "sample counts from 0"),
        ({"certificate": {"sent_as_meant": "no"}}, "true, false or null"),
        ({"artifact_id": "nothing"}, "refers to a row that it does not hold"),
        ({"behaviour_id": "nobody"}, "refers to a row that it does not hold"),
    ],
)
def test_a_reply_that_cannot_be_is_refused(whole, values, fault):
    assert fault in said("show", "--run", changed(whole, "replays.jsonl", **values))


@pytest.mark.parametrize(
    "values,fault",
    [
        ({"rendering": {"content_ids": ["a"]}}, "token ids are whole numbers"),
        ({"rendering": {"vocabulary": 3}}, "are texts"),
        ({"behaviour_id": "nobody"}, "behaviours.jsonl"),
    ],
)
def test_a_prompt_that_cannot_be_is_refused(whole, values, fault):
    changed(whole, "attacks.jsonl", **values)
    assert fault in said("show", "--run", whole) and fault in said("verify", "--run", whole)


@pytest.mark.parametrize("file", ["attacks.jsonl", "behaviours.jsonl"])
def test_a_run_that_lacks_a_file_is_not_whole(whole, file, tmp_path):
    (whole / file).unlink()
    out = ["--format", "harmbench", "--out", tmp_path / "out.json", "--attack", "gcg"]
    assert file in said("show", "--run", whole)
    assert file in said("export", "--run", whole, *out)


@pytest.mark.parametrize(
    "file,content,fault",
    [
        ("plane_classes.jsonl", '{"a":1}', "target: field required"),
        ("failures.jsonl", '{"a":1}', "stage: field required"),
        ("failures.jsonl", '{"stage":"attack","reason":"x"}', "not a failed cell"),
        ("judge_errors.json", '{"rules": {"x": "y"}}', "no counts of 'all'"),
        ("judge_errors.json", '{"rules": {"all": {"fp": 1}}}', "unknown setting 'fp'"),
        ("judge_errors.json", '{"rules": {"all": 7}}', "no counts"),
    ],
)
def test_what_a_run_holds_beside_its_rows_is_checked(whole, file, content, fault):
    (whole / file).write_text(content + "\n")
    words = said("show", "--run", whole)
    assert fault in words and file in words


def test_stages_of_a_manifest_are_tables(whole):
    manifest = json.loads((whole / "manifest.json").read_text())
    manifest["stages"]["gcg"] = 3
    (whole / "manifest.json").write_text(json.dumps(manifest))
    assert "stages, gcg" in said("show", "--run", whole)


def test_directions_of_other_tensors_are_refused(tmp_path):
    layers, width = 3, 4
    unit = torch.zeros(layers, width)
    unit[:, 0] = 1
    for name in ("one", "two"):
        tensors = [unit.clone(), unit.clone(), torch.ones(layers), torch.ones(layers)]
        tensors += [torch.full((layers, width), float(ord(name[0]))) for _ in range(2)]
        save_directions(Directions(name, "harc", *tensors, {"harmful": 2}), tmp_path, {})
    assert load_directions(tmp_path, "one", "harc").n_layers == 2
    one, two = (directions_path(tmp_path, name, "harc") for name in ("one", "two"))
    one.write_bytes(two.read_bytes())
    with pytest.raises(AttackPlaneError, match="not those that the description is of"):
        load_directions(tmp_path, "one", "harc")
    description = json.loads(two.with_suffix(".json").read_text())
    for key, value in (("settings", []), ("sample_counts", {"x": "y"})):
        two.with_suffix(".json").write_text(json.dumps(description | {key: value}))
        with pytest.raises(AttackPlaneError, match=key):
            load_directions(tmp_path, "two", "harc")


@pytest.mark.parametrize("name", ["x" * 300, "a\0b"])
def test_paths_that_no_disk_takes_are_refused_before_any_work(tmp_path, name, whole):
    result = CliRunner().invoke(cli, ["show", "--run", f"{tmp_path}/{name}"])
    assert result.exit_code == 2 and "no disk takes this path" in result.output
    with pytest.raises(AttackPlaneError, match=r"too long|no path holds a NUL"):
        require_possible(tmp_path / name)


def test_a_file_in_the_way_of_a_run_is_told(tmp_path):
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path / "file", tmp_path / "file" / "deeper"):
        with pytest.raises(AttackPlaneError, match="a file is in the way"):
            require_possible(path)


def test_a_pipe_is_no_file_to_be_replaced(whole, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    arguments = ["export", "--run", whole, "--format", "harmbench", "--out", tmp_path / "pipe"]
    assert "no plain file" in said(*arguments, "--force")
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


def test_an_unknown_target_of_an_export_is_told(whole, tmp_path):
    arguments = ["--format", "jailbreakbench", "--out", tmp_path / "x.json", "--target", "nope"]
    assert "no replies of this target" in said("export", "--run", whole, *arguments)


def test_errors_of_the_system_are_no_faults_of_ours(whole, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device", "somewhere")

    monkeypatch.setattr("pipeline.matrices.matrix", full)
    words = said("show", "--run", whole)
    assert "No space left" in words and "somewhere" in words


EXPERIMENT = """
run = "{run}"
{head}
[[trainings]]
arm = "sft"
num_steps = 4
{training}
[attacks.templates]
classes = ["persona"]
[transfer.templates]
classes = ["persona"]
[sources]
sft = {steps}
"""


@pytest.mark.parametrize(
    "change,fault",
    [
        ({"run": "file"}, "a file is in the way"),
        ({"run": "x" * 300}, "too long"),
        ({"head": 'reference = ""'}, "needs a reference"),
        ({"head": "fixed_behaviours = 1000000"}, "more behaviours than the set has"),
        ({"steps": "[4, 4]"}, "given twice"),
        ({"training": f'name = "{"n" * 400}"'}, "must do as a folder"),
    ],
)
def test_an_experiment_that_cannot_be_is_refused_when_it_is_read(tmp_path, change, fault):
    (tmp_path / "file").write_text("mine")
    values = {"run": "run", "head": "", "training": "", "steps": "[4]"} | change
    text = EXPERIMENT.format(**(values | {"run": tmp_path / values["run"]}))
    (tmp_path / "study.toml").write_text(text)
    with pytest.raises(AttackPlaneError, match=fault):
        read_experiment(tmp_path / "study.toml")


def test_no_classes_are_no_attack():
    with pytest.raises(AttackPlaneError, match="no classes"):
        TemplatesConfig(classes=())


def test_a_report_of_the_users_own_is_not_replaced(tmp_path):
    report = tmp_path / "REPORT.md"
    report.write_text("MY NOTES")
    with pytest.raises(AttackPlaneError, match="did not write"):
        refuse_foreign_report(report)
    report.write_text("# x\n\nMade by `study x.toml`.\n")
    refuse_foreign_report(report)


def test_a_model_with_another_ones_tokenizer_is_told(tiny_folders, tmp_path):
    loaded = load(str(tiny_folders["llama"]))
    loaded.model.resize_token_embeddings(10)
    with pytest.raises(AttackPlaneError, match="no embedding of"):
        Renderer(loaded).tokenise(["Bake a cake"])
    folder = Path(shutil.copytree(tiny_folders["llama"], tmp_path / "model"))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": 7}))
    with pytest.raises(AttackPlaneError, match="the chat template is no text"):
        load(str(folder))


def test_a_cache_that_is_a_file_is_told(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ATTACK_PLANE_CACHE", str(tmp_path / "file"))
    assert "is no folder" in said("models")
