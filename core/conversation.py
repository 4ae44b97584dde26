"""User content with the places of request and suffix in it, the conversation around it, and what
a renderer (``core/prompt.py``) makes of that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from core.errors import AttackPlaneError


@dataclass(frozen=True)
class Span:
    """Half-open range [start, stop) of tokens, or of characters where said so."""

    start: int
    stop: int

    @property
    def last(self) -> int:
        return self.stop - 1

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Conversation:
    """User content with the character ranges of request and suffix in it, and what is around it."""

    content: str
    request: Span | None = None
    suffix: Span | None = None
    system: str | None = None
    history: tuple[tuple[str, str], ...] = ()

    @classmethod
    def build(
        cls,
        request: str,
        suffix: str | None = None,
        *,
        placement: str = "{request} {suffix}",
        system: str | None = None,
        history: Sequence[tuple[str, str]] = (),
    ) -> Conversation:
        """Place ``request`` and ``suffix`` by their markers; without a suffix the request alone.

        ``history`` is earlier turns as (role, content).
        """
        past = tuple(history)
        if suffix is None:
            return cls(request, Span(0, len(request)), None, system, past)
        for marker in ("{request}", "{suffix}"):
            if placement.count(marker) != 1:
                raise AttackPlaneError(
                    f"the placement must hold {marker} once", where="placement", got=placement
                )
        first, second = sorted(("{request}", "{suffix}"), key=placement.index)
        fill = {"{request}": request, "{suffix}": suffix}
        head, _, rest = placement.partition(first)
        middle, _, end = rest.partition(second)
        start = {first: len(head), second: len(head) + len(fill[first]) + len(middle)}
        spans = {marker: Span(start[marker], start[marker] + len(fill[marker])) for marker in fill}
        content = head + fill[first] + middle + fill[second] + end
        return cls(content, spans["{request}"], spans["{suffix}"], system, past)

    @classmethod
    def of_prompt(
        cls, prompt: str, *, request: str | None, suffix: str | None, system: str | None
    ) -> Conversation:
        """A frozen prompt. Request and suffix are left out where it does not hold them."""

        def find(part: str | None, position: int) -> Span | None:
            return Span(position, position + len(part)) if part and position >= 0 else None

        return cls(
            prompt,
            find(request, prompt.find(request) if request else -1),
            find(suffix, prompt.rfind(suffix) if suffix else -1),
            system,
        )


@dataclass(frozen=True)
class Prompt:
    """A rendered conversation: its text, its token ids, and where things lie in them.

    ``target_ids`` follow ``ids`` directly.
    """

    text: str
    ids: tuple[int, ...]
    content: Span
    request: Span | None
    suffix: Span | None
    starts: tuple[int, ...]
    """Character at which each token's text begins (white space before a token belongs to it)."""
    target_text: str = ""
    target_ids: tuple[int, ...] = ()
    trimmed: bool = False
    """The template removed white space around the content (only with ``allow_trim``)."""

    @property
    def t_goal(self) -> int | None:
        return self.request.last if self.request else None

    @property
    def t_inst(self) -> int:
        return self.content.last

    @property
    def t_post_inst(self) -> int:
        return len(self.ids) - 1

    @property
    def tail(self) -> Span:
        """Template tokens between the user content and the reply."""
        return Span(self.content.stop, len(self.ids))

    @property
    def target(self) -> Span:
        """Token range of the target in ``ids + target_ids``."""
        return Span(len(self.ids), len(self.ids) + len(self.target_ids))
