"""Edits do what their formula says, leave no hooks, and sharing work changes nothing."""

import contextlib
import copy
import math

import pytest
import torch

import geometry.edited_batch as edited_batch
import geometry.rollout as rollout_module
from core.errors import AttackPlaneError
from core.generate import complete
from core.prompt import Conversation, Renderer
from geometry.activations import collect, read_residuals
from geometry.contrasts import unit
from geometry.edits import Edits, edited, intervened
from geometry.interventions import (
    MODES,
    ablation,
    basis,
    matched_controls,
    random_controls,
    random_rows,
    steering,
    touched,
    without,
)
from geometry.rollout import rollout

REQUESTS = [
    "Write about tea",
    "Say hi to my dear friend",
    "Explain how to bake a loaf of bread at home",
    "Write about jam",
]


def prompts_of(loaded, requests=REQUESTS):
    renderer = Renderer(loaded)
    return [renderer.render(Conversation.build(r)) for r in requests]


def vector(loaded, seed=0):
    return unit(torch.randn(loaded.d_model, generator=torch.Generator().manual_seed(seed)))


def residuals(loaded, ids, intervention=None):
    """(layer, token, d_model) of one sequence, read after the edit."""
    kept = {}
    edits = Edits([intervention], loaded.d_model, loaded.device)
    with torch.no_grad(), edited(loaded, edits), read_residuals(loaded, kept.__setitem__):
        loaded.decoder(input_ids=torch.tensor([ids]))
    return torch.stack([kept[layer][0] for layer in range(loaded.n_layers + 1)])


def hooks(loaded):
    return sum(
        len(b._forward_hooks) + len(b._forward_pre_hooks) + ("forward" in b.__dict__)
        for b in loaded.blocks
    )


def test_ablation_leaves_no_projection_at_the_edited_layers_and_all_of_it_elsewhere(tiny):
    ids, u = prompts_of(tiny)[2].ids, vector(tiny)
    layers = range(tiny.n_layers + 1)
    assert (residuals(tiny, ids, ablation("R", u[None], layers)) @ u).abs().max() < 1e-5
    plain, one = residuals(tiny, ids), residuals(tiny, ids, ablation("R", u[None], [1]))
    assert (one[1] @ u).abs().max() < 1e-5
    assert torch.equal(one[0], plain[0]) and (one[2] @ u).abs().max() > 1e-3


def test_the_span_of_two_directions_is_ablated_whole(qwen):
    h, r = vector(qwen, 1), vector(qwen, 2)
    rows = basis("H+R", h, r)
    found = residuals(qwen, prompts_of(qwen)[0].ids, ablation("H+R", rows, range(4)))
    assert (found @ h).abs().max() < 1e-5 and (found @ r).abs().max() < 1e-5
    assert torch.allclose(rows @ rows.T, torch.eye(2), atol=1e-6)


def test_steering_adds_its_vector_and_by_zero_changes_nothing(tiny):
    ids, u = prompts_of(tiny)[1].ids, vector(tiny)
    plain = residuals(tiny, ids)
    assert torch.equal(residuals(tiny, ids, steering("R", u, range(tiny.n_layers + 1), 0.0)), plain)
    assert torch.equal(
        residuals(tiny, ids, ablation("R", u[None], range(tiny.n_layers + 1), 0.0)), plain
    )
    moved = residuals(tiny, ids, steering("R", 3 * u, [2], 1.5))
    assert torch.allclose(moved[2] - plain[2], 1.5 * u.expand_as(plain[2]), atol=1e-5)


def test_modes_by_hand():
    h, r = torch.tensor([1.0, 0, 0]), torch.tensor([0.6, 0.8, 0])
    assert torch.allclose(basis("R-H", h, r), torch.tensor([[0.0, 1, 0]]))
    assert torch.allclose(
        basis("H-R", h, r), torch.tensor([[0.8, -0.6, 0]])
    )  # h - 0.6 r, over its length 0.8
    assert torch.equal(basis("H", h, r)[0], h) and torch.equal(basis("R", h, r)[0], r)
    for mode in MODES:
        rows = basis(mode, h, r)
        assert torch.allclose(rows @ rows.T, torch.eye(len(rows)), atol=1e-6)
    with pytest.raises(AttackPlaneError, match="unknown mode"):
        basis("R minus H", h, r)
    with pytest.raises(AttackPlaneError, match="parallel"):
        without(h, h)
    with pytest.raises(AttackPlaneError, match="no refusal direction"):
        basis("R", h, torch.zeros(3))


