"""Our decoder: replies of a plain loop, whatever the batch; each prompt samples its own stream."""

import threading

import pytest
import torch

import core.decoding
import core.generate
from core.conversation import Conversation
from core.decodable import KEPT, decodes
from core.decoding import RowDecoder
from core.generate import complete, stop_ids
from core.head import head_of
from core.models import load
from core.packed import attend_after
from core.prompt import Renderer

REQUESTS = (
    "Brew some tea",
    "Say hello to the people of the village now",
    "Tell me about the tea and about the pot that it was made in, and about the cup",
    "Hello",
    "Write about the tea",
    "Now tell me about the village",
    "Tea",
)


def prompts_of(loaded):
    renderer = Renderer(loaded)
    return [list(renderer.render(Conversation.build(r)).ids) for r in REQUESTS]


@torch.no_grad()
def plain(loaded, prompt, new, stops=()):
    """One prompt alone, whole sequences, no cache."""
    ids = list(prompt)
    for _ in range(new):
        token = int(loaded.model(torch.tensor([ids])).logits[0, -1].float().argmax())
        if token in stops:
            break
        ids.append(token)
    return ids[len(prompt) :]


def decoded(loaded, prompts, new, *, shared, **options):
    head = head_of(loaded, torch.tensor(prompts[0]))
    decoder = RowDecoder(loaded, head, prompts[0][:shared], max_new_tokens=new, **options)
    return dict(decoder.replies({n: p[shared:] for n, p in enumerate(prompts)}))


class Used(list):
    """Counts of lanes that were used. ``expected``: of one decoding of enough rows."""


@pytest.fixture(params=[1, 2], ids=["one lane", "two lanes"])
def lanes(request, monkeypatch):
    """Decode in so many lanes, however few the rows are."""
    used, merged = Used(), core.decoding.merged
    monkeypatch.setattr(core.decoding, "merged", lambda s: used.append(len(s)) or merged(s))
    monkeypatch.setattr(core.decoding, "ENOUGH", 3)
    monkeypatch.setattr(core.decoding, "uses_onednn", lambda model: True)
    threads = torch.get_num_threads()
    torch.set_num_threads(request.param)
    used.expected = [2] if request.param == 2 else []
    yield used
    torch.set_num_threads(threads)


@pytest.mark.parametrize("batch", [1, 3, 5, 96])
def test_replies_are_those_of_a_plain_greedy_loop(tiny, lanes, batch):
    prompts = prompts_of(tiny)
    shared = next(n for n in range(99) if len({p[n] for p in prompts}) > 1)
    expected = {n: plain(tiny, p, 20) for n, p in enumerate(prompts)}
    assert decodes(tiny, prompts[0])
    assert decoded(tiny, prompts, 20, shared=shared, stops=(), batch=batch) == expected
    stops = {expected[0][4], expected[2][9]}  # some rows end early, and others come in
    early = {n: plain(tiny, p, 20, stops) for n, p in enumerate(prompts)}
    assert any(len(reply) < 20 for reply in early.values())
    assert decoded(tiny, prompts, 20, shared=shared, stops=stops, batch=batch) == early
    assert decoded(tiny, prompts, 20, shared=0, stops=stops, batch=batch) == early
    assert lanes == 3 * lanes.expected * (batch >= 3)


def test_two_lanes_only_where_no_hook_may_hold_a_state(qwen, lanes):
    prompts = prompts_of(qwen)
    handle = qwen.blocks[0].register_forward_hook(lambda *_: None)
    expected = decoded(qwen, prompts, 4, shared=1, stops=())
    assert not lanes
    handle.remove()
    qwen.model(torch.tensor([prompts[0]]), output_hidden_states=True)  # leaves hooks of its own
    assert qwen.blocks[0]._forward_hooks
    assert decoded(qwen, prompts, 4, shared=1, stops=()) == expected
    assert lanes == lanes.expected


@pytest.mark.parametrize("scaling", [None, 0.3])
def test_attention_after_a_shared_start_is_attention(scaling):
    generator = torch.Generator().manual_seed(0)
    rows, few, each, shared, seen, width = 5, 2, 3, 4, 9, 8
    widths = width, 6  # of keys and of values
    start = [torch.randn(1, few, shared, w, generator=generator) for w in widths]
    own = [torch.randn(rows, few, seen - shared, w, generator=generator) for w in widths]
    query = torch.randn(rows, few * each, 1, width, generator=generator)
    k, v = (torch.cat([s.expand(rows, -1, -1, -1), o], 2) for s, o in zip(start, own, strict=True))
    lengths = torch.tensor([5, 9, 6, 7, 9])
    mask = torch.zeros(rows, 1, 1, seen)
    mask.masked_fill_((torch.arange(seen) >= lengths[:, None])[:, None, None], float("-inf"))
    found = attend_after(start, query, k, v, mask, scaling)
    every = (states.repeat_interleave(each, 1) for states in (k, v))
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, *every, attn_mask=mask, scale=scaling
    )
    assert torch.allclose(found, expected.transpose(1, 2), atol=1e-6)


