"""GCG's family: mellowmax, buffer, annealing, and one suffix for several prompts and models. Each
does what its source says."""

import copy
import dataclasses
import types

import pytest
import torch

from attacks.adc import ADCConfig
from attacks.adc_search import run_adc, sparsified
from attacks.candidates import promised, sample_candidates
from attacks.damping import damped
from attacks.gcg import GCGConfig
from attacks.gcg_search import GCGState, run_gcg
from attacks.likelihood import plain_loss, target_nll
from attacks.objective import TargetLoss
from attacks.slot import slot_for
from attacks.universal import SharedSuffix, UniversalConfig, UniversalLoss
from attacks.verify import verify_artifact
from core.errors import AttackPlaneError
from core.models import load
from core.prompt import Renderer
from core.records import Behaviour
from core.store import ATTACKS, RunFolder
from tests.campaigns import attacked
from tests.conftest import make_model
from tests.test_gcg import REQUEST, SMALL, TARGET, allowed_of, candidates_of, slot_of


def test_all_of_them_are_off_by_default():
    config = GCGConfig()
    assert (config.mellowmax, config.buffer, config.final_width, config.final_n_replace) == (
        0.0,
        0,
        None,
        None,
    )
    assert {config.width_at(s) for s in range(500)} == {512} and config.n_replace_at(499) == 1


# --- mellowmax ------------------------------------------------------------------------------------
def test_mellowmax_lies_between_the_mean_and_the_worst_token_and_reaches_both():
    # token losses ln 2 and ln 4: (1/a) ln((2^a + 4^a) / 2); for a = 1 that is ln 3
    logits = torch.tensor([[[0.0, 0.0, -torch.inf], [0.0, 0.0, torch.log(torch.tensor(2.0))]]])
    target = torch.tensor([0, 0])
    assert float(target_nll(logits, target)) == pytest.approx((0.693147 + 1.386294) / 2, abs=1e-5)
    assert float(target_nll(logits, target, 1.0)) == pytest.approx(1.098612, abs=1e-5)
    assert float(target_nll(logits, target, 1e-2)) == pytest.approx(
        1.0397 + 0.01 * 0.1201 / 2, abs=1e-4
    )
    assert float(target_nll(logits, target, 200.0)) == pytest.approx(1.386294, abs=1e-2)


@pytest.mark.parametrize("path", ["packed", "cached", "plain"])
def test_a_search_with_mellowmax_takes_the_argmin_of_the_mellowmax_losses(qwen, path):
    slot = slot_of(qwen)
    _, candidates = candidates_of(qwen, slot)
    objective = TargetLoss(qwen, slot, path=path, mellowmax=2.0)
    objective.share(torch.tensor(slot.initial_ids))
    expected = []
    for row in candidates.tolist():
        ids = torch.tensor([[*slot.before_ids, *row, *slot.after_ids, *slot.target_ids]])
        logits = qwen.model(input_ids=ids).logits[:, -len(slot.target_ids) - 1 : -1]
        nll = torch.nn.functional.cross_entropy(
            logits[0], torch.tensor(slot.target_ids), reduction="none"
        )
        expected.append(float((2 * nll).exp().mean().log() / 2))
    losses = objective.losses(candidates)
    assert losses.tolist() == pytest.approx(expected, abs=1e-4)
    winner, lowest = objective.best(candidates)
    assert winner == int(losses.argmin()) and lowest == pytest.approx(min(expected), abs=1e-4)


def test_the_gradient_under_mellowmax_is_that_of_the_mellowmax_loss(qwen):
    slot = slot_of(qwen)
    suffix = torch.tensor(slot.initial_ids)
    loss, gradient = TargetLoss(qwen, slot, mellowmax=3.0).token_gradient(suffix)
    table = qwen.embedding_table
    whole = torch.tensor([*slot.before_ids, *suffix.tolist(), *slot.after_ids, *slot.target_ids])
    onehot = torch.nn.functional.one_hot(whole, table.shape[0]).float().requires_grad_(True)
    logits = qwen.model(inputs_embeds=(onehot @ table)[None]).logits[
        0, -len(slot.target_ids) - 1 : -1
    ]
    nll = torch.nn.functional.cross_entropy(logits, torch.tensor(slot.target_ids), reduction="none")
    own = (3 * nll).exp().mean().log() / 3
    (expected,) = torch.autograd.grad(own, onehot)
    own = own.detach()
    start = len(slot.before_ids)
    assert loss == pytest.approx(float(own), abs=1e-4)
    assert torch.allclose(gradient, expected[start : start + len(suffix)], atol=1e-4)


