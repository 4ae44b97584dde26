"""The transfer report: what is sent is told from what is meant, on families that trim, other
vocabularies, imported tokens."""

import dataclasses

import pytest

from commands.tables.attacks import certificates_table, matrix_table, pivot_table
from core.prompt import Conversation, Renderer
from core.records import AttackArtifact, Replay
from core.store import REPLAYS, RunFolder
from tests.test_gcg import run_attacker
from tests.test_transfer import replay, replay_all
from transfer.certificate import certificate
from transfer.matrix import matrix
from transfer.replay import ReplayConfig


def artifact(prompt, **more):
    plain = AttackArtifact(
        "id",
        "b0",
        "pair",
        "none",
        "Tell me about tea",
        prompt,
        None,
        None,
        None,
        None,
        [],
        None,
        0,
        "c",
        None,
    )
    return dataclasses.replace(plain, **more)


def test_on_its_own_source_every_prompt_is_sent_with_the_same_tokens(tmp_path, tiny):
    renderer = Renderer(tiny)
    for made in run_attacker(tmp_path, tiny):
        found = certificate(renderer, made)
        assert found["sent_as_meant"] and found["verbatim"] and found["same_ids"] is True
        assert found["same_vocabulary"] is True and found["same_template"] is True
        assert found["content_tokens"] == found["source_content_tokens"] < found["prompt_tokens"]


def test_another_vocabulary_leaves_tokens_unknown_and_another_template_is_told(
    tmp_path, qwen, tiny_models
):
    made = run_attacker(tmp_path, qwen, count=1)[-1]
    found = certificate(Renderer(tiny_models["llama"]), made)
    assert (
        found["same_vocabulary"] is False
        and found["same_ids"] is None
        and found["same_template"] is False
    )
    assert found[
        "sent_as_meant"
    ]  # the text is the same; other tokens are the target's own way to read it
    # a checkpoint that added a token reads this prompt with the same ids all the same
    more = certificate(Renderer(tiny_models["qwen3"]), made)
    assert more["same_vocabulary"] is False and more["same_ids"] is True


def test_a_template_that_trims_the_content_is_not_sent_as_meant(tiny_models):
    padded = artifact("Tell me about tea \n ")
    assert certificate(Renderer(tiny_models["qwen2"]), padded)["verbatim"] is True
    found = certificate(Renderer(tiny_models["gemma3"]), padded)
    assert found["verbatim"] is False and found["sent_as_meant"] is False


def test_tokens_that_another_tool_kept_are_compared_as_a_whole(qwen):
    renderer = Renderer(qwen)
    ids = list(renderer.render(Conversation("Tell me about tea")).ids)
    good = artifact("Tell me about tea", rendering={"prompt_ids": ids})
    assert certificate(renderer, good)["same_ids"] is True
    other = artifact("Tell me about tea", rendering={"prompt_ids": [*ids[:-1], 5]})
    # of another template or vocabulary, which the tool did not keep: that says nothing about the
    # prompt
    assert (
        certificate(renderer, other)["same_ids"] is None
        and certificate(renderer, other)["sent_as_meant"]
    )
    assert certificate(renderer, artifact("Tell me about tea"))["same_ids"] is None


def test_ids_that_were_scored_but_are_not_those_of_the_text_are_not_sent_as_meant(tmp_path, qwen):
    made = run_attacker(tmp_path, qwen, count=1)[-1]
    broken = certificate(Renderer(qwen), dataclasses.replace(made, token_fidelity=False))
    assert broken["same_ids"] is False and not broken["sent_as_meant"]


def test_attacks_are_paired_with_plain_requests_under_the_same_system_prompt_only():
    def under(row, system):
        return dataclasses.replace(
            row, certificate={"system_prompt_hash": system, "sent_as_meant": True}
        )

    plain = [
        under(replay("plain", "b1", False), None),
        under(replay("plain", "b1", True, source="u"), "brief"),
    ]
    cells = {
        s: [c for c in matrix([*plain, under(replay("gcg", "b1", True), s)]) if c.attack == "gcg"]
        for s in (None, "brief", "x")
    }
    assert [cells[s][0].gain for s in (None, "brief", "x")] == [1.0, 0.0, None]


def test_hashes_change_with_text_and_system_prompt(qwen):
    renderer = Renderer(qwen)
    a, b = (certificate(renderer, artifact("Tea", system_prompt=s)) for s in (None, "Be brief"))
    assert a["prompt_hash"] != b["prompt_hash"] and a["template_hash"] == b["template_hash"]
    assert a["system_prompt_hash"] is None and b["system_prompt_hash"]


def test_replays_carry_their_certificate_and_the_tables_show_what_was_not_sent_as_meant(
    tmp_path, tiny_models
):
    artifacts = [
        artifact("Tea ", artifact_id="x"),
        artifact("Tea", artifact_id="y", behaviour_id="b1"),
    ]
    with RunFolder(tmp_path) as run:
        replay_all(
            run, tiny_models["gemma3"], [], ReplayConfig(max_new_tokens=2), artifacts=artifacts
        )
        rows = [Replay.from_row(r) for r in run.rows(REPLAYS)]
    assert sorted(r.certificate["sent_as_meant"] for r in rows) == [False, True]
    assert "1/2" in certificates_table(rows) and "1 not sent as meant" in matrix_table(matrix(rows))


def test_a_prompt_that_a_template_refuses_is_told_and_the_others_are_replayed(
    tmp_path, tiny_models
):
    artifacts = [
        artifact("Tea", artifact_id="x", system_prompt="Be brief"),
        artifact("Tea", artifact_id="y"),
    ]
    failed = []
    with RunFolder(tmp_path) as run:
        made = replay_all(
            run,
            tiny_models["gemma3"],
            [],
            ReplayConfig(max_new_tokens=2),
            artifacts=artifacts,
            not_sent=lambda a, e: failed.append((a.artifact_id, str(e))),
        )
    assert made == 1 and failed[0][0] == "x" and "refuses" in failed[0][1]


def test_missing_cells_are_missing_and_never_failures():
    rows = [replay("plain", "b1", False), replay("gcg", "b1", True)]
    expected = {("gcg", "s"): 3, ("persona", "none"): 2, ("plain", "s"): 1}
    cells = {
        c.attack: c for c in matrix(rows, {(*key, "harmful"): n for key, n in expected.items()})
    }
    assert (cells["gcg"].missing, cells["gcg"].asr, cells["plain"].missing) == (2, 1.0, 0)
    assert cells["persona"].missing == 2 and cells["persona"].asr is None
    table = matrix_table(list(cells.values()))
    assert "2 missing" in table and "persona" in table
    lines = {line.split()[0]: line for line in pivot_table(list(cells.values())).splitlines()}
    assert lines["gcg"].endswith("1.00 [0.21, 1.00] -2") and lines["persona"].endswith("missing")


@pytest.mark.parametrize("source", ["none", "vicuna-13b-v1.5"])
def test_attacks_without_a_plain_request_of_their_own_source_are_paired_with_any(source):
    rows = [replay("plain", "b1", False, source="s"), replay("persona", "b1", True, source=source)]
    assert next(c for c in matrix(rows) if c.attack == "persona").gain == 1.0
    own = [*rows, replay("plain", "b1", True, source=source)]
    assert next(c for c in matrix(own) if c.attack == "persona").gain == 0.0
