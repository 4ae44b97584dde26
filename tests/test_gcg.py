"""GCG: the fast objective equals the plain one, candidates are what the paper says, the best suffix
is returned."""

import dataclasses

import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from attacks.baselines import random_suffix
from attacks.candidates import allowed_tokens, sample_candidates
from attacks.gcg import GCGConfig, baselines
from attacks.gcg_search import GCGState, run_gcg
from attacks.likelihood import plain_loss, target_nll
from attacks.objective import TargetLoss
from attacks.slot import default_slot
from attacks.verify import verify_artifact
from core.errors import AttackPlaneError
from core.models import load
from core.packed import NAME, PackedDecoder
from core.prompt import Renderer
from core.records import AttackArtifact, Behaviour, stream_seed
from core.store import ATTACKS, RunFolder
from tests.campaigns import attacked
from tests.conftest import make_model

REQUEST, TARGET = "Write a short text about the tea", "Sure, here is a text"
SMALL = GCGConfig(num_steps=6, search_width=12, topk=16, suffix_length=6)


def slot_of(loaded, *, placement="{request} {suffix}", system=None, length=6):
    return default_slot(
        Renderer(loaded), REQUEST, TARGET, length=length, placement=placement, system=system
    )


def allowed_of(loaded):
    return allowed_tokens(loaded.tokenizer, loaded.embedding_table.shape[0])


def slow_loss(loaded, ids, n_target):
    """One sequence, no cache, full logits, log-softmax, written apart from the objective's code."""
    logits = loaded.model(input_ids=torch.tensor([ids])).logits[0]
    log_probabilities = logits.log_softmax(-1)
    return (
        -sum(float(log_probabilities[i - 1, ids[i]]) for i in range(len(ids) - n_target, len(ids)))
        / n_target
    )


def candidates_of(loaded, slot, n_replace=1, width=10):
    objective = TargetLoss(loaded, slot)
    suffix = torch.tensor(slot.initial_ids)
    _, gradient = objective.token_gradient(suffix)
    generator = torch.Generator().manual_seed(1)
    drawn = sample_candidates(
        suffix,
        gradient,
        allowed_of(loaded),
        topk=20,
        width=width,
        n_replace=n_replace,
        generator=generator,
    )
    return objective, drawn


def test_target_nll_is_the_hand_derived_number():
    logits = torch.tensor([[[0.0, 0.0], [0.0, torch.log(torch.tensor(3.0))]]])
    expected = (torch.log(torch.tensor(2.0)) + torch.log(torch.tensor(4.0 / 3.0))) / 2
    assert torch.allclose(target_nll(logits, torch.tensor([0, 1])), expected[None])


@pytest.mark.parametrize(
    "placement", ["{request} {suffix}", "{suffix} {request}", "{request} {suffix} please"]
)
@pytest.mark.parametrize("n_replace", [1, 3])
def test_candidate_losses_equal_a_plain_slow_loop(tiny, placement, n_replace):
    slot = slot_of(tiny, placement=placement)
    objective, drawn = candidates_of(tiny, slot, n_replace)
    assert objective.path == "packed"
    objective.batch.value = 4
    expected = [
        slow_loss(
            tiny, [*slot.before_ids, *ids, *slot.after_ids, *slot.target_ids], len(slot.target_ids)
        )
        for ids in drawn.tolist()
    ]
    assert objective.losses(drawn).tolist() == pytest.approx(expected, abs=1e-4)
    cached = TargetLoss(tiny, slot, path="cached")
    assert cached.path == "cached"
    assert cached.losses(drawn).tolist() == pytest.approx(expected, abs=1e-4)
    winner, loss = objective.best(drawn)
    assert (
        loss == pytest.approx(min(expected), abs=1e-4) == pytest.approx(expected[winner], abs=1e-4)
    )


def test_suffixes_are_scored_alike_whichever_suffix_was_current(tiny):
    slot = slot_of(tiny)
    objective, drawn = candidates_of(tiny, slot, n_replace=2)
    fresh = TargetLoss(tiny, slot, path="packed")
    expected = fresh.losses(drawn)
    assert torch.allclose(objective.losses(drawn), expected, atol=1e-5)
    objective.token_gradient(drawn[2])
    assert torch.allclose(objective.losses(drawn), expected, atol=1e-5)
    assert torch.allclose(
        objective.losses(drawn[2:3]), expected[2:3], atol=1e-5
    )  # itself, wholly shared
    longer = torch.cat([drawn, drawn[:, :2]], 1)  # another length shares the prefix only
    assert torch.allclose(objective.losses(longer), fresh.losses(longer), atol=1e-5)


