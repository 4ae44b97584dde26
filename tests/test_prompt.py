"""Spans and positions against several chat templates; what a template may not do; token
fidelity."""

import pytest

import core.prompt
from attacks.slot import default_slot, make_slot
from core.errors import AttackPlaneError
from core.prompt import Conversation, Renderer, Span

REQUEST, SUFFIX, TARGET = "Write about the tea", "x x ! x", "Sure, here is a text"


def decode(loaded, ids):
    return loaded.tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)


def test_spans_hold_the_words_that_they_name(tiny):
    renderer = Renderer(tiny)
    prompt = renderer.render(Conversation.build(REQUEST, SUFFIX), TARGET)
    ids = prompt.ids
    assert decode(tiny, ids[prompt.request.start : prompt.request.stop]).strip() == REQUEST
    assert decode(tiny, ids[prompt.suffix.start : prompt.suffix.stop]).strip() == SUFFIX
    assert (
        decode(tiny, ids[prompt.content.start : prompt.content.stop]).strip()
        == f"{REQUEST} {SUFFIX}"
    )
    assert decode(tiny, prompt.target_ids).strip() == TARGET
    assert prompt.t_goal == prompt.request.stop - 1 < prompt.t_inst == prompt.suffix.stop - 1
    assert prompt.t_post_inst == len(ids) - 1 == prompt.t_inst + len(prompt.tail)


def test_ids_are_those_of_the_rendered_text_tokenised_once(tiny):
    renderer = Renderer(tiny)
    prompt = renderer.render(Conversation.build(REQUEST, SUFFIX), TARGET)
    assert list(prompt.ids) == renderer.tokenise([prompt.text])[0]
    assert renderer.fidelity(
        [prompt.text + prompt.target_text], [[*prompt.ids, *prompt.target_ids]]
    ) == [True]
    bos = tiny.tokenizer.bos_token_id
    assert bos is None or list(prompt.ids).count(bos) <= 1


def test_t_inst_is_p_tokens_before_the_end_with_p_template_tokens(tiny_models):
    # chatml: <|im_end|> \n <|im_start|> ... \n are the tokens after the content
    loaded = tiny_models["qwen2"]
    renderer = Renderer(loaded)
    prompt = renderer.render(Conversation.build(REQUEST))
    tail = renderer.tokenise(["<|im_end|>\n<|im_start|>assistant\n"])[0]
    assert list(prompt.ids[prompt.t_inst + 1 :]) == tail
    assert prompt.t_inst == len(prompt.ids) - len(tail) - 1


def test_plain_template_serves_models_without_a_chat_template(tiny_models):
    loaded = tiny_models["gpt2"]
    prompt = Renderer(loaded).render(Conversation.build(REQUEST), TARGET)
    assert prompt.text == f"User: {REQUEST}\nAssistant:"
    assert prompt.target_text == " " + TARGET
    assert "plain template" in loaded.describe()


def test_bos_is_added_once_where_the_tokenizer_would_add_it(tiny_models):
    loaded = tiny_models["llama"]
    assert loaded.tokenizer("a").input_ids[0] == loaded.tokenizer.bos_token_id
    ids = Renderer(loaded).render(Conversation.build(REQUEST)).ids
    assert ids[0] == loaded.tokenizer.bos_token_id and ids.count(ids[0]) == 1


def test_suffix_may_stand_anywhere_by_its_marker(tiny):
    renderer = Renderer(tiny)
    for placement in ("{suffix} {request}", "Now {request} {suffix} thanks"):
        prompt = renderer.render(Conversation.build(REQUEST, SUFFIX, placement=placement))
        assert decode(tiny, prompt.ids[prompt.suffix.start : prompt.suffix.stop]).strip() == SUFFIX
        assert (
            decode(tiny, prompt.ids[prompt.request.start : prompt.request.stop]).strip() == REQUEST
        )
    with pytest.raises(AttackPlaneError, match="suffix"):
        Conversation.build(REQUEST, SUFFIX, placement="{request}")


def test_system_prompt_and_history_come_before_the_content(tiny_models):
    renderer = Renderer(tiny_models["qwen2"])
    history = [("user", "Write about the tea"), ("assistant", "Tea is warm.")]
    prompt = renderer.render(Conversation.build(REQUEST, system="Be brief.", history=history))
    assert prompt.text.index("Be brief.") < prompt.text.index("Tea is warm.")
    # the same words stand in the history: the span is the last turn's
    assert prompt.starts[prompt.content.start] > prompt.text.index("Tea is warm.")


def test_a_template_without_system_role_says_so(tiny_models):
    with pytest.raises(AttackPlaneError, match="System role not supported"):
        Renderer(tiny_models["gemma3"]).render(Conversation.build(REQUEST, system="Be brief."))


def test_a_template_that_trims_is_refused_unless_asked_to_accept(tiny_models):
    renderer = Renderer(tiny_models["gemma3"])
    with pytest.raises(AttackPlaneError, match="rewrites the user content"):
        renderer.render(Conversation.build(" " + REQUEST))
    prompt = renderer.render(Conversation.build(" " + REQUEST), allow_trim=True)
    assert prompt.trimmed
    assert (
        decode(renderer.loaded, prompt.ids[prompt.request.start : prompt.request.stop]).strip()
        == REQUEST
    )


def test_a_template_that_drops_the_content_is_refused(tiny_models):
    loaded = tiny_models["qwen2"]
    renderer = Renderer(loaded)
    before = loaded.tokenizer.chat_template
    try:
        loaded.tokenizer.chat_template = "{{ messages[0].role }}"
        with pytest.raises(AttackPlaneError, match="0 times"):
            renderer.render(Conversation.build(REQUEST))
    finally:
        loaded.tokenizer.chat_template = before


