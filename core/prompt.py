"""Render a conversation once and know where everything lies in its tokens.

Steps: 1. Render the chat template with a sentinel in place of the user content; what stands before
and after it is the template's. 2. Check that the template leaves the real content as it is. 3.
Tokenise the whole text once, without adding special tokens (the text carries its own BOS). 4. Turn
character ranges into token ranges by the tokenizer's offsets. No template is known by name.

Positions (Zhao, arXiv 2507.11878; HARC, arXiv 2607.00572): ``t_inst`` is the last token of the user
content, ``t_post_inst`` the last template token before the reply, ``t_goal`` the last token of the
original request, which differs from t_inst under a suffix attack.

Token fidelity: a prompt counts only if its text, tokenised again as a whole, gives the ids that
were scored. Comparing the suffix alone is not enough: its tokens merge with their neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

from core.conversation import Conversation, Prompt, Span
from core.deadline import TooLong, at_most
from core.errors import AttackPlaneError
from core.records import content_hash
from core.rows import Row

if TYPE_CHECKING:
    from core.models import LoadedModel

PLAIN_TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}\n\n"
    "{% elif m.role == 'user' %}User: {{ m.content }}\n"
    "{% else %}Assistant: {{ m.content }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
"""Used, and named in the output, for a model without a chat template (a base model)."""

TEMPLATE_SECONDS = 5.0
SENTINEL = "ZQXcontentXQZ"
REPLY_SENTINEL = "ZQXreplyXQZ"
# Some templates print today's date; a prompt must render the same tomorrow.
FIXED = {"date_string": "26 Jul 2024"}
FIXED_TODAY = "{%- macro strftime_now(format) -%}26 Jul 2024{%- endmacro -%}"


class Renderer:
    """Renders conversations for one model's tokenizer, which it never changes.

    ``raw``: without the text that the template puts before the first turn by itself, such as a
    system prompt of its own. HARC's second script writes its prompts so [I].
    """

    def __init__(self, loaded: LoadedModel, *, raw: bool = False) -> None:
        self.loaded, self.raw = loaded, raw
        self.tokenizer = loaded.tokenizer
        if not getattr(self.tokenizer, "is_fast", False):
            raise AttackPlaneError(
                "this tokenizer gives no offsets",
                where=loaded.spec,
                got=type(self.tokenizer).__name__,
                remedy="use a checkpoint that has a tokenizer.json (a fast tokenizer)",
            )
        self._around: dict[tuple[str | None, tuple[tuple[str, str], ...]], tuple[str, str]] = {}

    @cached_property
    def template(self) -> str:
        """The chat template that is used: the model's own with the date held fixed, or ours."""
        if not self.loaded.has_chat_template:
            return PLAIN_TEMPLATE
        own = self.tokenizer.get_chat_template()
        return FIXED_TODAY + own if "strftime_now" in own else own

    @cached_property
    def vocabulary_hash(self) -> str:
        """Stands for the tokenizer: two with the same one read ids alike."""
        return content_hash(sorted(self.tokenizer.get_vocab().items()))

    @cached_property
    def template_hash(self) -> str:
        return content_hash(self.template)

    # --- text -------------------------------------------------------------------------------------
    @cached_property
    def _bos_added_by_default(self) -> bool:
        ids = self.tokenizer("a").input_ids
        return (
            bool(ids)
            and self.tokenizer.bos_token_id is not None
            and (ids[0] == self.tokenizer.bos_token_id)
        )

    def _template(
        self,
        content: str,
        system: str | None,
        history: tuple[tuple[str, str], ...],
        reply: str | None = None,
    ) -> str:
        messages = [{"role": "system", "content": system}] if system is not None else []
        messages += [{"role": role, "content": text} for role, text in history]
        messages.append({"role": "user", "content": content})
        if reply is not None:
            messages.append({"role": "assistant", "content": reply})
        options: Row = {"tokenize": False, "add_generation_prompt": reply is None}
        try:
            options["chat_template"] = self.template
            with at_most(TEMPLATE_SECONDS):
                text = self.tokenizer.apply_chat_template(messages, **options, **FIXED)
        except TooLong as error:
            fault = f"the chat template does not end ({error})"
            remedy = "mend chat_template in the model's folder, or give another template"
            raise AttackPlaneError(fault, where=self.loaded.spec, remedy=remedy) from error
        except Exception as error:  # templates raise jinja2 errors of their own choosing
            raise AttackPlaneError(
                "the chat template refuses this conversation",
                where=self.loaded.spec,
                got=f"{type(error).__name__}: {error}",
                remedy="some take no system prompt or need alternating roles: leave them out; "
                "where it refuses every conversation, mend chat_template in the model's folder",
            ) from error
        bos = self.tokenizer.bos_token
        if self._bos_added_by_default and not text.startswith(bos):
            text = bos + text
        if self.raw and system is None:
            start = self._beginning
            return start + text[len(start) + len(self._added) :]
        return text

    @cached_property
    def _beginning(self) -> str:
        """BOS, where texts begin with it."""
        bos = self.tokenizer.bos_token
        return bos if bos and self._own_start.startswith(bos) else ""

    @cached_property
    def _own_start(self) -> str:
        return Renderer(self.loaded)._template(SENTINEL, None, ()).partition(SENTINEL)[0]

    @cached_property
    def _added(self) -> str:
        """What the template puts between BOS and the first user turn by itself.

        A second user turn begins with what belongs to a turn: it stands after the reply before it
        and that reply's ending.
        """
        chat = Renderer(self.loaded)
        turns = (("user", "Hello"), ("assistant", REPLY_SENTINEL))
        later = chat._template(SENTINEL, None, turns).partition(SENTINEL)[0]
        ending = chat._template("Hello", None, (), reply=REPLY_SENTINEL)
        turn = later.partition(REPLY_SENTINEL)[2].removeprefix(ending.partition(REPLY_SENTINEL)[2])
        turn = turn.removeprefix(self._beginning)
        own = self._own_start[len(self._beginning) :]
        if not own.endswith(turn):
            raise AttackPlaneError(
                "this chat template begins its first turn in a way of its own",
                where=self.loaded.spec,
                got=f"{own!r:.60}, a later turn {turn!r:.60}",
                remedy="use the template chat",
            )
        return own[: len(own) - len(turn)]

    def text(self, conversation: Conversation) -> str:
        """The conversation's text up to the reply, BOS included: what a replay sends."""
        return self._template(conversation.content, conversation.system, conversation.history)

    def around_content(self, conversation: Conversation) -> tuple[str, str]:
        """What the template puts before and after the user content."""
        key = (conversation.system, conversation.history)
        if key not in self._around:
            text = self._template(SENTINEL, *key)
            if text.count(SENTINEL) != 1:
                raise AttackPlaneError(
                    "the chat template does not keep the user content once, as it is",
                    where=self.loaded.spec,
                    got=f"a probe word appears {text.count(SENTINEL)} times",
                    remedy="this model's template cannot be attacked with known token positions",
                )
            self._around[key] = (text.partition(SENTINEL)[0], text.partition(SENTINEL)[2])
        return self._around[key]

    def target_text(self, conversation: Conversation, target: str) -> str:
        """The target as it follows the prompt, with the template's white space before a reply."""
        prompt = self._template(SENTINEL, conversation.system, conversation.history)
        full = self._template(
            SENTINEL, conversation.system, conversation.history, reply=REPLY_SENTINEL
        )
        if full.startswith(prompt):
            between = full[len(prompt) :].partition(REPLY_SENTINEL)[0]
            if not between.strip():
                return between + target
        return target

    def end_of_turn(self) -> tuple[int, ...]:
        """The special token that the template puts after a reply, else end of text, else none."""
        full = self._template(SENTINEL, None, (), reply=REPLY_SENTINEL)
        rest = full.partition(REPLY_SENTINEL)[2].strip()
        ids = self.tokenizer(rest, add_special_tokens=False).input_ids if rest else []
        if ids and ids[0] in self.tokenizer.all_special_ids:
            return (ids[0],)
        end = self.tokenizer.eos_token_id
        return () if end is None else (end,)

    # --- tokens -----------------------------------------------------------------------------------
    def tokenise(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of whole conversations, one tokenizer call; the texts carry their own BOS."""
        if not texts:  # the tokenizer refuses an empty list
            return []
        ids = self.tokenizer(list(texts), add_special_tokens=False).input_ids
        rows = self.loaded.model.get_input_embeddings().weight.shape[0]
        highest = max((max(row) for row in ids if row), default=0)
        if highest >= rows:
            raise AttackPlaneError(
                "the tokenizer gives a token that the model has no embedding of",
                where=self.loaded.spec,
                got=f"id {highest}, the model has {rows} embeddings",
                remedy="tokenizer and weights must be of one model",
            )
        return ids

    def require_room(self, tokens: int, new: int, what: str) -> None:
        """Raises AttackPlaneError if a prompt and what follows exceed the model's positions."""
        room = self.loaded.positions
        if room is not None and tokens + new > room:
            raise AttackPlaneError(
                "too long for the model",
                where=f"{self.loaded.spec}, {what}",
                got=f"{tokens} tokens and {new} to follow, the model has {room} positions",
                remedy="leave the prompt out, or ask for fewer new tokens",
            )

    def decode(self, ids: Sequence[Sequence[int]], context: Sequence[int] = ()) -> list[str]:
        """Text of token lists as it reads after ``context``.

        Some decoders drop white space at the very start.
        """
        options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
        head = self.tokenizer.decode(list(context), **options) if context else ""
        joined = self.tokenizer.batch_decode([[*context, *row] for row in ids], **options)
        return [text[len(head) :] for text in joined]

    def fidelity(self, texts: Sequence[str], expected: Sequence[Sequence[int]]) -> list[bool]:
        """Whether each whole text, tokenised again, gives the expected ids. One tokenizer call."""
        return [
            list(got) == list(ids) for got, ids in zip(self.tokenise(texts), expected, strict=True)
        ]

    def _content_in(
        self, text: str, conversation: Conversation, allow_trim: bool
    ) -> tuple[str, int]:
        """The user content as it stands in the rendered text, and how far its own places move."""
        before, after = self.around_content(conversation)
        content = conversation.content
        if text == before + content + after:
            return content, len(before)
        if allow_trim and text == before + content.strip() + after:
            return content.strip(), len(before) - (len(content) - len(content.lstrip()))
        became = text[len(before) : len(text) - len(after)]
        raise AttackPlaneError(
            "the chat template rewrites the user content",
            where=self.loaded.spec,
            got=f"{content[:60]!r} became {became[:60]!r}",
            remedy="remove white space at the ends of the content and special tokens inside it",
        )

    def render(
        self, conversation: Conversation, target: str | None = None, *, allow_trim: bool = False
    ) -> Prompt:
        """Render and locate.

        Raises:
            AttackPlaneError: the template rewrites the content (``allow_trim`` accepts removed
                outer white space), or the target's tokens merge with the template's.
        """
        before, _ = self.around_content(conversation)
        text = self.text(conversation)
        content, shift = self._content_in(text, conversation, allow_trim)
        target_text = self.target_text(conversation, target) if target is not None else ""
        encoded = self.tokenizer(
            text + target_text, add_special_tokens=False, return_offsets_mapping=True
        )
        # a token covers [start, end); white space that the offsets leave out belongs to the token
        # after it, and the several tokens of one character share its range
        starts: list[int] = []
        ends: list[int] = []
        for start, end in encoded.offset_mapping:
            starts.append(min(start, ends[-1] if ends else 0))
            ends.append(max(end, ends[-1] if ends else 0))
        boundary = sum(start < len(text) for start in starts)
        if ends[boundary - 1] > len(text):
            raise AttackPlaneError(
                "the target merges with the template in one token",
                where=self.loaded.spec,
                got=f"target {target!r:.40} after {text[-20:]!r}",
                remedy="begin the target string with another word",
            )

        def tokens(span: Span | None, offset: int) -> Span | None:
            if span is None or len(span) == 0:
                return None
            low, high = span.start + offset, span.stop + offset
            inside = [i for i in range(boundary) if ends[i] > low and starts[i] < high]
            return Span(inside[0], inside[-1] + 1) if inside else None

        content_span = tokens(Span(0, len(content)), len(before))
        if content_span is None:
            raise AttackPlaneError("the user content is empty", where=self.loaded.spec)
        ids = encoded.input_ids
        return Prompt(
            text=text,
            ids=tuple(ids[:boundary]),
            content=content_span,
            request=tokens(conversation.request, shift),
            suffix=tokens(conversation.suffix, shift),
            starts=tuple(starts[:boundary]),
            target_text=target_text,
            target_ids=tuple(ids[boundary:]),
            trimmed=content != conversation.content,
        )


__all__ = ["Conversation", "Prompt", "Renderer", "Span"]