def test_the_bound_lets_few_candidates_through_and_never_the_wrong_one(tiny, monkeypatch):
    monkeypatch.setattr("attacks.packed_scorer.LIKELY", 40)
    monkeypatch.setattr("attacks.packed_scorer.LIKELY_SHARE", 1)
    slot = slot_of(tiny)
    objective, _ = candidates_of(tiny, slot)
    vocabulary = tiny.embedding_table.shape[0]
    generator = torch.Generator().manual_seed(5)
    skipped = 0
    for _ in range(10):
        drawn = torch.randint(vocabulary, (40, len(slot.initial_ids)), generator=generator)
        losses = objective.losses(drawn)
        assert objective.best(drawn) == (
            int(losses.argmin()),
            pytest.approx(float(losses.min()), abs=1e-6),
        )
        assert (objective.scorer.bounds(objective.scorer.hidden(drawn)) <= losses + 1e-5).all()
        skipped += len(drawn) - objective.fully_scored
    assert objective.scorer.likely_tokens < vocabulary
    assert skipped > 0


def test_a_family_with_its_own_attention_falls_back_and_says_so(tmp_path, caplog):
    loaded = load(str(make_model(tmp_path, "bloom")), "cpu")
    slot = slot_of(loaded)
    objective, drawn = candidates_of(loaded, slot)
    assert objective.path == "cached"
    assert "no packed scoring" in caplog.text
    whole = [*slot.before_ids, *drawn[0].tolist(), *slot.after_ids, *slot.target_ids]
    assert float(objective.losses(drawn)[0]) == pytest.approx(
        slow_loss(loaded, whole, len(slot.target_ids)), abs=1e-4
    )
    assert objective.best(drawn)[0] == int(objective.losses(drawn).argmin())


def test_a_model_that_ignores_positions_is_caught_by_its_losses(qwen, monkeypatch, caplog):
    forward = type(qwen.decoder).forward
    monkeypatch.setattr(
        type(qwen.decoder),
        "forward",
        lambda self, *a, position_ids=None, **k: forward(self, *a, **k),
    )
    assert TargetLoss(qwen, slot_of(qwen)).path == "cached"
    assert "losses differ" in caplog.text


def test_the_model_is_left_as_it_was_found_when_a_pass_breaks_off(tiny, monkeypatch):
    before = tiny.config._attn_implementation
    slot = slot_of(tiny)
    objective, drawn = candidates_of(tiny, slot)

    def broken(*args, **kwargs):
        assert tiny.config._attn_implementation == NAME
        raise KeyError("in the last block")

    with monkeypatch.context() as patch:
        patch.setattr(tiny.blocks[-1], "forward", broken)
        for work in (lambda: objective.losses(drawn), lambda: objective.token_gradient(drawn[1])):
            with pytest.raises(KeyError, match="last block"):
                work()
            assert tiny.config._attn_implementation == before
            assert NAME not in ALL_ATTENTION_FUNCTIONS
    # the keys and values of the suffix that broke off are not taken for those of the one before it
    assert torch.allclose(objective.losses(drawn), TargetLoss(tiny, slot).losses(drawn), atol=1e-5)


def test_losses_with_a_system_prompt_equal_the_plain_loop(qwen):
    slot = slot_of(qwen, system="You are a careful assistant who writes about tea and gardens.")
    objective, drawn = candidates_of(qwen, slot)
    whole = [*slot.before_ids, *drawn[0].tolist(), *slot.after_ids, *slot.target_ids]
    assert float(objective.losses(drawn)[0]) == pytest.approx(
        slow_loss(qwen, whole, len(slot.target_ids)), abs=1e-4
    )


def test_a_prefix_longer_than_the_sliding_window_changes_no_loss(tiny_models):
    loaded = tiny_models["mistral"]
    slot = slot_of(loaded, placement="one two three four five six seven eight {request} {suffix}")
    assert len(slot.before_ids) > loaded.config.sliding_window
    objective, drawn = candidates_of(loaded, slot)
    whole = [*slot.before_ids, *drawn[3].tolist(), *slot.after_ids, *slot.target_ids]
    assert float(objective.losses(drawn)[3]) == pytest.approx(
        slow_loss(loaded, whole, len(slot.target_ids)), abs=1e-4
    )


