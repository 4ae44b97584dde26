"""Replays send the prompt verbatim; the matrix's numbers are those derived by hand."""

import math

import pytest
import torch

from commands.tables.attacks import matrix_table
from core.errors import AttackPlaneError
from core.generate import complete
from core.models import handle_of
from core.prompt import Conversation, Renderer
from core.records import AttackArtifact, Replay
from core.statistics import bootstrap_mean, wilson
from core.store import REPLAYS, RunFolder
from pipeline.transfer import Transfer
from tests.test_gcg import run_attacker
from transfer.matrix import matrix
from transfer.replay import ReplayConfig, sendings
from transfer.replay import replay as replay_prompts


def replay_all(run, loaded, judges, config, *, artifacts=None, not_sent=None, **more):
    """Make the replies that a run lacks on one target; to these artifacts, or to its own."""
    stage = Transfer(run, judges, config, **more)
    stage.artifacts = stage.artifacts if artifacts is None else artifacts
    return stage.replay_on(handle_of(loaded), not_sent)


def replay(attack, behaviour, jailbroken, target="t", source="s", number=0):
    return Replay(
        f"{attack}{behaviour}{target}{number}",
        "a",
        behaviour,
        attack,
        source,
        target,
        "x",
        {},
        jailbroken,
        "c",
    )


def test_rates_gains_and_missing_judgements_by_hand():
    rows = [
        replay("plain", "b1", False),
        replay("plain", "b2", True),
        replay("plain", "b3", False),
        replay("gcg", "b1", True),
        replay("gcg", "b2", True),
        replay("gcg", "b3", None),
    ]
    plain, gcg = matrix(rows)
    assert (plain.asr, plain.replays, plain.judged, plain.gain) == (
        pytest.approx(1 / 3),
        3,
        3,
        None,
    )
    assert (gcg.asr, gcg.replays, gcg.judged, gcg.paired) == (1.0, 3, 2, 2)
    assert gcg.gain == 0.5  # b1 gained, b2 did not, b3 was not judged
    assert gcg.bootstrap == (1.0, 1.0) and gcg.wilson[0] == pytest.approx(0.342, abs=1e-3)


def test_a_cell_without_judgements_is_not_judged_rather_than_zero():
    (cell,) = matrix([replay("gcg", "b1", None)])
    assert cell.asr is None and cell.wilson is None and "not judged" in matrix_table([cell])


def test_several_replies_of_one_behaviour_count_as_one():
    rows = [
        replay("gcg", "b1", True),
        replay("gcg", "b1", False, number=1),
        replay("gcg", "b2", True),
    ]
    assert matrix(rows)[0].asr == 0.75


def test_cells_are_separate_by_source_and_target():
    rows = [replay("gcg", "b1", True, target="x"), replay("gcg", "b1", False, target="y")]
    assert [(c.target, c.asr) for c in matrix(rows)] == [("x", 1.0), ("y", 0.0)]


def test_wilson_is_the_textbook_interval():
    # 7 of 10: centre (0.7 + 0.192) / 1.384, half-width 0.248
    low, high = wilson(7, 10)
    assert low == pytest.approx(0.3968, abs=1e-3) and high == pytest.approx(0.8922, abs=1e-3)
    assert wilson(0, 4)[0] == 0.0 and wilson(4, 4)[1] == pytest.approx(1.0)
    assert all(math.isnan(v) for v in wilson(0, 0))


def test_bootstrap_covers_the_mean_about_as_often_as_it_says():
    import numpy as np

    draws = np.random.default_rng(0).random((200, 40)) < 0.4
    hits = [
        low <= 0.4 <= high for low, high in (bootstrap_mean(row.astype(float)) for row in draws)
    ]
    assert 0.88 <= sum(hits) / len(hits) <= 0.99


def test_replays_send_the_prompt_verbatim_and_are_not_made_twice(tmp_path, qwen, tiny_models):
    artifacts = run_attacker(tmp_path, qwen)
    target = tiny_models["qwen3"]
    judges = ["refusal_phrases", "target_prefix"]
    config = ReplayConfig(max_new_tokens=5)
    with RunFolder(tmp_path) as run:
        assert replay_all(run, target, judges, config, batch_size=3) == len(artifacts)
        assert replay_all(run, target, judges, config) == 0
        rows = {r["artifact_id"]: Replay.from_row(r) for r in run.rows(REPLAYS)}
    renderer = Renderer(target)
    for artifact in artifacts:
        text = renderer.text(Conversation(artifact.prompt))
        assert artifact.prompt in text
        (alone,) = complete(renderer, [text], max_new_tokens=5)
        assert rows[artifact.artifact_id].reply == alone
        assert set(rows[artifact.artifact_id].judgements) == {"refusal_phrases", "target_prefix"}