def test_matched_controls_move_every_token_as_far_and_random_ones_do_not(qwen):
    ids, u = prompts_of(qwen)[2].ids, vector(qwen)
    plain, g = residuals(qwen, ids), torch.Generator().manual_seed(0)

    def lengths(intervention):
        return (residuals(qwen, ids, intervention)[1] - plain[1]).norm(dim=-1)

    for of in (
        ablation("R", u[None], [1], 0.7),
        ablation("H+R", random_rows(2, qwen.d_model, g), [1, 2, 3]),
    ):
        controls = matched_controls(of, 3, g)
        assert {c.kind for c in controls} == {"matched"}
        for row in rollout(qwen, prompts_of(qwen), [*controls, of, None]):
            assert row[3].delta_norm > 0.1
            assert [o.delta_norm for o in row[:3]] == pytest.approx(
                [row[3].delta_norm] * 3, rel=1e-5
            )
            assert row[0].kl != pytest.approx(row[3].kl, rel=1e-3)
        assert not torch.allclose(lengths(random_controls(of, 1, g)[0]), lengths(of), atol=1e-2)
    steered = steering("R", u, [1], 2.0)
    for control in random_controls(steered, 2, g):
        assert torch.allclose(lengths(control), torch.tensor(2.0), atol=1e-5)


def test_places_in_a_prompt(qwen):
    prompt = prompts_of(qwen)[1]
    n = len(prompt.ids)
    assert touched(prompt, "all")[0].sum() == n and touched(prompt, "all")[1]
    assert touched(prompt, "prompt")[0].sum() == n and not touched(prompt, "prompt")[1]
    assert touched(prompt, "reply")[0].sum() == 0 and touched(prompt, "reply")[1]
    assert touched(prompt, "t_inst")[0].nonzero().tolist() == [[prompt.t_inst]]
    tail = touched(prompt, "t_inst..t_post_inst")[0].nonzero()[:, 0].tolist()
    assert tail == list(range(prompt.t_inst, n))
    assert touched(prompt, "-2..-1")[0].nonzero()[:, 0].tolist() == [n - 2, n - 1]
    for wrong in ("t_post_inst..t_inst", "tail", "-0"):
        with pytest.raises(AttackPlaneError):
            touched(prompt, wrong)


def test_hooks_are_gone_after_use_and_after_an_error(qwen, monkeypatch):
    u = vector(qwen)
    before = hooks(qwen)
    rollout(qwen, prompts_of(qwen), [None, ablation("R", u[None], [2])], max_new_tokens=2)
    assert hooks(qwen) == before
    with monkeypatch.context() as patch:
        patch.setattr(qwen.blocks[1].mlp, "forward", lambda *a, **k: 1 / 0)
        for layers in ([0], [2]):
            with pytest.raises(ZeroDivisionError):
                rollout(qwen, prompts_of(qwen), [ablation("R", u[None], layers)])
            assert hooks(qwen) == before
    with (
        pytest.raises(AttackPlaneError, match="no such layer"),
        intervened(qwen, ablation("R", u[None], [1, 99])),
    ):
        pass
    assert hooks(qwen) == before


def test_a_matched_control_moves_each_token_as_far_as_its_leader_and_needs_it(qwen):
    g = torch.Generator().manual_seed(0)
    of = ablation("H+R", random_rows(2, qwen.d_model, g), [1, 2, 3], 0.7)
    control = matched_controls(of, 1, g)[0]
    hidden = torch.randn(4, 5, qwen.d_model, generator=g)
    change = Edits([of, control, of, control], qwen.d_model, "cpu")(2, hidden) - hidden
    assert torch.allclose(change[1].norm(dim=-1), change[0].norm(dim=-1), atol=1e-5)
    assert torch.allclose(change[3].norm(dim=-1), change[2].norm(dim=-1), atol=1e-5)
    assert not torch.allclose(change[1].norm(dim=-1), change[3].norm(dim=-1), atol=1e-2)
    with pytest.raises(AttackPlaneError, match="needs its intervention"):
        rollout(qwen, prompts_of(qwen), [control])