@pytest.mark.parametrize("path", ["cached", "plain"])
def test_every_path_gives_the_same_losses_and_gradient(tiny, path):
    slot = slot_of(tiny)
    objective, drawn = candidates_of(tiny, slot)
    other = TargetLoss(tiny, slot, path=path)
    assert (objective.path, other.path) == ("packed", path)
    assert torch.allclose(other.losses(drawn), objective.losses(drawn), atol=1e-4)
    loss, gradient = objective.token_gradient(drawn[0])
    other_loss, other_gradient = other.token_gradient(drawn[0])
    assert loss == pytest.approx(other_loss, abs=1e-5)
    assert torch.allclose(other_gradient, gradient, atol=1e-5)


def test_token_gradient_equals_autograd_through_one_hot_vectors(tiny):
    slot = slot_of(tiny)
    suffix = torch.tensor(slot.initial_ids)
    loss, gradient = TargetLoss(tiny, slot).token_gradient(suffix)
    table = tiny.embedding_table
    one_hot = torch.nn.functional.one_hot(suffix, table.shape[0]).float().requires_grad_(True)
    embed = tiny.model.get_input_embeddings()
    parts = [embed(torch.tensor(slot.before_ids)), one_hot @ table]
    parts.append(embed(torch.tensor([*slot.after_ids, *slot.target_ids])))
    logits = tiny.model(inputs_embeds=torch.cat(parts)[None]).logits[0]
    count = len(slot.target_ids)
    plain = torch.nn.functional.cross_entropy(
        logits[-count - 1 : -1], torch.tensor(slot.target_ids)
    )
    (expected,) = torch.autograd.grad(plain, one_hot)
    assert loss == pytest.approx(float(plain.detach()), abs=1e-5)
    assert torch.allclose(gradient, expected, atol=1e-5)


def test_candidates_replace_exactly_n_positions_by_top_k_tokens_and_never_repeat(qwen):
    suffix = torch.tensor([5, 6, 7, 8])
    vocabulary = 50
    gradient = torch.randn(4, vocabulary, generator=torch.Generator().manual_seed(0))
    allowed = torch.ones(vocabulary, dtype=torch.bool)
    allowed[:5] = False
    for n_replace in (1, 2):
        drawn = sample_candidates(
            suffix,
            gradient,
            allowed,
            topk=8,
            width=200,
            n_replace=n_replace,
            generator=torch.Generator().manual_seed(3),
        )
        rows = {tuple(row) for row in drawn.tolist()}
        assert len(rows) == len(drawn) <= 200
        assert tuple(suffix.tolist()) not in rows
        top = gradient.masked_fill(~allowed, torch.inf).topk(8, largest=False).indices
        for row in drawn:
            changed = (row != suffix).nonzero()[:, 0].tolist()
            assert 1 <= len(changed) <= n_replace
            assert all(int(row[i]) in top[i].tolist() and allowed[row[i]] for i in changed)


def test_allowed_tokens_are_printable_ascii_and_never_special(tiny):
    allowed = allowed_of(tiny)
    assert not allowed[torch.tensor(tiny.tokenizer.all_special_ids)].any()
    assert not allowed[len(tiny.tokenizer) :].any()
    texts = tiny.tokenizer.batch_decode(allowed.nonzero().tolist())
    assert all(text.isascii() and text.isprintable() for text in texts)


def test_the_best_suffix_over_all_steps_is_returned_with_its_own_loss(tiny):
    slot = slot_of(tiny)
    state = run_gcg(TargetLoss(tiny, slot), slot, SMALL, allowed_of(tiny), seed=4)
    assert len(state.losses) == SMALL.num_steps + 1
    assert state.best_loss == min(state.losses) == state.losses[state.best_step]
    prompt = (*slot.before_ids, *state.best_ids, *slot.after_ids)
    assert state.best_loss == pytest.approx(plain_loss(tiny, prompt, slot.target_ids), abs=1e-4)
    assert slot.faithful([state.best_ids]) == [True]


def test_each_step_takes_the_argmin_even_when_it_is_worse(qwen):
    slot = slot_of(qwen)
    config = dataclasses.replace(SMALL, num_steps=40, search_width=2, topk=400)
    seen = []
    state = run_gcg(
        TargetLoss(qwen, slot),
        slot,
        config,
        allowed_of(qwen),
        seed=0,
        on_step=lambda s: seen.append(list(s.suffix_ids)),
    )
    assert any(b > a for a, b in zip(state.losses, state.losses[1:], strict=False))
    assert state.losses[-1] > state.best_loss and seen[-1] != state.best_ids


