"""The place of a suffix in a rendered conversation: ids and text before it, in it and after it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from core.errors import AttackPlaneError
from core.prompt import Conversation, Renderer
from core.records import Behaviour
from core.settings import setting

log = logging.getLogger(__name__)

DEFAULT_WORDS = ("!", "x")
"""Words that an initial suffix repeats: the paper's, then one that never merges with punctuation or
line ends."""


@dataclass(frozen=True)
class Slot:
    """Token ids around what is scored: before + content + after, then the target.

    ``initial_ids`` is one such content.
    """

    before_ids: tuple[int, ...]
    initial_ids: tuple[int, ...]
    after_ids: tuple[int, ...]
    target_ids: tuple[int, ...]


@dataclass(frozen=True)
class SuffixSlot(Slot):
    """Everything about a conversation that stays fixed while its suffix changes.

    ``before_ids + suffix_ids + after_ids`` is the prompt up to the reply, ``target_ids`` follow it.
    ``content_before`` and ``content_after`` are the user content around the suffix, so that content
    = before + suffix text + after.
    """

    renderer: Renderer
    before_text: str
    after_text: str
    content_before: str
    content_after: str
    target_text: str

    def content_with(self, suffix: str) -> str:
        """The user content with this text as the suffix."""
        return self.content_before + suffix + self.content_after

    def suffix_texts(self, suffixes: Sequence[Sequence[int]]) -> list[str]:
        return self.renderer.decode(suffixes, context=self.before_ids[-1:])

    def faithful(self, suffixes: Sequence[Sequence[int]]) -> list[bool]:
        """Token fidelity of each suffix in the whole conversation, target included; one tokenizer
        call.

        A suffix that puts white space at an end of the user content is refused too: templates trim
        it.
        """
        if not suffixes:
            return []
        texts = self.suffix_texts(suffixes)
        same = self.renderer.fidelity(
            [self.before_text + text + self.after_text + self.target_text for text in texts],
            [(*self.before_ids, *ids, *self.after_ids, *self.target_ids) for ids in suffixes],
        )
        return [
            ok
            and bool(text)
            and not (not self.content_after and text[-1].isspace())
            and not (not self.content_before and text[0].isspace())
            for ok, text in zip(same, texts, strict=True)
        ]


def make_slot(
    renderer: Renderer,
    request: str,
    target: str,
    *,
    suffix: str,
    placement: str = "{request} {suffix}",
    system: str | None = None,
) -> SuffixSlot:
    """Locate ``suffix`` in the rendered conversation.

    Raises:
        AttackPlaneError: the suffix shares a token with its neighbours or does not survive
        tokenisation.
    """
    conversation = Conversation.build(request, suffix, placement=placement, system=system)
    prompt = renderer.render(conversation, target)
    renderer.require_room(len(prompt.ids), len(prompt.target_ids), f"request {request[:60]!r}")
    span = prompt.suffix
    if span is None:
        raise AttackPlaneError("the initial suffix is empty", where=placement)
    start = prompt.starts[span.start]
    stop = prompt.starts[span.stop] if span.stop < len(prompt.ids) else len(prompt.text)
    offset = len(renderer.around_content(conversation)[0])
    slot = SuffixSlot(
        renderer=renderer,
        before_text=prompt.text[:start],
        after_text=prompt.text[stop:],
        content_before=conversation.content[: start - offset],
        content_after=conversation.content[stop - offset :],
        before_ids=prompt.ids[: span.start],
        initial_ids=prompt.ids[span.start : span.stop],
        after_ids=prompt.ids[span.stop :],
        target_text=prompt.target_text,
        target_ids=prompt.target_ids,
    )
    if (
        prompt.text[start:stop].strip() != suffix.strip()
        or not slot.faithful([slot.initial_ids])[0]
    ):
        raise AttackPlaneError(
            "the initial suffix does not keep its tokens inside the conversation",
            where=f"{renderer.loaded.spec}, placement {placement!r}",
            got=f"suffix {suffix!r} lies in tokens that read {prompt.text[start:stop]!r}",
            remedy="choose another init_suffix or placement (words parted by spaces are safe)",
        )
    return slot


@dataclass(frozen=True)
class SuffixConfig:
    """Where a suffix stands, how it begins, and which tokens it may hold; GCG's defaults."""

    suffix_length: int = setting(20, 'Words of the initial suffix ("! ! ...").', low=1, high=10**4)
    init_suffix: str | None = setting(None, "Initial suffix in its place.")
    placement: str = setting("{request} {suffix}", "Where the suffix stands.")
    system_prompt: str | None = setting(None, "System prompt.", flag="--system")
    ascii_only: bool = setting(True, "Allow ASCII tokens only.", flag="--ascii-only/--any-token")


def slot_for(renderer: Renderer, behaviour: Behaviour, config: SuffixConfig) -> SuffixSlot:
    """The slot of one behaviour by an attack's settings."""
    assert behaviour.target_string is not None
    return default_slot(
        renderer,
        behaviour.request,
        behaviour.target_string,
        length=config.suffix_length,
        placement=config.placement,
        system=config.system_prompt,
        suffix=config.init_suffix,
    )


def default_slot(
    renderer: Renderer,
    request: str,
    target: str,
    *,
    length: int,
    placement: str,
    system: str | None,
    suffix: str | None = None,
) -> SuffixSlot:
    """A slot with the given suffix, or with a default word repeated ``length`` times."""
    if suffix is not None:
        return make_slot(
            renderer, request, target, suffix=suffix, placement=placement, system=system
        )
    fault: AttackPlaneError | None = None
    for word in DEFAULT_WORDS:
        initial = " ".join([word] * length)
        try:
            slot = make_slot(
                renderer, request, target, suffix=initial, placement=placement, system=system
            )
        except AttackPlaneError as error:
            fault = fault or error
        else:
            if fault is not None:
                log.info(
                    "%r merges with its neighbours here: the suffix repeats %r",
                    DEFAULT_WORDS[0],
                    word,
                )
            return slot
    assert fault is not None
    raise fault