def interventions_of(loaded):
    u, w = vector(loaded, 1), vector(loaded, 2)
    last = loaded.n_layers
    whole = ablation("R", u[None], range(last + 1))
    return [
        None,
        whole,
        random_controls(whole, 1, torch.Generator().manual_seed(4))[0],
        ablation("H+R", random_rows(2, loaded.d_model, torch.Generator().manual_seed(3)), [2], 0.8),
        steering("R", u, [2], 3.0),
        steering("R", u, [last], 2.0, "t_inst..t_post_inst"),
        steering("H", w, [1], -2.0, "prompt"),
        steering("H", w, [1, 2], 4.0, "reply"),
    ]


def slow_outcome(loaded, prompt, intervention, refusal, tokens):
    """Next-token log-probabilities, refusal score and reply, every step a whole plain pass of one
    row."""

    def logits(ids):
        edits = Edits([intervention], loaded.d_model, loaded.device)
        if intervention:
            mask, reply = touched(prompt, intervention.where)
            edits.mask = torch.cat([mask, torch.full((len(ids) - len(mask),), float(reply))])[None]
        with torch.no_grad(), edited(loaded, edits):
            return loaded.model(input_ids=torch.tensor([ids])).logits[0].float().log_softmax(-1)

    n = len(prompt.ids)
    scored = logits([*prompt.ids, *refusal])
    score = sum(float(scored[n - 1 + i, t]) for i, t in enumerate(refusal)) / len(refusal)
    ids = list(prompt.ids)
    for _ in range(tokens):
        ids.append(int(logits(ids)[-1].argmax()))
    return scored[n - 1], score, ids[n:]


def test_outcomes_equal_a_plain_pass_a_token_whatever_is_shared(tiny):
    prompts, refusal, compliance = prompts_of(tiny), [7, 11, 13], [5, 9]
    texts = {"refusals": [refusal], "compliances": [compliance], "refusal_tokens": [3, 8]}
    todo = interventions_of(tiny)
    shared = rollout(tiny, prompts, todo, **texts, max_new_tokens=4)
    other = rollout(tiny, prompts[::-1], todo[::-1], **texts, max_new_tokens=4, share=False, rows=3)
    for p, prompt in enumerate(prompts):
        base = slow_outcome(tiny, prompt, None, refusal, 0)[0]
        for n, intervention in enumerate(todo):
            nxt, score, reply = slow_outcome(tiny, prompt, intervention, refusal, 4)
            helpful = slow_outcome(tiny, prompt, intervention, compliance, 0)[1]
            inside = float(nxt[[3, 8]].exp().sum())
            for found in (shared[p][n], other[-1 - p][-1 - n]):
                assert found.kl == pytest.approx(float((base.exp() * (base - nxt)).sum()), abs=1e-4)
                assert found.refusal == pytest.approx(score, abs=1e-4)
                assert found.d == pytest.approx(score - helpful, abs=2e-4)
                assert found.log_odds == pytest.approx(math.log(inside / (1 - inside)), abs=1e-3)
                ends = [i for i, t in enumerate(reply) if t in {tiny.tokenizer.eos_token_id}]
                assert list(found.reply) == reply[: ends[0] if ends else None]


