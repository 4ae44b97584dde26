"""Rows and files that were edited by hand: told at the door, by their place."""

import json
import os

import pytest
from click.testing import CliRunner

from attacks import autodan, pair
from attacks.autodan import AutoDANConfig
from attacks.pair import proposal, score_of
from attacks.words import read_seeds
from attacks.workbench import Workbench
from cli import cli
from commands.options import _lacks_memory
from core.embedded import convert_gguf
from core.errors import AttackPlaneError
from core.records import AttackArtifact, Behaviour, Replay
from core.registry import load_plugin
from core.served import parse_server
from core.store import FAILURES, RunFolder, sealed
from interchange.importer import REJECTS, forget_rejects
from pipeline.capability import require_tasks
from pipeline.matrices import failures_of, judges_of
from pipeline.plane import NOTE, _hash_of
from pipeline.runs import classes_of
from plots.style import save
from tests.test_damaged_runs import lines, run_of
from tests.test_inspect_log import artifact, replay
from training.devices import Devices
from training.requests import read_replies
from training.saved import refuse_foreign
from transfer.replay import ReplayConfig

HALF = "\ud800"


# --- rows -----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "change",
    [
        {"snapshots": [{}]},
        {"snapshots": [{"step": "1", "prompt": "x"}]},
        {"snapshots": [{"step": 0}]},
        {"snapshots": [{"step": 0.0, "prompt": "x"}]},
        {"provenance": {"losses": []}},
        {"provenance": {"losses": {"m": "x"}}},
        {"provenance": {"losses": {"m": float("inf")}}},
        {"system_prompt": HALF},
    ],
)
def test_an_edited_prompt_is_told_by_its_line(change):
    row = artifact("a").to_row() | {"loss_history": [1.0]}
    assert AttackArtifact.from_row(row).artifact_id == "a"
    with pytest.raises(AttackPlaneError, match="line 3"):
        AttackArtifact.from_row(row | change, "attacks.jsonl, line 3")


@pytest.mark.parametrize(
    "certificate",
    [
        {"sent_as_meant": True, "system_prompt_hash": ["x"]},
        {"sent_as_meant": True, "template_hash": 7},
        {"sent_as_meant": True, "content_tokens": "7"},
        {"sent_as_meant": True, "content_tokens": True},
        {"x": 1},
    ],
)
def test_an_edited_certificate_is_told_by_its_line(certificate):
    row = replay("a", "m", "refused").to_row()
    good = {"sent_as_meant": True, "content_tokens": 7, "fault": None}
    assert Replay.from_row(row | {"certificate": good}).certificate == good
    with pytest.raises(AttackPlaneError, match="line 3"):
        Replay.from_row(row | {"certificate": certificate}, "replays.jsonl, line 3")


def test_a_request_that_is_no_text_is_told_by_its_line():
    row = Behaviour("a", "Bake.", None, "", "harmless", "own").to_row()
    with pytest.raises(AttackPlaneError, match="request: no Unicode text"):
        Behaviour.from_row(row | {"request": HALF}, "line 1")


def test_a_row_after_a_torn_line_stands_alone(tmp_path):
    for torn in ('{"a": 1}\n{"a": 2', '{"a": 1}'):
        (tmp_path / "rows.jsonl").write_text(torn)
        run = RunFolder(tmp_path)
        run.append("rows.jsonl", {"a": 3})
        assert run.rows("rows.jsonl") == [{"a": 1}, {"a": 3}]
        (tmp_path / "rows.jsonl").write_text(torn)
        with RunFolder(tmp_path).appending("rows.jsonl") as add:
            add({"a": 3})
        assert run.rows("rows.jsonl") == [{"a": 1}, {"a": 3}]


@pytest.mark.parametrize("judges", [5, {"a": 1}, [[1]], [None]])
def test_judges_of_a_manifest_are_names(tmp_path, judges):
    with RunFolder(tmp_path) as run:
        run.begin_stage("transfer", {"judges": judges}, {})
        with pytest.raises(AttackPlaneError, match="not a list of names"):
            judges_of(run)


@pytest.mark.parametrize("change", [{"attack": ["gcg"]}, {"source": 7}, {"variant": [1]}])
def test_failed_cells_are_read_by_their_types(tmp_path, change):
    row = {"stage": "attack", "reason": "x", "attack": "gcg", "source": "m"}
    lines(tmp_path / FAILURES, row, row | change)
    with pytest.raises(AttackPlaneError, match="line 2"):
        failures_of(RunFolder(tmp_path))