# --- buffer and annealing -------------------------------------------------------------------------
def test_a_buffer_goes_on_from_its_best_and_drops_its_worst():
    state = GCGState([1], [], 1)
    for ids, loss in (([1], 3.0), ([2], 1.0), ([3], 2.0), ([4], 5.0)):
        state.suffix_ids = ids
        state.note(loss, 2)
    assert state.buffer == [(1.0, [2], 1), (2.0, [3], 2)] and state.suffix_ids == [2]
    assert (
        state.losses == [3.0, 1.0, 2.0, 5.0] and state.best_ids == [2] and state.current_step == 1
    )
    state.begin_anew(
        4.0, 2
    )  # a prompt joined: the loss is another, and so is what the buffer holds
    assert (
        state.buffer == [(4.0, [2], 3)]
        and state.losses == [3.0, 1.0, 2.0, 4.0]
        and state.best_step == 3
    )


def test_with_a_buffer_no_step_starts_from_a_suffix_worse_than_the_best(qwen):
    slot, starts, saved = slot_of(qwen), [], []
    objective = TargetLoss(qwen, slot)
    real = objective.token_gradient
    objective.token_gradient = lambda suffix: starts.append(suffix.tolist()) or real(suffix)
    config = dataclasses.replace(SMALL, buffer=3, search_width=2)
    state = run_gcg(
        objective,
        slot,
        config,
        allowed_of(qwen),
        seed=0,
        on_step=lambda s: saved.append(copy.deepcopy(s)),
    )
    for start, step in zip(starts[1:], range(1, len(starts)), strict=True):
        best = state.losses[: step + 1].index(min(state.losses[: step + 1]))
        assert objective.losses(torch.tensor([start])).item() == pytest.approx(
            state.losses[best], abs=1e-4
        )
    again = run_gcg(
        TargetLoss(qwen, slot),
        slot,
        config,
        allowed_of(qwen),
        seed=0,
        state=GCGState(**saved[2].to_row()),
    )
    assert again.losses == state.losses


def test_annealed_numbers_go_linearly_from_the_first_to_the_last(qwen):
    config = dataclasses.replace(
        SMALL, num_steps=5, search_width=20, final_width=4, n_replace=3, final_n_replace=1
    )
    assert [config.width_at(s) for s in range(5)] == [20, 16, 12, 8, 4]
    assert [config.n_replace_at(s) for s in range(5)] == [3, 2, 2, 2, 1]
    state = run_gcg(
        TargetLoss(qwen, slot_of(qwen)), slot_of(qwen), config, allowed_of(qwen), seed=0
    )
    assert all(scored <= config.width_at(step) for step, scored in enumerate(state.scored))
    assert state.scored[0] > 4


def test_more_positions_than_the_suffix_has_are_refused_also_at_the_end(qwen):
    config = dataclasses.replace(SMALL, final_n_replace=99)
    with pytest.raises(AttackPlaneError, match="more positions"):
        run_gcg(TargetLoss(qwen, slot_of(qwen)), slot_of(qwen), config, allowed_of(qwen), seed=0)
    for bad in ({"buffer": -1}, {"final_width": 0}, {"mellowmax": -1.0}):
        with pytest.raises(AttackPlaneError):
            GCGConfig(**bad)


# --- universal ------------------------------------------------------------------------------------
BEHAVIOURS = [
    Behaviour(f"b{i}", f"{REQUEST} number {i}", TARGET if i else "Sure, tea", "tea", "harmful", "t")
    for i in range(3)
]


@pytest.fixture(scope="module")
def sibling(tmp_path_factory):
    """Another model with the same tokenizer."""
    return load(
        str(make_model(tmp_path_factory.mktemp("sibling") / "qwen2", "qwen2", seed=5)), "cpu"
    )


