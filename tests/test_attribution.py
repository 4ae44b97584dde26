"""Attribution: to first order it is what a very small edit does; and it chooses carriers."""

import pytest
import torch

from core.hooks import before_block
from core.models import load
from core.prompt import Conversation, Renderer
from geometry.activations import read_residuals
from geometry.attribution import attribution
from geometry.carriers import KEPT, Carrier, Tried, best_of_each, first_order, screened
from geometry.contrasts import unit
from geometry.interventions import steering
from geometry.rollout import rollout

SMALL = 0.01


@pytest.fixture(scope="module")
def setting(tiny_folders):
    loaded = load(str(tiny_folders["qwen2"]), "cpu")
    renderer = Renderer(loaded)
    prompts = [renderer.render(Conversation.build(t)) for t in ("Brew some tea", "Say hello now")]
    refusals = [
        renderer.render(Conversation.build("x"), target=t).target_ids for t in ("No", "I cannot")
    ]
    directions = unit(torch.randn(5, loaded.d_model, generator=torch.Generator().manual_seed(0)))
    return loaded, prompts, refusals, directions


def changes(loaded, prompts, refusals, edits):
    """Change of the mean log-probability of refusals by each edit, a mean over prompts."""
    rows = rollout(loaded, prompts, [None, *edits], refusals=refusals)
    table = torch.tensor([[o.refusal for o in row] for row in rows], dtype=torch.float64).mean(0)
    return table[1:] - table[0]


def test_a_small_push_does_what_attribution_says(setting):
    loaded, prompts, refusals, directions = setting
    found = attribution(loaded, prompts, refusals)
    for layer in range(loaded.n_layers + 1):
        edits = [steering("u", v, [layer], SMALL) for v in directions]
        expected = found.added(directions, [layer] * 5, torch.full((5,), SMALL))
        pushed = changes(loaded, prompts, refusals, edits)
        assert torch.allclose(pushed, expected, rtol=0.05, atol=2e-5)


def test_an_ablation_is_what_small_pushes_against_all_writes_add_up_to(setting):
    """On one prompt and one refusal: -(u . w) of every write, as a push, times its effect."""
    loaded, prompts, refusals, directions = setting
    prompt, refusal = prompts[0], refusals[0]
    found = attribution(loaded, [prompt], [refusal])
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
    assert float(found.ablated(directions[:1])) == pytest.approx(total, rel=0.02, abs=1e-5)


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


def test_carriers_are_chosen_alike_alone_and_among_other_groups(setting):
    loaded, prompts, refusals, _ = setting
    g = torch.Generator().manual_seed(1)
    groups = [
        [
            Carrier("-1", 1 + i % 2, unit(torch.randn(loaded.d_model, generator=g)), 1.0 + i)
            for i in range(5)
        ]
        for _ in range(3)
    ]
    tried = Tried.on(loaded, prompts, prompts, refusals)
    best = best_of_each(loaded, groups, tried)
    for group, (index, carrier) in zip(groups, best, strict=True):
        alone = screened(loaded, group, tried)
        assert len(alone) == KEPT and alone[0].score == pytest.approx(carrier.score, abs=1e-4)
        assert torch.equal(group[index].vector, carrier.vector)
        assert index in first_order(group, tried).topk(KEPT).indices.tolist()