@pytest.mark.parametrize(
    "change", [{"centroid": []}, {"displacement_interval": [[1.0]]}, {"null_random": [1.0]}]
)
def test_classes_of_a_plane_are_pairs(tmp_path, change):
    names = ("target", "frame", "class", "kind")
    row = dict.fromkeys(names, "x") | {"n": 1, "judged": 1, "jailbroken": 0, "centroid": [0.0, 1.0]}
    row |= dict.fromkeys(("displacement", "displacement_interval", "null_random", "null_permuted"))
    lines(tmp_path / "plane_classes.jsonl", row)
    assert classes_of(tmp_path) == [row]
    lines(tmp_path / "plane_classes.jsonl", row | change)
    with pytest.raises(AttackPlaneError, match="line 1"):
        classes_of(tmp_path)


def test_rejects_of_an_import_are_read_by_their_types(tmp_path):
    lines(tmp_path / REJECTS, {"place": "line 1"})
    with pytest.raises(AttackPlaneError, match=REJECTS):
        forget_rejects(RunFolder(tmp_path), tmp_path / "x.csv", "csv")


# --- what may still change ------------------------------------------------------------------------
def test_settings_that_nothing_was_made_with_may_change(tmp_path):
    with RunFolder(tmp_path) as run:
        run.begin_stage("gcg", {"width": 1}, {})
        run.begin_stage("gcg", {"width": 2}, {}, empty=lambda: True)
        assert run.manifest["stages"]["gcg"] == {"width": 2}
        with pytest.raises(AttackPlaneError, match="another configuration"):
            run.begin_stage("gcg", {"width": 3}, {}, empty=lambda: False)


# --- files that would be written over -------------------------------------------------------------
def test_a_picture_is_not_written_through_a_link(tmp_path):
    from matplotlib.figure import Figure

    (tmp_path / "mine.png").write_bytes(b"mine")
    (tmp_path / "plane.png").symlink_to(tmp_path / "mine.png")
    with pytest.raises(AttackPlaneError, match="symbolic link"):
        save(Figure(), tmp_path / "plane.png", 50)
    assert (tmp_path / "mine.png").read_bytes() == b"mine"
    figure = Figure()
    figure.suptitle("a model named $\\frac{ and $")
    save(figure, tmp_path / "own.png", 50)
    assert (tmp_path / "own.png").read_bytes().startswith(b"\x89PNG")


def test_a_hook_is_not_fitted_into_a_folder_of_the_users(tmp_path):
    (tmp_path / "condition.csv").write_text("mine")
    with pytest.raises(AttackPlaneError, match="nothing was written"):
        refuse_foreign(tmp_path, "condition.csv")


def test_a_plane_is_done_while_its_files_are_what_was_written(tmp_path):
    (tmp_path / "plane.jsonl").write_text("{}\n")
    note = {"made_from": "x", "files": {"plane.jsonl": _hash_of(tmp_path / "plane.jsonl")}}
    (tmp_path / NOTE).write_text(json.dumps(sealed(note)))
    (tmp_path / "plane.jsonl").write_text('{"a": 1}\n')
    assert note["files"] != {"plane.jsonl": _hash_of(tmp_path / "plane.jsonl")}