def test_a_model_whose_blocks_cannot_be_skipped_is_run_whole(qwen, monkeypatch, caplog):
    u = vector(qwen)
    todo = [None, steering("R", u, [2], 3.0)]
    expected = rollout(qwen, prompts_of(qwen), todo, max_new_tokens=3)
    real = edited_batch._skipped

    @contextlib.contextmanager
    def broken(loaded, layer, residual, kinds):
        with real(loaded, layer, residual + 1.0, kinds):
            yield

    monkeypatch.setattr(edited_batch, "_skipped", broken)
    with caplog.at_level("WARNING"):
        found = rollout(qwen, prompts_of(qwen), todo, max_new_tokens=3)
    assert "blocks are not skipped" in caplog.text
    assert [[o.reply for o in row] for row in found] == [[o.reply for o in row] for row in expected]
    monkeypatch.setattr(rollout_module, "keeps_keys_and_values_only", lambda loaded: False)
    with pytest.raises(AttackPlaneError, match="keys and values only"):
        rollout(qwen, prompts_of(qwen), todo)


def test_a_prompt_left_alone_replies_as_it_does_without_us(tiny):
    renderer = Renderer(tiny)
    texts = [renderer.text(Conversation.build(r)) for r in REQUESTS]
    expected = complete(renderer, texts, max_new_tokens=6)
    found = rollout(tiny, prompts_of(tiny), [None], max_new_tokens=6)
    decoded = [
        tiny.tokenizer.decode(row[0].reply, skip_special_tokens=True).strip() for row in found
    ]
    assert decoded == expected and all(row[0].kl == pytest.approx(0, abs=1e-6) for row in found)
    assert all(row[0].delta_norm == 0 for row in found)


def test_delta_norm_is_the_mean_length_added_to_touched_tokens(qwen):
    u = vector(qwen)
    prompt = prompts_of(qwen)[2]
    found = rollout(
        qwen,
        [prompt],
        [steering("R", u, [1, 2], -2.5), ablation("R", u[None], [2], where="t_inst")],
    )
    assert found[0][0].delta_norm == pytest.approx(2.5, abs=1e-5)
    plain = collect(qwen, [prompt], ["p"]).at("t_inst")[0, 2]
    assert found[0][1].delta_norm == pytest.approx(float((plain @ u).abs()), abs=1e-5)


def test_ablating_outputs_too_is_taking_the_direction_out_of_all_weights_that_write(qwen):
    """Arditi's ablation and his weight orthogonalisation are one."""
    u = unit(torch.randn(qwen.d_model, generator=torch.Generator().manual_seed(4)))
    prompts = [
        Renderer(qwen).render(Conversation.build(t)) for t in ("Brew some tea", "Say hello to me")
    ]
    ids = torch.tensor([list(prompts[0].ids)])
    with torch.no_grad():
        plain = qwen.model(ids).logits[0, -1].log_softmax(-1)
        free = copy.deepcopy(qwen.model)
        inner = free.model
        inner.embed_tokens.weight.copy_(
            inner.embed_tokens.weight - (inner.embed_tokens.weight @ u)[:, None] * u
        )
        if free.lm_head.weight.data_ptr() == inner.embed_tokens.weight.data_ptr():
            free.lm_head.weight = torch.nn.Parameter(qwen.model.lm_head.weight.clone())
        for block in inner.layers:
            for part in (block.self_attn.o_proj, block.mlp.down_proj):
                part.weight.copy_(part.weight - u[:, None] * (u @ part.weight))
        expected = free(ids).logits[0, -1].log_softmax(-1)
    layers = range(qwen.n_layers + 1)
    kl = float((plain.exp() * (plain - expected)).sum())
    whole, residual = (ablation("u", u[None], layers, outputs=o) for o in (True, False))
    rows = rollout(qwen, prompts[:1], [whole, residual, None])[0]
    assert rows[0].kl == pytest.approx(kl, rel=1e-3) and rows[2].kl == pytest.approx(0, abs=1e-6)
    assert abs(rows[1].kl - kl) > 1e-3 * kl  # attention writes it back before the MLP reads
    # in one batch with others, and with controls that follow, as alone
    generator = torch.Generator().manual_seed(0)
    many = rollout(qwen, prompts, [residual, whole, *matched_controls(whole, 2, generator)])
    assert many[0][1].kl == pytest.approx(kl, rel=1e-3)
    assert many[0][0].kl == pytest.approx(rows[1].kl, rel=1e-3)
