"""Attribution: to first order it is what a very small edit does; and it chooses carriers."""

from dataclasses import replace

import pytest
import torch

from core.hooks import before_block
from core.models import load
from core.prompt import Conversation, Renderer
from geometry.activations import read_residuals
from geometry.attribution import LIKELIEST, Texts, ablated, added, next_token_kl
from geometry.carriers import (
    KEPT,
    Carrier,
    Tried,
    best_of_each,
    estimated,
    ranked,
    scored,
)
from geometry.contrasts import unit
from geometry.interventions import steering
from geometry.rollout import rollout

SMALL = 0.002


@pytest.fixture(scope="module")
def setting(tiny_folders):
    loaded = load(str(tiny_folders["qwen2"]), "cpu")
    renderer = Renderer(loaded)
    prompts = [renderer.render(Conversation.build(t)) for t in ("Brew some tea", "Say hello now")]
    refusals = [
        renderer.render(Conversation.build("x"), target=t).target_ids for t in ("No", "I cannot")
    ]
    directions = unit(torch.randn(5, loaded.d_model, generator=torch.Generator().manual_seed(0)))
    complying = renderer.render(Conversation.build("x"), target="Sure").target_ids
    return loaded, prompts, Texts(refusals, [complying]), directions


def changes(loaded, prompts, texts, edits):
    """Change of outcome D by each edit, a mean over prompts."""
    rows = rollout(
        loaded, prompts, [None, *edits], refusals=texts.refusals, compliances=texts.compliances
    )
    table = torch.tensor([[o.d for o in row] for row in rows], dtype=torch.float64).mean(0)
    return table[1:] - table[0]


def test_a_small_push_does_what_attribution_says(setting):
    loaded, prompts, texts, directions = setting
    for layer in range(loaded.n_layers + 1):
        edits = [steering("u", v, [layer], SMALL) for v in directions]
        lengths = torch.full((5,), SMALL)
        expected = added(loaded, prompts, texts, directions, [layer] * 5, lengths)
        pushed = changes(loaded, prompts, texts, edits)
        assert torch.allclose(pushed, expected, rtol=0.05, atol=2e-4)


