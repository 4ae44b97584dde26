"""Files of a run that were damaged, swapped or edited: one error with the place and the remedy."""

import json
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

from cli import cli
from core.cards import CARD, card_of
from core.cast import SETTINGS, VECTORS, load_cast
from core.errors import AttackPlaneError
from core.kept import Kept
from core.records import Behaviour
from core.served import parse_server
from core.specs import parse_spec
from core.store import ATTACKS, REPLAYS, RunFolder, intact, sealed
from pipeline.evaluate import Evaluation, _take_attacks
from pipeline.merge import merge
from pipeline.sweep.shards import Shard, parse_shard
from plots.tradeoff_png import ROWS, evaluation_rows
from study.config import StudyConfig
from study.measure import _replay_settings
from study.verdicts import Check, Claim, claim_of
from tests.test_inspect_log import REQUEST, artifact, replay
from training.saved import KEPT, STATE, saved_state

MODEL = SimpleNamespace(spec="m", fingerprint="f")


def lines(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize(
    "bad", [{"value": 1}, {"key": "a"}, {"key": 7, "value": 1}, {"key": None, "value": 1}]
)
def test_kept_results_without_key_or_value_are_told_by_their_line(tmp_path, bad):
    lines(tmp_path / "kept.jsonl", {"key": "a", "value": 1}, bad)
    with pytest.raises(AttackPlaneError, match="line 2") as error:
        Kept(RunFolder(tmp_path), "kept.jsonl")
    assert "measured anew" in str(error.value)


def test_a_kept_result_that_was_changed_is_not_used(tmp_path):
    with RunFolder(tmp_path) as run:
        made = Kept(run, "kept.jsonl").get("what", MODEL, [1], lambda: {"n": (1, 2), 3: 0.1})
        again = Kept(run, "kept.jsonl").get("what", MODEL, [1], lambda: pytest.fail("made anew"))
        assert made == again == {"n": [1, 2], "3": 0.1}
    row = json.loads((tmp_path / "kept.jsonl").read_text())
    row["value"]["n"] = [1, 3]
    lines(tmp_path / "kept.jsonl", row)
    with pytest.raises(AttackPlaneError, match="changed after it was written"):
        Kept(RunFolder(tmp_path), "kept.jsonl")


@pytest.mark.parametrize("change", [{"foreign": 1}, {"step": "2"}, {"seal": "0"}, {"seal": None}])
def test_a_search_goes_on_from_what_it_saved_and_from_nothing_else(tmp_path, change):
    run = RunFolder(tmp_path)
    run.save_state("x", {"step": 2, "ids": (1, 2)})
    assert run.load_state("x") == {"step": 2, "ids": [1, 2]}
    path = tmp_path / "state" / "x.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(AttackPlaneError, match="begins anew"):
        run.load_state("x")
    assert intact(sealed({"a": 1})) and not intact(sealed({"a": 1}) | {"a": True})


def test_an_evaluation_without_its_model_is_told_by_its_line(tmp_path):
    lines(tmp_path / ROWS, {"arm": None})
    with pytest.raises(AttackPlaneError, match="model: field required"):
        evaluation_rows(tmp_path)
    assert evaluation_rows(tmp_path / "elsewhere") == []


CHECK = Check("a", 0.1, float("nan"), 0.2, 0.0, "above", "nats", 12, 0.01, 1.0, "t", needed=None)
CLAIM = Claim(3, "title", "m", (CHECK,), held_back=("x",))


def test_a_claim_is_read_as_it_was_written():
    row = json.loads(json.dumps(CLAIM.to_row()))
    assert claim_of(row, "line 1").to_row() == CLAIM.to_row()


@pytest.mark.parametrize(
    "change",
    [
        {"checks": None},
        {"checks": [7]},
        {"checks": [{}]},
        {"checks": [{**CLAIM.to_row()["checks"][0], "n": "12"}]},
        {"number": "3"},
        {"model": None},
        {"held_back": "x"},
    ],
)
def test_a_claim_that_is_none_is_told_by_its_place(change):
    row = json.loads(json.dumps(CLAIM.to_row())) | change
    with pytest.raises(AttackPlaneError, match=r"claims.jsonl, line 4"):
        claim_of(row, "claims.jsonl, line 4")


def cast_folder(folder, settings=None, **tensors):
    folder.mkdir()
    plain = {"condition_layer": 1, "threshold": 0.5, "above": True, "layers": [2, 3]}
    (folder / SETTINGS).write_text(json.dumps(plain | {"prompt_end": [5]} | (settings or {})))
    whole = {"condition": torch.ones(4), "behaviour": torch.ones(2, 4)}
    save_file(whole | tensors, folder / VECTORS)
    return folder


def test_a_cast_folder_is_read_by_its_types(tmp_path):
    assert load_cast(cast_folder(tmp_path / "good")).layers == (2, 3)
    bad = [
        {"above": "false"},
        {"condition_layer": "12"},
        {"condition_layer": 1.9},
        {"condition_layer": -1},
        {"threshold": float("nan")},
        {"layers": [2]},
        {"layers": "23"},
        {"layers": [2, 2]},
        {"prompt_end": None},
        {"more": 1},
    ]
    for n, settings in enumerate(bad):
        with pytest.raises(AttackPlaneError, match=rf"bad-{n}"):
            load_cast(cast_folder(tmp_path / f"bad-{n}", settings))
    forms = [
        {"condition": torch.ones(1, 4)},
        {"condition": torch.full((4,), torch.nan)},
        {"condition": torch.zeros(4)},
        {"behaviour": torch.tensor(1.0)},
        {"behaviour": torch.ones(3, 4)},
    ]
    for n, tensors in enumerate(forms):
        with pytest.raises(AttackPlaneError, match=rf"form-{n}"):
            load_cast(cast_folder(tmp_path / f"form-{n}", **tensors))
    deep = cast_folder(tmp_path / "deep")
    (deep / SETTINGS).write_text("[" * 100_000)
    with pytest.raises(AttackPlaneError, match="nested too deeply"):
        load_cast(deep)


@pytest.mark.parametrize(
    "change", [{"step": "5"}, {"seed": 1.5}, {"variant": []}, {"arm": None}, {"trained_on": [7]}]
)
def test_a_card_is_read_by_its_types(tmp_path, change):
    (tmp_path / "adapter_config.json").write_text("{}")
    card = {"arm": "sft", "step": 5, "seed": 0, "variant": {}, "trained_on": ["a"]}
    (tmp_path / CARD).write_text(json.dumps(card))
    assert card_of(f"embedded+{tmp_path}") == card
    (tmp_path / CARD).write_text(json.dumps(card | change))
    with pytest.raises(AttackPlaneError, match=re.escape(CARD)):
        card_of(f"embedded+{tmp_path}")


def test_words_of_no_form_are_told():
    with pytest.raises(AttackPlaneError, match="address and its model's name"):
        parse_server("http://[x/v1#m")
    with pytest.raises(AttackPlaneError, match="not a shard"):
        parse_shard(f"1/{'9' * 5000}")


@pytest.mark.parametrize(
    "spec", ["embedded?", "embedded?dtype=bfloat16&", "embedded?&", "http://localhost:1/v1#m?"]
)
def test_a_spec_has_one_spelling(spec):
    with pytest.raises(AttackPlaneError, match="nothing between"):
        parse_spec(spec)


def test_a_report_says_how_many_replies_it_leaves_out(tmp_path):
    run = run_of(tmp_path, artifact("a", "gcg").to_row())
    sent = {"sent_as_meant": True, "verbatim": True, "fault": None}
    one, two = replay("a", "m", "refused"), replay("a", "n", "refused")
    run.append(REPLAYS, replace(one, certificate=sent).to_row())
    run.append(REPLAYS, two.to_row())
    result = CliRunner().invoke(cli, ["report", "--run", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert "left out: 1 replies" in result.stderr


def run_of(path, *prompts, behaviours=True):
    with RunFolder(path) as run:
        run.begin_stage("gcg", {}, {})
        if behaviours:
            run.note_behaviours([Behaviour("cake", REQUEST, "Sure", "food", "harmful", "own")])
        for prompt in prompts:
            run.append(ATTACKS, prompt)
    return run


def test_a_merge_reads_rows_and_knows_a_shard(tmp_path):
    good = artifact("a", "gcg").to_row()
    run_of(tmp_path / "one", good)
    run_of(tmp_path / "two", good | {"artifact_id": "other", "prompt": 7})
    with pytest.raises(AttackPlaneError, match=r"two/attacks.jsonl, line 1"):
        merge(tmp_path / "whole", [tmp_path / "one", tmp_path / "two"])
    run_of(tmp_path / "three", good)
    Shard(1, 2).mark(tmp_path / "three")
    with pytest.raises(AttackPlaneError, match="merged into a shard"):
        merge(tmp_path / "three", [tmp_path / "one"])


def test_attacks_of_a_run_without_its_behaviours_are_not_taken(tmp_path):
    run_of(tmp_path / "other", artifact("a", "gcg").to_row(), behaviours=False)
    asked = Evaluation(attacks=(tmp_path / "other",))
    with pytest.raises(AttackPlaneError, match="refers to a row that it does not hold"):
        _take_attacks(RunFolder(tmp_path / "own"), asked, [])


@pytest.mark.parametrize("change", [{"losses": {}}, {"losses": [7]}, {"seconds": [{}]}, {"x": 1}])
def test_the_state_of_a_training_is_read_by_its_types(tmp_path, change):
    whole = {name: kind() for name, kind in KEPT.items()} | {"losses": [{"step": 1}]}
    torch.save(whole, tmp_path / STATE)
    assert saved_state(tmp_path / STATE) == whole
    torch.save(whole | change, tmp_path / STATE)
    with pytest.raises(AttackPlaneError, match="not the state of a training"):
        saved_state(tmp_path / STATE)


def test_settings_of_replies_that_were_edited_are_told(tmp_path):
    with RunFolder(tmp_path) as run:
        lines(tmp_path / "replays.jsonl")
        run.begin_stage("transfer", {"judges": ["refusal_phrases"], "temperatur": 1.0}, {})
        with pytest.raises(AttackPlaneError, match="temperature"):
            _replay_settings(run, StudyConfig())
