"""How likely texts are as replies: agreement with a plain pass, whatever the padding; D by hand."""

import math

import pytest
import torch

from core.continuations import Continuations, after_own_prompt, log_odds
from core.prefix import keeps_keys_and_values_only, shared_length
from core.prompt import Conversation, Renderer
from core.tree import reader_of
from evaluation.refusal_score import openings_of, refusal_scores
from evaluation.refusals import (
    COMPLIANCE_OPENINGS,
    REFUSAL_OPENINGS,
    held_out_refusals,
    refusal_replies,
)

REQUESTS = ("Write about tea", "Explain how to paint a garden fence in the summer", "Sing")


def plain_score(loaded, prompt, text):
    """One plain pass over prompt and text, no padding and no cache."""
    ids = torch.tensor([[*prompt, *text]])
    with torch.no_grad():
        log_p = loaded.model(ids).logits[0].float().log_softmax(-1)
    return float(sum(log_p[len(prompt) - 1 + t, token] for t, token in enumerate(text)) / len(text))


def prompts_of(loaded):
    renderer = Renderer(loaded)
    return [renderer.render(Conversation.build(r)).ids for r in REQUESTS]


def test_scores_equal_plain_passes_in_every_family(tiny):
    prompts = prompts_of(tiny)
    texts = [prompts[0][:5], prompts[1][2:4], prompts[2][:1]]
    table = Continuations(tiny, prompts).log_probabilities(texts)
    own = after_own_prompt(tiny, prompts, texts)
    for i, prompt in enumerate(prompts):
        for j, text in enumerate(texts):
            assert float(table[i, j]) == pytest.approx(plain_score(tiny, prompt, text), abs=1e-4)
        assert float(own[i]) == pytest.approx(float(table[i, i]), abs=1e-4)


def test_texts_behind_their_prompts_in_one_row_equal_plain_passes_in_every_family(tiny):
    prompts = [*prompts_of(tiny), prompts_of(tiny)[0]]
    texts = [prompts[0][:5], prompts[1][2:4], prompts[2][:1]]
    reader = reader_of(tiny, texts, prompts[1])
    if not keeps_keys_and_values_only(tiny):
        assert reader is None
        return
    assert reader is not None
    for batch in (prompts, prompts[:1], [p[n:] for n, p in enumerate(prompts)]):
        table, following = reader.read(batch)
        for i, prompt in enumerate(batch):
            for j, text in enumerate(texts):
                score = plain_score(tiny, prompt, text)
                assert float(table[i, j]) == pytest.approx(score, abs=1e-4)
            own = tiny.last_logits(1, input_ids=torch.tensor([prompt]))[0, -1].log_softmax(-1)
            torch.testing.assert_close(following[i], own, atol=1e-4, rtol=1e-4)


def test_a_text_without_tokens_has_no_score(qwen):
    assert math.isnan(float(after_own_prompt(qwen, prompts_of(qwen)[:1], [[]])[0]))


def test_log_odds_by_hand():
    log_p = torch.tensor([0.5, 0.2, 0.2, 0.1]).log()
    assert float(log_odds(log_p, [1, 3])) == pytest.approx(math.log(0.3 / 0.7))
    assert math.isnan(float(log_odds(log_p, [])))


def test_d_is_the_difference_of_the_two_means(qwen):
    renderer, prompts = Renderer(qwen), prompts_of(qwen)
    openings = openings_of(renderer)
    assert len(openings.refusals) == len(REFUSAL_OPENINGS)
    scores = refusal_scores(renderer, prompts, batch_size=2)
    for prompt, score in zip(prompts, scores, strict=True):
        refusal, compliance = (
            sum(plain_score(qwen, prompt, text) for text in texts) / len(texts)
            for texts in (openings.refusals, openings.compliances)
        )
        assert score.d == pytest.approx(refusal - compliance, abs=1e-4)
        assert score.refusal == pytest.approx(refusal, abs=1e-4)


def test_half_of_the_refusals_are_kept_out_of_training():
    trained, held_out = refusal_replies(), held_out_refusals()
    assert len(trained) == len(held_out) >= 8 and not set(trained) & set(held_out)
    in_training = [any(t.startswith(o) for t in trained) for o in REFUSAL_OPENINGS]
    assert in_training == [True, True, False, False]
    assert not any(t.startswith(o) for t in trained for o in COMPLIANCE_OPENINGS)


def test_the_common_start_leaves_one_token_of_every_prompt():
    def start(prompts):
        return shared_length(prompts, min(map(len, prompts)) - 1)

    assert start([(1, 2, 3), (1, 2, 4, 5), [1, 2, 3, 9]]) == 2
    assert start([(1, 2), (1, 2, 3)]) == 1
    assert start([(7,), (7, 8)]) == 0
    assert start([(1, 2, 3)]) == 2
    assert start([(1, 2), (3, 2)]) == 0
