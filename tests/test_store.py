"""Run folders: rows survive crashes, repeated commands add nothing, other configurations are
refused by name."""

import json
import logging
import os

import pyarrow.parquet as pq
import pytest

from core.errors import AttackPlaneError
from core.files import read_rows, write_atomically, write_new
from core.readings import PlanePoint
from core.records import AttackArtifact, Behaviour, content_hash
from core.store import RunFolder
from core.typed import from_values
from pipeline.plane_files import as_parquet


def test_a_torn_last_line_is_dropped_with_a_warning_and_cut_when_writing(tmp_path, caplog):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a":1}\n{"a":2}\n{"a":')
    with caplog.at_level(logging.WARNING):
        assert read_rows(path) == [{"a": 1}, {"a": 2}]
    assert "torn" in caplog.text and path.read_bytes().endswith(b'{"a":')
    with RunFolder(tmp_path) as run:
        assert run.rows("rows.jsonl") == [{"a": 1}, {"a": 2}]
        run.append("rows.jsonl", {"a": 3})
    assert path.read_bytes() == b'{"a":1}\n{"a":2}\n{"a":3}\n'


def test_a_bad_line_in_the_middle_is_an_error_with_its_number(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a":1}\nnonsense\n{"a":3}\n')
    with pytest.raises(AttackPlaneError, match=r"rows\.jsonl, line 2"):
        read_rows(path)


def test_another_configuration_is_refused_naming_the_difference(tmp_path):
    with RunFolder(tmp_path) as run:
        run.begin_stage("gcg", {"search_width": 64, "seed": 0}, {"m": "abc"})
        run.begin_stage("gcg", {"search_width": 64, "seed": 0}, {"m": "abc"})
        with pytest.raises(
            AttackPlaneError, match=r"gcg\.search_width: the run has 64, this command 128"
        ):
            run.begin_stage("gcg", {"search_width": 128, "seed": 0}, {"m": "abc"})
        with pytest.raises(AttackPlaneError, match="model m: other files or precision"):
            run.begin_stage("gcg", {"search_width": 64, "seed": 0}, {"m": "xyz"})
    assert (
        json.loads((tmp_path / "manifest.json").read_text())["stages"]["gcg"]["search_width"] == 64
    )


def test_a_behaviour_id_stands_for_one_request(tmp_path):
    first = Behaviour("1", "Bake a cake", None, "c", "harmful", "a")
    with RunFolder(tmp_path) as run:
        run.note_behaviours([first])
        run.note_behaviours([first])
        assert run.behaviours() == {"1": first} and len(run.rows("behaviours.jsonl")) == 1
        with pytest.raises(AttackPlaneError, match="'1' for another request"):
            run.note_behaviours([Behaviour("1", "Brew tea", None, "c", "harmful", "b")])


def test_a_run_can_not_be_written_into_a_file(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(AttackPlaneError, match="cannot write"), RunFolder(tmp_path / "file"):
        pass


def test_two_writers_at_once_are_refused(tmp_path):
    with (
        RunFolder(tmp_path),
        pytest.raises(AttackPlaneError, match="another process"),
        RunFolder(tmp_path),
    ):
        pass


def test_a_folder_without_a_run_is_a_clear_error(tmp_path):
    with pytest.raises(AttackPlaneError, match="no run here"):
        RunFolder.existing(tmp_path / "nothing")


def test_states_are_replaced_whole_and_dropped(tmp_path):
    with RunFolder(tmp_path) as run:
        run.save_state("x", {"step": 1})
        run.save_state("x", {"step": 2})
        assert run.load_state("x") == {"step": 2}
        run.drop_state("x")
        assert run.load_state("x") is None


def test_an_interrupted_write_leaves_the_old_content(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomically(path, "old")
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, "new")
    assert path.read_text() == "old"


def test_content_in_pieces_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    write_atomically(path, (f"{n}\n" for n in range(3)))
    assert path.read_text() == "0\n1\n2\n"
    with pytest.raises(ZeroDivisionError):
        write_atomically(path, (str(1 // (2 - n)) for n in range(3)))
    assert path.read_text() == "0\n1\n2\n" and [*tmp_path.iterdir()] == [path]


def test_hashes_depend_on_content_and_not_on_key_order():
    assert content_hash({"a": 1, "b": [2, "é"]}) == content_hash({"b": [2, "é"], "a": 1})
    assert content_hash({"a": 1}) != content_hash({"a": 2})


def test_unknown_and_missing_fields_are_named_with_the_nearest():
    row = Behaviour("b", "request", None, "c", "harmful", "x").to_row()
    with pytest.raises(AttackPlaneError, match="did you mean 'category'"):
        Behaviour.from_row({**row, "categry": "c"})
    with pytest.raises(AttackPlaneError, match="lacks label"):
        Behaviour.from_row({k: v for k, v in row.items() if k != "label"})
    with pytest.raises(AttackPlaneError, match="schema"):
        Behaviour.from_row({**row, "schema_version": 99})
    with pytest.raises(AttackPlaneError, match="did you mean 'search_width'"):
        from attacks.gcg import GCGConfig

        from_values(GCGConfig, {"serch_width": 3}, "a config")


def test_records_refuse_what_cannot_be():
    with pytest.raises(AttackPlaneError, match="label"):
        Behaviour("b", "request", None, "c", "evil", "x")
    good = {
        "artifact_id": "a",
        "behaviour_id": "b",
        "attack": "gcg",
        "source_model": "m",
        "request": "r",
        "prompt": "r ! !",
        "suffix": " ! !",
        "suffix_ids": [1, 2],
        "target_string": "t",
        "loss": 1.0,
        "loss_history": [2.0, 1.0],
        "best_step": 1,
        "seed": 0,
        "config_hash": "c",
        "token_fidelity": True,
    }
    AttackArtifact(**good)
    for change in ({"suffix": "x x"}, {"loss": float("nan")}, {"best_step": 2}, {"prompt": ""}):
        with pytest.raises(AttackPlaneError):
            AttackArtifact(**{**good, **change})
    with pytest.raises(AttackPlaneError, match="frame"):
        PlanePoint(*["x"] * 8, "third", 1, 0, 0, 0, 0, None, 1, 1, None)


def test_a_whole_last_row_without_its_newline_is_kept_and_completed(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a":1}\n{"a":2}')
    assert read_rows(path) == [{"a": 1}, {"a": 2}]
    assert [row["a"] for row in RunFolder(tmp_path).rows("rows.jsonl")] == [1, 2]
    assert path.read_bytes() == b'{"a":1}\n{"a":2}'  # reading alone changes nothing
    with RunFolder(tmp_path) as run:
        assert run.rows("rows.jsonl") == [{"a": 1}, {"a": 2}]
        run.append("rows.jsonl", {"a": 3})
    assert path.read_bytes() == b'{"a":1}\n{"a":2}\n{"a":3}\n'


def test_nothing_is_written_through_a_link(tmp_path):
    theirs = tmp_path / "theirs.jsonl"
    theirs.write_text('{"a":1}')
    (tmp_path / "run").mkdir()
    link = tmp_path / "run" / "rows.jsonl"
    link.symlink_to(theirs)
    with RunFolder(tmp_path / "run") as run:
        for write in (
            lambda: run.append("rows.jsonl", {"a": 2}),
            lambda: run.rows("rows.jsonl"),
            lambda: write_atomically(link, "x"),
        ):
            with pytest.raises(AttackPlaneError, match="symbolic link"):
                write()
    assert theirs.read_text() == '{"a":1}' and link.is_symlink()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "Expecting"),
        ("[]", "a list, no object"),
        ('{"stages": {}, "models": [1], "history": []}', "models is a list"),
        ('{"schema_version": 7, "stages": {}, "models": {}, "history": []}', "schema_version 7"),
    ],
)
def test_a_broken_manifest_is_one_error_that_names_it(content, says, tmp_path):
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(AttackPlaneError) as error:
        _ = RunFolder.existing(tmp_path).manifest
    assert "manifest.json" in str(error.value) and says in str(error.value)


def test_leftovers_of_killed_writes_are_cleared_and_those_of_living_ones_stay(tmp_path):
    dead, living = tmp_path / f".x.json.{2**22 + 1}.tmp", tmp_path / f".x.json.{os.getpid()}.tmp"
    theirs = tmp_path / ".notes.tmp"
    for path in (dead, living, theirs):
        path.write_text("x")
    with RunFolder(tmp_path):
        assert not dead.exists() and living.exists() and theirs.exists()


def test_a_file_that_the_user_names_replaces_nothing_and_stays_out_of_the_run(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    with pytest.raises(AttackPlaneError, match="in the run"):
        write_new(run / "attacks.jsonl", "x", apart_from=run, force=True)
    there = tmp_path / "there.json"
    there.write_text("mine")
    with pytest.raises(AttackPlaneError, match="--force"):
        write_new(there, "x", apart_from=run, force=False)
    assert there.read_text() == "mine" and not list(run.iterdir())
    write_new(there, "x", apart_from=run, force=True)
    assert there.read_text() == "x"


@pytest.mark.parametrize("collide", [False, True])
def test_two_rows_of_one_id_are_refused_and_ids_whose_hashes_are_equal_are_not(
    tmp_path, monkeypatch, collide
):
    if collide:
        monkeypatch.setattr("core.store.hash", lambda text: 7, raising=False)
    rows = [Behaviour(f"b{n}", f"Bake {n}", None, "", "harmful", "x").to_row() for n in range(4)]
    with RunFolder(tmp_path / "run") as run:
        for row in rows:
            run.append("rows.jsonl", row)
        found = run.records("rows.jsonl", Behaviour, lambda b: b.behaviour_id)
        assert [b.behaviour_id for b in found] == ["b0", "b1", "b2", "b3"]
        run.append("rows.jsonl", rows[1] | {"request": "Brew"})
        with pytest.raises(AttackPlaneError, match=r"(?s)the same id as line 2.*line 5.*b1"):
            run.records("rows.jsonl", Behaviour, lambda b: b.behaviour_id)


def test_a_parquet_file_of_several_parts_keeps_its_types(tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.plane_files.PARQUET_ROWS", 2)
    rows = [{"a": n, "b": None if n < 3 else n / 2, "c": None, "d": f"t{n}"} for n in range(5)]
    path = tmp_path / "rows.parquet"
    path.write_bytes(as_parquet(list("abcd"), rows, dict.get))
    assert pq.ParquetFile(path).num_row_groups == 3
    assert pq.read_table(path).to_pylist() == rows
    path.write_bytes(as_parquet(list("abcd"), [], dict.get))
    assert pq.read_table(path).to_pylist() == []