def universal(run, sources, count=2, **more):
    values = {**dataclasses.asdict(SMALL), **more, "optimise_on": count}
    config = UniversalConfig(**values)
    return attacked(run, "gcg_universal", config, BEHAVIOURS, *sources, save_every=1)


def losses_of(loaded, config=SMALL):
    slots = [slot_for(Renderer(loaded), b, config) for b in BEHAVIOURS]
    return [[TargetLoss(loaded, slot)] for slot in slots], SharedSuffix(slots)


def test_the_universal_loss_is_the_mean_over_prompts_in_play_and_models(qwen, sibling):
    rows, shared = losses_of(qwen)
    others, _ = losses_of(sibling)
    loss = UniversalLoss([[a[0], b[0]] for a, b in zip(rows, others, strict=True)])
    suffix = torch.tensor([list(shared.initial_ids)])
    one = [float(part.losses(suffix)[0]) for part in (rows[0][0], others[0][0])]
    assert float(loss.losses(suffix)[0]) == pytest.approx(sum(one) / 2, abs=1e-5)
    assert loss.grow() and loss.active == 2
    two = one + [float(part.losses(suffix)[0]) for part in (rows[1][0], others[1][0])]
    assert float(loss.losses(suffix)[0]) == pytest.approx(sum(two) / 4, abs=1e-5)
    assert loss.grow() and not loss.grow() and loss.active == 3


def test_its_gradient_adds_unit_norm_gradients(qwen):
    rows, shared = losses_of(qwen)
    loss = UniversalLoss(rows)
    loss.grow()
    suffix = torch.tensor(shared.initial_ids)
    parts = [row[0].token_gradient(suffix)[1] for row in rows[:2]]
    _, gradient = loss.token_gradient(suffix)
    assert torch.allclose(gradient, sum(g / g.norm() for g in parts), atol=1e-6)


def test_a_suffix_must_keep_its_tokens_in_every_conversation(qwen):
    _, shared = losses_of(qwen)

    class Refusing:
        initial_ids = shared.initial_ids

        def faithful(self, suffixes):
            return [s[0] != 7 for s in suffixes]

    both = SharedSuffix([shared.slots[0], Refusing()])
    good = list(shared.initial_ids)
    assert both.faithful([good, [7, *good[1:]], good]) == [True, False, True]
    other = dataclasses.replace(shared.slots[0], initial_ids=(1, 2))
    with pytest.raises(AttackPlaneError, match="other tokens"):
        SharedSuffix([shared.slots[0], other])


def test_the_next_prompt_joins_when_all_in_play_give_their_targets(qwen, monkeypatch):
    rows, shared = losses_of(qwen)
    loss = UniversalLoss(rows)
    real, seen = loss.token_gradient, []

    def matching(suffix):
        found = real(suffix)
        seen.append(loss.active)
        loss.matches = len(seen) in (2, 4)
        return found

    monkeypatch.setattr(loss, "token_gradient", matching)
    state = run_gcg(
        loss,
        shared,
        dataclasses.replace(SMALL, num_steps=5),
        allowed_of(qwen),
        seed=0,
        growth=loss,
    )
    # step 1; a match, prompt 2 joins; step 2; a match, prompt 3 joins; steps 3 to 5
    assert seen == [1, 1, 2, 2, 3, 3, 3] and state.active == 3 and state.step == 5
    # the best is the best since the last prompt joined, under the loss of all three
    assert state.best_step >= 2 and state.best_loss == min(state.losses[2:])
    assert float(loss.losses(torch.tensor([state.best_ids]))[0]) == pytest.approx(
        state.best_loss, abs=1e-4
    )


def test_a_low_loss_does_not_end_the_search_before_all_prompts_are_in(qwen, monkeypatch):
    rows, shared = losses_of(qwen)
    loss = UniversalLoss(rows)
    config = dataclasses.replace(SMALL, num_steps=4, stop_loss=1e9)
    real = loss.token_gradient

    def matching(suffix):
        found = real(suffix)
        loss.matches = loss.active == 1
        return found

    monkeypatch.setattr(loss, "token_gradient", matching)
    state = run_gcg(loss, shared, config, allowed_of(qwen), seed=0, growth=loss)
    assert state.step == 4 and state.active == 2  # the third prompt never joined
    monkeypatch.setattr(loss, "token_gradient", real)
    loss.active = 3
    assert run_gcg(loss, shared, config, allowed_of(qwen), seed=0, growth=loss).step == 0


