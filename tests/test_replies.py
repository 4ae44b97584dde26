"""Several replies to one prompt: streams of their own, and the chance that one of k succeeds."""

import itertools
import json
from dataclasses import replace

import pytest
from click.testing import CliRunner

import attack_plane as ap
from cli import cli
from core.errors import AttackPlaneError
from core.records import Replay
from core.statistics import at_least_one
from pipeline.in_memory import artifact_of
from transfer.matrix import matrix
from transfer.replay import ReplayConfig, sendings
from transfer.served import replies_of

RULES = ("--judge", "rules", "--max-new-tokens", "5", "--temperature", "1")


def call(*arguments, code=0):
    result = CliRunner().invoke(cli, [str(a) for a in arguments])
    assert result.exit_code == code, (result.output, result.exception)
    return result.output


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_at_least_one_is_the_share_of_all_choices_that_hold_a_win():
    assert at_least_one(5, 0, 3) == 0.0 and at_least_one(4, 1, 1) == 0.25
    assert at_least_one(4, 1, 4) == 1.0
    for tried, won, k in ((6, 2, 3), (7, 5, 2), (5, 3, 3), (8, 1, 5)):
        wins = [n < won for n in range(tried)]
        choices = list(itertools.combinations(wins, k))
        assert at_least_one(tried, won, k) == pytest.approx(sum(map(any, choices)) / len(choices))


def reply(behaviour, artifact, sample, won, attack="gcg"):
    return Replay(
        replay_id=f"{artifact}-{sample}",
        artifact_id=artifact,
        behaviour_id=behaviour,
        attack=attack,
        source_model="source",
        target_model="target",
        reply="",
        judgements={},
        jailbroken=won,
        config_hash="h",
        outcome="complied" if won else "refused",
        sample=sample,
    )


def test_asr_at_k_is_a_mean_over_prompts_then_behaviours():
    rows = [reply("a", "a1", n, n < 1) for n in range(4)]  # 1 of 4
    rows += [reply("a", "a2", n, n < 2) for n in range(4)]  # 2 of 4
    rows += [reply("b", "b1", n, True) for n in range(5)]  # 5 of 5
    (cell,) = matrix(rows, {("gcg", "source", "harmful"): 4})
    assert cell.asr == pytest.approx(((0.25 + 0.5) / 2 + 1) / 2)
    assert (cell.replays, cell.behaviours, cell.missing) == (13, 2, 1)
    at_2 = ((1 - 3 / 6) + (1 - 1 / 6)) / 2  # C(3,2) = 3 and C(2,2) = 1 of C(4,2) = 6 hold no win
    assert [row["k"] for row in cell.at_k] == [1, 2, 4]
    assert [row["asr"] for row in cell.at_k] == pytest.approx([cell.asr, (at_2 + 1) / 2, 1.0])
    # behaviours are resampled: twice a, both, or twice b
    assert cell.at_k[1]["bootstrap"] == pytest.approx((at_2, 1.0))
    (one,) = matrix([r for r in rows if r.sample == 0])
    assert one.at_k == () and one.asr == 1.0


def test_a_plain_request_with_several_replies_is_averaged_for_the_gain():
    rows = [reply("a", "p", n, n < 1, attack="plain") for n in range(4)]
    rows += [reply("a", "x", n, True) for n in range(4)]
    assert [cell.gain for cell in matrix(rows)] == [None, pytest.approx(0.75)]


def test_replies_differ_and_depend_neither_on_the_batch_nor_on_how_many_there_are(tiny):
    classes = ap.TemplatesConfig(classes=("persona",))
    prompt = ap.templates("Bake a cake", config=classes)[0]
    config = ReplayConfig(6, 1.0, 3, replies=4)

    def made(config, batch_size):
        sent = sendings([artifact_of(prompt, 0), artifact_of("Brew tea", 1)], config)
        batches = replies_of(tiny, sent, [], config, batch_size=batch_size)
        return {(r.artifact_id, r.sample): (r.replay_id, r.reply) for b in batches for r in b}

    whole = made(config, 8)
    assert len(whole) == 8 and len({i for i, _ in whole.values()}) == 8
    assert len({text for _, text in whole.values()}) > 2
    assert made(config, 3) == whole and made(config, 1) == whole
    fewer = made(replace(config, replies=2), 5)
    assert fewer == {key: value for key, value in whole.items() if key[1] < 2}


def test_more_replies_are_added_to_a_run_and_rates_say_at_how_many(tmp_path, tiny_folders):
    run, target = tmp_path / "run", str(tiny_folders["qwen2"])
    call("templates", "--class", "persona", "--limit", 3, "--run", run)
    call("transfer", "--run", run, "--target", target, *RULES)
    first = (run / "replays.jsonl").read_bytes()
    output = call("transfer", "--run", run, "--target", target, *RULES, "--replies", 3)
    assert (run / "replays.jsonl").read_bytes().startswith(first)
    rows = lines_of(run / "replays.jsonl")
    assert len(rows) == 3 * len(lines_of(run / "attacks.jsonl")) and "at 3" in output
    assert {r["sample"] for r in rows} == {0, 1, 2} and "missing" not in output
    greedy = call("transfer", "--run", run, "--target", target, "--replies", 2, code=1)
    assert "temperature above 0" in greedy


def test_from_python_each_reply_is_a_row(qwen):
    settings = {"judges": "rules", "max_new_tokens": 3}
    rows = ap.replay(["a", "b"], qwen, **settings, temperature=1.0, replies=2)
    assert [row["request"] for row in rows] == ["a", "a", "b", "b"]
    with pytest.raises(AttackPlaneError, match="one and the same"):
        ap.replay(["a"], qwen, replies=2)