def test_a_replay_stopped_half_way_goes_on(tmp_path, qwen):
    artifacts = run_attacker(tmp_path, qwen)
    config = ReplayConfig(max_new_tokens=3)
    with RunFolder(tmp_path) as run:
        replay_all(run, qwen, [], config, artifacts=artifacts[:3])
        first = run.rows(REPLAYS)
        assert replay_all(run, qwen, [], config) == len(artifacts) - 3
        assert run.rows(REPLAYS)[:3] == first
        assert all(r["jailbroken"] is None for r in run.rows(REPLAYS))


def test_greedy_completion_equals_a_step_by_step_argmax(tiny, monkeypatch):
    # also where the checkpoint brings generation settings of its own
    for name, value in (("repetition_penalty", 5.0), ("do_sample", True), ("min_new_tokens", 4)):
        monkeypatch.setattr(tiny.model.generation_config, name, value)
    renderer = Renderer(tiny)
    texts = [
        renderer.text(Conversation.build(r))
        for r in ("Write about tea", "Say a very short word now please")
    ]
    replies = complete(renderer, texts, max_new_tokens=6)
    ends = {tiny.tokenizer.eos_token_id, tiny.model.generation_config.eos_token_id}
    for text, reply in zip(texts, replies, strict=True):
        ids = renderer.tokenise([text])[0]
        new = []
        for _ in range(6):
            with torch.no_grad():
                new.append(
                    int(tiny.model(input_ids=torch.tensor([ids + new])).logits[0, -1].argmax())
                )
            if new[-1] in ends:
                break
        assert tiny.model.generation_config.repetition_penalty == 5.0
        assert reply == tiny.tokenizer.decode(new, skip_special_tokens=True).strip()


def test_the_common_start_of_prompts_runs_once_and_the_head_gets_whole_states(qwen, monkeypatch):
    """By transformers, as models are decoded that our own decoder does not serve."""
    monkeypatch.setattr("core.generate.decodes", lambda *_: False)
    renderer = Renderer(qwen)
    texts = [renderer.text(Conversation.build(r)) for r in ("Write about tea", "Say a word")]
    ids = renderer.tokenise(texts)
    shared = next(i for i, pair in enumerate(zip(*ids, strict=False)) if pair[0] != pair[1])
    fed, whole = [], []
    hooks = [
        qwen.decoder.register_forward_pre_hook(
            lambda _, args, kwargs: fed.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
        ),
        qwen.model.get_output_embeddings().register_forward_hook(
            lambda _, args, out: whole.append(args[0].is_contiguous())
        ),
    ]
    try:
        complete(renderer, texts, max_new_tokens=2)
    finally:
        for hook in hooks:
            hook.remove()
    assert shared > 0
    assert fed[:2] == [(1, shared), (2, max(map(len, ids)) - shared)]
    assert all(whole)
    assert not qwen.model.get_output_embeddings()._forward_pre_hooks


def test_sampled_replies_do_not_depend_on_where_a_run_was_stopped(tmp_path, qwen):
    artifacts = run_attacker(tmp_path / "source", qwen)
    config = ReplayConfig(max_new_tokens=6, temperature=1.0)
    with RunFolder(tmp_path / "a") as whole, RunFolder(tmp_path / "b") as stopped:
        for run, parts in ((whole, [artifacts]), (stopped, [artifacts[::2], artifacts])):
            for part in parts:
                replay_all(run, qwen, [], config, artifacts=part)
        a, b = (
            {r["artifact_id"]: r["reply"] for r in run.rows(REPLAYS)} for run in (whole, stopped)
        )
    assert a == b and len(set(a.values())) > 1


def test_sampling_repeats_with_its_seed_and_leaves_the_global_stream_alone(qwen):
    renderer = Renderer(qwen)
    texts = [renderer.text(Conversation.build("Write about tea"))] * 4
    before = torch.get_rng_state()
    first = complete(renderer, texts, max_new_tokens=8, temperature=1.0, seed=1)
    assert torch.equal(before, torch.get_rng_state())
    assert first == complete(renderer, texts, max_new_tokens=8, temperature=1.0, seed=1)
    assert first != complete(renderer, texts, max_new_tokens=8, temperature=1.0, seed=2)
    assert len(set(first)) > 1


def test_a_prompt_that_does_not_fit_is_named_before_any_reply(qwen):
    prompts = [
        AttackArtifact(
            f"id-{n}",
            "b",
            "persona",
            "none",
            "Brew tea",
            text,
            None,
            None,
            None,
            None,
            [],
            None,
            seed=0,
            config_hash="c",
            token_fidelity=None,
        )
        for n, text in enumerate(("Brew tea", "tea " * 600))
    ]
    assert qwen.positions == 512
    told = []
    config = ReplayConfig(4)
    sent = sendings(prompts, config)

    def not_sent(artifact, error):
        told.append((artifact, str(error)))

    replies = replay_prompts(qwen, sent, [], config, not_sent=not_sent)
    assert [r.artifact_id for part in replies for r in part] == ["id-0"]
    (artifact, why) = told[0]
    assert artifact.artifact_id == "id-1" and "512 positions" in why and "persona b id-1" in why
    with pytest.raises(AttackPlaneError, match="too long for the model"):
        list(replay_prompts(qwen, sent, [], config))