def test_one_suffix_is_frozen_for_seen_and_held_out_behaviours_and_verified_on_both_models(
    tmp_path, qwen, sibling
):
    with RunFolder(tmp_path) as run:
        artifacts = universal(run, [qwen, sibling])
        assert universal(run, [qwen, sibling]) == artifacts
        assert len(run.rows(ATTACKS)) == 3
    assert len({tuple(a.suffix_ids) for a in artifacts}) == 1
    assert [a.variant for a in artifacts] == ["seen", "seen", "held out"]
    assert {a.source_model for a in artifacts} == {f"{qwen.spec} & {sibling.spec}"}
    for artifact in artifacts:
        for model in (qwen, sibling):
            own = dataclasses.replace(artifact, loss=artifact.provenance["losses"][model.spec])
            assert verify_artifact(Renderer(model), own).fault is None
        assert artifact.loss == pytest.approx(sum(artifact.provenance["losses"].values()) / 2)
        assert artifact.provenance["scoring"]["operations"] > 0
    slot = slot_for(Renderer(qwen), BEHAVIOURS[0], SMALL)
    ids = (*slot.before_ids, *artifacts[0].suffix_ids, *slot.after_ids)
    assert plain_loss(qwen, ids, slot.target_ids) == pytest.approx(
        artifacts[0].provenance["losses"][qwen.spec], abs=1e-4
    )


def test_a_stopped_universal_search_goes_on_to_the_bit(tmp_path, qwen):
    class Stop(Exception):
        pass

    with RunFolder(tmp_path / "whole") as run:
        whole = universal(run, [qwen])
    with RunFolder(tmp_path / "stopped") as run:
        real = run.save_state

        def crash(name, state):
            real(name, state)
            if len(state["scored"]) == 3:
                raise Stop

        run.save_state = crash
        with pytest.raises(Stop):
            universal(run, [qwen])
        run.save_state = real
        assert universal(run, [qwen]) == whole


def test_models_of_another_vocabulary_and_a_draft_are_refused(tmp_path, qwen, tiny_models):
    with RunFolder(tmp_path) as run:
        with pytest.raises(AttackPlaneError, match="different vocabularies"):
            universal(run, [qwen, tiny_models["llama"]])
        with pytest.raises(AttackPlaneError, match="probe sampling"):
            universal(run, [qwen], draft="x")


class Block(torch.nn.Module):
    """x -> x + attention(x) + mlp(x + attention(x)), both linear."""

    def __init__(self):
        super().__init__()
        self.self_attn = torch.nn.Linear(3, 3, bias=False)
        self.mlp = torch.nn.Linear(3, 3, bias=False)

    def forward(self, x):
        x = x + self.self_attn(x)
        return x + self.mlp(x)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0])
def test_lsgm_multiplies_the_gradient_of_every_branch_and_leaves_values(gamma):
    torch.manual_seed(0)
    loaded = types.SimpleNamespace(blocks=[Block(), Block()], spec="toy")
    x, c = torch.randn(3, requires_grad=True), torch.randn(3)
    plain = loaded.blocks[1](loaded.blocks[0](x))
    with damped(loaded, gamma):
        value = loaded.blocks[1](loaded.blocks[0](x))
    assert torch.equal(value, plain)
    (found,) = torch.autograd.grad((value * c).sum(), x)
    expected = c
    for part in [m for b in reversed(loaded.blocks) for m in (b.mlp, b.self_attn)]:
        expected = expected + gamma * part.weight.T @ expected  # (I + gamma W)^T
    assert torch.allclose(found, expected, atol=1e-6)


def test_without_branches_nothing_flows_from_the_suffix_to_the_target(qwen):
    slot = slot_of(qwen)
    suffix = torch.tensor(slot.initial_ids)
    loss, gradient = TargetLoss(qwen, slot).token_gradient(suffix)
    same, none = TargetLoss(qwen, slot, lsgm=0.0).token_gradient(suffix)
    assert same == loss and float(gradient.abs().max()) > 0 == float(none.abs().max())