# --- words, files and numbers of the user's -------------------------------------------------------
def test_seeds_are_texts_of_a_file(tmp_path):
    path = tmp_path / "seeds.jsonl"
    for bad in (
        '{"name": "a", "text": ["{request}"]}',
        '{"name": 7, "text": "{request}"}',
        '{"name": "a", "name": "b", "text": "{request}"}',
        '{"name": "a", "text": "\\ud800 {request}"}',
        "[" * 100_000,
    ):
        path.write_text(bad + "\n")
        with pytest.raises(AttackPlaneError, match="line 1"):
            read_seeds(path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(AttackPlaneError, match="a pipe or a device"):
        read_seeds(tmp_path / "pipe")


def test_replies_of_a_file_are_unicode(tmp_path):
    (tmp_path / "r.jsonl").write_text('{"request": "a", "reply": "\\ud800"}\n')
    with pytest.raises(AttackPlaneError):
        read_replies(tmp_path / "r.jsonl")


@pytest.mark.parametrize(
    "content",
    [
        {"params": {"goals": "abc"}, "controls": ["!"], "losses": [1.0]},
        {"params": {"goals": [7]}, "controls": ["!"], "losses": [1.0]},
        {"params": {"goals": ["a"], "targets": [7]}, "controls": ["!"], "losses": [1.0]},
        {"params": {"goals": ["a"]}, "controls": ["!"], "losses": [1.0], "tests": 5},
        {"params": {"goals": ["a"]}, "controls": ["!"], "losses": [1.0], "tests": [5]},
        {"params": {"goals": ["a"]}, "controls": ["!"], "losses": [10**400]},
    ],
)
def test_a_log_of_llm_attacks_is_read_by_its_types(tmp_path, content):
    (tmp_path / "log.json").write_text(json.dumps(content))
    arguments = ["import", str(tmp_path / "log.json"), "--format", "llm-attacks"]
    result = CliRunner().invoke(cli, [*arguments, "--run", str(tmp_path / "run")])
    assert result.exit_code == 1 and "unexpected" not in result.output, result.output


def test_tables_and_texts_of_an_import_are_unicode(tmp_path):
    (tmp_path / "a.csv").write_bytes(b'"a"b,prompt\nx,y\n')
    (tmp_path / "b.csv").write_bytes(b"prompt,\xe9\nx,y\n")
    (tmp_path / "c.jsonl").write_text('{"prompt": "a", "request": "a", "system": "\\ud800"}\n')
    for name in ("a.csv", "b.csv", "c.jsonl"):
        run = str(tmp_path / name / "run").replace(".", "-")
        kind = name.split(".")[1]
        result = CliRunner().invoke(
            cli, ["import", str(tmp_path / name), "--format", kind, "--run", run]
        )
        assert result.exit_code == 1 and "unexpected" not in result.output, result.output


def test_numbers_that_no_machine_serves_are_refused():
    for arguments in (
        ["gcg", "--width", "1000000000"],
        ["gcg", "--suffix-length", "1000000000"],
        ["adc", "--starts", "1000000000"],
        ["train", "sft", "--rank", "1000000000"],
    ):
        result = CliRunner().invoke(cli, arguments)
        assert result.exit_code == 2, result.output
    with pytest.raises(AttackPlaneError, match=r"at least 0\.001"):
        ReplayConfig(temperature=1e-40)
    result = CliRunner().invoke(cli, ["nanogcg", "--option", "a=" + "[" * 100_000])
    assert result.exit_code == 2, result.output


def test_a_lack_of_memory_is_no_fault_of_ours():
    import torch

    for error in (
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
    ):
        assert _lacks_memory(error)
    assert not _lacks_memory(RuntimeError("shape"))


def test_what_would_fail_late_fails_first(tmp_path, monkeypatch):
    for check, config in (
        (autodan.ATTACK.check, AutoDANConfig),
        (pair.ATTACK.check, pair.PAIRConfig),
    ):
        with pytest.raises(AttackPlaneError, match="judge"):
            check(Workbench(), config(judge="nonsense"))
    with pytest.raises(AttackPlaneError):
        require_tasks(["no_such_task_of_anyone"])
    for spec in ("http://host:abc/v1#m", "http://host:99999/v1#m"):
        with pytest.raises(AttackPlaneError, match="address and its model's name"):
            parse_server(spec)
    monkeypatch.setenv("WORLD_SIZE", "")
    with pytest.raises(AttackPlaneError, match="WORLD_SIZE"):
        Devices()


def test_replies_of_an_attacker_that_no_reader_holds_are_no_proposals():
    assert proposal('{"prompt": ' + "[" * 100_000) is None
    assert score_of("[[" + "7" * 5000 + "]]") is None and score_of("Rating: [[7]]") == 7


def test_a_plugin_that_leaves_and_a_file_that_is_no_gguf(tmp_path):
    (tmp_path / "plugin.py").write_text("import sys\nsys.exit()\n")
    with pytest.raises(AttackPlaneError, match="the plugin cannot be loaded"):
        load_plugin(tmp_path / "plugin.py")
    (tmp_path / "m.gguf").write_bytes(b"GGUF\x03\x00\x00\x00")
    with pytest.raises(AttackPlaneError, match="cannot read the GGUF file"):
        convert_gguf(tmp_path / "m.gguf")


# --- merges ---------------------------------------------------------------------------------------
def test_a_merge_wants_whole_runs_that_nobody_writes(tmp_path):
    from pipeline.merge import merge

    good = artifact("a", "gcg").to_row()
    run_of(tmp_path / "one", good)
    run_of(tmp_path / "lacking", good | {"artifact_id": "b"}, behaviours=False)
    with pytest.raises(AttackPlaneError, match="refers to a row that it does not hold"):
        merge(tmp_path / "whole", [tmp_path / "one", tmp_path / "lacking"])
    writing = pytest.raises(AttackPlaneError, match="another process is writing")
    with RunFolder(tmp_path / "one"), writing:
        merge(tmp_path / "whole", [tmp_path / "one"])
    lines(tmp_path / "one" / REJECTS, {"file": "x", "format": "csv"})
    found = merge(tmp_path / "whole", [tmp_path / "one", tmp_path / "one"])
    assert found.added["attacks.jsonl"] == 1
    assert any("not joined" in note and REJECTS in note for note in found.notes)
    assert not (tmp_path / "whole" / "attacks.jsonl").read_text().count("\n") > 1