def test_samples_do_not_depend_on_the_rows_beside_them(qwen, lanes):
    prompts = prompts_of(qwen)
    options = {"shared": 1, "stops": (), "temperature": 1.0}
    seeds = range(len(prompts))
    one, five = (decoded(qwen, prompts, 12, **options, seeds=seeds, batch=b) for b in (1, 5))
    assert one == five != decoded(qwen, prompts, 12, **options, seeds=seeds[::-1])
    own = decoded(qwen, [prompts[0]] * 2, 12, **options, seeds=seeds)
    assert own[0] != own[1]  # each prompt has a stream of its own


def test_a_short_memory_halves_the_batch_and_loses_nothing(qwen, lanes, monkeypatch):
    renderer = Renderer(qwen)
    texts = [renderer.render(Conversation.build(r)).text for r in REQUESTS]
    expected = complete(renderer, texts, max_new_tokens=6)
    enter, asked = RowDecoder._enter, []

    def full(self, lane, fresh):
        asked.append(self.batch)
        if self.batch > 2:
            raise torch.OutOfMemoryError
        return enter(self, lane, fresh)

    monkeypatch.setattr(RowDecoder, "_enter", full)
    assert complete(renderer, texts, max_new_tokens=6, batch_size=7) == expected
    assert [*dict.fromkeys(asked)] == [7, 3, 1]  # each of two lanes asks
    assert lanes or asked[:3] == [7, 3, 1]


def test_a_lane_that_fails_loses_no_reply_and_gives_none_twice(qwen, lanes, monkeypatch):
    renderer = Renderer(qwen)
    texts = [renderer.render(Conversation.build(r)).text for r in REQUESTS]
    expected = complete(renderer, texts, max_new_tokens=6)
    step, calls, given = RowDecoder._step, [], []

    def fails_once(self, lane, token):
        calls.append(None)
        if len(calls) == 8:  # some rows have ended by then, of five side by side
            raise torch.OutOfMemoryError
        return step(self, lane, token)

    replies = RowDecoder.replies
    monkeypatch.setattr(RowDecoder, "_step", fails_once)
    monkeypatch.setattr(
        RowDecoder, "replies", lambda s, r: (given.append(p) or (p, x) for p, x in replies(s, r))
    )
    assert complete(renderer, texts, max_new_tokens=6, batch_size=5) == expected
    assert len(calls) > 8 and sorted(given) == list(range(len(texts)))


def test_a_caller_that_stops_leaves_nothing_behind(qwen, lanes):
    prompts, own = prompts_of(qwen), qwen.config._attn_implementation
    decoder = RowDecoder(
        qwen, head_of(qwen, torch.tensor(prompts[0])), [], stops=(), max_new_tokens=9
    )
    stream = decoder.replies(dict(enumerate(prompts)))
    next(stream)
    assert qwen.config._attn_implementation != own
    stream.close()
    assert qwen.config._attn_implementation == own and lanes == lanes.expected
    assert not [t for t in threading.enumerate() if t.name.startswith("lane")]


def test_a_model_that_it_would_decode_wrongly_goes_to_transformers(tiny_folders, monkeypatch):
    loaded = load(str(tiny_folders["llama"]), "cpu")
    renderer = Renderer(loaded)
    texts = [renderer.render(Conversation.build(r)).text for r in REQUESTS]
    expected = complete(renderer, texts, max_new_tokens=5)
    vars(loaded).pop(KEPT)
    keep = RowDecoder._keep
    monkeypatch.setattr(RowDecoder, "_keep", lambda self, *a: keep(self, *a[:-1], a[-1] * 2))
    assert not decodes(loaded, renderer.tokenise(texts)[0])
    assert complete(renderer, texts, max_new_tokens=5) == expected


def test_both_ways_give_the_same_text(qwen, monkeypatch):
    renderer = Renderer(qwen)
    texts = [renderer.render(Conversation.build(r)).text for r in REQUESTS]
    ours = complete(renderer, texts, max_new_tokens=8)
    monkeypatch.setattr(core.generate, "decodes", lambda *_: False)
    assert complete(renderer, texts, max_new_tokens=8) == ours
    assert stop_ids(qwen)