def test_texts_in_one_row_and_texts_one_by_one_give_the_same(tiny, monkeypatch):
    renderer = Renderer(tiny)
    prompts = [renderer.render(Conversation.build(t)) for t in ("Brew some tea", "Say hello")]
    no, cannot, sure = (
        renderer.render(Conversation.build("x"), target=t).target_ids
        for t in ("No", "I cannot do", "Sure, here")
    )
    texts = Texts([no, cannot], [sure])
    directions = unit(torch.randn(3, tiny.d_model, generator=torch.Generator().manual_seed(0)))
    layers, lengths = [0, 1, tiny.n_layers], torch.ones(3)

    def both():
        pushed = added(tiny, prompts, texts, directions, layers, lengths)
        return ablated(tiny, prompts, texts, directions), pushed

    together = both()
    monkeypatch.setattr("geometry.attribution.reader_of", lambda *_: None)
    for one, other in zip(together, both(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)


def test_an_ablation_is_what_small_pushes_against_all_writes_add_up_to(setting):
    """On one prompt and one refusal: -(u . w) of every write, as a push, times its effect."""
    loaded, prompts, texts, directions = setting
    prompt, refusal = prompts[0], texts.refusals[0]
    states = {}
    ids = torch.tensor([[*prompt.ids, *refusal]])
    with torch.no_grad(), read_residuals(loaded, states.__setitem__):
        loaded.model(ids)
    a = torch.stack([states[layer][0] for layer in range(loaded.n_layers + 1)]).double()
    written = torch.cat([a[:1], a[1:] - a[:-1]])  # (layer, token, d_model)
    u = directions[0].double()
    total = 0.0
    for layer in range(loaded.n_layers + 1):
        for token in range(ids.shape[1]):
            effect = _effect(loaded, ids, len(prompt.ids), layer, token, u.float())
            total -= float(written[layer, token] @ u) * effect
    assert float(ablated(loaded, [prompt], Texts([refusal]), directions[:1])) == pytest.approx(
        total, rel=0.02, abs=1e-5
    )


def _effect(loaded, ids, start, layer, token, direction):
    """Change of the refusal's mean log-probability per unit pushed at one layer and token."""
    scores = []
    for sign in (1, -1):

        def push(hidden, sign=sign):
            hidden = hidden.clone()
            hidden[0, token] += sign * SMALL * direction
            return hidden

        block = loaded.blocks[min(layer, loaded.n_layers - 1)]
        handle = (
            before_block(block, push)
            if layer < loaded.n_layers
            else block.register_forward_hook(
                lambda _, __, out: (push(out[0]), *out[1:]) if isinstance(out, tuple) else push(out)
            )
        )
        with torch.no_grad():
            of = loaded.model(ids).logits[0, start - 1 : -1].double().log_softmax(-1)
        handle.remove()
        scores.append(float(of.gather(1, ids[0, start:, None]).mean()))
    return (scores[0] - scores[1]) / (2 * SMALL)


def test_the_kl_of_a_small_change_is_half_the_mean_square_of_what_it_does(setting):
    """A direction whose writes were made small: estimate and truth agree where all tokens count."""
    loaded, prompts, _, directions = setting
    found = next_token_kl(loaded, prompts, directions)
    total = torch.zeros(len(directions), dtype=torch.float64)
    for prompt in prompts:
        ids = torch.tensor([list(prompt.ids)])
        with torch.no_grad():
            of = loaded.model(ids).logits[0, -1].double().log_softmax(-1)
        for token in of.topk(LIKELIEST).indices.tolist():
            change = ablated(loaded, [prompt], Texts([[token]]), directions)
            total += of[token].exp() * change**2 / 2
    # ablating the token itself is part of the second, so its own writes are not in the first
    assert torch.allclose(found, total / len(prompts), rtol=0.3)


def test_carriers_are_chosen_alike_alone_and_among_other_groups(setting):
    loaded, prompts, texts, _ = setting
    g = torch.Generator().manual_seed(1)
    groups = [
        [
            Carrier("-1", 1 + i % 2, unit(torch.randn(loaded.d_model, generator=g)), 1.0 + i)
            for i in range(5)
        ]
        for _ in range(3)
    ]
    tried = Tried(prompts, prompts, texts)
    best = best_of_each(loaded, groups, tried)
    for group, carrier in zip(groups, best, strict=True):
        (alone,) = best_of_each(loaded, [group], tried)
        assert torch.equal(alone.vector, carrier.vector)
        (full,) = scored(loaded, [carrier], tried)
        assert full.kl == pytest.approx(carrier.kl, rel=1e-3, abs=1e-5)  # it was measured
        assert full.kl_error == pytest.approx(carrier.kl_error, rel=1e-3, abs=1e-5)
        estimates = estimated(loaded, group, tried)
        first = [group[i].vector for i in ranked(estimates)[:KEPT]]
        assert any(torch.equal(v, carrier.vector) for v in first)


def test_the_ranking_puts_admissible_ones_first_by_score():
    v = torch.ones(2)
    table = [
        Carrier("a", 1, v, 1.0, comply=9.0, refuse=0.0, kl=0.3),
        Carrier("b", 1, v, 1.0, comply=0.1, refuse=0.1, kl=0.1),
        Carrier("c", 1, v, 1.0, comply=0.5, refuse=0.1, kl=0.0),
        Carrier("d", 1, v, 1.0, comply=8.0, refuse=0.0, kl=0.2),
    ]
    assert ranked(table) == [2, 1, 3, 0]
    unsure = [replace(c, kl_error=0.01) for c in table]
    assert ranked(unsure) == [2, 1, 3, 0] and ranked([unsure[1], table[3], table[1]]) == [2, 0, 1]
