"""User content with the places of request and suffix in it, and the conversation around it."""

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