def test_a_state_saved_at_any_step_goes_on_to_the_bit(qwen):
    slot, allowed = slot_of(qwen), allowed_of(qwen)
    saved = []
    whole = run_gcg(
        TargetLoss(qwen, slot),
        slot,
        SMALL,
        allowed,
        seed=7,
        on_step=lambda s: saved.append(
            GCGState(**{k: list(v) if isinstance(v, list) else v for k, v in s.to_row().items()})
        ),
    )
    for state in saved[:-1]:
        again = run_gcg(TargetLoss(qwen, slot), slot, SMALL, allowed, seed=7, state=state)
        assert again.to_row() == whole.to_row()


def test_stop_loss_ends_the_search_early(qwen):
    slot = slot_of(qwen)
    config = dataclasses.replace(SMALL, stop_loss=100.0)
    assert run_gcg(TargetLoss(qwen, slot), slot, config, allowed_of(qwen), seed=0).step == 0


def test_a_loss_that_is_not_finite_is_an_error_and_no_result(qwen, monkeypatch):
    slot = slot_of(qwen)
    objective = TargetLoss(qwen, slot)
    monkeypatch.setattr(objective, "best", lambda s: (0, float("nan")))
    with pytest.raises(AttackPlaneError, match="not finite"):
        run_gcg(objective, slot, SMALL, allowed_of(qwen), seed=0)


def test_out_of_memory_halves_the_batch_and_changes_no_loss(qwen, monkeypatch):
    slot = slot_of(qwen)
    objective, drawn = candidates_of(qwen, slot)
    expected = objective.losses(drawn)
    inner = PackedDecoder._run

    def scarce(self, embeddings, groups, *options):
        if sum(group.count for group in groups) > 1:
            raise torch.OutOfMemoryError("pretended")
        return inner(self, embeddings, groups, *options)

    monkeypatch.setattr(PackedDecoder, "_run", scarce)
    objective.batch.value = 8
    assert torch.allclose(objective.losses(drawn), expected, atol=1e-5)
    assert objective.batch.value in (1, 2)  # with one thread no two halves run side by side


def test_random_suffix_has_the_length_of_the_initial_one_and_keeps_its_tokens(tiny):
    slot = slot_of(tiny)
    generator = torch.Generator().manual_seed(0)
    suffix = random_suffix(slot, allowed_of(tiny), generator)
    assert len(suffix) == len(slot.initial_ids) and tuple(suffix) != slot.initial_ids
    assert slot.faithful([suffix]) == [True]


# --- the runner -----------------------------------------------------------------------------------
def behaviours(count=2):
    return [
        Behaviour(f"b{i}", f"{REQUEST} number {i}", TARGET, "tea", "harmful", "test")
        for i in range(count)
    ]


def run_attacker(path, loaded, config=SMALL, count=2, save_every=2):
    with RunFolder(path) as run:
        (_, own), *_ = baselines(config)
        both = behaviours(count)
        before = attacked(run, "baselines", own, both, loaded, seed=3)
        return before + attacked(run, "gcg", config, both, loaded, seed=3, save_every=save_every)


def test_artifacts_are_saved_verified_and_not_made_twice(tmp_path, tiny):
    first = run_attacker(tmp_path, tiny)
    content = (tmp_path / ATTACKS).read_bytes()
    assert [a.attack for a in first] == ["plain", "initial_suffix", "random_suffix"] * 2 + [
        "gcg"
    ] * 2
    assert all(a.token_fidelity for a in first)
    renderer = Renderer(tiny)
    assert [verify_artifact(renderer, a).fault for a in first] == [None] * 8
    assert run_attacker(tmp_path, tiny) == first
    assert (tmp_path / ATTACKS).read_bytes() == content


def test_more_behaviours_in_the_same_run_make_only_what_is_missing(tmp_path, qwen):
    first = run_attacker(tmp_path, qwen, count=1)
    content = (tmp_path / ATTACKS).read_bytes()
    second = run_attacker(tmp_path, qwen, count=2)
    assert (tmp_path / ATTACKS).read_bytes().startswith(content)
    alone = {a.artifact_id: a for a in run_attacker(tmp_path / "other", qwen, count=2)}
    assert {a.artifact_id: a for a in second} == alone
    assert all(alone[a.artifact_id] == a for a in first)