def test_positions_are_drawn_by_what_the_gradient_promises():
    suffix, allowed = torch.tensor([0, 0, 0]), torch.ones(4, dtype=torch.bool)
    gradient = torch.tensor([[0.0, -3.0, 0, 0], [0.0, -1.0, 0, 0], [0.0, 1.0, 0, 0]])
    scores = gradient.masked_fill(~allowed, float("inf"))
    assert promised(suffix, gradient, scores).tolist() == pytest.approx([1.0, 1 / 3, 1e-3])
    drawn = sample_candidates(
        *(suffix, gradient, allowed),
        **{"topk": 4, "width": 4000, "n_replace": 1, "by_gradient": True},
        generator=torch.Generator().manual_seed(0),
    )
    assert set((drawn != 0).nonzero()[:, 1].tolist()) == {0, 1, 2}


# --- ADC ------------------------------------------------------------------------------------------
def test_sparsity_is_what_was_asked_on_average_and_weights_sum_to_one():
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(2, 10, 50, generator=generator)
    sparse = sparsified(z, torch.tensor([1.0, 3.5]), generator)
    assert torch.allclose(sparse.sum(2), torch.ones(2, 10)) and float(sparse.min()) >= 0
    kept = (sparse > 0).sum(2)
    assert kept[0].tolist() == [1] * 10 and sorted(kept[1].tolist()) == [3] * 5 + [4] * 5
    assert torch.equal(sparse.argmax(2), z.argmax(2))
    assert sparsified(-z.abs(), torch.tensor([1.0, 1.0]), generator).sum() == 20  # none above 0


def test_one_hot_weights_have_the_loss_and_the_gradient_of_their_suffix(qwen):
    slot = slot_of(qwen)
    suffix = torch.tensor(slot.initial_ids)
    objective, table = TargetLoss(qwen, slot), qwen.embedding_table.detach()
    one_hot = torch.nn.functional.one_hot(suffix, len(table)).float()
    missed, gradient = objective.soft_gradient(one_hot[None].repeat(2, 1, 1), table)
    _, expected = objective.token_gradient(suffix)
    assert torch.allclose(gradient[0], expected, atol=1e-5)
    assert torch.allclose(gradient[1], expected, atol=1e-5)
    assert missed.tolist() == [len(objective.target)] * 2 or not objective.matches


def test_adc_lowers_the_loss_of_what_it_returns_and_repeats_itself(qwen):
    slot, allowed = slot_of(qwen), allowed_of(qwen)
    config = ADCConfig(num_steps=20, starts=4, read_every=5)
    first, again = (
        run_adc(TargetLoss(qwen, slot), slot, config, allowed, seed=1) for _ in range(2)
    )
    assert first == again and first.loss <= first.losses[0]
    exact = float(TargetLoss(qwen, slot).losses(torch.tensor([first.ids]))[0])
    assert first.loss == pytest.approx(exact, abs=1e-5) == first.losses[first.best_reading]
    assert slot.faithful([first.ids]) == [True]


def test_operations_are_two_a_parameter_and_token_forward_and_four_backward(qwen):
    """Counted by hand: the prefix once, the suffix and what follows, candidates from where they
    differ."""
    slot = slot_of(qwen)
    objective = TargetLoss(qwen, slot, path="packed")
    n = sum(p.numel() for p in qwen.model.parameters())
    objective.take_operations()
    suffix = torch.tensor(slot.initial_ids)
    rest = len(slot.after_ids) + len(slot.target_ids) - 1
    objective.token_gradient(suffix)
    assert objective.take_operations() == n * (2 + 4) * (len(suffix) + rest)
    candidates = suffix.repeat(2, 1)
    candidates[0, 0] += 1  # shares nothing
    candidates[1, 2] += 1  # shares two tokens
    objective.losses(candidates)
    assert objective.take_operations() == n * 2 * (2 * (len(suffix) + rest) - 2)
    assert objective.take_operations() == 0
    plain = TargetLoss(qwen, slot, path="plain")
    plain.take_operations()
    plain.losses(candidates)
    whole = len(slot.before_ids) + len(suffix) + rest
    assert plain.take_operations() == n * 2 * 2 * whole
