"""Bad files that a stranger threw at the suite: each is told by what it is."""

import json

import pytest
from click.testing import CliRunner

from cli import cli
from core.errors import AttackPlaneError
from core.specs import parse_spec
from evaluation.behaviours import read_file
from pipeline.toml_file import read_toml


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
    arguments = ["import", "--run", str(tmp_path / "run"), "--format", kind, str(file)]
    result = CliRunner().invoke(cli, [*arguments, "--label-of-file", "harmful"])
    assert result.exit_code == 1 and fault in result.output, result.output


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
