"""The real small model: losses, gradient and residuals of the fast paths against plain ones."""

import copy

import pytest
import torch

from attacks.candidates import allowed_tokens, sample_candidates
from attacks.likelihood import plain_loss
from attacks.objective import TargetLoss
from attacks.slot import default_slot
from core.generate import complete
from core.prompt import Conversation, Renderer
from evaluation.behaviours import load_behaviours
from geometry.activations import collect

pytestmark = pytest.mark.embedded


@pytest.fixture(scope="module")
def slot(embedded):
    behaviour = load_behaviours(label="harmful", splits=["test"])[0]
    return default_slot(
        Renderer(embedded),
        behaviour.request,
        behaviour.target_string,
        length=20,
        placement="{request} {suffix}",
        system=None,
    )


def test_candidate_losses_equal_one_plain_pass_each(embedded, slot):
    objective = TargetLoss(embedded, slot)
    suffix = torch.tensor(slot.initial_ids)
    _, gradient = objective.token_gradient(suffix)
    drawn = sample_candidates(
        suffix,
        gradient,
        allowed_tokens(embedded.tokenizer, embedded.embedding_table.shape[0]),
        topk=256,
        width=8,
        n_replace=1,
        generator=torch.Generator().manual_seed(0),
    )
    for ids, loss in zip(drawn.tolist(), objective.losses(drawn).tolist(), strict=True):
        prompt = (*slot.before_ids, *ids, *slot.after_ids)
        assert loss == pytest.approx(plain_loss(embedded, prompt, slot.target_ids), abs=1e-4)


def test_token_gradient_equals_autograd_through_one_hot_vectors(embedded, slot):
    # the reference in float64: in float32 it is itself 1e-5 off, ours 1.3e-6 (docs/lab-log.md)
    suffix = torch.tensor(slot.initial_ids)
    _, gradient = TargetLoss(embedded, slot).token_gradient(suffix)
    model = copy.deepcopy(embedded.model).double()
    embed = model.get_input_embeddings()
    one_hot = (
        torch.nn.functional.one_hot(suffix, embed.weight.shape[0]).double().requires_grad_(True)
    )
    rest = torch.tensor([*slot.after_ids, *slot.target_ids])
    whole = torch.cat([embed(torch.tensor(slot.before_ids)), one_hot @ embed.weight, embed(rest)])
    n = len(slot.target_ids)
    logits = model(inputs_embeds=whole[None]).logits[0, -n - 1 : -1]
    (expected,) = torch.autograd.grad(
        torch.nn.functional.cross_entropy(logits, torch.tensor(slot.target_ids)), one_hot
    )
    assert (gradient - expected).abs().max() < 1e-5


def test_residuals_do_not_depend_on_the_batch_to_1e_4_of_the_layers_largest_entry(embedded):
    renderer = Renderer(embedded)
    prompts = [renderer.render(Conversation.build(b.request)) for b in load_behaviours()[:6]]
    ids = [str(i) for i in range(6)]
    together = collect(embedded, prompts, ids, batch_tokens=400).resid
    alone = collect(embedded, prompts, ids, batch_tokens=1, share_prefix=False).resid
    scale = alone.abs().amax(dim=(0, 2, 3), keepdim=True).clamp_min(1.0)
    assert ((together - alone).abs() / scale).max() < 1e-4


def test_the_model_talks(embedded):
    renderer = Renderer(embedded)
    text = renderer.text(Conversation.build("What is the capital of France?"))
    (reply,) = complete(renderer, [text], max_new_tokens=16)
    assert "Paris" in reply