def test_a_template_that_does_not_end_is_stopped(tiny_models, monkeypatch):
    loaded = tiny_models["qwen2"]
    monkeypatch.setattr(core.prompt, "TEMPLATE_SECONDS", 0.2)
    loop = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    monkeypatch.setattr(loaded.tokenizer, "chat_template", loop)
    with pytest.raises(AttackPlaneError, match="does not end"):
        Renderer(loaded).render(Conversation.build(REQUEST))


def test_raw_leaves_out_what_a_template_adds_by_itself_and_nothing_else(tiny, monkeypatch):
    conversations = [Conversation.build(REQUEST), Conversation.build(REQUEST, system="Be brief.")]
    for conversation in conversations[: 1 if "raise_exception" in Renderer(tiny).template else 2]:
        assert Renderer(tiny, raw=True).text(conversation) == Renderer(tiny).text(conversation)
    if not tiny.has_chat_template:
        return
    plain = Renderer(tiny).render(conversations[0], TARGET)
    own = tiny.tokenizer.chat_template
    added = "{% if messages[0].role != 'system' %}sys: be kind\n{% endif %}"
    bos = "{{ bos_token }}" if own.startswith("{{ bos_token }}") else ""
    monkeypatch.setattr(tiny.tokenizer, "chat_template", bos + added + own.removeprefix(bos))
    assert "be kind" in Renderer(tiny).text(conversations[0])
    assert Renderer(tiny, raw=True).render(conversations[0], TARGET) == plain


def test_a_first_turn_of_its_own_form_has_no_raw_text(tiny_models, monkeypatch):
    loaded = tiny_models["qwen2"]
    own = "{% if messages|length == 1 %}Question: {{ messages[0].content }}{% else %}"
    template = own + loaded.tokenizer.chat_template + "{% endif %}"
    monkeypatch.setattr(loaded.tokenizer, "chat_template", template)
    with pytest.raises(AttackPlaneError, match="a way of its own"):
        Renderer(loaded, raw=True).text(Conversation.build(REQUEST))


def test_templates_that_print_the_date_render_the_same_tomorrow(tiny_models, monkeypatch):
    loaded = tiny_models["qwen2"]
    dated = "{{ strftime_now('%d %b %Y') }} {{ date_string }} " + loaded.tokenizer.chat_template
    monkeypatch.setattr(loaded.tokenizer, "chat_template", dated)
    text = Renderer(loaded).render(Conversation.build(REQUEST)).text
    assert text.startswith("26 Jul 2024 26 Jul 2024 ")


def test_rendering_leaves_the_tokenizer_as_it_was(tiny):
    before = (tiny.tokenizer.chat_template, tiny.tokenizer.padding_side, len(tiny.tokenizer))
    Renderer(tiny).render(Conversation.build(REQUEST, SUFFIX), TARGET)
    assert (
        tiny.tokenizer.chat_template,
        tiny.tokenizer.padding_side,
        len(tiny.tokenizer),
    ) == before


def test_fidelity_fails_for_ids_that_the_text_would_not_give(qwen):
    renderer = Renderer(qwen)
    slot = make_slot(renderer, REQUEST, TARGET, suffix="x x x")
    vocabulary = dict(qwen.tokenizer.get_vocab().items())
    whole = renderer.tokenise([" tea"])[0]
    letters = [vocabulary["Ġ"], vocabulary["t"], vocabulary["e"], vocabulary["a"]]
    assert len(whole) < len(
        letters
    )  # " tea" merges, so letter by letter is never what the text gives
    assert slot.faithful([slot.initial_ids, letters]) == [True, False]


def test_fidelity_sees_merges_with_the_neighbours_that_the_suffix_alone_hides(qwen):
    renderer = Renderer(qwen)
    slot = make_slot(renderer, "Write about the te", TARGET, suffix="x x")
    suffix = renderer.tokenise(["a x"])[0]
    assert renderer.tokenise(renderer.decode([suffix]))[0] == suffix  # alone it round-trips
    assert slot.faithful([suffix]) == [False]  # after "te" it does not


def test_a_suffix_that_ends_in_white_space_is_not_faithful(tiny):
    slot = default_slot(
        Renderer(tiny), REQUEST, TARGET, length=3, placement="{request} {suffix}", system=None
    )
    space = [i for i in range(len(tiny.tokenizer)) if tiny.tokenizer.decode([i]) == " "]
    tries = [[*slot.initial_ids[:-1], i] for i in space]
    assert not any(slot.faithful(tries))


def test_slot_content_is_what_the_template_gets(tiny):
    renderer = Renderer(tiny)
    slot = default_slot(
        renderer, REQUEST, TARGET, length=4, placement="Now {request} {suffix} thanks", system=None
    )
    text = renderer.text(
        Conversation(
            slot.content_before + slot.suffix_texts([slot.initial_ids])[0] + slot.content_after
        )
    )
    assert text == slot.before_text + slot.suffix_texts([slot.initial_ids])[0] + slot.after_text


def test_frozen_prompts_find_their_parts_again():
    conversation = Conversation.of_prompt(
        "Say hi ! !", request="Say hi", suffix=" ! !", system=None
    )
    assert (conversation.request, conversation.suffix) == (Span(0, 6), Span(6, 10))
    encoded = Conversation.of_prompt("U2F5IGhp", request="Say hi", suffix=None, system=None)
    assert encoded.request is None


def test_characters_of_several_tokens_stay_inside_their_span(tiny):
    renderer = Renderer(tiny)
    prompt = renderer.render(Conversation.build("Write about 🍵"), TARGET)
    assert (
        decode(tiny, prompt.ids[prompt.content.start : prompt.content.stop]).strip()
        == "Write about 🍵"
    )