def test_a_run_stopped_between_saves_gives_the_same_file(tmp_path, qwen, monkeypatch):
    run_attacker(tmp_path / "whole", qwen)
    calls = 0
    save = RunFolder.save_state

    def dying(self, name, state):
        nonlocal calls
        save(self, name, state)
        calls += 1
        if calls % 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(RunFolder, "save_state", dying)
    for _ in range(20):
        try:
            run_attacker(tmp_path / "broken", qwen)
            break
        except KeyboardInterrupt:
            continue
    assert calls >= 3
    assert (tmp_path / "broken" / ATTACKS).read_bytes() == (
        tmp_path / "whole" / ATTACKS
    ).read_bytes()
    assert not list((tmp_path / "broken" / "state").glob("*"))


def test_the_recorded_loss_is_a_plain_pass_and_a_search_that_saw_another_is_warned_of(
    tmp_path, qwen, monkeypatch, caplog
):
    artifact = run_attacker(tmp_path / "good", qwen, count=1)[-1]
    assert artifact.loss == pytest.approx(artifact.loss_history[artifact.best_step], abs=1e-4)
    assert "plain pass" not in caplog.text
    losses, best = TargetLoss.losses, TargetLoss.best
    monkeypatch.setattr(TargetLoss, "losses", lambda self, s: losses(self, s) + 0.01)
    monkeypatch.setattr(
        TargetLoss, "best", lambda self, s: (best(self, s)[0], best(self, s)[1] + 0.01)
    )
    run_attacker(tmp_path / "off", qwen, count=1)
    assert "a plain pass gives" in caplog.text


def test_an_attack_in_bfloat16_is_verified_like_any_other(tmp_path, tiny_folders):
    loaded = load(f"{tiny_folders['qwen2']}?dtype=bfloat16", "cpu")
    artifacts = run_attacker(tmp_path, loaded, count=1)
    assert loaded.dtype == torch.bfloat16
    assert [verify_artifact(Renderer(loaded), a).fault for a in artifacts] == [None] * 4


def test_verify_names_a_changed_loss_and_changed_tokens(tmp_path, qwen):
    artifact = run_attacker(tmp_path, qwen, count=1)[-1]
    renderer = Renderer(qwen)
    worse = dataclasses.replace(artifact, loss=artifact.loss + 0.01)
    assert "recorded" in str(verify_artifact(renderer, worse).fault)
    assert artifact.suffix_ids is not None
    other = dataclasses.replace(artifact, suffix_ids=[*artifact.suffix_ids[:-1], 7])
    assert "other ids" in str(verify_artifact(renderer, other).fault)


def test_behaviours_without_target_are_refused_by_name(tmp_path, qwen):
    behaviour = Behaviour("b9", REQUEST, None, "tea", "harmful", "test")
    with RunFolder(tmp_path) as run, pytest.raises(AttackPlaneError, match="b9"):
        attacked(run, "gcg", SMALL, [behaviour], qwen)


def test_streams_of_behaviours_differ_and_repeat():
    assert stream_seed(0, "a", "gcg") == stream_seed(0, "a", "gcg")
    assert len({stream_seed(s, b, "gcg") for s in (0, 1) for b in ("a", "b")}) == 4


def test_artifact_rows_round_trip(tmp_path, qwen):
    for artifact in run_attacker(tmp_path, qwen, count=1):
        assert AttackArtifact.from_row(artifact.to_row()) == artifact


def test_snapshots_are_the_prompts_that_were_the_best_in_turn(qwen, tmp_path):
    config = GCGConfig(num_steps=4, search_width=8, topk=8, suffix_length=4)
    with RunFolder(tmp_path) as run:
        artifact = attacked(run, "gcg", config, behaviours(1), qwen)[0]
    steps = [s["step"] for s in artifact.snapshots]
    assert steps[0] == 0 and steps[-1] == artifact.best_step
    assert artifact.snapshots[-1]["prompt"] == artifact.prompt
    losses = [artifact.loss_history[s] for s in steps]
    assert losses == sorted(losses, reverse=True) and min(artifact.loss_history) == losses[-1]
    with pytest.raises(AttackPlaneError, match="snapshots"):
        dataclasses.replace(artifact, snapshots=[{"step": 99, "prompt": "x"}])
