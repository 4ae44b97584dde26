"""The export to Inspect, read by Inspect's own reader."""

import json

import pytest
from click.testing import CliRunner

from cli import cli
from core.records import AttackArtifact, Behaviour, Replay
from core.store import ATTACKS, REPLAYS, RunFolder

REQUEST = "Bake a cake"


def artifact(name, attack="gcg", system=None):
    return AttackArtifact(
        artifact_id=name,
        behaviour_id="cake",
        attack=attack,
        source_model="source",
        request=REQUEST,
        prompt=f"{REQUEST} {name}",
        suffix=None,
        suffix_ids=None,
        target_string="Sure",
        loss=None,
        loss_history=[],
        best_step=None,
        seed=0,
        config_hash="x",
        token_fidelity=None,
        system_prompt=system,
    )


def replay(of, target, outcome, sample=0):
    score = {"refused": 0.0, "complied": 1.0}.get(outcome)
    return Replay(
        replay_id=f"{of}-{target}-{sample}",
        artifact_id=of,
        behaviour_id="cake",
        attack="gcg",
        source_model="source",
        target_model=target,
        reply="a reply that is not to be exported",
        judgements={"rules": score, "other": 1.0},
        jailbroken=None if score is None else bool(score),
        config_hash="settings",
        outcome=outcome,
        d=0.25,
        sample=sample,
    )


@pytest.fixture
def run(tmp_path):
    with RunFolder(tmp_path / "run") as folder:
        folder.begin_stage("transfer", {"temperature": 0.5, "judges": ["rules", "other"]}, {})
        folder.note_behaviours([Behaviour("cake", REQUEST, "Sure", "food", "harmful", "own")])
        for a in (artifact("a"), artifact("b", system="Be kind."), artifact("c", attack="plain")):
            folder.append(ATTACKS, a.to_row())
        for r in (
            replay("a", "one", "complied"),
            replay("a", "one", "refused", sample=1),
            replay("b", "one", None),
            replay("c", "one", "complied"),
            replay("a", "two", "refused"),
        ):
            folder.append(REPLAYS, r.to_row())
    return tmp_path / "run"


def export(run, *arguments, code=0):
    out = run.parent / "log.json"
    given = ["export", "--run", str(run), "--format", "inspect", "--out", str(out), "--force"]
    result = CliRunner().invoke(cli, [*given, *arguments])
    assert result.exit_code == code, result.output
    return out if code == 0 else " ".join(result.output.split())


def test_inspect_reads_the_log(run):
    read = pytest.importorskip("inspect_ai.log").read_eval_log
    log = read(str(export(run, "--target", "one")))
    assert log.status == "success" and log.eval.model == "attack_plane/one"
    assert log.eval.task_args["temperature"] == 0.5
    first, second, third = log.samples  # the baseline is left out
    assert (first.id, first.epoch, second.epoch) == ("a", 1, 2)
    assert first.input[0].text == "Bake a cake a" and first.target == "Sure"
    assert first.scores["jailbroken"].value == 1 and second.scores["jailbroken"].value == 0
    assert [m.role for m in third.input] == ["system", "user"]
    assert set(third.scores) == {"other"}  # what was not judged has no score
    assert first.metadata["attack"] == "gcg" and first.metadata["d"] == 0.25
    by_name = {score.name: score for score in log.results.scores}
    assert by_name["jailbroken"].metrics["mean"].value == 0.5
    assert by_name["jailbroken"].scored_samples == 2
    assert by_name["jailbroken"].unscored_samples == 1


def test_no_reply_is_in_it_and_one_target_is_asked_for(run):
    log = json.loads(export(run, "--target", "two").read_text())
    assert len(log["samples"]) == 1 and "not to be exported" not in json.dumps(log)
    assert "give --target, one of one, two" in export(run, code=1)
    assert "one of one, two" in export(run, "--target", "three", code=1)
